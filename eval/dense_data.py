"""What a dense probe holds against each other: the truth of every patch, and the tokens that an encoder gives it.

Both lie in files without a name beside the results, mapped into memory, which vanish with the process. Nothing is
fitted here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools import given_masks
from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import UNUSABLE, decode_tile
from eosin.eval.annotations import Annotations, refusing
from eosin.eval.color import color_statistics
from eosin.eval.encoders import Encoder
from eosin.ssl.stain.normalizer import make_normalizer

COLOR_SIZE, COLOR_PATCH = 224, 16
COLORED = 2048  # patches whose colors are counted at once
THREADS = 4
CHUNK = 64  # tiles whose truth is counted at once


@dataclass(frozen=True)
class Tokens:
    """Patch tokens of N tiles by one encoder: float16 [N, h, w, D]."""

    encoder: Encoder
    maps: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.maps.shape[1], self.maps.shape[2]


def readable(shards: ShardSet, tiles: np.ndarray) -> np.ndarray:
    """Which of the tiles can be decoded, [N] bool."""
    good = np.zeros(len(tiles), dtype=bool)
    for rows, _ in decoded(shards, tiles, CHUNK, "look at tiles"):
        good[rows] = True
    return good


def decoded(shards: ShardSet, tiles: np.ndarray, batch: int, desc: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in ``tiles`` and uint8 [b, T, T, 3] of those that can be read, some at a time."""

    def read(image: bytes | Exception, crc32: int) -> np.ndarray | None:
        try:
            return decode_tile(image, crc32, shards.tile_size)
        except UNUSABLE:
            return None

    starts = range(0, len(tiles), batch)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in progress(starts, total=len(starts), desc=desc, unit="batches"):
            some = tiles[first : first + batch]
            rows = shards.rows(some)
            images = list(pool.map(read, shards.images(some, rows), rows["crc32"].tolist()))
            good = [i for i, image in enumerate(images) if image is not None]
            if good:
                yield first + np.array(good), np.stack([image for image in images if image is not None])


