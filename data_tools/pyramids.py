"""The readers of slide files behind one protocol: pyramids of 8-bit RGB, and what a file says of its resolution.

OpenSlide reads what it can; tiffslide reads the tiled TIFFs it refuses (OME-TIFF); plain images are read whole. Where a
file's tiles are JPEGs, :mod:`eosin.data_tools.jpeg_tiles` decodes them directly, to the same pixels. Label and macro
images are never touched, and color profiles (ICC) are ignored: pixels are as stored.
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
from eosin.data_tools.jpeg_tiles import PLAIN_VENDORS, JpegPixels, from_whole_pixels, jpeg_levels

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
MAX_IMAGE_PIXELS = 1 << 27
# Of decoded pixels, in memory: enough for a row of tiles across a slide, so that the next row finds what it shares.
CACHE_BYTES = 128 << 20


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

    def region(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """Read a region that lies inside a level.

        Args:
            level: its number, 0 for the finest.
            x: left edge, in pixels of the finest level.
            y: upper edge.
            width: in pixels of the level.
            height: likewise.

        Returns:
            uint8 [height, width, 3], and how far right and down of its corner the region begins, in pixels of the level
            below 1: where that is not 0, the result has a column or a row more, unless the level ends there. OpenSlide
            interpolates by itself, so that there it is always 0.
        """

    def close(self) -> None:
        """Release the file."""


def open_pyramid(path: Path) -> Pixels:
    """Open a slide or a plain image with the fastest reader that is right for it.

    Raises:
        Refusal: the file is no readable slide of 8-bit RGB.
    """
    pixels = _open(path)
    if pixels.vendor in PLAIN_VENDORS:
        levels = jpeg_levels(path, pixels.sizes)
        if any(levels):
            return JpegPixels(path, pixels, levels, CACHE_BYTES)
    return pixels


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

    def region(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
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
            return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), (0.0, 0.0)
        weight = alpha.astype(np.uint16)
        mixed = (rgba[..., :3] * weight + self._background * (255 - weight) + 127) // 255
        return mixed.astype(np.uint8), (0.0, 0.0)

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

    def region(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        def read(left: int, top: int, wide: int, high: int) -> np.ndarray:
            # tiffslide takes positions in the finest level and rounds down what it makes of them.
            downsample = self.downsamples[level]
            corner = (math.ceil(left * downsample - 1e-6), math.ceil(top * downsample - 1e-6))
            try:
                return self._slide.read_region(corner, level, (wide, high), as_array=True, padding=False)
            except Exception as error:  # the chain of decoders below raises anything on broken input
                raise Refusal(f"cannot be decoded at {x}, {y}: {_one_line(error)}") from None

        return from_whole_pixels(read, self.sizes[level], self.downsamples[level], x, y, width, height)

    def close(self) -> None:
        self._slide.close()


class _ArrayPixels:
    def __init__(self, pixels: np.ndarray, stated: Stated | None = None, vendor: str = "image") -> None:
        self._pixels = pixels
        self.sizes: tuple[tuple[int, int], ...] = ((pixels.shape[1], pixels.shape[0]),)
        self.downsamples: tuple[float, ...] = (1.0,)
        self.vendor, self.stated = vendor, stated

    def region(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        return self._pixels[y : y + height, x : x + width], (0.0, 0.0)

    def close(self) -> None:
        pass


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
