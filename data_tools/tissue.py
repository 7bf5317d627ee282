"""Where the tissue is on a thumbnail, which cuts it makes, and what was rejected: pen, edges of glass, debris.

Everything is decided in optical density relative to the slide's own white point, where a stain keeps the ratio of its
channels however thick the section is: tissue is what has color, and ink is what has a ratio that no stain has. It works
on H&E, on DAB with hematoxylin, and on pale fat, without a model. Lengths are in µm, so any thumbnail will do; about
8 µm/px is meant. This module never reads a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import cv2
import numpy as np

from eosin.data_tools.errors import UserError, nearest

THUMBNAIL_MPP = 8.0
# Pen strokes and edges are looked for at half of a thumbnail that is finer than this: they are broad.
HALF_BELOW_MPP = 10.0
# Tissue covers less than this of the surroundings of an edge: a dark line inside tissue is the tissue's own.
MAX_EDGE_TISSUE = 0.4

REASONS = ("pen_red", "pen_green", "pen_blue", "pen_black", "edge", "debris")


def _between(default: float, low: float, high: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Thresholds:
    """What may be set of the search for tissue. Lengths are in µm, areas in µm² of the slide.

    Attributes:
        smooth_um: standard deviation of the blur beforehand; membranes of fat cells and nuclei run into one another.
        chroma_low, chroma_high: between these lies the color above which a pixel is tissue, as the largest less the
            smallest natural-logarithm optical density of its channels; where exactly, the noise of the glass decides.
        close_um: radius of the closing; fat cells are up to 100 µm wide and stay tissue.
        hole_um2: smallest hole that stays open.
        thread_um: radius of the opening; threads up to twice as wide go.
        island_um2: smallest piece of tissue.
        pen_um2: smallest area of ink.
        pen_margin_um: what is rejected around ink and edges, for their faded sides.
        edge_um: shortest gray line over glass that is an edge of a coverslip or the rim of an air bubble.
        edge_width_um: its largest width.
        section_gap_um: pieces nearer than this belong to one section.
        max_pen: share of a tile under pen above which it is dropped.
        min_contrast: standard deviation of gray levels below which a tile shows nothing.
        min_sharpness: share of a tile's contrast finer than two pixels below which nothing in it is in focus.

    Raises:
        UserError: a value out of its range.
    """

    smooth_um: float = _between(4.0, 0.5, 100)
    chroma_low: float = _between(0.04, 0.005, 1)
    chroma_high: float = _between(0.10, 0.005, 1)
    close_um: float = _between(28.0, 0, 1000)
    hole_um2: float = _between(10_000.0, 0, 1e9)
    thread_um: float = _between(12.0, 0, 1000)
    island_um2: float = _between(20_000.0, 0, 1e9)
    pen_um2: float = _between(5_000.0, 0, 1e9)
    pen_margin_um: float = _between(16.0, 0, 1000)
    edge_um: float = _between(500.0, 100, 1e5)
    edge_width_um: float = _between(120.0, 20, 1000)
    section_gap_um: float = _between(1000.0, 0, 1e5)
    max_pen: float = _between(0.02, 0, 1)
    min_contrast: float = _between(4.0, 0, 128)
    min_sharpness: float = _between(0.035, 0, 1)

    def __post_init__(self) -> None:
        for entry in fields(self):
            low, high = entry.metadata["range"]
            value = getattr(self, entry.name)
            if not low <= value <= high:
                raise UserError(f"threshold {entry.name}={value:g} is out of range; valid: {low:g} to {high:g}")
        if self.chroma_low > self.chroma_high:
            raise UserError(f"chroma_low={self.chroma_low:g} is above chroma_high={self.chroma_high:g}; swap them")

    @classmethod
    def of(cls, words: Iterable[str]) -> Thresholds:
        """Read ``name=value`` words; the others keep their defaults.

        Raises:
            UserError: no such name, no number, or out of range.
        """
        names = [entry.name for entry in fields(cls)]
        given = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names:
                raise UserError(f"there is no threshold '{name}'; {nearest(name, names)}")
            try:
                given[name] = float(value)
            except ValueError:
                raise UserError(f"threshold '{word}' has no number; write {name}=NUMBER") from None
        return cls(**given)


@dataclass
class Tissue:
    """What a thumbnail shows, every mask bool [height, width].

    Attributes:
        mask: tissue.
        rejected: what is not tissue though it is not glass, by reason (see :data:`REASONS`); only what occurs.
    """

    mask: np.ndarray
    rejected: dict[str, np.ndarray]

    @property
    def pen(self) -> np.ndarray:
        """Pen of any color."""
        pens = [area for reason, area in self.rejected.items() if reason.startswith("pen")]
        return np.logical_or.reduce(pens) if pens else np.zeros_like(self.mask)


def find_tissue(thumbnail: np.ndarray, mpp: float, thresholds: Thresholds = Thresholds()) -> Tissue:
    """Find the tissue.

    Args:
        thumbnail: uint8 [height, width, 3], RGB, of a brightfield slide.
        mpp: its µm/px.
    """
    white = white_point(thumbnail)
    channels = cv2.split(cv2.GaussianBlur(thumbnail, (0, 0), thresholds.smooth_um / mpp))
    red, green, blue = (cv2.LUT(*pair) for pair in zip(channels, _density_tables(white)))
    chroma = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))  # thousandths
    colored = (chroma > _chroma_threshold(chroma, thresholds)).view(np.uint8)
    marks = _find_marks(channels, colored, white, mpp, thresholds)
    clean = np.ones_like(colored)
    for area in marks.values():
        clean -= clean & area
    closed = _morph(colored & clean, cv2.MORPH_CLOSE, thresholds.close_um / mpp)
    closed = _fill_holes(closed, thresholds.hole_um2 / mpp**2) & clean
    opened = _morph(closed, cv2.MORPH_OPEN, thresholds.thread_um / mpp)
    kept = _keep_large(opened, thresholds.island_um2 / mpp**2)
    rejected = {reason: area.view(bool) for reason, area in marks.items()}
    debris = closed > kept
    if debris.any():
        rejected["debris"] = debris
    return Tissue(kept.view(bool), rejected)


def sections(mask: np.ndarray, mpp: float, thresholds: Thresholds = Thresholds()) -> np.ndarray:
    """Number the separate cuts on a slide, row by row of cuts and from left to right in a row.

    A row is the topmost cut that is left and all that begin above its middle.

    Args:
        mask: tissue, bool [H, W].
        mpp: its µm/px.

    Returns:
        int32 [H, W]: 0 outside tissue, 1.. the cuts.
    """
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    # Two pieces join where the glass between them is within half the gap of both.
    away = cv2.distanceTransform(1 - mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    near = (away <= thresholds.section_gap_um / mpp / 2).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(near, connectivity=8)
    labels[~mask] = 0
    boxes = np.zeros((count, 4), int)  # of the tissue: left, top, width, height
    for cut, (left, top, width, height, _) in enumerate(stats[1:].tolist(), start=1):
        there = labels[top : top + height, left : left + width] == cut
        boxes[cut] = np.add(cv2.boundingRect(there.view(np.uint8)), (left, top, 0, 0))
    lefts, tops, middles = boxes[:, 0], boxes[:, 1], boxes[:, 1] + boxes[:, 3] / 2
    waiting, ordered = sorted(range(1, count), key=lambda cut: tops[cut]), []
    while waiting:
        row = [cut for cut in waiting if tops[cut] <= middles[waiting[0]]]
        waiting = waiting[len(row) :]
        ordered += sorted(row, key=lambda cut: lefts[cut])
    numbers = np.zeros(count, np.int32)
    numbers[ordered] = np.arange(1, count)
    return numbers[labels]


def white_point(thumbnail: np.ndarray) -> np.ndarray:
    """The color of empty glass, float32 [3]: the brightest gray there is much of, 245 where there is none."""
    pixels = _sample(thumbnail)
    channels = cv2.split(pixels)
    low, high = (pick(pick(*channels[:2]), channels[2]) for pick in (cv2.min, cv2.max))
    glass = pixels[(low > 190) & (high - low < 28)]  # [n, 3]
    if len(glass) < max(16, 0.002 * low.size):
        return np.full(3, 245, np.float32)
    counts = [np.bincount(glass[:, channel], minlength=256) for channel in range(3)]
    quartile = [np.searchsorted(np.cumsum(count), 0.75 * len(glass)) for count in counts]
    return np.maximum(quartile, 200).astype(np.float32)


def is_dark(thumbnail: np.ndarray) -> bool:
    """Whether the light comes from the specimen, as in fluorescence: mostly dark and almost nowhere bright."""
    gray = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    return float((gray < 60).mean()) > 0.5 and float((gray > 160).mean()) < 0.05


def _optical_density(levels: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Natural-logarithm density of gray levels relative to white ones, never below 0."""
    return np.maximum(-np.log(np.maximum(levels, 4.0) / white), 0)


