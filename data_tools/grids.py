"""Where tiles lie on a slide: grids, shares of masks under them, islands that a grid misses, and samples of places.

Everything here is arithmetic on positions and thumbnails; this module never reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from eosin.data_tools.draws import hash32


@dataclass(frozen=True)
class Extent:
    """The sides of a tile in pixels of a slide's finest level, not rounded.

    Attributes:
        stored: of what is stored: the tile, or the larger region around it.
        inner: of the tile, by which its tissue is judged.
        stride: from tile to tile.
        downsample: of the level that is read.
    """

    stored: float
    inner: float
    stride: float
    downsample: float

    @property
    def margin(self) -> float:
        """From the stored region's edge to the tile's."""
        return (self.stored - self.inner) / 2


def grid(side: int, tile: float, downsample: float, stride: float | None = None) -> np.ndarray:
    """Left edges of the tiles along one axis, in pixels of the finest level, int64.

    Every tile lies inside the slide. Edges fall on whole pixels of the level that is read, so that nothing is
    interpolated between two of them; an edge moves by less than one of them, and the tile's size never changes.

    Args:
        side: of the slide, in pixels of the finest level.
        tile: side of a tile, in the same pixels, not rounded.
        downsample: of the level that is read.
        stride: from tile to tile, not rounded; by default ``tile``: without gap or overlap.
    """
    stride = tile if stride is None else stride
    count = math.floor((side - tile) / stride + 1e-9) + 1 if side * (1 + 1e-9) >= tile else 0
    return snapped(np.arange(count) * stride, downsample)


def snapped(edges: np.ndarray, downsample: float) -> np.ndarray:
    """Positions moved up or left to a whole pixel of a level, int64."""
    return np.rint(np.floor(edges / downsample + 1e-6) * downsample).astype(np.int64)


def box_means(mask: np.ndarray, lefts: np.ndarray, tops: np.ndarray, side: float) -> np.ndarray:
    """Mean of a mask over the boxes of a grid, [len(tops), len(lefts)], exact for edges between pixels.

    Args:
        mask: bool [H, W]; what lies outside counts as False.
        lefts: left edges in pixels of the mask.
        tops: upper edges.
        side: of a box, in the same pixels.
    """
    sums = cv2.integral(mask.astype(np.uint8)).astype(np.float64)  # [H + 1, W + 1]
    # Between its knots the integral of a mask is bilinear, so interpolating it is exact.
    sums = _interpolate(sums, np.concatenate([tops, tops + side]))
    sums = _interpolate(sums.T, np.concatenate([lefts, lefts + side])).T
    n, m = len(tops), len(lefts)
    boxes = sums[n:, m:] - sums[n:, :m] - sums[:n, m:] + sums[:n, :m]
    return np.clip(boxes / side**2, 0, 1)


def box_shares(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Mean of a mask over boxes, [n, 4] as left, top, right, bottom in pixels of the mask: [n], to a whole pixel."""
    height, width = mask.shape
    sums = cv2.integral(mask.astype(np.uint8))
    left, right = (np.clip(np.rint(boxes[:, i]), 0, width).astype(int) for i in (0, 2))
    top, bottom = (np.clip(np.rint(boxes[:, i]), 0, height).astype(int) for i in (1, 3))
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return inside / np.maximum((right - left) * (bottom - top), 1)


def box_labels(labels: np.ndarray, boxes: np.ndarray) -> list[int]:
    """The label there is most of in each box, [n, 4] in pixels of ``labels`` (int [H, W], 0: none); 0 where is none."""
    found = []
    for left, top, right, bottom in np.rint(boxes).astype(int).tolist():
        counts = np.bincount(labels[max(0, top) : max(bottom, top + 1), max(0, left) : max(right, left + 1)].ravel())
        found.append(int(counts[1:].argmax()) + 1 if counts[1:].any() else 0)
    return found


