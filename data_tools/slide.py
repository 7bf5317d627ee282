"""A slide as one small interface: what is known of it, and any region at any µm/px.

Regions come from the nearest finer level and are resampled with antialiasing to the exact µm/px, so that a pyramid
whose levels are 1.99955 apart is as exact as one of twos. Nothing outside the slide is ever read. Files are opened by
:mod:`eosin.data_tools.pyramids`; label and macro images are never touched, and color profiles (ICC) are ignored: pixels
are as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from eosin.data_tools.errors import Refusal
from eosin.data_tools.pyramids import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, open_pyramid, read_image

__all__ = ["IMAGE_SUFFIXES", "MAX_IMAGE_PIXELS", "MPP_RANGE", "SLIDE_SUFFIXES", "Slide", "read_image"]

SLIDE_SUFFIXES = (
    ".bif",
    ".czi",
    ".dcm",
    ".mrxs",
    ".ndpi",
    ".qptiff",
    ".scn",
    ".svs",
    ".svslide",
    ".tif",
    ".tiff",
    ".vms",
    ".vmu",
)
# What lies outside says "unknown" in practice: 72 dots per inch is 353 µm/px.
MPP_RANGE = (0.05, 20.0)
# A level this much coarser than asked still serves: the field of view is right to a tenth of a percent.
LEVEL_TOLERANCE = 1e-3
# Enlarging beyond this invents detail.
MAX_UPSAMPLING = 1.05
# This near to 2, where most scanners are for tiles of 0.5 µm/px, means over boxes are had three times as fast, of boxes
# that are wrong by as much of a pixel: on tissue less than 4 gray levels anywhere, and 0.02 in the mean.
HALF_TOLERANCE = 0.05
BLOCK = 4096
ADVICE = "give --mpp-override, or a column mpp in the file of --slides"


class Slide:
    """An open slide.

    Args:
        path: a file that OpenSlide reads, a tiled TIFF, or a plain RGB image.
        mpp_override: µm/px of the finest level, in place of what the file says.

    Attributes:
        size: (width, height) in pixels of the finest level.
        downsamples: of each level, relative to the finest.
        mpp: µm/px of the finest level, None where unknown.
        mpp_source: "property", "tiff tag" or "override", "" where unknown.
        vendor: the scanner's format, such as "aperio".

    Raises:
        Refusal: the file is no readable slide of 8-bit RGB.
    """

    def __init__(self, path: Path | str, mpp_override: float | None = None) -> None:
        self.path = Path(path)
        self._pixels = open_pyramid(self.path)
        self.size = self._pixels.sizes[0]
        self.downsamples = self._pixels.downsamples
        self.vendor = self._pixels.vendor
        self.mpp: float | None = None
        self.mpp_source = ""
        stated = self._pixels.stated
        if mpp_override is not None:
            self.mpp, self.mpp_source = mpp_override, "override"
        elif stated and stated.square and MPP_RANGE[0] <= stated.mpp <= MPP_RANGE[1]:
            self.mpp, self.mpp_source = stated.mpp, stated.source

    def require(self, mpp: float) -> None:
        """Raise Refusal where the slide cannot give tiles of ``mpp`` µm/px."""
        stated, finest = self._pixels.stated, self.mpp
        if finest is None:
            if stated is None:
                raise Refusal(f"no resolution (µm/px) in the file; {ADVICE}")
            if not stated.square:
                raise Refusal(f"its pixels are not square ({stated.x:.4g} by {stated.y:.4g} µm); {ADVICE}")
            if stated.source != "property" or stated.mpp < MPP_RANGE[0]:
                raise Refusal(f"no believable resolution in the file (it says {stated.mpp:.4g} µm/px); {ADVICE}")
            finest = stated.mpp
        if finest > mpp * MAX_UPSAMPLING:
            raise Refusal(f"the finest level is {finest:.4g} µm/px, coarser than the asked {mpp:g}")

    def read(self, x: int, y: int, size: int, mpp: float) -> np.ndarray:
        """Read a square region.

        Args:
            x: left edge, in pixels of the finest level.
            y: upper edge.
            size: pixels of the result.
            mpp: µm/px of the result.

        Returns:
            uint8 [size, size, 3], RGB.

        Raises:
            Refusal: these pixels cannot be decoded; others may be.
            ValueError: the region reaches outside the slide.
        """
        return self._resample(x, y, size, size, self._scale(mpp))

    def tiles(self, places: np.ndarray, size: int, mpp: float) -> Iterator[np.ndarray | Refusal]:
        """Read many squares, each exactly as :meth:`read` has it, in the order given.

        Row by row is fastest: tiles of the file that two squares share are then decoded once. No more than
        ``pyramids.CACHE_BYTES`` of decoded pixels are kept meanwhile, however large the slide is.

        Args:
            places: integers [n, 2], left and upper edges in pixels of the finest level.
            size: pixels of each result.
            mpp: µm/px of each result.

        Yields:
            For each place uint8 [size, size, 3], RGB, or the Refusal that says why it cannot be decoded.

        Raises:
            ValueError: a square reaches outside the slide.
        """
        scale = self._scale(mpp)
        for x, y in places.tolist():
            try:
                yield self._resample(x, y, size, size, scale)
            except Refusal as refusal:
                yield refusal

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at ``mpp`` µm/px: uint8 [height, width, 3]; a ragged last pixel is left out.

        It is read block by block, so memory is bounded where a slide has no pyramid.
        """
        scale = self._scale(mpp)
        width, height = (max(1, int(side / scale + 1e-6)) for side in self.size)
        step = max(1, int(BLOCK * self.downsamples[self.level(scale)] / scale))
        result = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, step):
            for left in range(0, width, step):
                block = result[top : top + step, left : left + step]
                block[:] = self._resample(
                    round(left * scale), round(top * scale), block.shape[1], block.shape[0], scale
                )
        return result

    def level(self, scale: float) -> int:
        """The coarsest level that is no coarser than ``scale`` pixels of the finest a pixel."""
        fine_enough = [i for i, d in enumerate(self.downsamples) if d <= scale * (1 + LEVEL_TOLERANCE)]
        return max(fine_enough, key=lambda i: self.downsamples[i], default=0)

    def close(self) -> None:
        """Release the file."""
        self._pixels.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scale(self, mpp: float) -> float:
        if self.mpp is None:
            raise ValueError(f"{self.path} has no resolution")
        return mpp / self.mpp

    def _resample(self, x: int, y: int, width: int, height: int, scale: float) -> np.ndarray:
        level = self.level(scale)
        downsample = self.downsamples[level]
        ratio = scale / downsample
        if abs(ratio - 1) <= LEVEL_TOLERANCE:
            ratio = 1.0
        source = [math.ceil(side * ratio - 1e-6) for side in (width, height)]
        ends = (x + width * scale, y + height * scale)
        if min(x, y) < 0 or any(end >= side + 1 for end, side in zip(ends, self.size)):
            raise ValueError(f"a region at {x}, {y} of {width} x {height} px reaches outside {self.path}")
        # A level's size is rounded, so a pixel of it may lack at the right or lower edge.
        lack = [
            max(0, math.ceil(start / downsample + extent - limit - 1e-6))
            for start, extent, limit in zip((x, y), source, self._pixels.sizes[level])
        ]
        sides = [max(1, extent - missing) for extent, missing in zip(source, lack)]
        pixels, shift = self._pixels.region(level, x, y, sides[0], sides[1])
        if any(lack):
            right, below = max(0, source[0] - pixels.shape[1]), max(0, source[1] - pixels.shape[0])
            pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(_shrink(pixels, ratio, shift, width, height))


