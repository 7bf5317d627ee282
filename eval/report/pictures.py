"""Tiles as pictures for the report: mosaics of a slide, patch tokens, attention.

Everything here turns tiles of a shard set into uint8 RGB arrays; nothing is written and nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.ssl.config import Config, patch_size
from eosin.ssl.stain.normalizer import Normalizer
from eosin.ssl.whole_tiles import on_tissue, preprocess, token_colors

MOST_TILES = 144  # of a slide in one mosaic; of a larger slide its fullest square window is shown
MOSAIC_PIXELS = 720
HEAT = (213, 94, 0)  # Okabe and Ito's vermilion
PICK = purpose("report tile")
BATCH = 36


@dataclass(frozen=True)
class Mosaic:
    """Where tiles of a slide lie beside each other.

    Attributes:
        tiles: [n], their numbers.
        images: [n, T, T, 3] uint8.
        cells: [n, 2] row and column.
        whole: all tiles of the slide are here, at their places.
        placed: the places are those of the slide; False where the tiles have none and are in a row.
    """

    tiles: np.ndarray
    images: np.ndarray
    cells: np.ndarray
    whole: bool
    placed: bool

    def paint(self, images: np.ndarray) -> np.ndarray:
        """Put pictures of the tiles, [n, t, t, 3] uint8, at their places on white: [H, W, 3]."""
        rows, columns = self.cells.max(axis=0) + 1
        side = max(8, MOSAIC_PIXELS // max(rows, columns))
        method = cv2.INTER_AREA if images.shape[1] > side else cv2.INTER_NEAREST
        out = np.full((rows * side, columns * side, 3), 255, np.uint8)
        for (row, column), image in zip(self.cells, images):
            small = cv2.resize(image, (side, side), interpolation=method)
            out[row * side : (row + 1) * side, column * side : (column + 1) * side] = small
        return out


def mosaic(shards: ShardSet, slide: int, slide_mpp: float = math.nan) -> Mosaic | None:
    """Lay out the readable tiles of a slide; None when there are none.

    Args:
        slide: row in the slides table.
        slide_mpp: µm a pixel of the slide's finest level, in which positions are given; guessed where unknown.
    """
    tiles = np.flatnonzero(shards.column("slide") == slide)
    if not len(tiles):
        return None
    rows = [shards.row(int(t)) for t in tiles]
    places = np.array([(r["y"], r["x"]) for r in rows], dtype=np.int64)
    placed = len(np.unique(places, axis=0)) == len(tiles) and len(tiles) > 1
    if placed:
        cells = _cells(places, shards.tile_size * float(rows[0]["mpp"]) / slide_mpp)
        chosen = _window(cells, math.isqrt(MOST_TILES))
    else:
        # Packed images have no place on their slide.
        chosen = np.arange(min(len(tiles), MOST_TILES))
        columns = math.ceil(math.sqrt(len(chosen)))
        cells = np.stack([np.arange(len(tiles)) // columns, np.arange(len(tiles)) % columns], axis=1)
    images, good = read_tiles(shards, tiles[chosen])
    if not len(good):
        return None
    kept = chosen[good]
    cells = cells[kept] - cells[kept].min(axis=0)
    return Mosaic(tiles[kept], images, cells, len(kept) == len(tiles), placed)


def read_tiles(shards: ShardSet, tiles: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode tiles: images [g, T, T, 3] uint8 of those that can be, and which ones these are, [g]."""
    images, good = [], []
    for place, tile in enumerate(tiles):
        try:
            image = decode(shards.image(int(tile)))
        except (ValueError, EOFError):
            continue  # 'eosin verify' lists them; a picture can do without
        if image.shape == (shards.tile_size, shards.tile_size, 3):
            images.append(image)
            good.append(place)
    side = shards.tile_size
    return np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8), np.array(good, dtype=np.int64)


