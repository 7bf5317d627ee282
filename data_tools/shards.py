"""The shard set: plain WebDataset tars, an index beside each, a slides table and ``dataset.json``.

    SHARDS/
      dataset.json              schema, tile size, mpp, counts, sha256 of every shard, the config that made it
      slides.parquet            one row a slide, refused slides included
      tiles-000000.tar          <key>.jpg + <key>.json, readable with `tar tf` and webdataset.WebDataset
      tiles-000000.index.npy    one row a tile: where its bytes lie, slide number, x, y, mpp, crc32

Any tile is one ``pread``. This module never decodes an image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path, parse_json, sha256, write_json
from eosin.data_tools.store import Local, open_store

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
SHARD_BYTES = 256 << 20
ROWS_IN_MEMORY = 1 << 20  # tiles of a set whose whole index, 44 MiB, is kept; of a larger one it is read row by row
EXTENSIONS = ("jpg", "png")
MAX_SIDE = 8192  # pixels; a tile larger than this is refused before it is decoded

INDEX = np.dtype(
    [
        ("offset", "<i8"),  # of the image's bytes in the tar
        ("size", "<i4"),
        ("meta_offset", "<i8"),  # of the JSON's bytes
        ("meta_size", "<i4"),
        ("crc32", "<u4"),  # of the image's bytes
        ("slide", "<i4"),  # row in the slides table
        ("x", "<i4"),  # left edge in level-0 pixels
        ("y", "<i4"),
        ("mpp", "<f4"),  # µm per pixel of the tile, NaN where unknown
    ]
)


def slide_key(name: str) -> str:
    """Turn a slide's name into a key without dots or slashes; different names give different keys.

    Characters outside ``[A-Za-z0-9_-]`` become ``=`` and two hexadecimal digits a UTF-8 byte. Long names are cut and
    closed with a hash, since a tar header holds 100 characters.
    """
    key = "".join(c if re.match(r"[A-Za-z0-9_-]", c) else "".join(f"={b:02x}" for b in c.encode()) for c in name)
    if len(key) > 64:
        key = f"{key[:46]}=h{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return key


def tile_key(slide: str, x: int, y: int, mpp: float) -> str:
    """``<slide>_<x>_<y>_<µm per px × 1000>``, unique for a tile of a slide."""
    return f"{slide_key(slide)}_{x}_{y}_{round(mpp * 1000)}"


class TarWriter:
    """Write tiles into one tar and collect its index. The bytes depend only on what is added.

    Headers are tarfile's; what its writer does beside them took longer than encoding a tile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[Any, ...]] = []
        self._file = path.open("wb")

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def add(self, key: str, image: bytes, extension: str, meta: dict[str, Any], slide: int = 0) -> None:
        """Append ``<key>.<extension>`` and ``<key>.json``. ``meta`` holds x, y and mpp (None: unknown)."""
        offset = self._member(f"{key}.{extension}", image)
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        meta_offset = self._member(f"{key}.json", text)
        mpp = np.nan if meta["mpp"] is None else meta["mpp"]
        crc = zlib.crc32(image)
        self.rows.append((offset, len(image), meta_offset, len(text), crc, slide, meta["x"], meta["y"], mpp))

    def copy(self, source: int, row: np.void, slide: int) -> None:
        """Append the tile with index row ``row`` of a tar, open as ``source``, as it lies there."""
        begin, end = int(row["offset"]) - tarfile.BLOCKSIZE, int(row["meta_offset"]) + _padded(int(row["meta_size"]))
        moved = row.copy()
        moved["slide"] = slide
        for name in ("offset", "meta_offset"):
            moved[name] += self._file.tell() - begin
        self._file.write(_read_at(source, begin, end - begin))
        self.rows.append(tuple(moved.tolist()))

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        info.uname = info.gname = "bigdata"  # as webdataset.TarWriter does
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.tell()
        self._file.write(data.ljust(_padded(len(data)), b"\0"))
        return offset

    def close(self) -> np.ndarray:
        """Finish the tar; return its index, an array of dtype :data:`INDEX`."""
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.close()
        return np.array(self.rows, dtype=INDEX)


