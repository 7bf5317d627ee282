"""Tissue masks that a user brings in place of ours: images and GeoJSON outlines.

An image of any size is stretched onto the slide. GeoJSON is read as QuPath and TRIDENT write it, in pixels of the
slide's finest level. Nothing is ever unpickled, and what a file holds is checked before it is believed.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.slide import MAX_IMAGE_PIXELS
from eosin.data_tools.sources import Source, find_files, shorten, without_ending

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

IMAGES = (".png", ".tif", ".tiff")
OUTLINES = (".geojson", ".json")
# Found beside masks, and not masks: a slide that has nothing else is refused with these words.
OTHERS = {
    ".h5": "HDF5 of TRIDENT or CLAM holds the places of tiles, no outline; give TRIDENT's contours_geojson",
    ".hdf5": "HDF5 of TRIDENT or CLAM holds the places of tiles, no outline; give TRIDENT's contours_geojson",
    ".jpeg": "a JPEG is no mask, as its pixels are not exact; give a PNG",
    ".jpg": "a JPEG is no mask, as its pixels are not exact; give a PNG",
    ".pkl": "a pickle is never opened, as it may run code; write CLAM's contours to GeoJSON",
}
ENDINGS = ("_mask", "-mask")
# Where TRIDENT puts its outlines, beside much else.
TRIDENT_FOLDER = "contours_geojson"
ASPECT_TOLERANCE = 0.02
# Share of a side by which an outline may leave the slide; beyond, its coordinates are of another image.
OVERSHOOT = 0.1
MAX_GEOJSON_BYTES = 64 << 20
# Rows that all outlines cross, together; tissue crosses a few thousand times as many as a thumbnail has.
MAX_CROSSINGS = 1 << 24
# Kinds of QuPath's objects that outline something seen; a core of a TMA or the whole image does not.
OBJECTS = ("annotation", "detection", "cell", "tile")
# Classes that say "nothing here"; QuPath also marks classes to be ignored with an asterisk, such as Artifact*.
NOTHING = ("background", "ignore")


def find_masks(folder: Path, sources: Sequence[Source]) -> tuple[dict[str, Path], list[str]]:
    """Find each slide's mask, at any depth of ``folder``, or in its ``contours_geojson`` where TRIDENT made it.

    A mask is called as the slide or its file, with or without its ending, and may add ``_mask``; where slides of
    several folders are called alike, the mask lies in a folder of the same name or is called as the slide in full.

    Returns:
        Slide names to files, and notices for slides without a mask and masks without a slide.

    Raises:
        UserError: no folder, no mask in it, two masks for a slide, or a mask that fits several slides.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a folder of masks")
    if (folder / TRIDENT_FOLDER).is_dir():
        folder = folder / TRIDENT_FOLDER
    slides = {source.path.resolve() for source in sources if source.path is not None}
    found = [path for path in find_files(folder, (*IMAGES, *OUTLINES, *OTHERS)) if path.resolve() not in slides]
    if not found:
        raise UserError(f"{folder} holds no mask; known endings: {' '.join(IMAGES + OUTLINES)}")
    by_name: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        if source.path is not None:
            by_name[source.path.name].add(source.slide)
            by_name[without_ending(Path(source.path.name))].add(source.slide)
    # A slide's own name goes before what another slide's file is called.
    by_name.update({source.slide: {source.slide} for source in sources})
    masks: dict[str, Path] = {}
    stray = []
    for path in found:
        fits = next((by_name[name] for name in called(path.relative_to(folder)) if name in by_name), set())
        if len(fits) > 1:
            raise UserError(f"{path} fits the slides {shorten(sorted(fits))}; name it as one of them, folders and all")
        if not fits:
            stray.append(path.name)
            continue
        (slide,) = fits
        if slide in masks:
            raise UserError(f"{masks[slide]} and {path} are both masks of slide '{slide}'; remove one")
        masks[slide] = path
    bare = [source.slide for source in sources if source.slide not in masks]
    notices = [f"no mask in {folder.name}: {shorten(bare)}"] if bare else []
    return masks, notices + ([f"no slide for these masks: {shorten(stray)}"] if stray else [])


