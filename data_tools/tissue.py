"""Where the tissue is on a thumbnail, and what was rejected: pen of four colors and debris.

Everything is decided in optical density relative to the slide's own white point, where a stain keeps the ratio of its
channels however thick the section is: tissue is what has color, and ink is what has a ratio that no stain has. It works
on H&E, on DAB with hematoxylin, and on pale fat, without a model. Lengths are in µm, so any thumbnail will do; about
8 µm/px is meant. This module never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

THUMBNAIL_MPP = 8.0
# The finest detail that counts: membranes of fat cells and nuclei run into one another here.
SMOOTH_UM = 4.0
# Fat cells are up to 100 µm wide and stay tissue; a vessel or a gland's lumen that is larger is a hole.
CLOSE_UM = 28.0
HOLE_UM2 = 10_000.0
THREAD_UM = 12.0
ISLAND_UM2 = 20_000.0
PEN_UM2 = 5_000.0
PEN_MARGIN_UM = 16.0
# Chroma (largest minus smallest optical density of the three channels) that noise never reaches on glass.
CHROMA_RANGE = (0.04, 0.10)

REASONS = ("pen_red", "pen_green", "pen_blue", "pen_black", "debris")


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


def find_tissue(thumbnail: np.ndarray, mpp: float) -> Tissue:
    """Find the tissue.

    Args:
        thumbnail: uint8 [height, width, 3], RGB, of a brightfield slide.
        mpp: its µm/px.
    """
    white = white_point(thumbnail)
    smooth = cv2.GaussianBlur(thumbnail, (0, 0), SMOOTH_UM / mpp)
    red, green, blue = cv2.split(cv2.LUT(smooth, _density_table(white)))
    chroma = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)  # [H, W], thousandths
    pens = _find_pens(smooth, white, mpp)
    pen = np.zeros(chroma.shape, np.uint8)
    for area in pens.values():
        pen |= area
    colored = (chroma > _chroma_threshold(chroma)).astype(np.uint8)
    closed = _morph(colored, cv2.MORPH_CLOSE, CLOSE_UM / mpp)
    closed = _fill_holes(closed, HOLE_UM2 / mpp**2)
    closed[pen > 0] = 0
    opened = _morph(closed, cv2.MORPH_OPEN, THREAD_UM / mpp)
    kept = _keep_large(opened, ISLAND_UM2 / mpp**2)
    rejected = {reason: area > 0 for reason, area in pens.items()}
    debris = (closed > 0) & (kept == 0)
    if debris.any():
        rejected["debris"] = debris
    return Tissue(kept > 0, rejected)


def white_point(thumbnail: np.ndarray) -> np.ndarray:
    """The color of empty glass, float32 [3]: the brightest gray there is much of, 245 where there is none."""
    pixels = _sample(thumbnail).astype(np.int16)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    glass = pixels[(low > 190) & (high - low < 28)]  # [n, 3]
    if len(glass) < max(16, 0.002 * low.size):
        return np.full(3, 245, np.float32)
    return np.maximum(np.percentile(glass, 75, axis=0), 200).astype(np.float32)


def is_dark(thumbnail: np.ndarray) -> bool:
    """Whether the light comes from the specimen, as in fluorescence: mostly dark and almost nowhere bright."""
    gray = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    return float((gray < 60).mean()) > 0.5 and float((gray > 160).mean()) < 0.05


def _optical_density(levels: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Natural-logarithm density of gray levels [..., 3] relative to the white point, never below 0."""
    return np.maximum(-np.log(np.maximum(levels, 4.0) / white), 0)


def _density_table(white: np.ndarray) -> np.ndarray:
    """Optical density in thousandths of every level and channel, for OpenCV's LUT: uint16 [1, 256, 3]."""
    levels = np.repeat(np.arange(256.0)[:, None], 3, axis=1)
    return np.rint(1000 * _optical_density(levels, white))[None].astype(np.uint16)


def _chroma_threshold(chroma: np.ndarray) -> float:
    """Above the noise of glass, taken to be the palest tenth: its median and six of its deviations, in thousandths."""
    sample = _sample(chroma).ravel()
    palest = sample[sample <= np.percentile(sample, 10)]
    middle = float(np.median(palest))
    spread = 1.4826 * float(np.median(np.abs(palest - middle)))
    return float(np.clip(middle + 6 * spread, 1000 * CHROMA_RANGE[0], 1000 * CHROMA_RANGE[1]))


def _sample(image: np.ndarray) -> np.ndarray:
    """At most about 512 by 512 pixels on a grid."""
    return image[:: max(1, image.shape[0] // 512), :: max(1, image.shape[1] // 512)]


def _find_pens(image: np.ndarray, white: np.ndarray, mpp: float) -> dict[str, np.ndarray]:
    """Ink by color, uint8 masks [H, W]; only the colors that occur."""
    table = _ink_table(white)
    red, green, blue = (np.asarray(channel, np.int32) for channel in cv2.split(image >> 2))  # six bits a channel
    bits = table[(red << 12) | (green << 6) | blue]
    found = {}
    for number, (reason, maybe) in enumerate(INKS.items()):
        sure = bits & (1 << number)
        if cv2.countNonZero(sure):
            area = _grow(sure > 0, (bits & maybe) > 0, mpp)
            if area.any():
                found[reason] = area
    return found


# Reason -> the bits of _ink_table that its faded edge may have; its sure bit is its place here.
INKS = {"pen_red": 1 << 4, "pen_green": 1 << 5, "pen_blue": 1 << 5, "pen_black": 1 << 6}


def _ink_table(white: np.ndarray) -> np.ndarray:
    """Which ink a color is, for every color of six bits a channel: bits, uint8 [2^18].

    Hematoxylin, eosin, DAB and blood absorb green at least about as much as red (ratio below 1.2 on every stain
    looked at), while blue and green ink absorb red most. Red ink lets red pass like eosin but absorbs blue almost as
    much as green, and is denser than eosin. Black ink is dense and has little color for its density.
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
        (mean > 0.5) & (chroma < 0.4 * mean),
    )
    table = np.zeros((64, 64, 64), np.uint8)
    for number, bit in enumerate(bits):
        table |= bit * np.uint8(1 << number)
    return table.ravel()


def _grow(sure: np.ndarray, maybe: np.ndarray, mpp: float) -> np.ndarray:
    """Areas of ``maybe`` that hold enough of ``sure``, with a margin for the faded edge of a stroke."""
    seeds = _morph(sure.astype(np.uint8), cv2.MORPH_OPEN, SMOOTH_UM / mpp)
    if not seeds.any():
        return seeds
    count, labels = cv2.connectedComponents((maybe | (seeds > 0)).astype(np.uint8))
    enough = np.bincount(labels[seeds > 0], minlength=count) * mpp**2 >= PEN_UM2
    return _morph(enough[labels].astype(np.uint8), cv2.MORPH_DILATE, PEN_MARGIN_UM / mpp)


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
    """Fill holes smaller than ``area`` pixels."""
    return 1 - _keep_large(1 - mask, area)


def _keep_large(mask: np.ndarray, area: float) -> np.ndarray:
    """Keep connected areas of at least ``area`` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= area
    large[0] = False
    return large[labels].astype(np.uint8)
