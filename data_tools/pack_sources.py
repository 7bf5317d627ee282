"""Where ``eosin pack`` takes images from: what is given, found out by what is there, as one stream of images. Folders
and zips are read here. Nothing is ever unpacked to disk, and no name in an archive is ever used as a path.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from eosin.data_tools.errors import Refusal, UserError, nearest
from eosin.data_tools.files import read_csv
from eosin.data_tools.sources import find_files, shorten, unique_names

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
# Sources that hold many images, by the ending of their names.
CONTAINERS = {".zip": "zip", ".tar": "tar", ".parquet": "Parquet", ".h5": "HDF5", ".hdf5": "HDF5"}
# The tile itself owns these names.
RESERVED = ("key", "x", "y", "mpp")
MAX_BYTES = 1 << 29  # of one encoded image
DICOM = "DICOM is not read; convert X-rays to PNG or TIFF of 16 bits, and give slides to 'eosin tile'"


@dataclass(frozen=True)
class Image:
    """One image to be packed.

    Attributes:
        name: unique in its source; the tile's key is made of it.
        listed: what a list of refusals calls it.
        read: brings the file's bytes, or pixels [H, W] or [H, W, C]; raises Refusal where there are none.
        facts: what its source knows of it, by column; values of JSON.
    """

    name: str
    listed: str
    read: Callable[[], bytes | np.ndarray]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Images that may be read one after another, any number of times, in the same order.

    Attributes:
        what: names it in a message.
        files: what it is made of.
        count: how many images, those included that will be refused.
        images: starts from the first.
        notices: what the user should know, one line each.
    """

    what: str
    files: list[Path]
    count: int
    images: Callable[[], Iterator[Image]]
    notices: list[str] = field(default_factory=list)


def open_source(
    given: Sequence[Path], manifest: Path | None = None, label: str | None = None, group: str | None = None
) -> Source:
    """Find out what is given, by what is there, and list it.

    Args:
        given: folders of images or of containers, or container files, all of one kind.
        manifest: CSV about the images of one folder or zip.
        label: a column that must be there.
        group: another.

    Raises:
        UserError: nothing there, of several kinds, broken as a whole, or without such a column.
    """
    kind, files, notices = _find(given, manifest)
    what = shorten([str(path) for path in given], limit=3)
    if kind in ("folder", "zip"):
        trees = [_folder_tree(path, manifest) if kind == "folder" else _zip_tree(path) for path in files]
        notices += [notice for tree in trees for notice in tree.notices]
        return _tree_source(what, trees, manifest, label, group, notices)
    if manifest:
        raise UserError(f"--manifest goes with a folder of images or a zip; {kind} files carry their own columns")
    names = _container_names(files, given)
    wanted = [column for column in (label, group) if column]
    from eosin.data_tools import pack_tables, pack_tars

    readers = {"tar": pack_tars.tar_source, "Parquet": pack_tables.parquet_source, "HDF5": pack_tables.hdf5_source}
    return readers[kind](what, files, names, wanted)


