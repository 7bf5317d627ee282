"""The tile stream: global batches whose content is arithmetic, so that resuming needs one integer.

An :class:`~eosin.data_tools.order.Order` says which tile stands at position ``p`` of the endless stream. Step ``s`` of
global batch size B covers positions ``[s·B, (s+1)·B)``, of which each rank takes an equal slice. Nothing depends on
workers, ranks or the past.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import EVENLY, Mixture, Sampling
from eosin.data_tools.order import Order
from eosin.data_tools.shards import MAX_SIDE

REPLACEMENTS = 16  # positions that are tried after one whose tile cannot be used
OUTAGE = 4  # tiles of a batch out of reach, after which no more are waited for
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"  # what each begins with; bytes behind its end are no harm
UNUSABLE = (ValueError, EOFError, OSError)  # what a tile that is broken or out of reach raises


class Batch(TypedDict):
    """What one rank trains on in one step."""

    images: torch.Tensor  # [B, 3, T, T] uint8
    position: torch.Tensor  # [B] int64, place in the endless stream: the key of every random draw of the sample
    tile: torch.Tensor  # [B] int64, number in the shard set
    slide: torch.Tensor  # [B] int64, row in the slides table
    bad: list[tuple[int, str]]  # (tile, reason) of tiles replaced by a later one


def decode(image: bytes, side: int | None = None) -> np.ndarray:
    """Decode a JPEG or PNG to RGB, [H, W, 3] uint8. The size is checked before any pixel is decoded.

    Raises ValueError with the reason when the image is broken, too large, or not ``side`` px wide and high.
    """
    import simplejpeg

    if image.startswith(JPEG):
        height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width, side)
        return simplejpeg.decode_jpeg(image, colorspace="RGB")
    if not image.startswith(PNG) or len(image) < 24:
        raise ValueError("not a JPEG or PNG")
    width, height = struct.unpack(">II", image[16:24])  # of IHDR, the first chunk
    _check_size(height, width, side)
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a readable PNG: {type(error).__name__}") from None


def decode_tile(image: bytes | Exception, crc32: int, size: int) -> np.ndarray:
    """Decode a tile, [size, size, 3] uint8.

    Raises what reading it raised, or ValueError with the reason when it is broken, of another size, or not what was
    written.
    """
    if isinstance(image, Exception):
        raise image
    if zlib.crc32(image) != crc32:
        raise ValueError("its bytes are not those that were written (crc32 differs)")
    return decode(image, size)


class Tiles(Dataset):
    """Tiles of shard sets by position in the stream, one batch a call.

    A tile that cannot be used is replaced by that of the next position, and reported in the batch.
    """

    def __init__(self, shards: Mixture, order: Order) -> None:
        self.shards, self.order = shards, order

    def __getitem__(self, positions: np.ndarray) -> Batch:
        size = self.shards.tile_size
        images = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        tiles = self.order(positions)
        rows = self.shards.rows(tiles)
        slides = rows["slide"].astype(np.int64)
        bad: list[tuple[int, Exception]] = []
        read = zip(self.shards.images(tiles, rows), rows["crc32"].tolist())
        for i, (image, crc32) in enumerate(read):
            try:
                images[i] = decode_tile(image, crc32, size)
            except UNUSABLE as error:
                self._note(int(tiles[i]), error, bad)
                images[i], tiles[i], slides[i] = self._after(int(positions[i]), bad)
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),  # as decoders leave them, which resizing likes
            position=torch.from_numpy(positions),
            tile=torch.from_numpy(tiles),
            slide=torch.from_numpy(slides),
            bad=[(tile, str(error)) for tile, error in bad],
        )

    def _note(self, tile: int, error: Exception, bad: list[tuple[int, Exception]]) -> None:
        """List a bad tile. Raises UserError when so many are out of reach that more would be waited for in vain."""
        bad.append((tile, error))
        if isinstance(error, OSError) and sum(isinstance(e, OSError) for _, e in bad) == OUTAGE:
            raise UserError(
                f"{OUTAGE} tiles of one batch of {self.shards.name} are out of reach, the last one: {error}; mend that "
                "and run the same command again: it goes on from its last checkpoint"
            )

    def _after(self, position: int, bad: list[tuple[int, Exception]]) -> tuple[np.ndarray, int, int]:
        """Image, tile and slide of the first position after ``position`` whose tile can be used."""
        following = self.order(np.arange(position + 1, position + 1 + REPLACEMENTS))
        rows = self.shards.rows(following)
        for i, (tile, row) in enumerate(zip(following.tolist(), rows)):
            (image,) = self.shards.images(following[i : i + 1], rows[i : i + 1])
            try:
                return decode_tile(image, int(row["crc32"]), self.shards.tile_size), tile, int(row["slide"])
            except UNUSABLE as error:
                self._note(tile, error, bad)
        raise UserError(
            f"{REPLACEMENTS + 1} tiles of {self.shards.name} in a row cannot be used, the last one "
            f"'{bad[-1][1]}'; run 'eosin verify'"
        )


def batches(
    shards: Mixture,
    *,
    batch: int,
    steps: Sequence[int],
    seed: int,
    sampling: Sampling = EVENLY,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's slice of the global batches of ``steps``.

    Args:
        batch: samples in a global batch, over all ranks.
        steps: which steps, e.g. ``range(resumed_at, total)``.
        workers: decoding processes; they change the speed, never the content.

    Raises:
        UserError: a set is empty, ``batch`` does not divide by ``ranks``, or ``sampling`` asks for what is not there;
            while iterating, when nothing can be read any more.
    """
    if batch % ranks:
        valid = max(ranks, round(batch / ranks) * ranks)
        raise UserError(f"data.batch {batch} does not divide by {ranks} processes; the nearest that does is {valid}")
    share = batch // ranks
    loader: DataLoader[Batch] = DataLoader(
        Tiles(shards, shards.order(seed, sampling)),
        sampler=Slices(steps, batch, rank * share, share),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_rank,
        multiprocessing_context="spawn" if workers else None,
    )
    return _in_one_line(loader)


class Slices(Sampler[np.ndarray]):
    """Positions of one rank's slice of each step."""

    def __init__(self, steps: Sequence[int], batch: int, offset: int, share: int) -> None:
        self.steps, self.batch, self.offset, self.share = steps, batch, offset, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.steps:
            first = step * self.batch + self.offset
            yield np.arange(first, first + self.share, dtype=np.int64)


def _in_one_line(loader: Iterable[Batch]) -> Iterator[Batch]:
    """A user's error that a worker met comes wrapped in the worker's traceback; its last line is the error's own.

    Workers start when the first batch is asked for.
    """
    line = ""
    try:
        yield from loader
    except UserError as error:
        line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
    if line:  # raised here, where nothing holds the worker's error and with it the workers any more
        raise UserError(line)


@atexit.register
def _end_workers() -> None:
    """Workers ignore SIGTERM, which is how Python ends those that are left at exit, and waits for them."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _leave_signals_to_the_rank(worker: int) -> None:
    """SLURM sends SIGTERM to every process of a task; a worker that died of it would keep its rank from saving."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _check_size(height: int, width: int, side: int | None) -> None:
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"is {width}×{height} px, over the bound of {MAX_SIDE}")
    if side is not None and (height, width) != (side, side):
        raise ValueError(f"is {width}×{height} px, not {side}×{side}")