def island_places(
    mask: np.ndarray, covered: np.ndarray, extent: Extent, scale: float, size: tuple[int, int]
) -> np.ndarray:
    """A place for each island of tissue that no tile of the grid shows, as a grid cuts what is smaller than a tile.

    Args:
        mask: tissue, bool [H, W].
        covered: left and top of the tiles that are kept, int [n, 2], of what is stored, in pixels of the finest level.
        extent: of a tile.
        scale: pixels of the mask a pixel of the finest level.
        size: (width, height) of the slide.

    Returns:
        int64 [m, 2], so that the island's middle is the tile's, inside the slide and clear of the tiles that are kept.
    """
    margin, inner = extent.margin * scale, extent.inner * scale
    taken = np.zeros(mask.shape, np.uint8)
    for x, y in (covered * scale + margin).tolist():
        _paint(taken, x, y, inner)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    shown = np.zeros(count, bool)
    shown[np.unique(labels[taken > 0])] = True
    places = []
    for label in np.flatnonzero(~shown[1:]) + 1:
        left, top, width, height = stats[label, :4].tolist()
        middle = np.array([left + width / 2, top + height / 2]) / scale
        most = np.array(size) - extent.stored
        place = snapped(np.clip(middle - extent.stored / 2, 0, np.maximum(most, 0)), extent.downsample)
        x, y = (place * scale + margin).tolist()
        box = np.array([[x, y, x + inner, y + inner]])
        if most.min() >= 0 and not box_shares(taken > 0, box)[0]:
            _paint(taken, x, y, inner)
            places.append(place)
    return np.array(places, np.int64).reshape(-1, 2)


def drawn(places: np.ndarray, most: int, how: str, key: int) -> list[np.ndarray]:
    """Groups of places, [n, 2], in the order they are to be tried; of each group an equal share is kept.

    Args:
        most: places wanted.
        how: "random": one group, by a draw; "stratified": ``most`` groups of neighbors along a Hilbert curve, so that
            the whole tissue is shown evenly.
        key: of the draw.

    Returns:
        Row numbers of ``places``.
    """
    order = np.argsort(hash32(key, places[:, 0], places[:, 1]), kind="stable")
    if how == "random" or len(places) <= most:
        return [order]
    rank = np.argsort(order)
    along = np.argsort(hilbert(places), kind="stable")
    return [part[np.argsort(rank[part])] for part in np.array_split(along, most)]


def hilbert(places: np.ndarray, bits: int = 16) -> np.ndarray:
    """Position of each place, [n, 2], along a Hilbert curve over their bounding square, int64 [n].

    The walk from coarse to fine of Warren, "Hacker's Delight" (2012), section 16-3.
    """
    if not len(places):
        return np.zeros(0, np.int64)
    least = places.min(0)
    span = max(int((places.max(0) - least).max()), 1)
    x, y = ((places - least) * ((1 << bits) - 1) // span).T
    position = np.zeros(len(places), np.int64)
    for bit in reversed(range(bits)):
        right, low = (x >> bit) & 1, (y >> bit) & 1
        position = (position << 2) | ((3 * right) ^ low)
        turned = low == 0
        x, y = (np.where(turned & (right == 1), ~axis, axis) for axis in (x, y))
        x, y = np.where(turned, y, x), np.where(turned, x, y)
    return position


def whole(places: np.ndarray, stored: float, size: Sequence[int]) -> np.ndarray:
    """Which places, [n, 2], have all of their tile inside a slide of ``size``: bool [n]."""
    return np.all((places >= 0) & (places + stored < np.array(size) + 1), axis=1)


def _paint(mask: np.ndarray, x: float, y: float, side: float) -> None:
    left, top, right, bottom = round(x), round(y), round(x + side), round(y + side)
    mask[max(0, top) : bottom, max(0, left) : right] = 1


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of ``values`` at fractional positions, linearly; positions outside take the nearest row."""
    at = np.clip(at, 0, len(values) - 1)
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    weight = (at - low)[:, None]
    return values[low] * (1 - weight) + values[low + 1] * weight