def tokens_of(encoder: Encoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives patch tokens [B, h, w, D] of uint8 tiles [B, 3, T, T]. Raises UserError where an encoder has none."""
    function = color_tokens if encoder.function is color_statistics else encoder.tokens
    if function is None:
        raise UserError(f"'{encoder.name}' has no patch tokens; a dense probe needs an encoder that keeps a grid")
    return function


def token_maps(encoder: Encoder, shards: ShardSet, tiles: np.ndarray, folder: Path, batch: int) -> Tokens:
    """The patch tokens of tiles that can be read, after the encoder's stain normalization.

    Raises UserError for an encoder without patch tokens, tokens that are not finite, or a disk without room for them.
    """
    function = tokens_of(encoder)
    normalizer = make_normalizer(encoder.stain, shards)
    maps: np.ndarray | None = None
    for rows, images in decoded(shards, tiles, batch, f"tokens, {encoder.name}"):
        pixels = torch.from_numpy(images).to(encoder.device).permute(0, 3, 1, 2).contiguous()  # [B, 3, T, T]
        if normalizer:
            slides = shards.rows(tiles[rows])["slide"].astype(np.int64)
            pixels, _ = normalizer(pixels, torch.from_numpy(slides))
        with torch.inference_mode():
            found = function(pixels).cpu().numpy()  # [B, h, w, D]
        if maps is None:
            maps = scratch(folder, (len(tiles), *found.shape[1:]), np.float16)
        with np.errstate(over="ignore"):
            maps[rows] = found
        if not np.isfinite(maps[rows]).all():
            raise UserError(f"'{encoder.name}' gives tokens that are not finite in 16 bits; its weights are broken")
    assert maps is not None
    return Tokens(encoder, maps)


def color_tokens(tiles: torch.Tensor) -> torch.Tensor:
    """Twelve color statistics of each of 14 x 14 patches of uint8 tiles [B, 3, H, W]: [B, 14, 14, 12]."""
    if tiles.shape[-2:] != (COLOR_SIZE, COLOR_SIZE):
        resized = F.interpolate(tiles.float(), (COLOR_SIZE, COLOR_SIZE), mode="bilinear", antialias=True)
        tiles = resized.round().clamp(0, 255).to(torch.uint8)
    side = COLOR_SIZE // COLOR_PATCH
    patches = tiles.unfold(2, COLOR_PATCH, COLOR_PATCH).unfold(3, COLOR_PATCH, COLOR_PATCH)  # [B, 3, h, w, P, P]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # [B·h·w, 3, P, P]
    # In pieces, since a histogram of each patch takes more memory than the patch.
    found = torch.cat([color_statistics(part).float() for part in patches.split(COLORED)])
    return found.view(len(tiles), side, side, 12)


def class_truth(annotations: Annotations, tiles: np.ndarray, pixels: int, folder: Path) -> np.ndarray:
    """Class numbers of every pixel of tiles, uint8 [N, pixels, pixels], mapped from a file."""
    truth = scratch(folder, (len(tiles), pixels, pixels), np.uint8)
    for row, tile in enumerate(progress(tiles.tolist(), total=len(tiles), desc="masks", unit="tiles")):
        truth[row] = annotations.mask(tile, pixels)
    return truth


def patch_shares(truth: np.ndarray, grid: tuple[int, int], n_classes: int) -> np.ndarray:
    """Share of each patch's area that each class covers, float32 [N, h, w, C]; they sum to what is annotated of it."""
    down, across = (overlaps(np.linspace(0, truth.shape[1], n + 1), truth.shape[1]) for n in grid)
    shares = np.empty((len(truth), *grid, n_classes), dtype=np.float32)
    for first in range(0, len(truth), CHUNK):
        part = np.asarray(truth[first : first + CHUNK])
        for c in range(n_classes):
            shares[first : first + CHUNK, ..., c] = down @ (part == c).astype(np.float32) @ across.T
    return shares


def value_truth(annotations: Annotations, tiles: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Means of each channel of images over the patches of tiles, float32 [N, h, w, C].

    Raises UserError for an image that cannot be read, has other channels than the first, or ends inside a tile.
    """
    found: list[np.ndarray] = []
    opened, image = -1, np.empty(0)
    for tile in progress(tiles.tolist(), total=len(tiles), desc="images", unit="tiles"):
        number, box = int(annotations.file[tile]), annotations.boxes[tile]
        path = annotations.files[number]
        if number != opened:
            opened, image = number, refusing(path, read_values, path)
        size = annotations.sizes[number]
        assert size is not None
        edges = [
            (start + np.linspace(0, box[2], n + 1)) * length / whole
            for start, n, length, whole in zip(box[1::-1], grid, image.shape, size[::-1])
        ]
        if any(e[0] < -0.5 or e[-1] > n + 0.5 for e, n in zip(edges, image.shape)):
            raise UserError(f"{path} ends inside a tile; its slide is larger or another one")
        (top, down), (left, across) = (_weights(e, n) for e, n in zip(edges, image.shape))
        window = image[top : top + down.shape[1], left : left + across.shape[1]]
        means = np.einsum("hy,yxc,wx->hwc", down, window, across, optimize=True).astype(np.float32)
        if found and means.shape != found[0].shape:
            raise UserError(f"{path} has {means.shape[2]} channels, an earlier image {found[0].shape[2]}")
        found.append(means)
    return np.stack(found)


def read_values(path: Path) -> np.ndarray:
    """An image of numbers, float32 [H, W, C]: a PNG, or a TIFF of integers or floats. Raises Refusal."""
    if path.suffix.lower() == ".png":
        with given_masks.open_png(path) as image:
            mode = image.mode if image.mode in ("L", "RGB") or image.mode.startswith("I") else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    elif path.suffix.lower() in given_masks.IMAGES:
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            pages = series.ndim == 3 and series.axes.endswith("YX")
            if not (pages or series.axes in ("YX", "YXS")) or series.dtype.kind not in "buif":
                raise Refusal(f"its pixels are {series.axes} of {series.dtype}; one image, or one a channel, is read")
            if series.size > 8 * given_masks.MAX_IMAGE_PIXELS:
                raise Refusal(f"{series.size} values in one piece; cut it into tiles")
            pixels = series.asarray()
            pixels = np.moveaxis(pixels, 0, -1) if pages else pixels
    else:
        raise Refusal("an outline has no values; give images")
    pixels = np.atleast_3d(pixels).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise Refusal("it holds values that are not finite")
    return pixels


def drawn_patches(usable: np.ndarray, tiles: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw patches to learn from: at most ``most``, and of each tile the same number, but at least one.

    Args:
        usable: [N, P] bool, patches that have a truth.
        tiles: [N], the tiles' numbers, which with the seed decide the draw.

    Returns:
        Tile row and patch of each, [M].
    """
    each = max(1, most // len(tiles))
    words = hash32(seed, purpose("dense patches"), tiles[:, None], np.arange(usable.shape[1])[None])
    order = np.argsort(np.where(usable, words, 1 << 40), axis=1, kind="stable")[:, :each]
    rows = np.repeat(np.arange(len(tiles)), order.shape[1])
    patches = order.ravel()
    kept = usable[rows, patches]
    return rows[kept], patches[kept]


def overlaps(edges: np.ndarray, pixels: int) -> np.ndarray:
    """How much of each bin between ``edges`` each of the pixels makes up, float32 [bins, pixels]; rows sum to 1."""
    starts, pixel = edges[:-1, None], np.arange(pixels)[None]
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(starts, pixel)
    covered = covered.clip(min=0)
    return (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)


def scratch(folder: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file without a name, gone when nobody holds it. Raises UserError where the disk has no room."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            raise UserError(
                f"{folder} has no room for {size / 1e9:.1f} GB of tokens and masks ({error.strerror}); give an --out "
                "on a larger disk, or fewer tiles"
            ) from None
        return np.memmap(file, dtype, "r+", shape=shape)


def _weights(edges: np.ndarray, pixels: int) -> tuple[int, np.ndarray]:
    """First pixel under bins between ``edges``, and :func:`overlaps` from it on."""
    edges = edges.clip(0, pixels)
    first, last = int(edges[0]), min(int(np.ceil(edges[-1])), pixels)
    return first, overlaps(edges - first, max(last - first, 1))
