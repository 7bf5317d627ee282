"""Embedding extraction: an encoder over a shard set, into one embeddings file.

Tiles that cannot be used are left out, listed with their reason, and bounded; nothing is ever put in their place. The
work is cut into parts (:mod:`eosin.eval.embed_parts`), which ranks share and of which a killed process loses one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import UNUSABLE, decode_tile
from eosin.eval import contamination
from eosin.eval.annotations import tile_places
from eosin.eval.embed_parts import Part, Summary, in_parts, made_already, read_part
from eosin.eval.encoders import Encoder
from eosin.ssl.stain.normalizer import REASONS, Normalizer, make_normalizer

if TYPE_CHECKING:
    import pandas as pd

BAD_BOUND = 0.01
BAD_ALWAYS_ALLOWED = 3
THREADS = 4
AHEAD = 2  # batches decoded before they are asked for
PART = 4096  # tiles
CPU_BATCH, MOST_BATCH = 64, 512  # tiles; more at once gains nothing


def embed(encoder: Encoder, shards: ShardSet, out: Path, batch_size: int | None = None) -> Summary:
    """Embed every tile of ``shards`` and write ``out``; the reasons of refused tiles go beside it.

    Does nothing when ``out`` holds embeddings of the same fingerprint: encoder, preprocessing, normalizer, tiles and
    slides table. Killed, the same call goes on. Ranks of a process group share the work.

    Args:
        batch_size: tiles at once, by default those of :func:`fitting_batch`. It changes features by rounding only.

    Raises:
        UserError: ``out`` holds something else, the shard set is empty, more than 1 % of its tiles (and more than 3)
            cannot be used, or the encoder gives values that are not finite.
    """
    normalizer = make_normalizer(encoder.stain, shards)
    fingerprint = encoder.fingerprint | data_fingerprint(shards) | contamination.fingerprint(encoder.seen)
    if there := made_already(out, fingerprint):
        return there
    if not len(shards):
        raise UserError(f"{shards.name} holds no tiles")

    def encode(images: np.ndarray, slides: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
        return features_of(encoder, normalizer, images, slides)

    size = batch_size or fitting_batch(encoder.device, encode, shards.tile_size)

    def make(numbers: list[int], done: list[Path]) -> Generator[tuple[int, Part], None, None]:
        before = sum(len(read_part(path).refused) for path in done)
        return _parts(encoder.name, encode, shards, numbers, size, before)

    def join(parts: list[Part]) -> pd.DataFrame:
        _refuse_many(sum(len(part.refused) for part in parts), parts[-1].refused, len(shards), shards)
        kept = np.array([tile for part in parts for tile in part.columns["tile"]], dtype=np.int64)
        if not len(kept):
            raise UserError(f"no tile of {shards.name} can be used; run 'eosin verify {shards.name}'")
        table = tile_places(shards).iloc[kept].reset_index(drop=True)
        for name in ("crc32", "size"):  # by which the same image under another name is known
            table[name] = shards.column(name)[kept].astype(np.int64)
        contamination.mark(table, encoder.seen)
        return table

    return in_parts(out, fingerprint, -(-len(shards) // PART), make, join)


def features_of(
    encoder: Encoder, normalizer: Normalizer | None, images: np.ndarray, slides: np.ndarray
) -> tuple[np.ndarray, Counter[str]]:
    """Features [B, D] of uint8 tiles [B, T, T, 3] of slide numbers [B], and how many stayed raw, by reason.

    Raises UserError where a feature is not finite.
    """
    pixels = torch.from_numpy(images).to(encoder.device).permute(0, 3, 1, 2).contiguous()  # [B, 3, T, T]
    raw: Counter[str] = Counter()
    if normalizer:
        pixels, reason = normalizer(pixels, torch.from_numpy(slides))
        raw.update(REASONS[r] for r in reason.tolist() if r)
    features = encoder(pixels).cpu().numpy()
    if not np.isfinite(features).all():
        raise UserError(
            f"'{encoder.name}' gives values that are not finite; its weights are broken or --precision is too low"
        )
    return features, raw


def fitting_batch(device: torch.device, encode: Callable[[np.ndarray, np.ndarray], object], tile_size: int) -> int:
    """The tiles to embed at once: on a GPU the largest power of two up to MOST_BATCH that fits its memory."""
    if device.type != "cuda":
        return CPU_BATCH
    return largest_that_fits(
        lambda size: encode(np.zeros((size, tile_size, tile_size, 3), np.uint8), np.zeros(size, np.int64))
    )


def largest_that_fits(attempt: Callable[[int], object], most: int = MOST_BATCH) -> int:
    """Halve from ``most`` until ``attempt`` of so many tiles does not run out of memory; at least 1."""
    size = most
    while size > 1:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    return 1


def data_fingerprint(shards: ShardSet) -> dict[str, Any]:
    """What the fingerprint of embeddings says of tiles and slides table. Raises UserError for a broken table."""
    shards.slides()  # says in a line what is wrong with the table
    return {"shards": shards.identity, "slides": hashlib.sha256(shards.store.read_all("slides.parquet")).hexdigest()}


def _parts(
    name: str,
    encode: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Counter[str]]],
    shards: ShardSet,
    numbers: list[int],
    batch_size: int,
    refused_before: int,
) -> Generator[tuple[int, Part], None, None]:
    """The parts with these numbers; batches are cut within parts, so that a part depends on nothing else."""
    bounds = {number: (number * PART, min((number + 1) * PART, len(shards))) for number in numbers}
    cuts = [
        np.arange(begin, min(begin + batch_size, end))
        for first, end in bounds.values()
        for begin in range(first, end, batch_size)
    ]
    # Closed here, where an error is raised: a thread that is being born must not be the one to clear it away.
    with closing(_decoded(shards, cuts)) as decoded:
        batches = progress(decoded, total=len(cuts), desc=f"embed {name}", unit="batches")
        looked_at = 0
        for number, (first, end) in bounds.items():
            part = Part(np.empty((0, 0), dtype=np.float32), {"tile": []})
            rows = []
            for tiles, images, bad in itertools.islice(batches, -(-(end - first) // batch_size)):
                looked_at += len(tiles) + len(bad)
                part.refused += [(shards.meta(tile)["key"], reason) for tile, reason in bad]
                _refuse_many(refused_before + len(part.refused), part.refused, looked_at, shards)
                if len(tiles):
                    features, raw = encode(images, shards.rows(tiles)["slide"].astype(np.int64))
                    rows.append(features)
                    part.columns["tile"] += tiles.tolist()
                    part.raw += raw
            if rows:
                part.features = np.concatenate(rows)
            refused_before += len(part.refused)
            yield number, part
        next(batches, None)  # lets progress say that all is done


def _refuse_many(count: int, last: list[tuple[str, str]], looked_at: int, shards: ShardSet) -> None:
    """Raise UserError when more tiles than are allowed, ``count``, cannot be used."""
    if count > max(BAD_ALWAYS_ALLOWED, BAD_BOUND * len(shards)):
        example = f", the last one '{last[-1][0]}': {last[-1][1]}" if last else ""
        raise UserError(
            f"{count} tiles of {shards.name} cannot be used, of {looked_at} that were looked at{example}; "
            f"run 'eosin verify {shards.name}'"
        )


def _decoded(
    shards: ShardSet, cuts: list[np.ndarray]
) -> Generator[tuple[np.ndarray, np.ndarray, list[tuple[int, str]]], None, None]:
    """Tile numbers [b], images [b, T, T, 3] and refusals of each batch of tiles, in order, decoded a little ahead."""
    with ThreadPoolExecutor(THREADS) as pool:

        def submit(tiles: np.ndarray) -> list[tuple[int, Future[np.ndarray]]]:
            rows = shards.rows(tiles)
            # Bytes are read here, since a shard set belongs to one thread; decoding is what takes time.
            read = zip(tiles.tolist(), shards.images(tiles, rows), rows["crc32"].tolist())
            return [(tile, pool.submit(decode_tile, image, crc32, shards.tile_size)) for tile, image, crc32 in read]

        waiting = deque(itertools.islice(map(submit, following := iter(cuts)), AHEAD))
        while waiting:
            good, images, bad = [], [], []
            for tile, future in waiting.popleft():
                try:
                    images.append(future.result())
                    good.append(tile)
                except UNUSABLE as error:
                    bad.append((tile, str(error)))
            waiting.extend(map(submit, itertools.islice(following, 1)))
            yield np.array(good, dtype=np.int64), np.stack(images) if images else np.empty(0), bad