class ShardWriter:
    """Write a shard set into ``folder`` (a temporary one: see :func:`~eosin.data_tools.files.atomic_dir`).

    Use :meth:`add` for each tile, then :meth:`finish`.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._writer: TarWriter | None = None

    def add(self, key: str, image: bytes, extension: str, meta: dict[str, Any], slide: int) -> None:
        """Append one tile of slide number ``slide``."""
        self._open().add(key, image, extension, meta, slide)

    def finish(
        self, slides: pd.DataFrame, *, tile_size: int, mpp: float | None, config: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the last shard, the slides table and ``dataset.json``; return the latter's content."""
        self._close()
        return write_dataset(self.folder, self.shards, slides, tile_size=tile_size, mpp=mpp, config=config)

    def _open(self) -> TarWriter:
        if self._writer is not None and self._writer.nbytes >= self.shard_bytes:
            self._close()
        if self._writer is None:
            self._writer = TarWriter(self.folder / f"tiles-{len(self.shards):06d}.tar")
        return self._writer

    def _close(self) -> None:
        if self._writer is None:
            return
        path, index = self._writer.path, self._writer.close()
        np.save(index_path(path), index, allow_pickle=False)
        self.shards.append(
            {"file": path.name, "tiles": len(index), "bytes": path.stat().st_size, "sha256": sha256(path)}
        )
        self._writer = None


