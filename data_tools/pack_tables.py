"""Images in tables: HDF5 with arrays of pixels, as PCam's and CLAM's old patches, and Parquet with encoded images, as
on the Hugging Face Hub. Both are read a few rows at a time, so that memory does not grow with the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.pack_sources import Image, Source, check_columns, refuse
from eosin.data_tools.sources import shorten

if TYPE_CHECKING:
    import h5py
    import pyarrow as pa

BLOCK_BYTES = 64 << 20  # of pixels read at once
MOST_CHUNK_BYTES = 512 << 20  # that HDF5 must unpack to read one row
PARQUET_ROWS = 64
# Of several arrays that could be images, the one that is, by the names that are in use.
IMAGE_SETS = ("x", "imgs", "images", "image")
LEAST_SIDE = 8  # pixels; arrays of smaller things are no images
# Of several columns of bytes, the one that is the image, by the names that are in use.
IMAGE_COLUMNS = ("image", "image_bytes", "img", "jpeg", "jpg", "png")


@dataclass
class _Arrays:
    """What one HDF5 file holds: the name of its images, and columns of as many rows."""

    path: Path
    name: str
    images: str = ""
    rows: int = 0
    coords: str = ""
    columns: dict[str, tuple[Path, str]] = field(default_factory=dict)  # file and dataset of each column


def hdf5_source(what: str, files: list[Path], names: list[str], wanted: Sequence[str]) -> Source:
    """Images [N, H, W] or [N, H, W, C]; further datasets of N rows are columns, ``y`` is the label, ``coords`` x and y.

    A file without images lends its columns to the one file of as many rows whose name differs by x for y (PCam), or to
    the only one.

    Raises UserError where a file cannot be read, holds no images, or columns that fit none.
    """
    found = [_look(path, name) for path, name in zip(files, names)]
    with_images = [arrays for arrays in found if arrays.images]
    for arrays in found:
        if not arrays.images:
            _lend(arrays, with_images)
    for arrays in with_images:
        check_columns(str(arrays.path), wanted, [*arrays.columns, "slide"] if arrays.coords else list(arrays.columns))
    count = sum(arrays.rows for arrays in with_images)
    return Source(what, files, count, partial(_hdf5_images, with_images))


def _look(path: Path, name: str) -> _Arrays:
    import h5py

    sets: dict[str, h5py.Dataset] = {}

    def visit(where: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sets[where] = item

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)  # never follows a link to another file
            shapes = {where: tuple(item.shape or ()) for where, item in sets.items()}
            found = [where for where, item in sets.items() if _holds_images(item)]
            images = found if len(found) == 1 else [where for where in found if where in IMAGE_SETS]
            if found and len(images) != 1:
                raise UserError(f"{path} holds several sets of images: {shorten(found)}; call the one to be packed x")
            rows = shapes[images[0]][0] if images else max((s[0] for s in shapes.values() if s), default=0)
            coords = [w for w, s in shapes.items() if s == (rows, 2) and w.rpartition("/")[2] == "coords"]
            columns = {
                "label" if where == "y" else where: (path, where)
                for where, item in sets.items()
                if where not in images and _is_column(item, rows)
            }
            if not images and (coords or not columns):
                held = f"coordinates, no images; 'eosin tile SLIDES --coords {path}' reads the slides" if coords else ""
                raise UserError(f"{path} holds {held or f'no images; its datasets are: {shorten(list(sets)) or 0}'}")
            for where in images:
                _refuse_unsafe(path, sets[where])
            if images and (labels := shapes.get("y", ())) and labels[:1] != (rows,):
                raise UserError(f"{path} holds {labels[0]} labels in 'y' for {rows} images; mend or remove 'y'")
    except OSError as error:
        raise UserError(f"{path} is not readable as HDF5, or cut: {' '.join(str(error).split())[:120]}") from None
    return _Arrays(path, name, "".join(images), rows, "".join(coords[:1]), columns)


def _holds_images(item: h5py.Dataset) -> bool:
    shape = tuple(item.shape or ())
    return (
        len(shape) in (3, 4)
        and min(shape[1:3]) >= LEAST_SIDE
        and (len(shape) == 3 or shape[3] <= 64)
        and item.dtype.kind in "uif"
    )


def _is_column(item: h5py.Dataset, rows: int) -> bool:
    import h5py

    shape = tuple(item.shape or ())
    scalar = item.dtype.kind in "iufbS" or h5py.check_string_dtype(item.dtype) is not None
    return rows > 0 and shape[:1] == (rows,) and math.prod(shape[1:]) == 1 and scalar and not _elsewhere(item)


def _elsewhere(item: h5py.Dataset) -> bool:
    """Whether a dataset's values lie in other files."""
    return bool(item.is_virtual or item.external)