def _shrink(pixels: np.ndarray, ratio: float, shift: tuple[float, float], width: int, height: int) -> np.ndarray:
    """Means over boxes of ``ratio`` by ``ratio`` pixels, [height, width, 3], from ``shift`` (x, y) on."""
    if abs(ratio - 2) <= 2 * HALF_TOLERANCE:
        # The mean of two by two bilinear samples is the same, as a sample is the mean over a box of one pixel.
        if any(shift):
            fine = _sample(pixels, ratio / 2, shift, 2 * width, 2 * height)
        else:
            fine = cv2.resize(pixels, None, fx=2 / ratio, fy=2 / ratio, interpolation=cv2.INTER_LINEAR)
        return cv2.resize(fine[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    if ratio > MAX_UPSAMPLING:
        if any(shift):
            pixels = _sample(pixels, 1.0, shift, math.ceil(width * ratio - 1e-6), math.ceil(height * ratio - 1e-6))
        # Without a target size OpenCV uses the factor as given, so that the scale is exact whatever is rounded.
        pixels = cv2.resize(pixels, None, fx=1 / ratio, fy=1 / ratio, interpolation=cv2.INTER_AREA)
    elif ratio != 1.0 or any(shift):
        # Near 1 the sizes may be equal, and then OpenCV's resize copies; a box's mean is bilinear here anyway.
        pixels = _sample(pixels, ratio, shift, width, height)
    return pixels[:height, :width]


def _sample(pixels: np.ndarray, step: float, shift: tuple[float, float], width: int, height: int) -> np.ndarray:
    """Bilinear samples [height, width, 3] at the middles of boxes ``step`` pixels wide, from ``shift`` (x, y) on."""
    matrix = np.array([[step, 0, (step - 1) / 2 + shift[0]], [0, step, (step - 1) / 2 + shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
