"""Gray images of any depth - a channel of fluorescence, an X-ray - to 8 bits by one window of values for a whole set.

A window of its own for each image would make a dim image look like a bright one, so none is ever stretched by itself.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from eosin.data_tools.draws import generator, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.slide import MAX_IMAGE_PIXELS

# Percentiles that the window spans: hot pixels and burnt-in letters lie outside.
SPAN = (0.1, 99.9)
SAMPLED_PIXELS = 1 << 14  # of each image over which a window is measured
CHANNELS = "CSIQ"  # what tifffile calls an axis of channels, samples, images in a row, and one of unknown meaning
PLANES = "one plane of values is read"


@dataclass(frozen=True)
class Window:
    """Values that become 0 and 255; what lies outside is clipped.

    Attributes:
        measured: over the set; such a window holds for no image of another depth.
    """

    low: float
    high: float
    measured: bool = False


class Encoded(io.BytesIO):
    """An image's bytes. A decoder's error calls them so, and not by an address in memory."""

    def __repr__(self) -> str:
        return "of these bytes"


def read_plane(data: bytes | np.ndarray, channel: int | None) -> np.ndarray:
    """One channel of an image, [H, W], values as they are stored.

    Args:
        data: a BMP, JPEG, PNG or TIFF, or pixels [H, W] or [H, W, C].
        channel: which, from 0; None where all are the same.

    Raises:
        Refusal: not readable, too large, of another shape, without that channel, or with values that are no numbers.
    """
    try:
        pixels = data if isinstance(data, np.ndarray) else _decode(data)
    except Refusal:
        raise
    except Exception as error:  # decoders raise anything on broken input
        text = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"not readable as an image: {text[:160]}") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype.kind not in "uif" or not np.isfinite(pixels).all():
        raise Refusal("some of its values are no numbers")
    channels = pixels.shape[2]
    if channel is None and (pixels != pixels[..., :1]).any():
        raise Refusal(f"it has {channels} channels; say which with --channel, from 0 to {channels - 1}")
    if channel is not None and channel >= channels:
        raise Refusal(f"it has no channel {channel}, but {channels}, counted from 0")
    return np.ascontiguousarray(pixels[..., channel or 0])


def measure_window(planes: Iterable[np.ndarray], where: str) -> Window | None:
    """The window of a set: percentiles 0.1 and 99.9 of its values; None for images of 8 bits, which stay as they are.

    Args:
        planes: [H, W] each, a sample of the set.
        where: names the set in an error.

    Raises:
        UserError: some have 8 bits and some more, or all values are the same.
    """
    values: list[np.ndarray] = []
    kinds: set[str] = set()
    for number, plane in enumerate(planes):
        kinds.add(str(plane.dtype))
        draws = generator(purpose("window pixels"), number).integers(0, plane.size, SAMPLED_PIXELS)
        values.append(plane.ravel()[draws].astype(np.float32))
    if "uint8" in kinds and len(kinds) > 1:
        raise UserError(f"{where} has images of {' and '.join(sorted(kinds))}; pack them apart, or give --window")
    if kinds <= {"uint8"}:
        return None
    low, high = (float(value) for value in np.percentile(np.concatenate(values), SPAN))
    if not low < high:
        raise UserError(f"the values of {where} are all {low:g}; give --window LOW HIGH")
    return Window(low, high, measured=True)


def to_8_bits(plane: np.ndarray, window: Window | None) -> np.ndarray:
    """Values through a window: uint8 [H, W]. None leaves 8 bits as they are.

    Raises Refusal where the window was measured over images of another depth.
    """
    if (plane.dtype == np.uint8) != (window is None) and (window is None or window.measured):
        raise Refusal(f"its values are {plane.dtype}, unlike those of the rest; pack it apart, or give --window")
    if window is None:
        return plane
    scaled = (plane.astype(np.float32) - np.float32(window.low)) / np.float32(window.high - window.low)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _decode(data: bytes) -> np.ndarray:
    return _decode_tiff(data) if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else _decode_picture(data)


def _decode_picture(data: bytes) -> np.ndarray:
    """A BMP, JPEG or PNG: [H, W] or [H, W, C]."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is ours
        image = Image.open(Encoded(data), formats=["BMP", "JPEG", "PNG"])
    with image:
        _refuse_huge(image.size)
        upright: Any = ImageOps.exif_transpose(image)
        if upright.mode in ("1", "P"):
            upright = upright.convert("RGBA" if "transparency" in upright.info else "RGB")
        pixels = np.asarray(upright)
    alpha = "A" in upright.getbands()
    if data.startswith(b"\x89PNG") and data[24] == 16 and pixels.ndim == 3:  # Pillow has cut these to 8 bits
        import cv2

        deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None:
            raise Refusal("not readable as an image: a PNG of 16 bits that is not as it says")
        pixels = np.concatenate([deep[..., 2::-1], deep[..., 3:]], axis=-1)
    if not alpha:
        return pixels
    if (pixels[..., -1] != np.iinfo(pixels.dtype).max).any():
        raise Refusal("parts of it are transparent, which gray images are not")
    return pixels[..., :-1]


def _decode_tiff(data: bytes) -> np.ndarray:
    """The first series of a TIFF, channels last: [H, W] or [H, W, C]. Other files that it names are never opened."""
    import tifffile

    with tifffile.TiffFile(Encoded(data), _multifile=False) as tiff:
        series = tiff.series[0]
        shape, axes = series.shape, series.axes
        if len(axes) not in (2, 3) or not {"Y", "X"} <= set(axes) or set(axes) - {"Y", "X", *CHANNELS}:
            raise Refusal(f"its pixels are {axes} {shape}; {PLANES}")
        _refuse_huge(shape)
        pixels = series.asarray(maxworkers=1)
        inverted = series.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if inverted and pixels.dtype.kind == "u":
        pixels = np.iinfo(pixels.dtype).max - pixels
    channels = next((place for place, axis in enumerate(axes) if axis in CHANNELS), None)
    return pixels if channels is None else np.moveaxis(pixels, channels, -1)


def _refuse_huge(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MAX_IMAGE_PIXELS:
        raise Refusal(f"{' x '.join(map(str, shape))} values in one piece, over the bound of {MAX_IMAGE_PIXELS}")