def _refuse_unsafe(path: Path, item: h5py.Dataset) -> None:
    if _elsewhere(item):
        raise UserError(f"{path}: the pixels of '{item.name}' lie in other files; copy them into this one")
    row = item.dtype.itemsize * math.prod(item.shape[1:])
    chunk = item.dtype.itemsize * math.prod(item.chunks) if item.chunks else 0
    if max(row, chunk) > MOST_CHUNK_BYTES:
        raise UserError(
            f"{path}: {max(row, chunk)} bytes must be unpacked to read one image of '{item.name}', over the bound of "
            f"{MOST_CHUNK_BYTES}; write it in smaller chunks"
        )


def _lend(columns: _Arrays, to: list[_Arrays]) -> None:
    """Give a file's columns to the file of its images."""
    fitting = [arrays for arrays in to if arrays.rows == columns.rows]
    named = [a for a in fitting if a.path.stem.removesuffix("x") == columns.path.stem.removesuffix("y")]
    chosen = named if named else fitting if len(to) == 1 else []
    if len(chosen) != 1:
        raise UserError(
            f"{columns.path} holds columns of {columns.rows} rows, no images, and fits none of the files given; give "
            "it beside the file of its images, named alike (..._x.h5 and ..._y.h5)"
        )
    chosen[0].columns |= columns.columns


def _hdf5_images(found: list[_Arrays]) -> Iterator[Image]:
    import h5py

    for arrays in found:
        files: dict[Path, h5py.File] = {}
        try:
            for path in {arrays.path: 0, **{path: 0 for path, _ in arrays.columns.values()}}:
                files[path] = h5py.File(path, "r")
            yield from _rows_of(arrays, files)
        finally:
            for file in files.values():
                file.close()


