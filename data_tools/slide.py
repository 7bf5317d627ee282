"""A slide as one small interface: what is known of it, and any region at any µm/px.

OpenSlide reads what it can; tiffslide reads the tiled TIFFs it refuses (OME-TIFF); plain images are read whole. Regions
come from the nearest finer level and are resampled with antialiasing to the exact µm/px, so that a pyramid whose levels
are 1.99955 apart is as exact as one of twos. Nothing outside the slide is ever read. Label and macro images are never
touched, and color profiles (ICC) are ignored: pixels are as stored.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from eosin.data_tools.errors import Refusal

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
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
# What lies outside says "unknown" in practice: 72 dots per inch is 353 µm/px.
MPP_RANGE = (0.05, 20.0)
# A level this much coarser than asked still serves: the field of view is right to a tenth of a percent.
LEVEL_TOLERANCE = 1e-3
# Enlarging beyond this invents detail.
MAX_UPSAMPLING = 1.05
MAX_IMAGE_PIXELS = 1 << 27
BLOCK = 4096
CACHE_BYTES = 64 << 20
ADVICE = "give --mpp-override, or a column mpp in the file of --slides"


@dataclass(frozen=True)
class Stated:
    """What a file says of its resolution.

    Attributes:
        x: µm/px of the finest level, horizontally.
        y: vertically.
        source: "property" for a scanner's own, "tiff tag" for the tags XResolution and YResolution.
    """

    x: float
    y: float
    source: str

    @property
    def mpp(self) -> float:
        """Side of a square pixel of the same area, µm."""
        return math.sqrt(self.x * self.y)

    @property
    def square(self) -> bool:
        """Whether both sides agree within 1 %."""
        return max(self.x, self.y) <= 1.01 * min(self.x, self.y)


class Pixels(Protocol):
    """A pyramid of 8-bit RGB levels: what :class:`Slide` needs of a reader.

    Attributes:
        sizes: (width, height) of each level, the finest first.
        downsamples: of each level, relative to the finest.
        vendor: the scanner's format.
        stated: resolution, None where the file says nothing.
    """

    sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    vendor: str
    stated: Stated | None

    def region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels [height, width, 3] of a level; ``x`` and ``y`` count pixels of the finest level."""

    def close(self) -> None:
        """Release the file."""


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
        self._pixels = _open(self.path)
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
        pixels = self._pixels.region(level, x, y, max(1, source[0] - lack[0]), max(1, source[1] - lack[1]))
        if any(lack):
            pixels = cv2.copyMakeBorder(
                pixels, 0, source[1] - pixels.shape[0], 0, source[0] - pixels.shape[1], cv2.BORDER_REPLICATE
            )
        if ratio > MAX_UPSAMPLING:
            # Without a target size OpenCV uses the factor as given, so that the scale is exact whatever is rounded.
            pixels = cv2.resize(pixels, None, fx=1 / ratio, fy=1 / ratio, interpolation=cv2.INTER_AREA)
        elif ratio != 1.0:
            # Near 1 the sizes may be equal, and then OpenCV's resize copies; a box's mean is bilinear here anyway.
            matrix = np.array([[ratio, 0, (ratio - 1) / 2], [0, ratio, (ratio - 1) / 2]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            pixels = cv2.warpAffine(pixels, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(pixels[:height, :width])


def read_image(path: Path) -> np.ndarray:
    """Decode a plain image file to uint8 [height, width, 3]; transparency is composited on white.

    Raises Refusal for what is no 8-bit image, is broken, or is larger than ``MAX_IMAGE_PIXELS``, before decoding.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _refuse_huge(*image.size)
                if image.mode.startswith(("I", "F")):
                    raise Refusal(f"its pixels are of mode {image.mode}; 8 bits a channel are read")
                upright = ImageOps.exif_transpose(image)
                if "A" in upright.getbands() or "transparency" in upright.info:
                    rgba = upright.convert("RGBA")
                    upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                return np.asarray(upright.convert("RGB"))
    except Refusal:
        raise
    except Exception as error:  # decoders raise anything on broken input
        raise Refusal(f"not readable as an image: {_one_line(error)}") from None


def _open(path: Path) -> Pixels:
    head = _first_bytes(path)
    suffix = path.suffix.lower()
    image = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"BM": ".bmp"}
    found = next((kind for magic, kind in image.items() if head.startswith(magic)), None)
    if suffix in IMAGE_SUFFIXES:
        return _ArrayPixels(read_image(path))
    if found and suffix not in (".vms", ".vmu"):
        raise Refusal(f"a {found[1:].upper()} image named {suffix or 'without an ending'}; name it {found} to tile it")
    tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    vendor = _openslide_vendor(path)
    # OpenSlide takes an OME-TIFF for a generic one: it sees neither its resolution nor its pyramid.
    if tiff and (vendor is None or (vendor == "generic-tiff" and _is_ome(path))):
        return _open_tiff(path)
    if vendor is None:
        raise Refusal("not a slide of a known format")
    return _OpenSlidePixels(path)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None
    if not head:
        raise Refusal("an empty file (0 bytes)")
    return head


def _openslide_vendor(path: Path) -> str | None:
    import openslide

    return openslide.OpenSlide.detect_format(path)


def _is_ome(path: Path) -> bool:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome)
    except Exception:  # tifffile raises anything on broken input, and whoever opens the file says so
        return False


class _OpenSlidePixels:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._reopen()
        properties = self._slide.properties
        self.sizes = self._slide.level_dimensions
        self.downsamples = self._slide.level_downsamples
        self.vendor = properties.get("openslide.vendor", "unknown")
        # For a generic TIFF, OpenSlide's property is made of the tags.
        source = "tiff tag" if self.vendor == "generic-tiff" else "property"
        self.stated = _stated(1.0, properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"), source)
        unit = {"inch": 25400.0, "centimeter": 10000.0}.get(properties.get("tiff.ResolutionUnit", ""))
        if self.stated is None and unit:
            dots = (properties.get("tiff.XResolution"), properties.get("tiff.YResolution"))
            self.stated = _stated_per(unit, *dots)
        color = properties.get("openslide.background-color", "FFFFFF")
        self._background = np.array([int(color[i : i + 2], 16) for i in (0, 2, 4)], np.uint8)

    def region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        try:
            rgba = self._region(level, x, y, width, height)
        except OSError:
            # After any error OpenSlide's handle stays dead, be it this region's or an earlier one's.
            self._reopen()
            try:
                rgba = self._region(level, x, y, width, height)
            except OSError as error:
                raise Refusal(f"cannot be decoded at {x}, {y}: {_one_line(error)}") from None
        alpha = rgba[..., 3:]
        if alpha.min() == 255:
            return rgba[..., :3]
        weight = alpha.astype(np.uint16)
        mixed = (rgba[..., :3] * weight + self._background * (255 - weight) + 127) // 255
        return mixed.astype(np.uint8)

    def _region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        import openslide

        try:
            return np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise OSError(str(error)) from None

    def _reopen(self) -> None:
        import openslide

        try:
            self._slide = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise Refusal(f"not readable as a slide: {_one_line(error)}") from None
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))

    def close(self) -> None:
        self._slide.close()


def _open_tiff(path: Path) -> Pixels:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            page = series.keyframe
            shape, axes, dtype, tiled = series.shape, series.axes, series.dtype, page.is_tiled
            stated = _stated_in_tiff(tiff, page)
            if dtype != np.uint8 or axes not in ("YXS", "CYX", "SYX") or 3 not in (shape[0], shape[-1]):
                raise Refusal(f"its pixels are {axes} {shape} of {dtype}; 8-bit RGB is read")
            if tiled and axes == "YXS":
                return _TiffSlidePixels(path, stated)
            _refuse_huge(*sorted(shape)[1:])
            whole = series.asarray()
    except Refusal:
        raise
    except Exception as error:  # tifffile raises anything on broken input
        raise Refusal(f"not readable as a TIFF: {_one_line(error)}") from None
    return _ArrayPixels(whole if axes == "YXS" else np.moveaxis(whole, 0, -1), stated, "tiff")


class _TiffSlidePixels:
    def __init__(self, path: Path, stated: Stated | None) -> None:
        import tiffslide

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._slide = tiffslide.TiffSlide(path)
        self.sizes = tuple(self._slide.level_dimensions)
        self.downsamples = tuple(self._slide.level_downsamples)
        self.vendor = (
            "ome-tiff" if self._slide.properties.get("tiff.ImageDescription", "").find("<OME ") >= 0 else "tiff"
        )
        self.stated = stated

    def region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        def read(left: int, top: int, wide: int, high: int) -> np.ndarray:
            # tiffslide takes positions in the finest level and rounds down what it makes of them.
            downsample = self.downsamples[level]
            corner = (math.ceil(left * downsample - 1e-6), math.ceil(top * downsample - 1e-6))
            try:
                return self._slide.read_region(corner, level, (wide, high), as_array=True, padding=False)
            except Exception as error:  # the chain of decoders below raises anything on broken input
                raise Refusal(f"cannot be decoded at {x}, {y}: {_one_line(error)}") from None

        return _at_fraction(read, self.sizes[level], self.downsamples[level], x, y, width, height)

    def close(self) -> None:
        self._slide.close()


class _ArrayPixels:
    def __init__(self, pixels: np.ndarray, stated: Stated | None = None, vendor: str = "image") -> None:
        self._pixels = pixels
        self.sizes: tuple[tuple[int, int], ...] = ((pixels.shape[1], pixels.shape[0]),)
        self.downsamples: tuple[float, ...] = (1.0,)
        self.vendor, self.stated = vendor, stated

    def region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        pass


def _at_fraction(
    read: Any, limit: tuple[int, int], downsample: float, x: int, y: int, width: int, height: int
) -> np.ndarray:
    """Read a region that begins between two pixels of a level, bilinearly, as OpenSlide does."""
    left, top = int(x / downsample + 1e-6), int(y / downsample + 1e-6)
    shift = (x / downsample - left, y / downsample - top)
    if max(map(abs, shift)) < 1e-3:
        return read(left, top, width, height)
    pixels = read(left, top, min(width + 1, limit[0] - left), min(height + 1, limit[1] - top))
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _stated_in_tiff(tiff: Any, page: Any) -> Stated | None:
    """The resolution of a TIFF: OME metadata first, then the tags."""
    import tifffile

    if tiff.is_ome:
        images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (images[0] if isinstance(images, list) else images)["Pixels"]
        units = {"µm": 1.0, "mm": 1e3, "nm": 1e-3, "cm": 1e4}
        unit = units.get(pixels.get("PhysicalSizeXUnit", "µm"))
        sides = (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY"))
        stated = _stated(unit, *sides, "property") if unit else None
        if stated:
            return stated
    unit = {2: 25400.0, 3: 10000.0}.get(int(page.resolutionunit))
    return _stated_per(unit, *page.resolution) if unit else None


def _stated(unit: float, x: Any, y: Any, source: str) -> Stated | None:
    """A resolution of ``x`` by ``y`` units of ``unit`` µm; None where either is missing or no positive number."""
    try:
        sides = unit * float(x), unit * float(y)
    except (TypeError, ValueError):
        return None
    return Stated(*sides, source) if all(math.isfinite(side) and side > 0 for side in sides) else None


def _stated_per(unit: float, x: Any, y: Any) -> Stated | None:
    """The same from pixels a unit, as TIFF tags have it."""
    dots = _stated(1.0, x, y, "")
    return Stated(unit / dots.x, unit / dots.y, "tiff tag") if dots else None


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise Refusal(f"{width} x {height} pixels in one piece; above {MAX_IMAGE_PIXELS} make it a pyramidal TIFF")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
