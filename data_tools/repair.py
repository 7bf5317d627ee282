"""An index rebuilt from what its tar and the slides table prove: byte for byte what was written, or not at all.

The tar's headers give offsets and sizes, its images the checksums, its JSON the place, the resolution and the slide's
name, and the slides table the number of that slide. This module guesses nothing and changes neither tars nor tables.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eosin.data_tools.errors import Refusal
from eosin.data_tools.files import atomic_path, sha256
from eosin.data_tools.shards import EXTENSIONS, INDEX, index_path


class TarTile(NamedTuple):
    """Where a tile lies in its tar: its key, and first byte and number of bytes of its image and of its JSON."""

    key: str
    offset: int
    size: int
    meta_offset: int
    meta_size: int


def tar_tiles(tar: Path) -> list[TarTile]:
    """The tiles of a tar in order, by its headers alone. Raises Refusal where it is no tar of images and their JSON."""
    try:
        return list(_walk(tar))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Refusal(f"not readable as a tar: {error}") from None


def rebuild_index(tar: Path, shard: Mapping[str, Any], numbers: Mapping[str, int]) -> np.ndarray:
    """The index of a tar, [tiles] of dtype :data:`~eosin.data_tools.shards.INDEX`, without a look at the old one.

    Args:
        shard: what ``dataset.json`` says of the tar: tiles, bytes, sha256.
        numbers: row in the slides table of each slide that has one row there.

    Raises:
        Refusal: the tar is not what was written, or does not hold all that its index held.
    """
    if not tar.is_file() or tar.stat().st_size != shard["bytes"] or sha256(tar) != shard["sha256"]:
        raise Refusal(f"{tar.name} is not what was written, and proves nothing")
    tiles = tar_tiles(tar)
    if len(tiles) != shard["tiles"]:
        raise Refusal(f"{tar.name} has {len(tiles)} tiles where dataset.json says {shard['tiles']}")
    rows = []
    with tar.open("rb") as file:
        for tile in tiles:
            file.seek(tile.offset)
            crc = zlib.crc32(file.read(tile.size))
            file.seek(tile.meta_offset)
            slide, x, y, mpp = _facts(tile.key, file.read(tile.meta_size), numbers)
            rows.append((*tile[1:], crc, slide, x, y, mpp))
    try:
        return np.array(rows, dtype=INDEX)
    except (OverflowError, ValueError, TypeError) as error:
        raise Refusal(f"a JSON of {tar.name} holds what no index can: {error}") from None


def write_index(tar: Path, index: np.ndarray) -> None:
    """Write the index beside a tar, atomically."""
    with atomic_path(index_path(tar)) as temporary:
        np.save(temporary, index, allow_pickle=False)


def _facts(key: str, text: bytes, numbers: Mapping[str, int]) -> tuple[int, Any, Any, Any]:
    """Slide number, x, y and mpp that a tile's JSON tells."""
    try:
        facts = json.loads(text)
        x, y, mpp = facts["x"], facts["y"], facts["mpp"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refusal(f"the JSON of {key} is not readable or lacks x, y or mpp") from None
    if "slide" not in facts:
        raise Refusal(f"the JSON of {key} does not name its slide, which only the index knew")
    name = str(facts["slide"])
    if name not in numbers:
        raise Refusal(f"slides.parquet does not have just one row for slide {name!r} of {key}")
    return numbers[name], x, y, np.nan if mpp is None else mpp


def _walk(tar: Path) -> Iterator[TarTile]:
    pending: tuple[str, tarfile.TarInfo] | None = None
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            key, _, extension = info.name.partition(".")
            if not info.isfile() or "/" in key or extension not in (*EXTENSIONS, "json"):
                raise ValueError(f"a member '{info.name[:60]}' that is neither an image nor its JSON")
            if pending is None and extension in EXTENSIONS:
                pending = key, info
            elif pending is not None and extension == "json" and pending[0] == key:
                image = pending[1]
                yield TarTile(key, image.offset_data, image.size, info.offset_data, info.size)
                pending = None
            else:
                raise ValueError(f"'{info.name[:60]}' does not follow its image")
    if pending is not None:
        raise ValueError(f"'{pending[0]}' has no JSON")