class ShardSet:
    """Read a shard set, here or behind a URL: ``len``, the bytes and the facts of any tile.

    Opening reads ``dataset.json``; a shard is looked at when its first tile is asked for. Memory grows with the number
    of shards, not of tiles.

    Raises:
        UserError: the folder is no shard set, of another schema version, or a file of it is missing or cut.
    """

    def __init__(self, folder: Path | str) -> None:
        self.store = open_store(folder)
        self.name = self.store.name
        if isinstance(self.store, Local) and not self.store.folder.exists():
            raise UserError(f"{self.name} does not exist; make a shard set with 'eosin tile' or 'eosin pack'")
        self.dataset = parse_json(
            lambda: self.store.read_all("dataset.json"), f"{self.name}/dataset.json", "the description of a shard set"
        )
        if self.dataset.get("schema") != SCHEMA or self.dataset.get("kind") != "eosin shard set":
            raise UserError(
                f"{self.name}/dataset.json has schema {self.dataset.get('schema')!r}; this version reads {SCHEMA}"
            )
        try:
            self.tile_size = _number(self.dataset, "tile_size", 1, MAX_SIDE)
            self.mpp: float | None = self.dataset["mpp"]
            self.slide_count = _number(self.dataset, "slides", 0)
            for shard in self.dataset["shards"]:
                if Path(shard["file"]).name != shard["file"] or len(shard["sha256"]) != 64:
                    raise KeyError(f"shard {shard['file']!r}")  # a file elsewhere is none of this set's
                _number(shard, "bytes", 0)
            self.starts = np.cumsum([0, *(_number(s, "tiles", 0) for s in self.dataset["shards"])])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name}/dataset.json is incomplete or wrong ({error}); make the shard set again"
            ) from None
        self._begins: dict[int, int] = {}  # where the rows begin in the index of each shard seen
        there = self.store.files()
        for shard in self.dataset["shards"] if there is not None else []:
            for file in (shard["file"], index_name(shard["file"])):
                if file not in there:  # type: ignore[operator]
                    raise UserError(f"{self.name}/{file} is missing; {self._mend}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def folder(self) -> Path:
        """Where the set lies on this machine. Raises UserError where it does not."""
        if not isinstance(self.store, Local):
            raise UserError(f"{self.name} is not on this machine; copy it here to change it or to look at its files")
        return self.store.folder

    @property
    def tars(self) -> list[Path]:
        """Paths of the shards."""
        return [self.folder / shard["file"] for shard in self.dataset["shards"]]

    @property
    def identity(self) -> str:
        """SHA-256 over the shards' own: the same for the same tiles, wherever they lie."""
        return hashlib.sha256(" ".join(s["sha256"] for s in self.dataset["shards"]).encode()).hexdigest()

    def rows(self, tiles: np.ndarray) -> np.ndarray:
        """Index rows of the tiles numbered ``tiles``, [n], of dtype :data:`INDEX`."""
        tiles = np.asarray(tiles, dtype=np.int64)
        shards = self._shards_of(tiles)
        if len(self) <= ROWS_IN_MEMORY:
            return self._rows[tiles]
        size = INDEX.itemsize
        fresh = [self.dataset["shards"][n]["file"] for n in set(shards.tolist()) - self._begins.keys()]
        self.store.prefetch([(f, 0, 0) for f in fresh] + [(index_name(f), 0, 1) for f in fresh])
        read = []
        for shard, place in zip(shards.tolist(), (tiles - self.starts[shards]).tolist()):
            file = index_name(self.dataset["shards"][shard]["file"])
            begin = self._begin(shard) + place * size
            try:
                read.append(self.store.read(file, begin, size))
            except (EOFError, OSError) as error:
                raise UserError(f"the index of {self.name} cannot be read: {error}") from None
        return self._checked(np.frombuffer(b"".join(read), dtype=INDEX))

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._checked(np.concatenate([np.zeros(0, dtype=INDEX), *self.indices()]))

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        if ((rows["slide"] < 0) | (rows["slide"] >= self.slide_count)).any():
            raise UserError(f"{self.name}: the index names slides that are not in the slides table; {self._mend}")
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def row(self, tile: int) -> np.void:
        """Index row of tile number ``tile``, a scalar of dtype :data:`INDEX`."""
        return self.rows(np.array([tile]))[0]

    def image(self, tile: int) -> bytes:
        """The encoded image (JPEG or PNG) of tile number ``tile``. Raises EOFError or OSError where it is not there."""
        (found,) = self.images(np.array([tile]), self.rows(np.array([tile])))
        if isinstance(found, Exception):
            raise found
        return found

    def images(self, tiles: np.ndarray, rows: np.ndarray) -> Iterator[bytes | Exception]:
        """The encoded images of ``tiles``, [n], with index rows ``rows``; for one out of reach, what was raised."""
        files = [self.dataset["shards"][shard]["file"] for shard in self._shards_of(tiles).tolist()]
        wanted = list(zip(files, rows["offset"].tolist(), rows["size"].tolist()))
        self.store.prefetch([where for where in wanted if min(where[1:]) >= 0])
        read = self.store.read
        for where in wanted:
            try:
                yield read(*where)
            except (EOFError, OSError, ValueError) as error:  # the last of a damaged row of the index
                yield error

    def meta(self, tile: int) -> dict[str, Any]:
        """What is stored with tile number ``tile``: its key, x, y, mpp and whatever the maker knew of it."""
        row = self.row(tile)
        # The JSON's tar header lies one block before its data and begins with the member's name.
        (shard,) = self._shards_of(np.array([tile]))
        block = self.store.read(
            self.dataset["shards"][shard]["file"],
            int(row["meta_offset"]) - tarfile.BLOCKSIZE,
            int(row["meta_size"]) + tarfile.BLOCKSIZE,
        )
        try:
            key = block[:100].rstrip(b"\0").decode().removesuffix(".json")
            return {"key": key} | json.loads(block[tarfile.BLOCKSIZE :])
        except ValueError:
            raise UserError(f"tile {tile} of {self.name} is damaged; {self._mend}") from None

    def indices(self) -> Iterator[np.ndarray]:
        """The index of each shard, whole, [tiles of the shard] of dtype :data:`INDEX`."""
        files = [shard["file"] for shard in self.dataset["shards"]]
        self.store.prefetch([(f, 0, 0) for f in files] + [(index_name(f), 0, 1 << 40) for f in files])
        for number, shard in enumerate(self.dataset["shards"]):
            begin = self._begin(number)
            yield np.frombuffer(self.store.read_all(index_name(shard["file"])), dtype=INDEX, offset=begin)

    def column(self, name: str) -> np.ndarray:
        """One column of the whole index, [tiles]."""
        parts = [index[name].copy() for index in self.indices()]
        return np.concatenate([np.zeros(0, dtype=INDEX[name]), *parts])

    def slides(self) -> pd.DataFrame:
        """The slides table, one row a slide."""
        import pandas as pd

        path = f"{self.name}/slides.parquet"
        try:
            return pd.read_parquet(io.BytesIO(self.store.read_all("slides.parquet")))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; the shard set is incomplete: {self._mend}") from None
        except (ValueError, OSError) as error:  # pyarrow's errors are of these
            raise UserError(f"{path} is not readable as Parquet ({' '.join(str(error).split())[:100]})") from None

    def table(self) -> pd.DataFrame:
        """One row a tile: everything known of the tile, joined with everything known of its slide."""
        import pandas as pd

        tiles = pd.DataFrame([self.meta(i) for i in range(len(self))])
        slides = self.slides()
        of_slide = slides.iloc[self.column("slide")].reset_index(drop=True)
        # A tile's own knowledge goes before that of its slide.
        return pd.concat([tiles, of_slide[[c for c in slides.columns if c not in tiles.columns]]], axis=1)

    @property
    def _mend(self) -> str:
        return f"{'' if isinstance(self.store, Local) else 'copy it here and '}run 'eosin verify {self.name}'"

    def _shards_of(self, tiles: np.ndarray) -> np.ndarray:
        if len(tiles) and (tiles.min() < 0 or tiles.max() >= len(self)):
            raise IndexError(f"{self.name} has tiles 0 to {len(self) - 1}")
        return np.searchsorted(self.starts, tiles, side="right") - 1

    def _begin(self, number: int) -> int:
        """Where the rows begin in the index of shard ``number``, whose files are looked at the first time."""
        if number in self._begins:
            return self._begins[number]
        shard = self.dataset["shards"][number]
        tar, file = f"{self.name}/{shard['file']}", index_name(shard["file"])
        path = f"{self.name}/{file}"
        try:
            if self.store.size(shard["file"]) != shard["bytes"]:
                size = self.store.size(shard["file"])
                raise UserError(f"{tar} has {size} bytes where {shard['bytes']} were written; {self._mend}")
            size = self.store.size(file)
            head = io.BytesIO(self.store.read(file, 0, min(size, 4096)))
            if np.lib.format.read_magic(head) != (1, 0):
                raise ValueError("of another version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        except FileNotFoundError as error:
            raise UserError(f"{tar if file not in str(error) else path} is missing; {self._mend}") from None
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not readable as an index ({error}); {self._mend}") from None
        if dtype != INDEX or shape != (shard["tiles"],) or size != head.tell() + shard["tiles"] * INDEX.itemsize:
            raise UserError(f"{path} does not fit {shard['file']}; {self._mend}")
        return self._begins.setdefault(number, head.tell())


def _number(described: dict[str, Any], key: str, least: int, most: int = 1 << 62) -> int:
    value = described[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {value!r}")
    return value


def write_dataset(
    folder: Path,
    shards: list[dict[str, Any]],
    slides: pd.DataFrame,
    *,
    tile_size: int,
    mpp: float | None,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Write the slides table and, last, ``dataset.json``; return the latter's content.

    Args:
        shards: file, tiles, bytes and sha256 of each.
        mpp: µm/px of all tiles, None where it is unknown or there are several.
    """
    write_slides(folder, slides)
    dataset = {
        "schema": SCHEMA,
        "kind": "eosin shard set",
        "tile_size": tile_size,
        "mpp": mpp,
        "tiles": sum(s["tiles"] for s in shards),
        "slides": len(slides),
        "shards": shards,
        "config": config,
    }
    write_json(folder / "dataset.json", dataset)
    return dataset


def write_slides(folder: Path, slides: pd.DataFrame) -> None:
    """Write the slides table of the shard set in ``folder``, atomically."""
    with atomic_path(folder / "slides.parquet") as temporary:
        slides.to_parquet(temporary, index=False)


def index_path(tar: Path) -> Path:
    """Path of the index beside a tar."""
    return tar.with_name(index_name(tar.name))


def index_name(tar: str) -> str:
    """Name of the index beside a tar."""
    return f"{tar.removesuffix('.tar')}.index.npy"


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of a tar's regular files, in order; no name is ever used as a path.

    Raises tarfile.TarError or EOFError when the tar is cut or broken.
    """
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            if info.isfile():
                data = archive.extractfile(info).read()  # type: ignore[union-attr]
                if len(data) != info.size:
                    raise EOFError(f"{info.name} is cut: {len(data)} of {info.size} bytes")
                yield info.name, data


def samples(tar: Path) -> Iterable[tuple[str, dict[str, bytes]]]:
    """Group a tar's members by key as WebDataset does: ``(key, {extension: bytes})``."""
    key, parts = None, {}
    for name, data in members(tar):
        stem, _, extension = name.partition(".")
        if stem != key and key is not None:
            yield key, parts
            parts = {}
        key = stem
        parts[extension] = data
    if key is not None:
        yield key, parts


def _padded(size: int) -> int:
    """Bytes that so many take in a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise EOFError(f"{len(data)} of {size} bytes at offset {offset}: the shard is cut")
    return data
