"""Annotations of slides and tiles: outlines of QuPath (GeoJSON) and ASAP (XML), and masks (PNG, TIFF), as class maps.

A file speaks of the slide, or a mask of the tile, that it is called after. Outlines and tiles count pixels of the
slide's finest level; a mask is stretched onto what it is of. Where outlines overlap, the later one is on top.

A ``legend.csv`` beside the files, with the columns ``value`` and ``class``, gives classes other names: the value is
that of a mask's pixels (a number, or #rrggbb), or an outline's class, empty where it has none. What it does not list is
left out, and where an outline's class is empty nothing is annotated, whatever lies below. Without a legend 0 and black
are not annotated, other values name themselves, and of QuPath's classes Ignore* is what is not annotated.
Nothing here is ever unpickled, and XML that declares a document type is refused.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

import numpy as np

from eosin.data_tools import given_masks
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import atomic_path, read_csv
from eosin.data_tools.shards import ShardSet, slide_key
from eosin.data_tools.sources import find_files, shorten

if TYPE_CHECKING:
    import pandas as pd

IGNORED = 255  # of a mask: not annotated
LEGEND = "legend.csv"
XML = ".xml"
ENDINGS = (*given_masks.IMAGES, *given_masks.OUTLINES, XML)
LABELS_HEAD = b"tile,label,cover\n"
MOST_CLASSES = 64
LARGEST_VALUE = (1 << 24) - 1
# Points a side at which the share of a tile is counted that an annotation covers.
POINTS = 128
AREAS = ("Polygon", "Rectangle", "Spline")  # kinds of ASAP's annotations; a spline by the points it runs through
Polygons = list[list[np.ndarray]]


@dataclass
class Annotations:
    """Classes of the places of N tiles.

    Attributes:
        classes: names: in the legend's order, or sorted, as numbers where all are numbers.
        files: what is read.
        sizes: (width, height) of what each file is of, None where it is not known.
        file: [N], number of the tile's file, -1 where there is none.
        boxes: [N, 3], left, top and side of the tile, in the pixels that ``sizes`` counts.
        skipped: outlines that name no class of these, by reason.
    """

    classes: list[str]
    files: list[Path]
    sizes: list[tuple[int, int] | None]
    file: np.ndarray
    boxes: np.ndarray
    legend: dict[str, str] | None
    skipped: Counter[str] = field(default_factory=Counter)
    _open: tuple[Any, Any] = field(default=(None, None), repr=False)

    def mask(self, tile: int, pixels: int) -> np.ndarray:
        """Class numbers at the pixels' centers of a tile, uint8 [pixels, pixels]; IGNORED where not annotated."""
        number, box = int(self.file[tile]), self.boxes[tile]
        if number < 0:
            return np.full((pixels, pixels), IGNORED, np.uint8)
        path, size = self.files[number], self.sizes[number]
        if _is_outlines(path):
            return _painted(self._opened((number, 0), size), box, pixels)
        assert size is not None
        return _sampled(self._opened((number, _fine_enough(size, box, pixels)), size), size, box, pixels)

    def _opened(self, key: tuple[int, Any], size: tuple[int, int] | None) -> Any:
        """What a file holds; the last one is kept, since tiles of a slide come together."""
        if self._open[0] != key:
            codes = {name: number for number, name in enumerate(self.classes)}
            path = self.files[key[0]]
            if _is_outlines(path):
                self._open = key, _Shapes.of(path, size, codes, self.legend)
            else:
                values = refusing(path, _read_values, path, key[1], size)
                self._open = key, _coded(path, values, codes, self.legend)
        return self._open[1]


def tile_places(shards: ShardSet, extent: float | None = None) -> pd.DataFrame:
    """What is known of each tile of a shard set, with ``extent``: its side in pixels of the slide's finest level.

    Args:
        shards: of which µm/px of tiles and slides say how large a tile is.
        extent: of all tiles, given.

    Raises UserError when ``extent`` is below 1 or not finite.
    """
    if extent is not None and not 1 <= extent < math.inf:
        raise UserError(f"--tile-size {extent:g} is no side of a tile; give 1 pixel or more")
    table = shards.table()
    slides = shards.slides()
    table["extent"] = np.nan
    if extent is not None:
        table["extent"] = float(extent)
    elif "mpp" in slides.columns:
        fine = slides["mpp"].to_numpy(dtype=np.float64, na_value=np.nan)[shards.column("slide")]
        table["extent"] = shards.tile_size * shards.column("mpp").astype(np.float64) / fine
    return table