def check_columns(where: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raise UserError where a wanted column is missing."""
    for column in wanted:
        if column not in there:
            raise UserError(f"{where} has no column '{column}'; {nearest(column, list(there))}")


def refuse(reason: str) -> bytes:
    """Raise Refusal: how an :class:`Image` is read that has nothing to be read."""
    raise Refusal(reason)


def readable(name: str) -> str:
    """A name whose bytes are no UTF-8, with these as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_escape(name: str) -> None:
    """Raise Refusal for a member whose name leads out of its archive."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise Refusal("its name leads out of the archive")


def _find(given: Sequence[Path], manifest: Path | None) -> tuple[str, list[Path], list[str]]:
    """The kind of what is given, its files (or folders), and notices."""
    kinds: dict[str, list[Path]] = {}
    notices = []
    for path in given:
        if (path / "dataset.json").is_file():
            raise UserError(f"{path} is a shard set already; to pack it anew give its tars one by one")
        if path.is_dir():
            inside: dict[str, list[Path]] = {}
            for file in find_files(path, tuple(CONTAINERS)):
                inside.setdefault(CONTAINERS[file.suffix.lower()], []).append(file)
            if manifest or find_files(path, SUFFIXES):
                notices += [
                    f"{path} also holds {kind} files, left alone: {len(files)}" for kind, files in inside.items()
                ]
                inside = {"folder": [path]}
            if not inside:
                advice = f"; {DICOM}" if find_files(path, (".dcm",)) else ""
                raise UserError(f"{path} holds no image; known endings: {' '.join((*SUFFIXES, *CONTAINERS))}{advice}")
        elif path.is_file() and path.suffix.lower() in CONTAINERS:
            inside = {CONTAINERS[path.suffix.lower()]: [path]}
        else:
            advice = DICOM if path.suffix.lower() == ".dcm" else f"give folders, or files of {' '.join(CONTAINERS)}"
            raise UserError(f"{path} is not a folder of images, nor a file that holds images; {advice}")
        for kind, files in inside.items():
            kinds.setdefault(kind, []).extend(files)
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} {kind}" for kind, files in kinds.items())
        raise UserError(f"images in several kinds of sources: {found}; give those of one kind, and the others apart")
    (kind, files), *_ = kinds.items()
    twice = [path for path, n in Counter(file.resolve() for file in files).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each source once")
    return kind, files, notices


def _container_names(files: list[Path], given: Sequence[Path]) -> list[str]:
    """A name for each file, relative to the folder that was given, if one was."""
    folders = [path for path in given if path.is_dir()]
    roots = [next((folder for folder in folders if folder in file.parents), file.parent) for file in files]
    return unique_names([(Path(file.name), file.relative_to(root), file) for file, root in zip(files, roots)])


# Folders and zips: files under names that are paths, with a manifest or without.


@dataclass(frozen=True)
class _Tree:
    root: Path
    paths: list[PurePosixPath]  # of its images
    shared: int  # folders that lead to all of them and say nothing
    read: Callable[[PurePosixPath], bytes]
    notices: list[str] = field(default_factory=list)


def _folder_tree(folder: Path, manifest: Path | None) -> _Tree:
    found = [] if manifest else [PurePosixPath(path.relative_to(folder)) for path in find_files(folder, SUFFIXES)]
    return _Tree(folder, found, 0, lambda path: _read_file(folder / path))


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refusal(f"{path.stat().st_size} bytes in one file, over the bound of {MAX_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        raise Refusal("no such file") from None
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None


def _zip_tree(file: Path) -> _Tree:
    try:
        archive = zipfile.ZipFile(file)  # open as long as its images are read
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file} is not a readable zip, or cut: {error}") from None
    members = [info for info in archive.infolist() if not info.is_dir()]
    if sum(info.compress_size for info in members) > file.stat().st_size:
        raise UserError(f"{file} is not a zip to be trusted: its members overlap")
    images = {PurePosixPath(info.filename): info for info in members if _is_image(PurePosixPath(info.filename))}
    n_images = sum(_is_image(PurePosixPath(info.filename)) for info in members)
    if n_images > len(images):
        raise UserError(f"{file} holds two images of one name; make the zip again without")
    if not images:
        raise UserError(f"{file} holds no image; known endings: {' '.join(SUFFIXES)}")
    paths = sorted(images)
    shared = min(len(path.parts) for path in paths) - 1
    while len({path.parts[:shared] for path in paths}) > 1:
        shared -= 1
    others = [info.filename for info in members if not _is_image(PurePosixPath(info.filename))]
    notices = [f"{file}: members that are no images: {len(others)}, {shorten(others, limit=3)}"] if others else []
    return _Tree(file, paths, shared, lambda path: _read_member(archive, images.get(path)), notices)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(
        part.startswith((".", "__MACOSX")) and part != ".." for part in path.parts
    )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bytes:
    if info is None:
        raise Refusal("no such file")
    refuse_escape(info.filename)
    if info.flag_bits & 0x1:
        raise Refusal("encrypted; decrypt the zip first")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The decoders of other methods have no bound on what they make of a few bytes.
        raise Refusal(f"compressed by method {info.compress_type}; stored and deflated members are read")
    if info.file_size > MAX_BYTES:
        raise Refusal(f"{info.file_size} bytes in one member, over the bound of {MAX_BYTES}")
    try:
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)  # no more is unpacked, whatever the member holds
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise Refusal(f"cannot be unpacked: {' '.join(str(error).split())[:100]}") from None
    if len(data) != info.file_size:
        raise Refusal(f"cut: {len(data)} of {info.file_size} bytes")
    return data


def _tree_source(
    what: str, trees: list[_Tree], manifest: Path | None, label: str | None, group: str | None, notices: list[str]
) -> Source:
    if manifest:
        if len(trees) > 1:
            raise UserError("--manifest goes with one folder or one zip")
        paths, facts = _listed(manifest, label, group)
        rows = [(trees[0], path) for path in paths]
        names = unique_names([(Path(path),) for path in paths])
    else:
        for option, column in (("--label", label), ("--group", group)):
            if column not in (None, "label"):
                raise UserError(f"{option} {column} names a column of a manifest; give --manifest")
        prefixes = unique_names([(Path(tree.root.name), tree.root) for tree in trees]) if len(trees) > 1 else [""]
        rows = [(tree, path) for tree in trees for path in tree.paths]
        ways = [path.parts[tree.shared :] for tree, path in rows]
        facts = [{"label": readable(way[0])} if len(way) > 1 else {} for way in ways]
        names = unique_names([(Path(p, path),) for p, tree in zip(prefixes, trees) for path in tree.paths])

    def images() -> Iterator[Image]:
        for (tree, path), name, known in zip(rows, names, facts):
            listed = path.as_posix() if len(trees) == 1 else f"{tree.root}: {path}"
            yield Image(readable(name), readable(listed), partial(tree.read, path), known)

    folders = all(tree.root.is_dir() for tree in trees)
    files = [tree.root / path for tree, path in rows] if folders else [tree.root for tree in trees]
    return Source(what, files, len(rows), images, notices)


def _listed(manifest: Path, label: str | None, group: str | None) -> tuple[list[PurePosixPath], list[dict[str, Any]]]:
    """Paths and facts of a manifest's images."""
    rows = read_csv(manifest, ["path"])
    if not rows:
        raise UserError(f"{manifest} lists no image")
    for option, column in (("--label", label), ("--group", group)):
        if column is not None and column not in rows[0]:
            raise UserError(f"{manifest} has no column '{column}' ({option}); {nearest(column, list(rows[0]))}")
    taken = [column for column in rows[0] if column in RESERVED]
    if taken:
        raise UserError(f"{manifest} has a column '{taken[0]}', which the tile itself owns; rename it")
    paths = [_inside(row["path"], f"{manifest} line {line}") for line, row in enumerate(rows, start=2)]
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise UserError(f"{manifest} lists {twice[0]} twice")
    return paths, [{column: value for column, value in row.items() if column != "path"} for row in rows]


def _inside(text: str, where: str) -> PurePosixPath:
    """A relative path that stays inside its folder."""
    path = PurePosixPath(text.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UserError(f"{where}: path '{text}' must be relative and stay inside the folder")
    return path