def _rows_of(arrays: _Arrays, files: dict[Path, h5py.File]) -> Iterator[Image]:
    pixels = files[arrays.path][arrays.images]
    step = max(1, BLOCK_BYTES // (pixels.dtype.itemsize * math.prod(pixels.shape[1:])))
    chunk = pixels.chunks[0] if pixels.chunks else 1
    step = max(chunk, step // chunk * chunk)  # no chunk is unpacked twice
    for first in range(0, arrays.rows, step):
        last = min(first + step, arrays.rows)
        read = _block_reader(pixels, first, last)
        try:
            facts = {name: files[path][at][first:last].reshape(-1) for name, (path, at) in arrays.columns.items()}
            places = files[arrays.path][arrays.coords][first:last] if arrays.coords else None
        except OSError as error:
            raise UserError(f"{arrays.path} is broken at row {first}: {' '.join(str(error).split())[:120]}") from None
        for row in range(first, last):
            known = {name: _plain(column[row - first]) for name, column in facts.items()}
            if places is not None:  # positions are in a slide: CLAM and its kin write one file for each
                x, y = (_plain(value) for value in places[row - first])
                known = {"slide": arrays.name, "x": x, "y": y} | known
            yield Image(f"{arrays.name}/{row}", f"{arrays.path.name} [{row}]", partial(read, row), known)


def _block_reader(pixels: h5py.Dataset, first: int, last: int) -> Callable[[int], np.ndarray]:
    """A function that brings one row of a block, which is read as a whole when the first of them is asked for."""
    block: list[np.ndarray] = []
    broken = False

    def read(row: int) -> np.ndarray:
        nonlocal broken
        if not block and not broken:
            try:
                block.append(pixels[first:last])
            except OSError:  # of some chunk, so the rows are read one by one
                broken = True
        try:
            return pixels[row] if broken else block[0][row - first]
        except OSError as error:
            raise Refusal(f"cannot be read: {' '.join(str(error).split())[:120]}") from None

    return read


def parquet_source(what: str, files: list[Path], names: list[str], wanted: Sequence[str]) -> Source:
    """Images in a column of bytes, or of the Hub's structs of ``bytes`` and ``path``; columns of scalars are kept.

    ``slide_path`` names the slide where no column ``slide`` does, as in medarc's TCGA-12K.

    Raises UserError where a file cannot be read or has no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                count += file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is not readable as Parquet, or cut: {text}") from None
        _image_column(path, schema)
        check_columns(str(path), wanted, _scalars(schema))
    if not count:
        raise UserError(f"{what} holds no rows")
    return Source(what, files, count, partial(_parquet_images, files, names))


def _image_column(path: Path, schema: pa.Schema) -> str:
    import pyarrow as pa

    def of_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(part.name == "bytes" and of_bytes(part.type) for part in kind.fields)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [column.name for column in schema if of_bytes(column.type)]
    chosen = found if len(found) == 1 else [name for name in IMAGE_COLUMNS if name in found]
    chosen = ["image"] if "image" in chosen else chosen
    if not found:
        raise UserError(f"{path} has no column of image bytes; its columns are: {shorten(schema.names, limit=12)}")
    if len(chosen) != 1:
        raise UserError(f"{path} has several columns of bytes: {shorten(found)}; call that of the images 'image'")
    return chosen[0]


def _scalars(schema: pa.Schema) -> list[str]:
    """Columns whose values are plain: text, numbers, truth, dates."""
    import pyarrow as pa

    plain = (
        *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string),
        *(pa.types.is_temporal, pa.types.is_decimal),
    )
    kinds = {c.name: c.type.value_type if pa.types.is_dictionary(c.type) else c.type for c in schema}
    return [name for name, kind in kinds.items() if any(test(kind) for test in plain)]


def _parquet_images(files: list[Path], names: list[str]) -> Iterator[Image]:
    import pyarrow.parquet as pq

    path_of: dict[str, str] = {}
    for path, name in zip(files, names):
        # A buffer makes it read page by page: a column of a whole row group may be as large as the file.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            row = 0
            for group in range(file.num_row_groups):
                for image, facts in _group_rows(file, group, path):
                    if isinstance(at := facts.get("slide_path"), str):
                        short = PurePosixPath(at).stem
                        facts.setdefault("slide", short if path_of.setdefault(short, at) == at else at)
                    listed = f"{path.name} [{row}]"
                    yield Image(f"{name}/{row}", listed, partial(_bytes_of, image), facts)
                    row += 1


def _group_rows(file: Any, group: int, path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The image's value and the facts of each row of a row group; a Refusal for all rows behind a broken page."""
    import pyarrow as pa

    image, scalars = _image_column(path, file.schema_arrow), _scalars(file.schema_arrow)
    left = file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(PARQUET_ROWS, [group], [image, *scalars], use_threads=False):
            columns = {name: batch.column(name) for name in scalars}
            for row, value in enumerate(batch.column(image)):
                facts = {name: _plain(column[row].as_py()) for name, column in columns.items()}
                left -= 1
                yield value, facts
    except (pa.ArrowException, OSError) as error:
        broken = Refusal(f"its part of the file cannot be read: {' '.join(str(error).split())[:100]}")
        yield from ((broken, {}) for _ in range(left))


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Refusal):
        raise value
    found = value.as_py()
    if isinstance(found, dict):
        if found["bytes"] is None and found.get("path"):
            raise Refusal(f"only a path is in the file ('{str(found['path'])[:80]}'), no bytes")
        found = found["bytes"]
    return refuse("no bytes") if found is None else found


def _plain(value: Any) -> Any:
    """A value as JSON has it: text, a number, true, false or null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