def open_annotations(path: Path, table: pd.DataFrame, pixels: int | None = POINTS) -> tuple[Annotations, list[str]]:
    """Find the annotations of tiles and their classes.

    Args:
        path: a folder, searched to any depth, or one file.
        table: N tiles with key, slide, x and y; where they are known, extent (:func:`tile_places`) and the slide's
            width and height.
        pixels: a side of the masks that will be asked for, which says what level of a pyramid is looked through for
            classes; None where the files hold values and no classes.

    Returns:
        The annotations, and notices on slides without and files of no slide.

    Raises:
        UserError: nothing fits, a file is broken or not of its slide, two files of one slide, or where a tile lies in
            its slide is not known.
    """
    found, notices = _find(path, set(table["key"]), set(table["slide"]))
    legend = read_legend((path if path.is_dir() else path.parent) / LEGEND)
    keys, slides = table["key"].to_numpy(), table["slide"].to_numpy()
    files = list(found.values())
    number = {name: i for i, name in enumerate(found)}
    own = np.array([number.get(f"tile {key}", -1) for key in keys])
    of_slide = np.array([number.get(f"slide {slide}", -1) for slide in slides])
    file = np.where(own >= 0, own, of_slide)
    boxes = np.tile([0.0, 0.0, 1.0], (len(table), 1))
    sizes: list[tuple[int, int] | None] = [(1, 1)] * len(files)
    placed = (own < 0) & (of_slide >= 0)
    columns = {c: _numbers(table, c) for c in ("x", "y", "extent", "width", "height")}
    for one in np.unique(of_slide[placed]):
        rows = np.flatnonzero(placed & (of_slide == one))
        size = columns["width"][rows[0]], columns["height"][rows[0]]
        known = bool(np.isfinite(size).all())
        if not known and len(rows) == 1 and not _is_outlines(files[one]):
            continue  # a picture of its own, which the mask covers
        where = f"of slide '{slides[rows[0]]}', for {files[one].name}"
        if not known and not _is_outlines(files[one]):
            raise UserError(f"the width and height {where}, are not known; name masks as the tiles, or give outlines")
        if not np.isfinite(columns["extent"][rows]).all():
            raise UserError(
                f"how large a tile is in the slide's own pixels is not known {where}; make the labels from the shard "
                "set with 'eosin eval label SHARDS ANNOTATIONS', and give it --tile-size PIXELS where it does not know"
            )
        boxes[rows] = np.stack([columns[c][rows] for c in ("x", "y", "extent")], axis=1)
        sizes[one] = (round(size[0]), round(size[1])) if known else None
    annotations = Annotations([], files, sizes, file, boxes, legend)
    if pixels is None:
        return annotations, notices
    annotations.classes = _classes(annotations, pixels)
    if not annotations.classes:
        more = "; left out: " + ", ".join(f"{n} {why}" for why, n in annotations.skipped.items())
        raise UserError(f"{path} annotates no class{more if annotations.skipped else ''}; see {LEGEND} in the help")
    if len(annotations.classes) > MOST_CLASSES:
        raise UserError(f"{path} names {len(annotations.classes)} classes; list the few that count in a {LEGEND} in it")
    notices += [f"{n} outlines left out: {why}" for why, n in annotations.skipped.most_common()]
    return annotations, notices


