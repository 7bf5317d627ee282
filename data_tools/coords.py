"""Tiles at given positions: spots of spatial transcriptomics, annotations, or another tool's coordinates.

A CSV holds the positions of all slides, with any further columns, which go to the tiles. A folder holds one HDF5 file a
slide, as TRIDENT (``<slide>_patches.h5``) and CLAM (``<slide>.h5``) write them: a dataset ``coords`` [N, 2] of left and
upper edges in pixels of the finest level, whatever the tiles' own resolution (https://github.com/mahmoodlab/CLAM, issue
159). Its attributes say how large they are: TRIDENT's ``patch_size_level0`` is their side in the same pixels; CLAM's
``patch_size`` counts pixels of the level that ``downsample`` is of. No image is opened here, and nothing that an HDF5
file refers to outside itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import read_csv
from eosin.data_tools.sources import Source, shorten, without_ending

if TYPE_CHECKING:
    import h5py

CORNER, CENTER = ("x", "y"), ("center_x", "center_y")
# The tile itself owns these names.
RESERVED = ("key", "mpp", "tissue")
# About twice the bins of a slide of Visium HD, which are 2 µm wide.
MAX_PLACES = 20_000_000
# A table is held in memory, where it is about ten times as large.
MAX_CSV_BYTES = 1 << 28
MAX_PIXEL = 1 << 30
MAX_SIZE = 1 << 20
ENDINGS = (".h5", "_patches.h5", ".hdf5", "_patches.hdf5")


@dataclass(frozen=True)
class Coords:
    """Where the tiles of a slide are.

    Attributes:
        places: int64 [N, 2], x and y in pixels of the finest level; they may lie outside the slide.
        centers: whether these are the tiles' centers, and not their left and upper edges.
        size: a tile's side in the same pixels, where the file says it.
        facts: what the table says of each tile beside its place, empty where it says nothing.
    """

    places: np.ndarray
    centers: bool = False
    size: int | None = None
    facts: list[dict[str, str]] = field(default_factory=list)


def find_coords(path: Path, sources: Sequence[Source]) -> tuple[dict[str, Coords | Path], list[str]]:
    """Find the positions of each slide; HDF5 files are left to :func:`read_coords`, since all might not fit in memory.

    Args:
        path: a CSV with the columns ``slide`` (its name, or its file's with or without ending) and either ``x`` and
            ``y`` (left and upper edge) or ``center_x`` and ``center_y``, in pixels of the finest level; or a folder of
            HDF5 files named by the slides, or one with such a folder ``patches``.
        sources: the slides.

    Returns:
        Slide name -> its positions or the file that holds them, and notices on slides without and positions without a
        slide.

    Raises UserError for a table that cannot be used, or a folder that holds nothing of these slides.
    """
    found: Mapping[str, Coords | Path]
    if path.is_dir():
        found, strange = _find_files(path, sources)
    elif path.suffix.lower() in (".h5", ".hdf5"):
        raise UserError(f"{path} is one HDF5 file; give the folder that holds one a slide")
    else:
        found, strange = _read_table(path, sources)
    if not found:
        raise UserError(f"{path} has no positions of the given slides; it names {shorten(strange) or 'none'}")
    lonely = [source.slide for source in sources if source.slide not in found and not source.refused]
    notices = [f"no positions in {path.name}: {shorten(lonely)}"] if lonely else []
    if strange:
        notices.append(f"positions in {path.name} of slides that were not given: {shorten(strange)}")
    return dict(found), notices


def read_coords(found: Coords | Path) -> Coords:
    """The positions of a slide, from what :func:`find_coords` found of it.

    Raises Refusal for an HDF5 file that is broken or holds something else.
    """
    if isinstance(found, Coords):
        return found
    import h5py

    try:
        with h5py.File(found, "r") as file:
            return _read_dataset(file)
    except Refusal as refusal:
        raise Refusal(f"{found.name} {refusal}") from None
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:  # h5py raises all of these
        raise Refusal(f"{found.name} cannot be read as HDF5: {' '.join(str(error).split())[:160]}") from None


def _read_dataset(file: h5py.File) -> Coords:
    import h5py

    if not isinstance(file.get("coords", getlink=True), h5py.HardLink) or not isinstance(file["coords"], h5py.Dataset):
        raise Refusal("holds no dataset 'coords'")
    coords = file["coords"]
    if coords.is_virtual or coords.external:
        raise Refusal("keeps its coords in another file")
    if coords.shape is None or len(coords.shape) != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf":
        raise Refusal(f"has coords of shape {coords.shape} and type {coords.dtype}; numbers [N, 2] are read")
    if coords.shape[0] > MAX_PLACES or np.prod(coords.chunks or (1,), dtype=float) > 2 * MAX_PLACES:
        raise Refusal(f"has {coords.shape[0]} coords in chunks of {coords.chunks}; up to {MAX_PLACES} are read")
    places = _whole(coords[:])
    if places is None:
        raise Refusal("has coords that are not finite or beyond any slide")
    # A place that is listed twice is one tile.
    return Coords(places[_first_of_each(places)], size=_side(coords.attrs))


def _side(attributes: h5py.AttributeManager) -> int | None:
    """A tile's side in pixels of the finest level, None where the attributes do not say it."""
    if "patch_size_level0" in attributes:
        side = _number(attributes, "patch_size_level0")
    elif {"patch_size", "downsample"} <= attributes.keys():
        side = _number(attributes, "patch_size") * _number(attributes, "downsample")
    elif {"patch_size", "level0_magnification", "target_magnification"} <= attributes.keys():
        own, wanted = (_number(attributes, f"{name}_magnification") for name in ("level0", "target"))
        side = _number(attributes, "patch_size") * own / wanted
    else:
        return None
    if not 1 <= round(side) <= MAX_SIZE:
        raise Refusal(f"states tiles of {side:g} px; 1 to {MAX_SIZE} are read")
    return round(side)


def _number(attributes: h5py.AttributeManager, name: str) -> float:
    """A positive number, or the mean where there is one for each axis, as ``downsample`` has it."""
    stored = attributes.get_id(name)
    number = float(np.mean(attributes[name])) if stored.dtype.kind in "iuf" and stored.shape in ((), (1,), (2,)) else 0
    if not 0 < number < MAX_SIZE:
        raise Refusal(f"has an attribute {name} that is no size or scale")
    return number


def _find_files(folder: Path, sources: Sequence[Source]) -> tuple[dict[str, Path], list[str]]:
    """Files of the slides, and the names of the files that are nobody's."""
    for place in (folder, folder / "patches"):
        files = {file.name: file for file in sorted(place.glob("*")) if file.name.endswith(ENDINGS)}
        if files:
            break
    else:
        raise UserError(f"{folder} holds no HDF5 file; they are called as the slides: NAME.h5 or NAME_patches.h5")
    found: dict[str, Path] = {}
    owner: dict[Path, str] = {}
    for name, slide in _slides_by_name(sources).items():
        for file in (files[name + ending] for ending in ENDINGS if name + ending in files):
            if slide is None:
                raise UserError(f"{file} could be of several slides that are called {name}; tile them one by one")
            if slide in found and found[slide] != file:
                raise UserError(f"{folder} holds two files of {slide}: {found[slide].name} and {file.name}")
            if owner.setdefault(file, slide) == slide:
                found[slide] = file
    return found, sorted(file.name for file in files.values() if file not in owner)


def _read_table(table: Path, sources: Sequence[Source]) -> tuple[dict[str, Coords], list[str]]:
    """Positions of the slides, and the names of the slides that were not given."""
    if table.is_file() and table.stat().st_size > MAX_CSV_BYTES:
        raise UserError(f"{table} is larger than {MAX_CSV_BYTES >> 30} GiB; split it and tile the slides in parts")
    rows = read_csv(table, ["slide"])
    if not rows:
        raise UserError(f"{table} lists no position")
    columns = list(rows[0])
    kinds = [pair for pair in (CORNER, CENTER) if set(pair) <= set(columns)]
    if len(kinds) != 1:
        raise UserError(
            f"{table} needs the columns x and y (left and upper edge) or center_x and center_y, and not both; "
            f"its columns are: {', '.join(columns)}"
        )
    taken = [column for column in columns if column in RESERVED]
    if taken:
        raise UserError(f"{table} has a column '{taken[0]}', which the tile itself owns; rename it")
    slide_of = _slides_by_name(sources)
    lines: dict[str, list[int]] = defaultdict(list)
    strange: dict[str, None] = {}
    for number, row in enumerate(rows):
        slide = slide_of.get(row["slide"], "")
        if slide is None:
            raise UserError(f"{table} line {number + 2}: several slides are called '{row['slide']}'; name it in full")
        if slide:
            lines[slide].append(number)
        else:
            strange[row["slide"]] = None
    further = [column for column in columns if column not in ("slide", *kinds[0])]
    found = {}
    for slide, numbers in lines.items():
        own = [rows[number] for number in numbers]
        places = _read_places([[row[column] for column in kinds[0]] for row in own])
        if places is None:
            bad = next(n for n in numbers if _read_places([[rows[n][column] for column in kinds[0]]]) is None)
            values = ", ".join(rows[bad][column] for column in kinds[0])
            raise UserError(f"{table} line {bad + 2}: '{values}' is no position in pixels of the finest level")
        once = _first_of_each(places)
        if len(once) < len(places):
            again = numbers[np.setdiff1d(np.arange(len(places)), once)[0]]
            raise UserError(f"{table} line {again + 2}: this position of {slide} is there already; remove one of them")
        facts = [{column: row[column] for column in further} for row in own] if further else []
        found[slide] = Coords(places, centers=kinds[0] == CENTER, facts=facts)
    return found, list(strange)


def _read_places(values: list[list[str]]) -> np.ndarray | None:
    try:
        return _whole(np.array([[float(value) for value in row] for row in values]))
    except ValueError:
        return None


def _whole(places: np.ndarray) -> np.ndarray | None:
    """Rounded to int64; None where one is not finite or beyond any slide."""
    # A NaN makes both ends NaN, which is within no bounds.
    if len(places) and not -MAX_PIXEL < places.min() <= places.max() < MAX_PIXEL:
        return None
    return np.rint(places).astype(np.int64)


def _first_of_each(places: np.ndarray) -> np.ndarray:
    """Where each place is first, in order."""
    _, first = np.unique(places[:, 0] * (2 * MAX_PIXEL) + places[:, 1], return_index=True)
    return np.sort(first)


def _slides_by_name(sources: Sequence[Source]) -> dict[str, str | None]:
    """What a slide may be called -> its name, None where several are called so; a slide's own name goes first."""
    by_name: dict[str, str | None] = {}
    for source in sources:
        for name in {source.listed, without_ending(Path(source.listed))}:
            by_name[name] = source.slide if name not in by_name else None
    return by_name | {source.slide: source.slide for source in sources}
