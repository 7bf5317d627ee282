"""What a recipe makes of tiles, as pictures: each tile, normalized, its global crops with masks, local crops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.qc import write_png
from eosin.data_tools.stream import Batch, Tiles
from eosin.ssl import feed
from eosin.ssl.config import Config, patch_size
from eosin.ssl.feed import Phase
from eosin.ssl.stain.normalizer import describe

SIDE = 160  # pixels of the tile and of global crops; local crops are half
GAP, LINE, MARGIN = 8, 18, 16
INK, FAINT, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
MOST_TILES = 64
LONGEST = 40  # letters of a slide's name


@dataclass(frozen=True)
class Views:
    """One tile as it is stored, as it is normalized, and its crops, all uint8 RGB; masked patches are gray."""

    slide: int
    tile: int
    raw: np.ndarray
    normalized: np.ndarray
    global_crops: list[np.ndarray]
    local_crops: list[np.ndarray]


def write_crops(config: Config, out: Path, tiles: int) -> int:
    """Draw the crops of ``tiles`` tiles, of each phase of the recipe, into the PNG ``out``; return how many were drawn.

    Raises:
        UserError: ``out`` is no PNG, ``tiles`` is out of range, or what a training run refuses.
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out} is not a PNG; give a name that ends in .png")
    if not 1 <= tiles <= MOST_TILES:
        raise UserError(f"--tiles {tiles} is not a number of tiles to look at; give 1 to {MOST_TILES}")
    phases = feed.phases(config, describe(config.stain), torch.device("cpu"))
    parts, drawn = [], 0
    for phase in phases:
        shown = views(phase, tiles)
        names = phase.shards.slides()["slide"].astype(str).tolist()
        parts.append(sheet(phase, shown, names))
        drawn += len(shown)
    width = max(part.shape[1] for part in parts)
    parts = [cv2.copyMakeBorder(p, 0, 0, 0, width - p.shape[1], cv2.BORDER_CONSTANT, value=PAPER) for p in parts]
    with atomic_path(out) as temporary:
        write_png(temporary, np.concatenate(parts))
    return drawn


def views(phase: Phase, count: int) -> list[Views]:
    """The crops and masks that training makes of ``count`` of a phase's first tiles, of as many slides as can be."""
    batch = first_tiles(phase, count)
    return drawn(phase, batch, feed.views(phase, batch, torch.device("cpu")), count)


def first_tiles(phase: Phase, count: int) -> Batch:
    """``count`` of a phase's first tiles, of as many slides as can be."""
    config, shards = phase.config, phase.shards
    order = shards.order(config.run.seed, feed.sampling(config, shards))
    start, stop = (step * config.data.batch for step in (phase.steps.start, phase.steps.stop))
    seen = np.arange(start, start + min(len(shards), stop - start, 64 * count), dtype=np.int64)
    _, first = np.unique(shards.rows(order(seen))["slide"], return_index=True)
    rest = np.setdiff1d(np.arange(len(seen)), first)
    return Tiles(shards, order)[seen[np.concatenate([np.sort(first), rest])[:count]]]


def drawn(phase: Phase, batch: Batch, made: feed.Views, count: int) -> list[Views]:
    """The first ``count`` tiles of a batch with the views that training makes of them."""
    config = phase.config
    images, slides = batch["images"][:count], batch["slide"][:count]
    normal = phase.normalizer(images, slides).images if phase.normalizer else images
    crops = [group[:, :count].cpu() for group in made.crops]
    masks = made.masks[:, :count].cpu()
    patch = patch_size(config.model)
    grid = config.crops.global_size // patch
    out = []
    for i, (slide, tile) in enumerate(zip(slides.tolist(), batch["tile"].tolist())):
        of_tile = masks[:, i].view(-1, grid, grid).numpy()
        shown = [_masked(_pixels(c[i], config), mask, patch) for c, mask in zip(crops[0], of_tile)]
        local = [_pixels(c[i], config) for c in crops[1]]
        stored, whole = (t[i].permute(1, 2, 0).numpy() for t in (images, normal))
        out.append(Views(slide, tile, stored, whole, shown, local))
    return out


def sheet(phase: Phase, shown: list[Views], names: list[str]) -> np.ndarray:
    """Crops of a phase in one picture, [H, W, 3] uint8; ``names`` are those of its slides."""
    config = phase.config
    crops, steps = config.crops, phase.steps
    columns = [("tile as stored", SIDE)]
    if phase.normalizer:
        columns.append(("normalized", SIDE))
    columns.append((f"2 global crops, {crops.global_size} px, masked patches gray", 2 * SIDE + GAP))
    across = -(-crops.local_count // 2)
    if crops.local_count:
        columns.append((f"{crops.local_count} local crops, {crops.local_size} px", across * (SIDE + GAP) // 2))
    width = max(2 * MARGIN + sum(w + 2 * GAP for _, w in columns), 640)
    row_height = LINE + SIDE + GAP
    picture = Image.new("RGB", (width, 2 * MARGIN + 3 * LINE + len(shown) * row_height), PAPER)
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(15), ImageFont.load_default(11)
    operations = ", ".join(o.op for o in config.stain.augment) or "none"
    said = (
        f"{config.model.architecture}, steps {steps.start + 1:,} to {steps.stop:,}; stain: normalize "
        f"{config.stain.normalize}, augment {operations}"
    )
    draw.text((MARGIN, MARGIN), said, INK, large)
    left = MARGIN
    for title, wide in columns:
        draw.text((left, MARGIN + LINE + GAP), title, FAINT, small)
        left += wide + 2 * GAP
    for number, view in enumerate(shown):
        top = MARGIN + 3 * LINE + number * row_height
        draw.text((MARGIN, top), f"{names[view.slide][:LONGEST]}, tile {view.tile}", FAINT, small)
        top += LINE
        left = MARGIN
        whole = [view.raw, *([view.normalized] if phase.normalizer else [])]
        for image, after in [*((i, 2 * GAP) for i in whole), *zip(view.global_crops, (GAP, 2 * GAP))]:
            picture.paste(_scaled(image, SIDE), (left, top))
            left += SIDE + after
        half = (SIDE - GAP) // 2
        for place, image in enumerate(view.local_crops):
            at = (left + place // 2 * (half + GAP), top + place % 2 * (half + GAP))
            picture.paste(_scaled(image, half), at)
    return np.asarray(picture)


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    method = Image.Resampling.LANCZOS if image.shape[0] > side else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((side, side), method)


def _pixels(crop: torch.Tensor, config: Config) -> np.ndarray:
    """Undo mean and deviation of a crop, [3, S, S]: uint8 [S, S, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    return ((crop * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _masked(crop: np.ndarray, mask: np.ndarray, patch: int) -> np.ndarray:
    """Paint masked patches, bool [grid, grid], gray with a fine edge."""
    out = crop.copy()
    hidden = mask.repeat(patch, axis=0).repeat(patch, axis=1)
    out[hidden] = 150
    edges = hidden & ~cv2.erode(hidden.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    out[edges] = 105
    return out