def tile_labels(annotations: Annotations, cover: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """The class that covers the most of each tile, [N] text, and its share, [N]; "" where that is below ``cover``."""
    if not 0 < cover <= 1:
        raise UserError(f"--cover {cover:g} is no share of a tile; give one above 0 and up to 1")
    names = np.full(len(annotations.file), "", dtype=object)
    shares = np.zeros(len(names))
    for tile in np.flatnonzero(annotations.file >= 0).tolist():
        counts = np.bincount(annotations.mask(tile, POINTS).ravel(), minlength=IGNORED + 1)[:IGNORED]
        shares[tile] = counts.max() / POINTS**2
        if counts.any() and shares[tile] >= cover:
            names[tile] = annotations.classes[int(counts.argmax())]
    return names, shares


def refuse_other_file(path: Path) -> None:
    """Raise UserError where ``path`` holds something else than :func:`write_labels` writes."""
    if path.is_dir() or (path.exists() and path.read_bytes()[: len(LABELS_HEAD)] != LABELS_HEAD):
        raise UserError(f"{path} exists and holds no labels of 'eosin eval label'; give another --out")


def write_labels(path: Path, table: pd.DataFrame, labels: np.ndarray, shares: np.ndarray) -> None:
    """Write what :func:`tile_labels` found as a CSV that ``--labels`` reads: tile, label, cover."""
    import pandas as pd

    rows = pd.DataFrame({"tile": table["key"], "label": labels, "cover": shares.round(4)})
    with atomic_path(path) as temporary:
        rows.to_csv(temporary, index=False)


def is_annotations(path: Path) -> bool:
    """Whether a path is one of annotations, a folder or a file, and not a table."""
    return path.is_dir() or path.suffix.lower() in ENDINGS


def refusing(path: Path, function: Any, *arguments: Any) -> Any:
    """What a reader returns, or what it raises as one line."""
    try:
        return function(*arguments)
    except Refusal as refusal:
        raise UserError(f"{path} cannot be used: {refusal}") from None
    except Exception as error:  # decoders raise anything on broken input
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} cannot be read: {text}") from None


def read_legend(path: Path) -> dict[str, str] | None:
    """Value -> class of a legend, "" for what is to be ignored; None where there is none."""
    if not path.is_file():
        return None
    rows = read_csv(path, ["value", "class"])
    names = [row["value"].strip() for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} lists the value '{name}' twice; one row each")
    return {name.lower() if name.startswith("#") else name: row["class"].strip() for name, row in zip(names, rows)}


