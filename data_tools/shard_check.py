"""Whether one shard is whole: its bytes, its tiles' images and JSON, and the index beside it.

Only an index is ever written, and only where :func:`check_shard` is told to.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.errors import Refusal
from eosin.data_tools.files import sha256
from eosin.data_tools.repair import TarTile, rebuild_index, tar_tiles, write_index
from eosin.data_tools.shards import INDEX, index_name, index_path

MOST_PROBLEMS = 20  # of one shard that are told one by one
Job = tuple[dict[str, Any], np.ndarray | None]
Row = tuple[Any, ...]  # of the index, as Python's own numbers


@dataclass(frozen=True)
class Slides:
    """Of each row of the slides table: its name, and width, height and µm/px of its finest level, [n, 3], or NaN."""

    names: list[str]
    sizes: np.ndarray

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Row of each name that only one row has."""
        count = Counter(self.names)
        return {name: number for number, name in enumerate(self.names) if count[name] == 1}


@dataclass(frozen=True)
class Rules:
    """What holds for every tile of a set; None where it is not known."""

    tile_size: int
    mpps: list[float] | None
    slides: Slides | None


@dataclass
class Found:
    """What is found in one shard; the hashes of its keys, uint64 [tiles], and its tiles a slide number."""

    problems: list[str] = field(default_factory=list)
    further: int = 0
    wrong_index: str = ""  # the first problem of the index
    repaired: bool = False
    lost: bool = False
    decoded: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    slides: tuple[np.ndarray, np.ndarray] | None = None

    def say(self, problem: str) -> None:
        """Add a problem; of many, only the number is kept."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
        else:
            self.further += 1

    def say_index(self, problem: str) -> None:
        """Add a problem that a right index would not have."""
        self.wrong_index = self.wrong_index or problem
        self.say(problem)


def check_shard(job: Job, *, folder: Path, rules: Rules, repair: bool) -> Found:
    """Judge a shard; with ``repair``, first write its index again where that is wrong and can be proved.

    Args:
        job: what ``dataset.json`` says of the shard, and the numbers of its tiles to be decoded, None: all.
    """
    shard, decode = job
    tar = folder / shard["file"]
    found = _judge(tar, shard, decode, rules)
    if not repair or not found.wrong_index or found.lost:
        return found
    try:
        if rules.slides is None:
            raise Refusal("slides.parquet, which numbers the slides, is not readable")
        index = rebuild_index(tar, shard, rules.slides.numbers)
    except Refusal as refusal:
        found.problems.append(f"{index_name(tar.name)}: cannot be rebuilt: {refusal}")
        return found
    write_index(tar, index)
    return replace(_judge(tar, shard, decode, rules), repaired=True, wrong_index=found.wrong_index)


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """64 bits of each key: 100 million keys stay within a gigabyte."""
    encoded = (key.encode(errors="surrogateescape") for key in keys)
    return np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in encoded), np.uint64)


def _judge(tar: Path, shard: dict[str, Any], decode: np.ndarray | None, rules: Rules) -> Found:
    """All that can be told of one shard."""
    found = Found()
    index: np.ndarray | None = None
    try:
        index = _read_index(index_path(tar))
        found.slides = np.unique(index["slide"], return_counts=True)
    except Refusal as refusal:
        found.say_index(f"{index_name(tar.name)}: {refusal}")
    if not tar.is_file():
        found.lost = True
        found.say(f"{tar.name}: missing")
        return found
    size = tar.stat().st_size
    if size != shard["bytes"]:
        found.lost = True
        what = "cut" if size < shard["bytes"] else "longer than written"
        found.say(f"{tar.name}: {what}: {size} of {shard['bytes']} bytes")
        return found
    if sha256(tar) != shard["sha256"]:
        found.lost = True
        found.say(f"{tar.name}: its bytes are not those that were written (sha256 differs)")
    try:
        tiles = tar_tiles(tar)
    except Refusal as refusal:
        found.say(f"{tar.name}: {refusal}")
        return found
    found.keys = hash_keys(tile.key for tile in tiles)
    if len(tiles) != shard["tiles"]:
        found.say(f"{tar.name}: {len(tiles)} tiles in the tar, {shard['tiles']} in dataset.json")
    if index is not None and len(index) != len(tiles):
        found.say_index(f"{index_name(tar.name)}: {len(index)} tiles where the tar has {len(tiles)}")
        index = None
    rows: Iterable[Row | None] = [None] * len(tiles) if index is None else index.tolist()
    wanted = None if decode is None else set(decode.tolist())
    with tar.open("rb") as file:
        for number, (tile, row) in enumerate(zip(tiles, rows)):
            file.seek(tile.offset)
            image = file.read(tile.size)
            file.seek(tile.meta_offset)
            text = file.read(tile.meta_size)
            where = f"{tar.name}: {tile.key}: "
            intact = _compare(tile, image, row, found, where)
            _compare_facts(text, row, rules.slides, found, where)
            if intact and (wanted is None or number in wanted):
                found.decoded += 1
                problem = _decoding_problem(image, rules.tile_size)
                if problem:
                    found.say(where + problem)
    if index is not None:
        for problem in _place_problems(index, rules):
            found.say(f"{tar.name}: {problem}")
    return found


def _read_index(path: Path) -> np.ndarray:
    """The index beside a tar. Raises Refusal for one that :class:`~eosin.data_tools.shards.ShardSet` would not take."""
    try:
        data = path.read_bytes()
        head = io.BytesIO(data)
        version = np.lib.format.read_magic(head)
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    except FileNotFoundError:
        raise Refusal("missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise Refusal(f"not readable: {error}") from None
    if version != (1, 0) or dtype != INDEX or len(shape) != 1:
        raise Refusal("not an index of this schema")
    there, expected = len(data) - head.tell(), shape[0] * INDEX.itemsize
    if there != expected:
        raise Refusal(f"{there} bytes of rows where {shape[0]} rows have {expected}")
    return np.frombuffer(data, INDEX, offset=head.tell())


def _compare(tile: TarTile, image: bytes, row: Row | None, found: Found, where: str) -> bool:
    """Compare an image with its row of the index; whether it is what was written, as far as that is known."""
    if row is None:
        return True
    if row[:4] != tile[1:]:
        found.say_index(f"{where}the index says offset and size {row[:4]}, the tar {tile[1:]}")
    if zlib.crc32(image) != row[4]:
        found.say_index(f"{where}its image is not what was written (crc32 differs)")
        return False
    return True


def _compare_facts(text: bytes, row: Row | None, slides: Slides | None, found: Found, where: str) -> None:
    """Compare a JSON with its row of the index."""
    try:
        facts = json.loads(text)
        place, mpp = (facts["x"], facts["y"]), np.float32(np.nan if facts["mpp"] is None else float(facts["mpp"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        found.say(f"{where}its JSON is not readable or lacks x, y or mpp")
        return
    if row is None:
        return
    if place != row[6:8] or not (mpp == row[8] or (np.isnan(mpp) and np.isnan(row[8]))):
        found.say_index(f"{where}its JSON and the index differ in x, y or mpp")
    if "slide" in facts and slides is not None and 0 <= row[5] < len(slides.names):
        name, indexed = str(facts["slide"]), slides.names[row[5]]
        if name != indexed:
            found.say_index(f"{where}of slide {name!r} by its JSON, of {indexed!r} by the index")


def _place_problems(index: np.ndarray, rules: Rules) -> Iterator[str]:
    """Tiles outside their slide, and of a resolution that the set does not have."""
    x, y, mpp = (index[name].astype(np.float64) for name in ("x", "y", "mpp"))
    bad = (x < 0) | (y < 0)
    if rules.slides is not None:
        sizes = rules.slides.sizes
        known = (index["slide"] >= 0) & (index["slide"] < len(sizes))
        width, height, slide_mpp = sizes[index["slide"][known]].T
        side = rules.tile_size * mpp[known] / slide_mpp
        # A tile's side is no whole number of the slide's pixels; NaN compares as False.
        bad[known] |= (x[known] + side >= width + 1) | (y[known] + side >= height + 1)
    if bad.any():
        row = index[bad][0]
        yield f"{int(bad.sum())} tiles lie outside their slide, the first at x {row['x']}, y {row['y']}"
    if rules.mpps is not None:
        strange = ~np.isin(index["mpp"], np.array(rules.mpps, np.float32))
        if strange.any():
            said = ", ".join(f"{mpp:g}" for mpp in rules.mpps)
            first = index["mpp"][strange][0]
            yield f"{int(strange.sum())} tiles have another µm/px than the set's {said}, the first {first:g}"


def _decoding_problem(data: bytes, tile_size: int) -> str | None:
    """What is wrong with an image, whose size is looked at before any pixel is decoded."""
    import simplejpeg
    from PIL import Image

    try:
        if simplejpeg.is_jpeg(data):
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            if height == width == tile_size:
                simplejpeg.decode_jpeg(data, "RGB")
        else:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                width, height = image.size
                if height == width == tile_size:
                    image.load()
    except Exception as error:  # decoders raise anything on broken input
        return f"cannot be decoded: {error}"
    return None if height == width == tile_size else f"is {width} x {height} px, not {tile_size} x {tile_size}"