def _density_tables(white: np.ndarray) -> np.ndarray:
    """Optical density in thousandths of every level of a channel, for OpenCV's LUT: uint16 [3, 256]."""
    return np.rint(1000 * _optical_density(np.arange(256.0), white[:, None])).astype(np.uint16)


def _chroma_threshold(chroma: np.ndarray, thresholds: Thresholds) -> int:
    """Above the noise of glass, taken to be the palest tenth: its median and six of its deviations, in thousandths."""
    sample = _sample(chroma).ravel()
    palest = sample[sample <= np.percentile(sample, 10)]
    middle = float(np.median(palest))
    spread = 1.4826 * float(np.median(np.abs(palest - middle)))
    return int(np.clip(middle + 6 * spread, 1000 * thresholds.chroma_low, 1000 * thresholds.chroma_high))


def _sample(image: np.ndarray) -> np.ndarray:
    """At most 512 by 512 pixels on a grid."""
    return image[:: -(-image.shape[0] // 512), :: -(-image.shape[1] // 512)]


def _find_marks(
    channels: Sequence[np.ndarray], colored: np.ndarray, white: np.ndarray, mpp: float, thresholds: Thresholds
) -> dict[str, np.ndarray]:
    """Ink by color and edges, uint8 masks [H, W]; only what occurs."""
    whole = colored.shape[::-1]
    planes = [*channels, colored]
    if mpp < HALF_BELOW_MPP and min(whole) > 1:
        planes = [cv2.resize(plane, (whole[0] // 2, whole[1] // 2), interpolation=cv2.INTER_AREA) for plane in planes]
        mpp *= 2
    red, green, blue = (np.asarray(plane >> 2, np.int32) for plane in planes[:3])  # six bits a channel
    bits = _ink_table(white)[(red << 12) | (green << 6) | blue]
    found = {}
    edge = _find_edges(bits >> GRAY_BIT, planes[3], mpp, thresholds)
    if edge is not None:
        found["edge"] = edge
        bits[edge > 0] = 0
    for number, (reason, maybe) in enumerate(INKS.items()):
        sure = bits & (1 << number)
        if cv2.countNonZero(sure):
            area = _grow(sure > 0, (bits & maybe) > 0, mpp, thresholds)
            if area.any():
                found[reason] = area
    return {reason: cv2.resize(area, whole, interpolation=cv2.INTER_NEAREST) for reason, area in found.items()}


# Reason -> the bits of _ink_table that its faded edge may have; its sure bit is its place here.
INKS = {"pen_red": 1 << 4, "pen_green": 1 << 5, "pen_blue": 1 << 5, "pen_black": 1 << 6}
GRAY_BIT = 7


def _ink_table(white: np.ndarray) -> np.ndarray:
    """Which ink a color is, for every color of six bits a channel: bits, uint8 [2^18].

    Hematoxylin, eosin, DAB and blood absorb green at least about as much as red (ratio below 1.2 on every stain
    looked at), while blue and green ink absorb red most. Red ink lets red pass like eosin but absorbs blue almost as
    much as green, and is denser than eosin. Black ink is dense and has little color for its density. Glass bends light
    of all colors: the shadow of an edge has hardly any.
    """
    steps = np.repeat(np.arange(64, dtype=np.float32)[:, None] * 4 + 1.5, 3, axis=1)
    density = _optical_density(steps, white)
    red, green, blue = density[:, 0, None, None], density[:, 1, None], density[:, 2]
    mean = (red + green + blue) / 3
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    cold = (red > 1.35 * green) & (red > 0.3)
    # Where red ink meets black ink, or is laid twice.
    mixed = (mean > 0.9) & (blue > 0.72 * green) & (red < 0.9 * green)
    bits = (
        (red < 0.25 * green) & (blue > 0.72 * green) & (green > 1.2),
        cold & (blue > 0.65 * green),
        cold & (blue <= 0.65 * green),
        (mean > 1.0) & (chroma < 0.28 * mean),
        ((red < 0.35 * green) & (blue > 0.68 * green) & (green > 0.25)) | mixed,
        (red > 1.2 * green) & (red > 0.12),
        ((mean > 0.5) & (chroma < 0.4 * mean)) | ((mean > 0.9) & (chroma < 0.52 * mean)),
        (mean > 0.2) & (chroma < 0.2 * mean),
    )
    table = np.zeros((64, 64, 64), np.uint8)
    for number, bit in enumerate(bits):
        table |= bit * np.uint8(1 << number)
    return table.ravel()


def _grow(sure: np.ndarray, maybe: np.ndarray, mpp: float, thresholds: Thresholds) -> np.ndarray:
    """Areas of ``maybe`` that hold enough of ``sure``, with a margin for the faded edge of a stroke."""
    seeds = _morph(sure.astype(np.uint8), cv2.MORPH_OPEN, thresholds.smooth_um / mpp)
    if not seeds.any():
        return seeds
    count, labels = cv2.connectedComponents((maybe | (seeds > 0)).astype(np.uint8))
    enough = np.bincount(labels[seeds > 0], minlength=count) * mpp**2 >= thresholds.pen_um2
    return _morph(enough[labels].astype(np.uint8), cv2.MORPH_DILATE, thresholds.pen_margin_um / mpp)


def _find_edges(gray: np.ndarray, colored: np.ndarray, mpp: float, thresholds: Thresholds) -> np.ndarray | None:
    """Long thin lines of gray over glass, uint8 [H, W]; None where there are none."""
    width, length = thresholds.edge_width_um / mpp, thresholds.edge_um / mpp
    if cv2.countNonZero(gray) < length:
        return None
    wide = _morph(gray, cv2.MORPH_OPEN, width / 2)
    thin = gray & (1 - _morph(wide, cv2.MORPH_DILATE, width / 4))
    # A line of one pixel across the grid breaks.
    count, labels, stats, _ = cv2.connectedComponentsWithStats(_morph(thin, cv2.MORPH_CLOSE, 1), connectivity=8)
    extent = np.hypot(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    long = extent >= length
    long[0] = False
    if not long.any():
        return None
    around = cv2.blur(255 * (colored & (1 - gray)), (2 * round(width) + 1,) * 2)
    rows, columns = np.nonzero(long[labels])
    part = labels[rows, columns]
    tissue = np.bincount(part, around[rows, columns] / 255, count)
    bare = long & (tissue <= MAX_EDGE_TISSUE * np.bincount(part, minlength=count))
    edges = bare[labels].view(np.uint8)
    return _morph(edges, cv2.MORPH_DILATE, thresholds.pen_margin_um / mpp) if edges.any() else None


def _morph(mask: np.ndarray, operation: int, radius: float) -> np.ndarray:
    size = 2 * round(radius) + 1
    if size == 1:
        return mask
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    # OpenCV takes the outside for part of the mask: right for opening, but closing would bridge to the border.
    frame = size if operation == cv2.MORPH_CLOSE else 0
    framed = cv2.copyMakeBorder(mask, frame, frame, frame, frame, cv2.BORDER_CONSTANT, value=0)
    result = cv2.morphologyEx(framed, operation, element)
    return result[frame : frame + mask.shape[0], frame : frame + mask.shape[1]]


def _fill_holes(mask: np.ndarray, area: float) -> np.ndarray:
    """Fill holes smaller than ``area`` pixels, also those that the border cuts, with what lies in them."""
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    outlines, pixels, parents = _outlines(framed)
    for number in np.flatnonzero((parents >= 0) & (pixels < area)):  # drawn together, a hole within a hole stays
        cv2.drawContours(framed, [outlines[number]], 0, 1, cv2.FILLED)
    return np.ascontiguousarray(framed[1:-1, 1:-1])


def _keep_large(mask: np.ndarray, area: float) -> np.ndarray:
    """Keep connected areas of at least ``area`` pixels."""
    outlines, pixels, parents = _outlines(mask)
    holes = np.flatnonzero(parents >= 0)
    np.subtract.at(pixels, parents[holes], pixels[holes])
    small = (parents < 0) & (pixels < area)
    small[holes] = small[parents[holes]]
    return cv2.drawContours(mask.copy(), [outlines[number] for number in np.flatnonzero(small)], -1, 0, cv2.FILLED)


def _outlines(mask: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """Outlines of areas (8-connected) and of their holes, the pixels within each, and a hole's area, else -1.

    Pixels are counted by Pick's theorem; for holes those of the outline, which belong to the area, are left out. This
    is four times as fast as labels.
    """
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if tree is None:
        return (), np.zeros(0), np.zeros(0, int)
    parents = tree[0, :, 3]
    lattice = np.fromiter(map(len, outlines), float, len(outlines)) / 2
    polygon = np.fromiter(map(cv2.contourArea, outlines), float, len(outlines))
    return outlines, polygon + np.where(parents < 0, lattice, -lattice) + 1, parents