def pick_tile(shards: ShardSet, slide: int, seed: int) -> np.ndarray | None:
    """One readable tile of a slide, drawn by the seed, [T, T, 3]; None when there is none."""
    tiles = np.flatnonzero(shards.column("slide") == slide)
    tiles = tiles[np.argsort(uniform(tiles, seed, PICK), kind="stable")][:8]
    images, _ = read_tiles(shards, tiles)
    return images[0] if len(images) else None


def normalized(normalizer: Normalizer, images: np.ndarray, slides: Sequence[int]) -> np.ndarray:
    """Stain-normalize tiles [n, T, T, 3] of slide numbers ``slides``."""
    done = normalizer(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(slides)).images
    return done.permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def token_pictures(
    backbone: VisionTransformer, config: Config, normalizer: Normalizer | None, mosaics: list[tuple[int, Mosaic]]
) -> tuple[list[np.ndarray], float]:
    """The first three principal components of patch tokens as RGB, one basis for all slides.

    See :func:`~eosin.ssl.whole_tiles.token_colors`.

    Args:
        mosaics: (slide number, mosaic) of each slide.

    Returns:
        A mosaic of token pictures for each slide, and the three components' share of the tokens' variance.
    """
    size = config.crops.global_size
    grid = size // patch_size(config.model)
    tokens, tissue = [], []
    for slide, laid in mosaics:
        for first in range(0, len(laid.images), BATCH):
            images = torch.from_numpy(laid.images[first : first + BATCH]).permute(0, 3, 1, 2).contiguous()
            if normalizer:
                images = normalizer(images, torch.full((len(images),), slide)).images
            features = backbone.forward_features(preprocess(images, size, config.augment.mean, config.augment.std))
            tokens.append(features[:, backbone.num_prefix_tokens :].flatten(0, 1).double())
            tissue.append(on_tissue(images, grid))
    colors, _, share = token_colors(torch.cat(tokens), torch.cat(tissue))
    pixels = colors.view(-1, grid, grid, 3).numpy()
    pictures, start = [], 0
    for _, laid in mosaics:
        pictures.append(laid.paint(pixels[start : start + len(laid.images)]))
        start += len(laid.images)
    return pictures, share


def heat(laid: Mosaic, relative: np.ndarray, full: float) -> np.ndarray:
    """A gray mosaic under attention in vermilion.

    Args:
        relative: [n] attention of the mosaic's tiles in even shares: 1 is what every tile would get.
        full: what gets full color.
    """
    alpha = 0.85 * np.clip(relative / full, 0, 1)[:, None, None, None]
    gray = np.stack([cv2.cvtColor(i, cv2.COLOR_RGB2GRAY) for i in laid.images])[..., None].astype(np.float32)
    # Ink multiplies, as a marker pen does, so that structure stays visible under it.
    painted = gray * (1 - alpha) + gray / 255 * np.array(HEAT, np.float32) * alpha
    return laid.paint(painted.round().astype(np.uint8))


def _cells(places: np.ndarray, step: float) -> np.ndarray:
    """Rows and columns of tiles at ``places``, [n, 2] y and x; ``step`` pixels from tile to tile, NaN if unknown."""
    offset = places - places.min(axis=0)
    if not step > 0:
        gaps = np.concatenate([np.diff(np.unique(offset[:, axis])) for axis in (0, 1)])
        step = float(gaps.min()) if len(gaps) else 1.0
    return np.rint(offset / step).astype(np.int64)


def _window(cells: np.ndarray, side: int) -> np.ndarray:
    """Indices of the tiles in the square window of ``side`` cells that holds most of them."""
    rows, columns = cells.max(axis=0) + 1
    if len(cells) <= side * side and max(rows, columns) <= 4 * side:
        return np.arange(len(cells))
    taken = np.zeros((rows, columns), np.uint8)
    taken[tuple(cells.T)] = 1
    sums = cv2.integral(taken)
    height, width = min(side, rows), min(side, columns)
    counts = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(counts.argmax(), counts.shape)
    inside = (cells >= (top, left)).all(axis=1) & (cells < (top + height, left + width)).all(axis=1)
    return np.flatnonzero(inside)
