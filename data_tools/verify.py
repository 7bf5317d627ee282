"""Whether a shard set is whole: checksums, index against tars, keys, decoding, and the slides table's counts.

Everything is read from the tars themselves, never through the index that is being judged. Nothing is ever changed.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, sha256
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import EXTENSIONS, INDEX, SCHEMA, index_path

MOST_PROBLEMS = 20


def verify_shards(folder: Path | str, sample: int | None = None) -> tuple[list[str], int]:
    """Look for anything wrong in a shard set.

    Args:
        folder: the shard set.
        sample: decode only so many tiles, spread over all by a fixed draw; all by default.

    Returns:
        One line a problem, and the number of tiles that were decoded.

    Raises:
        UserError: the folder is no shard set of this schema.
    """
    if "://" in str(folder) or ":/" in str(folder):  # argparse's Path has one slash left
        raise UserError("a shard set behind a URL is not verified from afar; copy it here and verify the copy")
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; make a shard set with 'eosin tile' or 'eosin pack'")
    dataset = read_json(folder / "dataset.json", "the description of a shard set")
    if dataset.get("kind") != "eosin shard set" or dataset.get("schema") != SCHEMA:
        raise UserError(f"{folder} holds no shard set of schema {SCHEMA}; make one with 'eosin tile' or 'eosin pack'")
    try:
        shards = [{name: shard[name] for name in ("file", "tiles", "bytes", "sha256")} for shard in dataset["shards"]]
        total = sum(shard["tiles"] for shard in shards)
        said_tiles, said_slides, tile_size = dataset["tiles"], dataset["slides"], dataset["tile_size"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/dataset.json is incomplete ({error}); make the shard set again") from None
    wanted = _draw(total, sample)
    problems: list[str] = []
    keys: Counter[bytes] = Counter()
    of_slide: Counter[int] = Counter()
    first, decoded = 0, 0
    for shard in progress(shards, total=len(shards), desc="verify", unit="shards"):
        tar = folder / shard["file"]
        inside = None if wanted is None else {tile - first for tile in wanted if first <= tile < first + shard["tiles"]}
        problems += _shard_problems(tar, shard, tile_size, inside, keys, of_slide)
        decoded += shard["tiles"] if inside is None else len(inside)
        first += shard["tiles"]
    unlisted = {path.name for path in folder.glob("*.tar")} - {shard["file"] for shard in shards}
    problems += [f"{name}: not listed in dataset.json" for name in sorted(unlisted)]
    problems += [f"key {key.decode(errors='replace')}: {n} tiles have it" for key, n in keys.items() if n > 1]
    if said_tiles != total:
        problems.append(f"dataset.json: says {said_tiles} tiles where its shards have {total}")
    if all(index_path(folder / shard["file"]).is_file() for shard in shards):
        problems += _slide_problems(folder, said_slides, of_slide)
    return problems, decoded


def report(folder: Path, problems: list[str], decoded: int) -> str:
    """What a user reads: one line a problem, bounded, or that all is well."""
    if not problems:
        return f"{folder}: whole; {decoded} tiles decoded"
    more = len(problems) - MOST_PROBLEMS
    lines = [*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    return "\n".join([*lines, f"{folder}: {len(problems)} problems; make the shard set again"])


def _draw(total: int, sample: int | None) -> set[int] | None:
    if sample is None or sample >= total:
        return None
    return set(permute(np.arange(sample), total, purpose("verify")).tolist())


def _shard_problems(
    tar: Path,
    shard: dict[str, Any],
    tile_size: int,
    decode: set[int] | None,
    keys: Counter[bytes],
    of_slide: Counter[int],
) -> Iterator[str]:
    """Problems of one shard; its keys and the slides of its tiles are counted on the way."""
    index = _read_index(tar)
    if isinstance(index, str):
        yield index
    else:
        of_slide.update(index["slide"].tolist())
    if not tar.is_file():
        yield f"{tar.name}: missing"
        return
    size = tar.stat().st_size
    if size != shard["bytes"]:
        what = "cut" if size < shard["bytes"] else "longer than written"
        yield f"{tar.name}: {what}: {size} of {shard['bytes']} bytes"
        return
    if sha256(tar) != shard["sha256"]:
        yield f"{tar.name}: its bytes are not those that were written (sha256 differs)"
    if isinstance(index, str):
        return
    try:
        tiles = list(_tiles(tar))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        yield f"{tar.name}: not readable as a tar: {error}"
        return
    if len(tiles) != len(index) or len(index) != shard["tiles"]:
        yield f"{tar.name}: {len(tiles)} tiles in the tar, {len(index)} in the index, {shard['tiles']} in dataset.json"
        return
    with tar.open("rb") as file:
        for number, (key, image, meta, row) in enumerate(zip(*zip(*tiles), index) if tiles else ()):
            keys[key.encode()] += 1
            file.seek(image.offset_data)
            data = file.read(image.size)
            file.seek(meta.offset_data)
            yield from (
                f"{tar.name}: {key}: {problem}"
                for problem in _tile_problems(
                    image, meta, row, data, file.read(meta.size), tile_size, decode is None or number in decode
                )
            )


def _read_index(tar: Path) -> np.ndarray | str:
    """The index beside a tar, or what is wrong with it."""
    path = index_path(tar)
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return f"{path.name}: not readable: {error}"
    return index if index.dtype == INDEX else f"{path.name}: not an index of this schema"


def _tiles(tar: Path) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarInfo]]:
    """Key, image member and JSON member of each tile, in order."""
    pending: tuple[str, tarfile.TarInfo] | None = None
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            key, _, extension = info.name.partition(".")
            if not info.isfile() or "/" in key or extension not in (*EXTENSIONS, "json"):
                raise ValueError(f"a member '{info.name[:60]}' that is neither an image nor its JSON")
            if pending is None and extension in EXTENSIONS:
                pending = key, info
            elif pending is not None and extension == "json" and pending[0] == key:
                yield key, pending[1], info
                pending = None
            else:
                raise ValueError(f"'{info.name[:60]}' does not follow its image")
    if pending is not None:
        raise ValueError(f"'{pending[0]}' has no JSON")


def _tile_problems(
    image: tarfile.TarInfo,
    meta: tarfile.TarInfo,
    row: np.void,
    data: bytes,
    text: bytes,
    tile_size: int,
    decode: bool,
) -> Iterator[str]:
    where = (image.offset_data, image.size, meta.offset_data, meta.size)
    indexed = tuple(int(row[name]) for name in ("offset", "size", "meta_offset", "meta_size"))
    if where != indexed:
        yield f"the index says offset and size {indexed}, the tar {where}"
    if zlib.crc32(data) != int(row["crc32"]):
        yield "its image is not what was written (crc32 differs)"
        return
    try:
        facts = json.loads(text)
        mpp = np.float32(np.nan if facts["mpp"] is None else facts["mpp"])
        same = (facts["x"], facts["y"]) == (row["x"], row["y"]) and (
            mpp == row["mpp"] or np.isnan([mpp, row["mpp"]]).all()
        )
    except (ValueError, KeyError, TypeError):
        yield "its JSON is not readable or lacks x, y or mpp"
        return
    if not same:
        yield "its JSON and the index differ in x, y or mpp"
    if decode:
        problem = _decoding_problem(data, tile_size)
        if problem:
            yield problem


def _decoding_problem(data: bytes, tile_size: int) -> str | None:
    import simplejpeg

    try:
        shape = simplejpeg.decode_jpeg(data, "RGB").shape if simplejpeg.is_jpeg(data) else _decode_png(data)
    except Exception as error:  # decoders raise anything on broken input
        return f"cannot be decoded: {error}"
    return (
        None if shape[:2] == (tile_size, tile_size) else f"is {shape[1]} x {shape[0]} px, not {tile_size} x {tile_size}"
    )


def _decode_png(data: bytes) -> tuple[int, ...]:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image).shape


def _slide_problems(folder: Path, expected: int, of_slide: Counter[int]) -> Iterator[str]:
    import pandas as pd

    path = folder / "slides.parquet"
    try:
        slides = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        yield f"{path.name}: not readable: {error}"
        return
    if len(slides) != expected:
        yield f"{path.name}: {len(slides)} slides where dataset.json says {expected}"
    outside = sum(n for slide, n in of_slide.items() if not 0 <= slide < len(slides))
    if outside:
        yield f"{path.name}: {outside} tiles belong to slides that are not in it"
    if slides["slide"].duplicated().any():
        yield f"{path.name}: slide {slides['slide'][slides['slide'].duplicated()].iloc[0]} has two rows"
    for number, (slide, tiles) in enumerate(zip(slides["slide"], slides["tiles"])):
        if int(tiles) != of_slide[number]:
            yield f"{path.name}: slide {slide} should have {int(tiles)} tiles and has {of_slide[number]}"
