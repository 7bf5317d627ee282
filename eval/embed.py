"""Embedding extraction: an encoder over a shard set, into one embeddings file.

Tiles that cannot be used are left out, listed with their reason, and bounded; nothing is ever put in their place.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eosin.data_tools.embeddings import Embeddings, read_embeddings, write_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import UNUSABLE, decode_tile
from eosin.eval.encoders import Encoder
from eosin.ssl.stain.normalizer import REASONS, Normalizer, make_normalizer

BAD_BOUND = 0.01
BAD_ALWAYS_ALLOWED = 3
THREADS = 4
AHEAD = 2  # batches decoded before they are asked for


@dataclass
class Summary:
    """What came of an extraction.

    Attributes:
        tiles: rows in the file.
        dimension: of a feature.
        refused: (key, reason) of each tile left out.
        cached: the file was there already and nothing was done.
        raw: how many tiles stayed without stain normalization, by reason.
    """

    tiles: int
    dimension: int
    refused: list[tuple[str, str]]
    cached: bool = False
    raw: Counter[str] = field(default_factory=Counter)


def embed(encoder: Encoder, shards: ShardSet, out: Path, batch_size: int = 64) -> Summary:
    """Embed every tile of ``shards`` and write ``out``; the reasons of refused tiles go beside it.

    Does nothing when ``out`` holds embeddings of the same fingerprint: encoder, preprocessing, normalizer, tiles and
    slides table.

    Raises:
        UserError: ``out`` holds something else, the shard set is empty, more than 1 % of its tiles (and more than 3)
            cannot be used, or the encoder gives values that are not finite.
    """
    normalizer = make_normalizer(encoder.stain, shards)
    fingerprint = encoder.fingerprint | _data_fingerprint(shards)
    if out.exists():
        there = read_embeddings(out)
        if there.encoder != fingerprint:
            raise UserError(f"{out} holds other embeddings (of '{there.name}'); give another --out, or remove it first")
        return Summary(len(there.features), there.features.shape[1], [], cached=True)
    if not len(shards):
        raise UserError(f"{shards.name} holds no tiles")

    numbers, rows, refused = [], [], []
    raw: Counter[str] = Counter()
    batches = range(0, len(shards), batch_size)
    stream = progress(_batches(shards, batch_size), total=len(batches), desc=f"embed {encoder.name}", unit="batches")
    for tiles, images, bad in stream:
        refused += [(shards.meta(tile)["key"], reason) for tile, reason in bad]
        if len(refused) > max(BAD_ALWAYS_ALLOWED, BAD_BOUND * len(shards)):
            raise UserError(
                f"{len(refused)} of the first {tiles[-1] + 1 if len(tiles) else batch_size} tiles of {shards.name} "
                f"cannot be used, the last one '{refused[-1][0]}': {refused[-1][1]}; run 'eosin verify {shards.name}'"
            )
        if len(tiles):
            numbers.append(tiles)
            rows.append(_features(encoder, normalizer, images, shards, tiles, raw))
    if not numbers:
        raise UserError(f"no tile of {shards.name} can be used; run 'eosin verify {shards.name}'")
    kept = np.concatenate(numbers)
    features = np.concatenate(rows)  # [N, D]
    if not np.isfinite(features).all():
        raise UserError(f"'{encoder.name}' gives values that are not finite; its weights are broken")
    table = shards.table().iloc[kept].reset_index(drop=True)
    for name in ("crc32", "size"):  # by which the same image under another name is known
        table[name] = shards.column(name)[kept].astype(np.int64)
    # The list first: embeddings that are there count as done.
    refused_path(out).unlink(missing_ok=True)
    if refused:
        with atomic_path(refused_path(out)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("key", "reason"), *refused])
    write_embeddings(out, Embeddings(features, table, fingerprint))
    return Summary(len(features), features.shape[1], refused, raw=raw)


def refused_path(out: Path) -> Path:
    """Path of the list of refused tiles that belongs to the embeddings at ``out``."""
    return out.with_suffix(".refused.csv")


def _data_fingerprint(shards: ShardSet) -> dict[str, Any]:
    shards.slides()  # says in a line what is wrong with the table
    return {"shards": shards.identity, "slides": hashlib.sha256(shards.store.read_all("slides.parquet")).hexdigest()}


def _features(
    encoder: Encoder,
    normalizer: Normalizer | None,
    images: np.ndarray,
    shards: ShardSet,
    tiles: np.ndarray,
    raw: Counter[str],
) -> np.ndarray:
    pixels = torch.from_numpy(images).to(encoder.device).permute(0, 3, 1, 2).contiguous()  # [B, 3, T, T]
    if normalizer:
        slides = shards.rows(tiles)["slide"].astype(np.int64)
        pixels, reason = normalizer(pixels, torch.from_numpy(slides))
        raw.update(REASONS[r] for r in reason.tolist() if r)
    return encoder(pixels).cpu().numpy()


def _batches(shards: ShardSet, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]]:
    """Tile numbers [b], images [b, T, T, 3] and refusals of each batch in order, decoded a little ahead."""
    with ThreadPoolExecutor(THREADS) as pool:

        def submit(first: int) -> list[tuple[int, Future[np.ndarray]]]:
            tiles = np.arange(first, min(first + batch_size, len(shards)))
            rows = shards.rows(tiles)
            # Bytes are read here, since a shard set belongs to one thread; decoding is what takes time.
            read = zip(tiles.tolist(), shards.images(tiles, rows), rows["crc32"].tolist())
            return [(tile, pool.submit(decode_tile, image, crc32, shards.tile_size)) for tile, image, crc32 in read]

        waiting = deque(itertools.islice(map(submit, starts := iter(range(0, len(shards), batch_size))), AHEAD))
        while waiting:
            good, images, bad = [], [], []
            for tile, future in waiting.popleft():
                try:
                    images.append(future.result())
                    good.append(tile)
                except UNUSABLE as error:
                    bad.append((tile, str(error)))
            waiting.extend(map(submit, itertools.islice(starts, 1)))
            yield np.array(good, dtype=np.int64), np.stack(images) if images else np.empty(0), bad
