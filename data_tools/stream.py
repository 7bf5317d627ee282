"""The tile stream: global batches whose content is arithmetic, so that resuming needs one integer.

Position ``p`` of the endless stream over N tiles is in epoch ``p // N`` at place ``p % N``, and a keyed permutation of
that epoch says which tile it is. Step ``s`` of global batch size B covers positions ``[s·B, (s+1)·B)``, of which each
rank takes an equal slice. Nothing depends on workers, ranks or the past.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet

ORDER = purpose("stream order")
MAX_SIDE = 8192  # pixels; a tile larger than this is refused before it is decoded
BAD_BOUND = 1e-3


class Batch(TypedDict):
    """What one rank trains on in one step."""

    images: torch.Tensor  # [B, 3, T, T] uint8
    position: torch.Tensor  # [B] int64, place in the endless stream: the key of every random draw of the sample
    tile: torch.Tensor  # [B] int64, number in the shard set
    slide: torch.Tensor  # [B] int64, row in the slides table
    bad: list[tuple[int, str]]  # (tile, reason) of tiles replaced by a later one


def order(positions: np.ndarray, tiles: int, seed: int) -> np.ndarray:
    """Tile numbers, [n] int64, at ``positions``, [n], of the endless stream."""
    positions = np.asarray(positions, dtype=np.int64)
    out = np.empty_like(positions)
    for epoch in np.unique(positions // tiles):
        now = positions // tiles == epoch
        out[now] = permute(positions[now] % tiles, tiles, ORDER, seed, int(epoch))
    return out


def decode(image: bytes) -> np.ndarray:
    """Decode a JPEG or PNG to RGB, [H, W, 3] uint8. The size is checked before any pixel is decoded.

    Raises ValueError with the reason when the image is broken or too large.
    """
    import simplejpeg

    if simplejpeg.is_jpeg(image):
        height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        _check_side(height, width)
        return simplejpeg.decode_jpeg(image, colorspace="RGB")
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as picture:
            _check_side(picture.height, picture.width)
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"not a readable JPEG or PNG: {error}") from None


class Tiles(Dataset):
    """Tiles of a shard set by position in the stream, one batch a call.

    A tile that cannot be used is replaced by the tile after it in the order and reported in the batch.
    """

    def __init__(self, shards: ShardSet, seed: int) -> None:
        self.shards, self.seed = shards, seed

    def __getitem__(self, positions: np.ndarray) -> Batch:
        size = self.shards.tile_size
        images = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        tiles, slides = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        bad: list[tuple[int, str]] = []
        for i, tile in enumerate(order(positions, len(self.shards), self.seed)):
            images[i], tiles[i] = self._usable(int(tile), bad)
            slides[i] = self.shards.row(int(tiles[i]))["slide"]
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            position=torch.from_numpy(positions),
            tile=torch.from_numpy(tiles),
            slide=torch.from_numpy(slides),
            bad=bad,
        )

    def _usable(self, tile: int, bad: list[tuple[int, str]]) -> tuple[np.ndarray, int]:
        size = self.shards.tile_size
        for step in range(len(self.shards)):
            candidate = (tile + step) % len(self.shards)
            try:
                image = decode(self.shards.image(candidate))
                if image.shape != (size, size, 3):
                    raise ValueError(f"is {image.shape[1]}×{image.shape[0]} px, not {size}×{size}")
                return image, candidate
            except (ValueError, EOFError) as error:
                bad.append((candidate, str(error)))
        raise UserError(f"no tile of {self.shards.folder} can be decoded; run 'eosin verify {self.shards.folder}'")


def batches(
    shards: ShardSet, *, batch: int, steps: range, seed: int, rank: int = 0, ranks: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """This rank's slice of the global batches of ``steps``.

    Args:
        batch: samples in a global batch, over all ranks.
        steps: which steps, e.g. ``range(resumed_at, total)``.
        workers: decoding processes; they change the speed, never the content.

    Raises:
        UserError: the set is empty, or ``batch`` does not divide by ``ranks``.
    """
    if not len(shards):
        raise UserError(f"{shards.folder} holds no tiles")
    if batch % ranks:
        valid = max(ranks, round(batch / ranks) * ranks)
        raise UserError(f"data.batch {batch} does not divide by {ranks} processes; the nearest that does is {valid}")
    share = batch // ranks
    loader: DataLoader[Batch] = DataLoader(
        Tiles(shards, seed),
        sampler=Slices(steps, batch, rank * share, share),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_rank,
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)


class Slices(Sampler[np.ndarray]):
    """Positions of one rank's slice of each step, in constant memory."""

    def __init__(self, steps: range, batch: int, offset: int, share: int) -> None:
        self.steps, self.batch, self.offset, self.share = steps, batch, offset, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.steps:
            first = step * self.batch + self.offset
            yield np.arange(first, first + self.share, dtype=np.int64)


def _leave_signals_to_the_rank(worker: int) -> None:
    """SLURM sends SIGTERM to every process of a task; a worker that died of it would keep its rank from saving."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _check_side(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"is {width}×{height} px, over the bound of {MAX_SIDE}")
