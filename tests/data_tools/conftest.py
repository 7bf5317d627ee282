"""Small painted slides whose every pixel is known."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

GLASS = 244


@functools.cache
def paint_section(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A section on glass: an ellipse over the middle with nuclei about ten pixels wide, with edges of four."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 3.5)
    nuclei = np.clip(noise / noise.std() - 0.5, 0, 1)
    y, x = np.mgrid[0:height, 0:width]
    inside = ((x - width / 2) / (0.4 * width)) ** 2 + ((y - height / 2) / (0.4 * height)) ** 2 < 1
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)
    amounts = np.stack([1.3 * nuclei, np.full_like(nuclei, 0.35)], axis=-1) * inside[..., None]
    image = GLASS * np.exp(-(amounts.astype(np.float32) @ stains))
    result = np.clip(image + rng.normal(0, 0.7, image.shape), 0, 255).round().astype(np.uint8)
    result.flags.writeable = False
    return result


def write_pyramid(
    path: Path, image: np.ndarray, mpp: float | None, sizes: Sequence[tuple[int, int]] = (), **kwargs: object
) -> Path:
    """Write a tiled TIFF that OpenSlide reads, uncompressed; ``sizes`` are (width, height) of the coarser levels."""
    import tifffile

    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    common = {"tile": (256, 256), "photometric": "rgb", "metadata": None} | kwargs
    with tifffile.TiffWriter(path) as tiff:
        for number, size in enumerate([(image.shape[1], image.shape[0]), *sizes]):
            level = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if number else image
            tiff.write(level, subfiletype=int(number > 0), **common, **(resolution if number == 0 else {}))
    return path


@pytest.fixture(scope="session")
def section() -> Callable[..., np.ndarray]:
    """:func:`paint_section`."""
    return paint_section


@pytest.fixture(scope="session")
def pyramid() -> Callable[..., Path]:
    """:func:`write_pyramid`."""
    return write_pyramid


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder of 18 phantoms with all nuisances; the seventh to ninth patients carry pen on their second slides."""
    from eosin.data_tools.phantom import write_phantoms

    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=9, workers=2).parent