def read_mask(path: Path, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Read a mask of a slide onto its thumbnail.

    Of an image, what is neither black nor transparent is tissue; it is stretched by its nearest pixels. Of GeoJSON, a
    pixel is tissue where its center lies in an outline of an annotation or a detection; holes stay open, and classes
    that mean nothing (Background, Ignore*, and any other that ends with an asterisk) are left out. QuPath counts
    from the corner of what OpenSlide calls the slide's bounds, which for MRXS is not the slide's corner.

    Args:
        path: of a PNG, a TIFF (of a pyramid, a level is read), or GeoJSON.
        size: (width, height) of the slide's finest level.
        shape: (height, width) of the thumbnail.

    Returns:
        bool [height, width].

    Raises:
        Refusal: the file is none of these, is too large, or does not fit the slide.
    """
    suffix = path.suffix.lower()
    if suffix in OTHERS:
        raise Refusal(f"no usable mask: {path.name}: {OTHERS[suffix]}")
    try:
        if suffix in OUTLINES:
            return fill(_outlines(path, size), size, shape)
        mask = _png(path) if suffix == ".png" else _tiff(path, shape)
    except Refusal as refusal:
        raise Refusal(f"no usable mask: {path.name}: {refusal}") from None
    except Exception as error:  # decoders raise anything on broken input
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise Refusal(f"no usable mask: {path.name} cannot be read: {text}") from None
    height, width = mask.shape
    expected = height * size[0] / size[1]
    if abs(width - expected) > max(ASPECT_TOLERANCE * expected, 1):
        raise Refusal(
            f"no usable mask: {path.name} has {width} x {height} pixels, another aspect ratio than the slide's "
            f"{size[0]} x {size[1]}"
        )
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(shape, mask.shape))
    return mask[rows[:, None], columns]


def called(path: Path) -> Iterator[str]:
    """What a mask's slide may be called, the likeliest first; of a path relative to the masks' folder."""
    for way in (path, Path(path.name)):
        name = without_ending(way)
        yield name
        yield from (name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending))


def open_png(path: Path) -> ImageFile:
    """A PNG that is not too large; not decoded yet. Raises Refusal, and what Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(path, formats=["PNG"])
    _refuse_huge(*image.size)
    return image


def _png(path: Path) -> np.ndarray:
    with open_png(path) as image:
        if image.mode in ("1", "L") or image.mode.startswith("I"):  # 1, 8 and 16 bits
            return np.asarray(image) != 0
        pixels = np.asarray(image.convert("RGBA"))  # [H, W, 4]
    return pixels[..., :3].any(axis=-1) & (pixels[..., 3] > 0)


def _tiff(path: Path, shape: tuple[int, int]) -> np.ndarray:
    pixels, black = read_tiff(path, shape)
    if pixels.ndim == 3:
        # A fourth sample is transparency.
        return (pixels[..., :3] != black).any(axis=-1) & (pixels[..., 3:] != 0).all(axis=-1)
    return pixels != black


def read_tiff(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Of a TIFF the coarsest level that is no coarser than (height, width) ``shape``, else the finest.

    Returns:
        Integers [H, W] or [H, W, S], and the value that is black. Raises Refusal, and what tifffile raises.
    """
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        if series.axes not in ("YX", "YXS") or series.dtype.kind not in "bui":
            raise Refusal(f"its pixels are {series.axes} {series.shape} of {series.dtype}; one image of integers is")
        fine_enough = [level for level in series.levels if level.shape[0] >= shape[0] and level.shape[1] >= shape[1]]
        level = min(fine_enough, key=lambda level: level.shape[0], default=series)
        _refuse_huge(level.shape[1], level.shape[0])
        page = level.keyframe
        black = (1 << page.bitspersample) - 1 if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE else 0
        return level.asarray(), black


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise Refusal(f"{width} x {height} pixels in one piece; a mask needs no more than the thumbnail has")


def _outlines(path: Path, size: tuple[int, int]) -> list[list[np.ndarray]]:
    """The polygons of a GeoJSON file that count. Raises Refusal where there are none, or not of this slide."""
    left_out: set[str] = set()
    found: list[list[np.ndarray]] = []
    for geometry, properties in features(path):
        if reason := _passed_over(properties):
            left_out.add(reason)
        else:
            found += polygons(geometry, size)
    if not found:
        more = f"; left out: {shorten(sorted(left_out))}" if left_out else ""
        raise Refusal(f"it outlines no tissue{more}")
    return found


def features(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every geometry of a GeoJSON file in order, with the properties of its feature. Raises Refusal."""
    if path.stat().st_size > MAX_GEOJSON_BYTES:
        raise Refusal(f"{path.stat().st_size >> 20} MiB, above {MAX_GEOJSON_BYTES >> 20}; outline the tissue alone")
    try:
        root = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"not JSON: {' '.join(str(error).split())[:160]}") from None
    todo: list[tuple[Any, dict[str, Any]]] = [(root, {})]
    while todo:
        item, properties = todo.pop()
        if isinstance(item, list):
            todo += ((part, properties) for part in reversed(item))
            continue
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise Refusal("not GeoJSON: an object with a 'type' was expected")
        if item["type"] == "FeatureCollection":
            todo.append((_listed(item.get("features")), properties))
        elif item["type"] == "GeometryCollection":
            todo.append((_listed(item.get("geometries")), properties))
        elif item["type"] != "Feature":
            yield item, properties
        else:
            own = item.get("properties") or {}
            if not isinstance(own, dict):
                raise Refusal("not GeoJSON: a feature's properties are no object")
            if item.get("geometry") is None:
                yield {"type": "GeometryCollection"}, own
            else:
                todo.append((item["geometry"], own))


def _passed_over(properties: dict[str, Any]) -> str:
    """The kind or class by which a feature does not count, "" where it does."""
    kind = properties.get("objectType", OBJECTS[0])
    if kind not in OBJECTS:
        return str(kind)
    for name in classification(properties):
        if name.endswith("*") or name.casefold().startswith(NOTHING):
            return name
    return ""


def classification(properties: dict[str, Any]) -> list[str]:
    """The class of one of QuPath's objects; derived ones, such as "Ignore*: Positive", in their parts."""
    given = properties.get("classification") or {}
    given = given if isinstance(given, dict) else {"name": given}
    names = given.get("names") or str(given.get("name") or "").split(":")
    return [name.strip() for name in map(str, _listed(names)) if name.strip()]


def polygons(geometry: dict[str, Any], size: tuple[int, int] | None) -> list[list[np.ndarray]]:
    """The polygons of a geometry, each its outer ring and its holes, float64 [n, 2] in pixels of the finest level.

    Raises Refusal where one reaches far out of a slide of (width, height) ``size``, where that is known.
    """
    return [[_ring(ring, size) for ring in _listed(polygon)] for polygon in _polygons(geometry) if polygon != []]


def _polygons(geometry: dict[str, Any]) -> list[Any]:
    """The polygons of a geometry; points and lines have none."""
    if geometry["type"] == "Polygon":
        return [geometry.get("coordinates")]
    return _listed(geometry.get("coordinates")) if geometry["type"] == "MultiPolygon" else []


def _ring(ring: Any, size: tuple[int, int] | None) -> np.ndarray:
    try:
        points = np.asarray(ring, np.float64)[:, :2]
    except (ValueError, TypeError, OverflowError, IndexError):
        raise Refusal("not GeoJSON: a polygon's ring is no list of positions") from None
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise Refusal("not GeoJSON: a polygon's ring is no list of finite positions")
    if size is None:
        return points
    slack = OVERSHOOT * np.array(size)
    outside = ((points < -slack) | (points > size + slack)).any(axis=1)
    if outside.any():
        x, y = points[outside.argmax()]
        raise Refusal(
            f"its outline reaches {x:g}, {y:g} on a slide of {size[0]} x {size[1]}; coordinates count pixels of the "
            "finest level"
        )
    return points


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal("not GeoJSON: a list was expected")
    return value


def fill(polygons: list[list[np.ndarray]], size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Whether each pixel's center lies in any polygon, even-odd within one: bool [height, width].

    OpenCV's fillPoly also fills whatever an outline touches, which widens the tissue and closes narrow holes.
    """
    height, width = shape
    scale = np.array([width, height]) / size
    rings = [(number, ring * scale) for number, polygon in enumerate(polygons) for ring in polygon]
    number = np.repeat([n for n, _ in rings], [len(ring) for _, ring in rings])
    (x0, y0), (x1, y1) = (np.concatenate(ends).T for ends in zip(*((r, np.roll(r, -1, axis=0)) for _, r in rings)))
    # A row is crossed where its middle lies in [top, bottom) of an edge, so that a vertex counts once.
    first, last = (np.clip(np.ceil(end(y0, y1) - 0.5), 0, height).astype(int) for end in (np.minimum, np.maximum))
    crossed = last - first
    if crossed.sum() > MAX_CROSSINGS:
        raise Refusal(f"its outlines cross the thumbnail's rows {crossed.sum()} times; outline the tissue alone")
    edge = np.repeat(np.arange(len(crossed)), crossed)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
    # Sorted by polygon, row and column, every second crossing enters the polygon and the next one leaves it.
    row, column = (values[np.lexsort((column, row, number[edge]))] for values in (row, column))
    steps = np.zeros((height, width + 1), np.int32)
    np.add.at(steps, (row[0::2], column[0::2]), 1)
    np.add.at(steps, (row[1::2], column[1::2]), -1)
    return steps.cumsum(axis=1, dtype=np.int32)[:, :width] > 0
