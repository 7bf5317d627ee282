"""The cores of a tissue microarray, by name: row letter and column number.

What is assumed: cores are round and about equal, and most are whole; they stand in rows and columns, turned or sheared
against the picture by less than 15 degrees; the first and last row and column hold at least one whole core. Missing
cores leave gaps, so that names are stable; a lane between blocks counts as so many empty rows or columns as it is
nearest to. Staggered (hexagonal) arrays are not known. This module never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MIN_CORES = 6
CORE_UM = (300.0, 5000.0)
# A whole core's box against the median one, and its area against that of the ellipse in its box.
BOX_RANGE = (0.7, 1.4)
MIN_ROUND = 0.7
# Direction to the next core of a row or column, against the picture's.
MAX_TURN = np.tan(np.radians(20))
# How far from its place, in pitches, the next core of a row or column may be.
TOLERANCE = 0.3


@dataclass
class Cores:
    """Cores of an array.

    Attributes:
        labels: int32 [H, W], 0 outside cores, else the number of the core, from 1, by rows from the top left.
        names: of core 1, 2, ...: "A1", "B3"; rows after Z are AA, AB.
    """

    labels: np.ndarray
    names: list[str]


def dearray(mask: np.ndarray, mpp: float) -> Cores | None:
    """Find and name the cores; None where tissue is no regular array of cores.

    Broken cores are put together, and cores that touch are parted, by their places in the array. Pieces outside it
    belong to no core.

    Args:
        mask: tissue, bool [H, W].
        mpp: its µm/px.
    """
    _, pieces, stats, centers = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes, areas = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]], stats[:, cv2.CC_STAT_AREA].astype(float)
    areas[0] = 0  # the glass
    diameter = _weighted_median(np.sqrt(boxes.prod(axis=1)), areas)
    if not CORE_UM[0] <= diameter * mpp <= CORE_UM[1]:
        return None
    low, high = np.array(BOX_RANGE) * diameter
    is_round = areas >= MIN_ROUND * np.pi / 4 * boxes.prod(axis=1)
    whole = np.flatnonzero(is_round & (boxes >= low).all(axis=1) & (boxes <= high).all(axis=1))
    if len(whole) < MIN_CORES or areas[whole].sum() < 0.5 * areas.sum():
        return None
    steps = _steps(centers[whole])
    if steps is None:
        return None
    known = centers[whole] @ np.linalg.inv(steps)  # [N, 2] as columns and rows, from anywhere
    if not _is_regular(known):
        return None
    places = np.zeros((len(areas), 2), int)
    places[whole] = _number(known)
    first, last = places[whole].min(axis=0), places[whole].max(axis=0)
    if (last == first).any() or len(np.unique(places[whole], axis=0)) < 0.95 * len(whole):
        return None
    columns = last[0] - first[0] + 1
    where = (places - first) @ (1, columns)  # numbers that count the places row by row, [pieces]
    where[np.setdiff1d(np.arange(len(areas)), whole)] = -1
    where = where[pieces]  # [H, W]
    for piece in np.setdiff1d(np.flatnonzero(areas), whole):
        left, top, width, height = stats[piece, :4]
        window = slice(top, top + height), slice(left, left + width)
        there = pieces[window] == piece
        points = centers[piece][None]
        if max(width, height) > high:  # cores that touch
            points = np.argwhere(there)[:, ::-1] + (left, top)
        near = np.argmin(np.linalg.norm(centers[whole] - centers[piece], axis=1))
        offset = points @ np.linalg.inv(steps) - known[near]
        place = places[whole[near]] + np.rint(offset).astype(int)
        outside = ((place < first) | (place > last)).any(axis=1)
        where[window][there] = np.where(outside, -1, (place - first) @ (1, columns))
    found = np.unique(where[where >= 0])
    labels = np.where(where < 0, 0, np.searchsorted(found, where) + 1).astype(np.int32)
    return Cores(labels, [f"{_letters(place // columns)}{place % columns + 1}" for place in found.tolist()])


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _steps(centers: np.ndarray) -> np.ndarray | None:
    """From a core to the next of its row and to the next of its column, [2, 2], in pixels."""
    between = centers[None] - centers[:, None]  # [N, N, 2]
    steps = []
    for along in (0, 1):
        ahead = (between[..., along] > 0) & (np.abs(between[..., 1 - along]) < MAX_TURN * between[..., along])
        if not ahead.any():
            return None
        far = np.where(ahead, between[..., along], np.inf)
        following = between[np.arange(len(centers)), far.argmin(axis=1)][ahead.any(axis=1)]  # [M, 2]
        # Where the next core is missing, the one after it was found.
        step = following[np.argsort(following[:, along])[len(following) // 4]]
        steps.append(following[np.linalg.norm(following - step, axis=1) < TOLERANCE * step[along]].mean(axis=0))
    return np.stack(steps)


def _is_regular(known: np.ndarray) -> bool:
    """Whether at least half the cores, [N, 2] in pitches, have two neighbors or more where a grid has them."""
    between = known[None] - known[:, None]
    beside = np.abs(np.abs(between).sum(axis=-1) - 1) < TOLERANCE
    on_axis = np.abs(between).min(axis=-1) < TOLERANCE
    return bool(((beside & on_axis).sum(axis=1) >= 2).mean() >= 0.5)


def _number(known: np.ndarray) -> np.ndarray:
    """Whole columns and rows, [N, 2], of cores at [N, 2] in pitches.

    One core after the other, always the one nearest to those that have numbers, is numbered by the median of what
    these say: an array may drift by more than a pitch from end to end, but not from core to core.
    """
    distances = np.linalg.norm(known[None] - known[:, None], axis=-1)
    numbers = np.zeros((len(known), 2), int)
    core = int(distances.sum(axis=1).argmin())
    done = np.zeros(len(known), bool)
    reach = distances[core].copy()  # from each core to the nearest that has a number
    for _ in range(len(known) - 1):
        done[core] = True
        reach = np.minimum(reach, distances[core])
        core = int(np.where(done, np.inf, reach).argmin())
        near = done & (distances[core] <= max(2.5, reach[core]))
        numbers[core] = np.rint(np.median(numbers[near] + known[core] - known[near], axis=0))
    return numbers


def _letters(row: int) -> str:
    """A to Z, AA, AB, ..."""
    return (_letters(row // 26 - 1) if row >= 26 else "") + chr(ord("A") + row % 26)