def _find(path: Path, keys: set[str], slides: set[str]) -> tuple[dict[str, Path], list[str]]:
    """``tile KEY`` or ``slide NAME`` -> its file, and notices."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of annotations, or one file")
    found: dict[str, Path] = {}
    stray = []
    paths = find_files(path, ENDINGS) if path.is_dir() else [path]
    for file in paths:
        names = list(given_masks.called(file.relative_to(path if path.is_dir() else path.parent)))
        of_tile = [] if _is_outlines(file) else [n for name in names for n in (name, slide_key(name)) if n in keys]
        ways = [f"tile {name}" for name in of_tile]
        ways += [f"slide {name}" for name in names if name in slides]
        if not ways:
            stray.append(file.name)
        elif ways[0] in found:
            raise UserError(f"{found[ways[0]]} and {file} are both annotations of {ways[0]}; remove one")
        else:
            found[ways[0]] = file
    if not found:
        held = f"its files are called {shorten(stray)}" if stray else f"known endings: {' '.join(ENDINGS)}"
        raise UserError(
            f"{path} annotates no slide or tile of these; {held}, and slides are called {shorten(sorted(slides))}"
        )
    bare = [] if any(name.startswith("tile ") for name in found) else sorted(slides - {n[6:] for n in found})
    notices = [f"no annotations of these slides: {shorten(bare)}"] if bare else []
    return found, notices + ([f"annotations of no slide or tile of these: {shorten(stray)}"] if stray else [])


def _classes(annotations: Annotations, pixels: int) -> list[str]:
    """Every class that the files name, or that the legend does; and count what is skipped."""
    named: set[str] = set()
    for number in np.unique(annotations.file[annotations.file >= 0]).tolist():
        path, size = annotations.files[number], annotations.sizes[number]
        if _is_outlines(path):
            shapes = _Shapes.of(path, size, {}, annotations.legend)
            named |= shapes.names
            annotations.skipped += shapes.skipped
        elif annotations.legend is None:
            assert size is not None
            shape = _fine_enough(size, annotations.boxes[(annotations.file == number).argmax()], pixels)
            values = refusing(path, _read_values, path, shape, size)
            named |= set(_value_names(path, values, None).values())
    if annotations.legend is not None:
        return list(dict.fromkeys(name for name in annotations.legend.values() if name))
    numbers = all(name.isdecimal() for name in named)
    return sorted(named, key=int if numbers else str)


@dataclass
class _Shapes:
    """Outlines in the order in which they are painted: what is to be ignored comes last."""

    codes: list[int]
    polygons: list[Polygons]
    bounds: np.ndarray  # [S, 4], left, top, right, bottom
    names: set[str]
    skipped: Counter[str]

    @classmethod
    def of(
        cls, path: Path, size: tuple[int, int] | None, codes: dict[str, int], legend: dict[str, str] | None
    ) -> _Shapes:
        """Read a file. Of classes that ``codes`` does not know, the names are collected only."""
        painted: list[tuple[int, Polygons]] = []
        names: set[str] = set()
        skipped: Counter[str] = Counter()
        for given, polygons in refusing(path, lambda: list(_outlines(path, size))):
            if legend is not None:
                name = legend.get(given)
                why = f"class '{given}' is not in {LEGEND}"
            elif given.startswith("Ignore"):
                name = ""
            else:
                name = None if not given or given.endswith("*") else given
                why = f"class '{given}' means no tissue class" if given else "they have no class"
            if name is None:
                skipped[why] += 1
                continue
            names |= {name} - {""}
            painted.append((codes.get(name, IGNORED), polygons))
        painted.sort(key=lambda shape: shape[0] == IGNORED)
        bounds = []
        for _, polygons in painted:
            points = np.concatenate([ring for polygon in polygons for ring in polygon])
            bounds.append([*points.min(axis=0), *points.max(axis=0)])
        return cls([c for c, _ in painted], [p for _, p in painted], np.array(bounds).reshape(-1, 4), names, skipped)


def _painted(shapes: _Shapes, box: np.ndarray, pixels: int) -> np.ndarray:
    """Class numbers of a tile under outlines, uint8 [pixels, pixels]."""
    mask = np.full((pixels, pixels), IGNORED, np.uint8)
    x, y, side = box
    left, top, right, bottom = shapes.bounds.T
    near = np.flatnonzero((right > x) & (left < x + side) & (bottom > y) & (top < y + side))
    for code, group in itertools.groupby(near.tolist(), shapes.codes.__getitem__):
        polygons = [[ring - (x, y) for ring in polygon] for one in group for polygon in shapes.polygons[one]]
        mask[given_masks.fill(polygons, (side, side), mask.shape)] = code
    return mask


def _outlines(path: Path, size: tuple[int, int] | None) -> Iterator[tuple[str, Polygons]]:
    """The class of each outline of a file, "" for none, and its polygons."""
    if path.suffix.lower() == XML:
        yield from _asap(path, size)
        return
    for geometry, properties in given_masks.features(path):
        kind = properties.get("objectType", given_masks.OBJECTS[0])
        if kind in given_masks.OBJECTS and (found := given_masks.polygons(geometry, size)):
            yield ": ".join(given_masks.classification(properties)), found


def _asap(path: Path, size: tuple[int, int] | None) -> Iterator[tuple[str, Polygons]]:
    """The group of each area of ASAP's annotations, and its outline."""
    if path.stat().st_size > given_masks.MAX_GEOJSON_BYTES:
        raise Refusal(f"{path.stat().st_size >> 20} MiB, above {given_masks.MAX_GEOJSON_BYTES >> 20}")
    areas: list[tuple[str, str, list[tuple[float, float, float]]]] = []
    roots: list[str] = []

    def start(tag: str, values: dict[str, str]) -> None:
        roots.append(tag)
        if tag == "Annotation":
            areas.append((values.get("Type", ""), values.get("PartOfGroup", ""), []))
        elif tag == "Coordinate" and areas:
            numbers = [float(values[name]) for name in ("Order", "X", "Y") if _is_number(values.get(name, ""))]
            if len(numbers) < 3:
                raise Refusal(f"a coordinate has no numbers Order, X and Y: {str(values)[:100]}")
            areas[-1][2].append((numbers[0], numbers[1], numbers[2]))

    def refuse(*_: Any) -> None:
        raise Refusal("it declares a document type, which may hold entities; ASAP writes none")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise Refusal(f"not XML: {error}") from None
    if roots[0] != "ASAP_Annotations":
        raise Refusal(f"its root is <{roots[0][:40]}>; ASAP's annotations begin with <ASAP_Annotations>")
    for kind, group, points in areas:
        if kind in AREAS and points:
            ring = [[x, y] for _, x, y in sorted(points)]
            found = given_masks.polygons({"type": "Polygon", "coordinates": [ring]}, size)
            yield "" if group == "None" else group, found


