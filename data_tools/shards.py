"""The shard set: plain WebDataset tars, a memory-mapped index beside each, a slides table and ``dataset.json``.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path, read_json, sha256, write_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
SHARD_BYTES = 256 << 20
EXTENSIONS = ("jpg", "png")

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
    """Write tiles into one tar and collect its index. The bytes depend only on what is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[Any, ...]] = []
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

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

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        info.uname = info.gname = "bigdata"  # as webdataset.TarWriter does
        self._tar.addfile(info, io.BytesIO(data))
        # addfile pads to whole blocks, so the data began that far before the end.
        return self._file.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def close(self) -> np.ndarray:
        """Finish the tar; return its index, an array of dtype :data:`INDEX`."""
        self._tar.close()
        self._file.close()
        return np.array(self.rows, dtype=INDEX)


class ShardWriter:
    """Write a shard set into ``folder`` (a temporary one: see :func:`~eosin.data_tools.files.atomic_dir`).

    Use :meth:`add` for single tiles or :meth:`append` for a whole tar written by another process, then :meth:`finish`.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._writer: TarWriter | None = None

    def add(self, key: str, image: bytes, extension: str, meta: dict[str, Any], slide: int) -> None:
        """Append one tile of slide number ``slide``."""
        self._open().add(key, image, extension, meta, slide)

    def append(self, part: Path, index: np.ndarray, slide: int) -> None:
        """Append every tile of the tar ``part``, all of slide number ``slide``, without decoding."""
        with part.open("rb") as file:
            for row in index:
                image = _read_at(file.fileno(), row["offset"], row["size"])
                header = _read_at(file.fileno(), row["offset"] - tarfile.BLOCKSIZE, 100)
                key, extension = header.rstrip(b"\0").decode().split(".", 1)
                meta = json.loads(_read_at(file.fileno(), row["meta_offset"], row["meta_size"]))
                self.add(key, image, extension, meta, slide)

    def finish(
        self, slides: pd.DataFrame, *, tile_size: int, mpp: float | None, config: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the last shard, the slides table and ``dataset.json``; return the latter's content."""
        self._close()
        write_slides(self.folder, slides)
        dataset = {
            "schema": SCHEMA,
            "kind": "eosin shard set",
            "tile_size": tile_size,
            "mpp": mpp,
            "tiles": sum(s["tiles"] for s in self.shards),
            "slides": len(slides),
            "shards": self.shards,
            "config": config,
        }
        write_json(self.folder / "dataset.json", dataset)
        return dataset

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
    """Read a shard set: ``len``, the bytes and the facts of any tile.

    Opening reads ``dataset.json`` and maps the indices; memory does not grow with the number of tiles.

    Raises:
        UserError: the folder is no shard set, of another schema version, or a file of it is missing or cut.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise UserError(f"{self.folder} does not exist; make a shard set with 'eosin tile' or 'eosin pack'")
        self.dataset = read_json(self.folder / "dataset.json", "the description of a shard set")
        if self.dataset.get("schema") != SCHEMA or self.dataset.get("kind") != "eosin shard set":
            raise UserError(
                f"{self.folder}/dataset.json has schema {self.dataset.get('schema')!r}; this version reads {SCHEMA}"
            )
        try:
            self.tile_size: int = self.dataset["tile_size"]
            self.mpp: float | None = self.dataset["mpp"]
            for shard in self.dataset["shards"]:
                if Path(shard["file"]).name != shard["file"] or len(shard["sha256"]) != 64:
                    raise KeyError(f"shard {shard['file']!r}")  # a file elsewhere is none of this set's
            self.tars = [self.folder / s["file"] for s in self.dataset["shards"]]
            self.indices = [self._map_index(tar, s) for tar, s in zip(self.tars, self.dataset["shards"])]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder}/dataset.json is incomplete or wrong ({error}); make the shard set again"
            ) from None
        self.starts = np.cumsum([0, *(len(i) for i in self.indices)])
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def identity(self) -> str:
        """SHA-256 over the shards' own: the same for the same tiles, wherever they lie."""
        return hashlib.sha256(" ".join(s["sha256"] for s in self.dataset["shards"]).encode()).hexdigest()

    def row(self, tile: int) -> np.void:
        """Index row of tile number ``tile``, a scalar of dtype :data:`INDEX`."""
        shard = int(np.searchsorted(self.starts, tile, side="right")) - 1
        return self.indices[shard][tile - self.starts[shard]]

    def image(self, tile: int) -> bytes:
        """The encoded image (JPEG or PNG) of tile number ``tile``."""
        row = self.row(tile)
        return _read_at(self._descriptor(tile), int(row["offset"]), int(row["size"]))

    def meta(self, tile: int) -> dict[str, Any]:
        """What is stored with tile number ``tile``: its key, x, y, mpp and whatever the maker knew of it."""
        row = self.row(tile)
        # The JSON's tar header lies one block before its data and begins with the member's name.
        block = _read_at(
            self._descriptor(tile),
            int(row["meta_offset"]) - tarfile.BLOCKSIZE,
            int(row["meta_size"]) + tarfile.BLOCKSIZE,
        )
        try:
            key = block[:100].rstrip(b"\0").decode().removesuffix(".json")
            return {"key": key} | json.loads(block[tarfile.BLOCKSIZE :])
        except ValueError:
            raise UserError(f"tile {tile} of {self.folder} is damaged; run 'eosin verify {self.folder}'") from None

    def column(self, name: str) -> np.ndarray:
        """One column of the whole index, [tiles]."""
        if not self.indices:
            return np.zeros(0, dtype=INDEX[name])
        return np.concatenate([i[name] for i in self.indices])

    def slides(self) -> pd.DataFrame:
        """The slides table, one row a slide."""
        import pandas as pd

        path = self.folder / "slides.parquet"
        if not path.is_file():
            raise UserError(f"{path} does not exist; the shard set is incomplete: run 'eosin verify {self.folder}'")
        try:
            return pd.read_parquet(path)
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def _descriptor(self, tile: int) -> int:
        shard = int(np.searchsorted(self.starts, tile, side="right")) - 1
        if shard not in self._files:
            self._files[shard] = os.open(self.tars[shard], os.O_RDONLY)
        return self._files[shard]

    def _map_index(self, tar: Path, shard: dict[str, Any]) -> np.ndarray:
        path = index_path(tar)
        mend = f"run 'eosin verify {self.folder}'"
        if not tar.is_file() or not path.is_file():
            raise UserError(f"{tar if path.is_file() else path} is missing; {mend}")
        if tar.stat().st_size != shard["bytes"]:
            raise UserError(f"{tar} has {tar.stat().st_size} bytes where {shard['bytes']} were written; {mend}")
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not readable as an index ({error}); {mend}") from None
        if index.dtype != INDEX or len(index) != shard["tiles"]:
            raise UserError(f"{path} does not fit {tar.name}; {mend}")
        return index


def write_slides(folder: Path, slides: pd.DataFrame) -> None:
    """Write the slides table of the shard set in ``folder``, atomically."""
    with atomic_path(folder / "slides.parquet") as temporary:
        slides.to_parquet(temporary, index=False)


def index_path(tar: Path) -> Path:
    """Path of the index beside a tar."""
    return tar.with_suffix(".index.npy")


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


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise EOFError(f"{len(data)} of {size} bytes at offset {offset}: the shard is cut")
    return data