def _read_values(path: Path, shape: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """A mask's values [H, W], of colors r·65536 + g·256 + b, and whether they are colors; transparent is 0."""
    if path.suffix.lower() == ".png":
        with given_masks.open_png(path) as image:
            grays = image.mode in ("1", "L", "P") or image.mode.startswith("I")
            pixels = np.asarray(image) if grays else np.asarray(image.convert("RGBA"))
    else:
        pixels, _ = given_masks.read_tiff(path, shape)
    height, width = pixels.shape[:2]
    expected = height * size[0] / size[1]
    if abs(width - expected) > max(given_masks.ASPECT_TOLERANCE * expected, 1):
        raise Refusal(
            f"{width} x {height} pixels, another shape than what it is of ({size[0]} x {size[1]}); a mask covers all "
            "of its tile or slide"
        )
    if pixels.ndim == 2:
        if pixels.min() < 0 or pixels.max() > LARGEST_VALUE:
            raise Refusal(f"its values reach from {pixels.min()} to {pixels.max()}; numbers of classes are small")
        return pixels.astype(np.uint32, copy=False), False
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (3, 4):
        raise Refusal(f"{pixels.shape[2]} channels of {pixels.dtype}; a mask is gray, or RGB of 8 bits")
    weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
    values = pixels[..., 0] * weights[0] + pixels[..., 1] * weights[1] + pixels[..., 2] * weights[2]
    return values * (pixels[..., 3] > 0 if pixels.shape[2] == 4 else 1), True


def _value_names(path: Path, given: tuple[np.ndarray, bool], legend: dict[str, str] | None) -> dict[int, str]:
    """The class of each value that a mask holds, without those that are not annotated."""
    values, colors = given
    held = np.zeros(int(values.max(initial=0)) + 1, dtype=bool)
    held[values] = True
    found = np.flatnonzero(held).tolist()
    name = {v: f"#{v:06x}" if colors else str(v) for v in found}
    if legend is not None:
        return {v: legend[n] for v, n in name.items() if legend.get(n)}
    if len(found) > MOST_CLASSES:
        raise UserError(
            f"{path} holds {len(found)} values, too many for classes; list those that count in a {LEGEND} beside it"
        )
    return {v: n for v, n in name.items() if v}


def _fine_enough(size: tuple[int, int], box: np.ndarray, pixels: int) -> tuple[int, int]:
    """Height and width of a mask of ``size`` that has so many pixels a side of a tile."""
    return round(size[1] * pixels / box[2]), round(size[0] * pixels / box[2])


def _coded(
    path: Path, given: tuple[np.ndarray, bool], codes: dict[str, int], legend: dict[str, str] | None
) -> np.ndarray:
    """A mask as class numbers, uint8 [H, W]."""
    table = np.full(int(given[0].max(initial=0)) + 1, IGNORED, np.uint8)
    for value, name in _value_names(path, given, legend).items():
        table[value] = codes[name]
    return table[given[0]]


def _sampled(mask: np.ndarray, size: tuple[int, int], box: np.ndarray, pixels: int) -> np.ndarray:
    """A window of a mask that is stretched onto ``size``, by its nearest pixels; IGNORED outside."""
    places = (np.arange(pixels) + 0.5) / pixels * box[2]
    columns, rows = (
        np.floor((start + places) * n / length).astype(int) for start, n, length in zip(box, mask.shape[::-1], size)
    )
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & (columns >= 0) & (columns < mask.shape[1])
    found = mask[rows.clip(0, mask.shape[0] - 1)[:, None], columns.clip(0, mask.shape[1] - 1)]
    return np.where(inside, found, np.uint8(IGNORED))


def _is_outlines(path: Path) -> bool:
    return path.suffix.lower() in (*given_masks.OUTLINES, XML)


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64, [N], NaN where it or a value is absent."""
    import pandas as pd

    if column not in table.columns:
        return np.full(len(table), np.nan)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
