"""What is looked at now and then while training goes on: pictures, the online probe, the loss on held-out patients.

Nothing here changes what is learned, and no random state is touched. Every process takes part in every look, since a
network may be spread over all of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import atomic_path
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.stream import UNUSABLE, Batch, decode_tile
from eosin.ssl import crops_sheet, distributed, feed
from eosin.ssl.config import Config, OnlineProbe, patch_size
from eosin.ssl.feed import Phase
from eosin.ssl.held_out import held_out_slides, texts
from eosin.ssl.metrics import balanced_accuracy, knn_across_groups
from eosin.ssl.network import StudentTeacher, divide
from eosin.ssl.parallel import autocast
from eosin.ssl.schedules import Moment
from eosin.ssl.stain.normalizer import Normalizer, make_normalizer
from eosin.ssl.whole_tiles import on_tissue, preprocess, token_colors, tokens

NEIGHBORS = 20
CHUNK = 64  # tiles that are looked at together
FIXED_TILES, CROP_TILES = 8, 4  # in the pictures of patch tokens and of crops
SIDE = 160  # pixels of a tile in the picture of patch tokens
SCORES = Path("tensorboard") / "patch_scores.npy"  # of the last picture, so that the next has its colors
DRAW = purpose("monitored tile")
# What is compiled for training is not compiled again for other numbers of tiles.
eager = partial(torch.compiler.set_stance, "force_eager")


class Looked(NamedTuple):
    """Numbers by name for the record, and pictures [H, W, 3] uint8 by name, which rank 0 alone has."""

    numbers: dict[str, float]
    pictures: dict[str, np.ndarray]


class Monitor:
    """Looks at a model every so many steps.

    Raises:
        UserError: the probe's shard set cannot be used, or too few tiles are held out.
    """

    def __init__(self, config: Config, phases: list[Phase], normalization: dict[str, Any] | None) -> None:
        health, every = config.health, config.health.pictures_every
        self.config = config
        self.probe = Probe(config, health.probe, normalization) if health.probe else None
        self.held_out = HeldOut(phases[0]) if health.held_out else None
        self.pictures_every = config.run.checkpoint_every if every is None else every
        self.pictures = Pictures(phases) if self.pictures_every else None
        self.start: dict[str, float] = {}

    def begin(self, model: StudentTeacher, device: torch.device) -> None:
        """Measure the weights that a run begins with; they are part of its first record."""
        if self.probe:
            with eager():
                found = self.probe.measure(model, device)
            self.start = {"probe_start": found["probe_accuracy"]} if found else {}

    def due(self, done: int) -> bool:
        """Whether there is something to look at after ``done`` steps."""
        return any(self._due(done))

    def look(
        self,
        done: int,
        model: StudentTeacher,
        student: nn.Module,
        phase: Phase,
        batch: Batch,
        views: feed.Views,
        moment: Moment,
    ) -> Looked:
        """What is due after ``done`` steps, the last of which was on ``batch``.

        Args:
            student: ``model.student`` or what wraps it for distributed training.
            views: made of the batch.
        """
        numbers, pictures, device = self.start, {}, views.positions.device
        self.start = {}
        probe, held_out, picture = self._due(done)
        with eager():
            if probe and self.probe:
                numbers = numbers | self.probe.measure(model, device)
            if held_out and self.held_out:
                numbers = numbers | self.held_out.measure(model, student, moment, device)
            if picture and self.pictures:
                pictures = self.pictures.draw(model, phase, batch, views)
        return Looked(numbers, pictures)

    def _due(self, done: int) -> tuple[bool, bool, bool]:
        health, last = self.config.health, done == self.config.run.steps
        return (
            health.probe is not None and (last or done % health.probe.every == 0),
            health.held_out > 0 and (last or done % health.held_out_every == 0),
            self.pictures_every > 0 and (last or done % self.pictures_every == 0),
        )


class Probe:
    """Grouped k-NN on labeled tiles: each is told by its nearest neighbors among the tiles of other groups.

    The features are the teacher's class tokens of whole tiles, as ``eosin embed`` makes them but for the precision,
    which is the run's.
    """

    def __init__(self, config: Config, asked: OnlineProbe, normalization: dict[str, Any] | None) -> None:
        self.config = config
        shards = Mixture({asked.shards: 1.0})
        self.normalizer = make_normalizer(normalization, shards)
        tiles, labels, groups = _labeled(shards, asked, config.run.seed)
        images, kept = _read(shards, tiles, len(tiles))
        labels, groups = labels[kept], groups[kept]
        classes, self.labels = np.unique(labels, return_inverse=True)
        names, self.groups = np.unique(groups, return_inverse=True)
        where = f"health.probe: of {shards.name}"
        if len(classes) < 2:
            raise UserError(f"{where}, all {len(labels)} tiles are of one '{asked.label}'; a probe needs two or more")
        present = np.zeros((len(classes), len(names)), dtype=bool)
        present[self.labels, self.groups] = True
        lonely = np.flatnonzero(present.sum(axis=1) == 1)
        if len(lonely):
            raise UserError(
                f"{where}, '{classes[lonely[0]]}' occurs in 1 {asked.group} only, so that no other can tell it; leave "
                "it out, or group by something finer with health.probe.group"
            )
        if len(labels) - np.bincount(self.groups).max() < NEIGHBORS:
            raise UserError(f"{where}, too few tiles can be used; {NEIGHBORS} outside of each {asked.group} are needed")
        # Each process has an equal share; the last is filled up with the first tiles again.
        ranks = distributed.ranks()
        mine = (np.arange(-(-len(labels) // ranks) * ranks) % len(labels)).reshape(ranks, -1)[distributed.rank()]
        self.images = images[mine]
        self.slides = torch.from_numpy(shards.rows(tiles[kept][mine])["slide"].astype(np.int64))

    def measure(self, model: StudentTeacher, device: torch.device) -> dict[str, float]:
        """Balanced accuracy, its standard error, and what always guessing the largest class gets."""
        found = []
        for first in range(0, len(self.images), CHUNK):
            part = slice(first, first + CHUNK)
            seen = _tokens(model, self.config, self.images[part].to(device), self.slides[part], self.normalizer)
            found.append(seen[:, 0])
        features = distributed.all_rows(torch.cat(found))[: len(self.labels)]  # [N, D]
        if not features.isfinite().all():
            return {}
        n_classes = int(self.labels.max()) + 1
        said = knn_across_groups(
            features.cpu().numpy(), self.labels, self.groups, n_classes, NEIGHBORS, device=features.device
        )
        accuracy, error = balanced_accuracy(self.labels, said, self.groups)
        return {"probe_accuracy": accuracy, "probe_error": error, "probe_chance": 1 / n_classes}


class HeldOut:
    """The training loss on tiles of patients that are never trained on, with the same crops and masks each time.

    As many tiles as a batch has, where there are so many, since the loss depends on their number.
    """

    def __init__(self, phase: Phase) -> None:
        config, shards = phase.config, phase.shards
        self.phase, ranks, rank = phase, distributed.ranks(), distributed.rank()
        parts = ranks * config.optim.accumulate
        slides = held_out_slides(shards, config.health.held_out, config.run.seed)
        of_slide = shards.column("slide")
        tiles = np.flatnonzero(np.isin(of_slide, list(slides)))
        tiles = tiles[np.argsort(hash32(tiles, config.run.seed, DRAW), kind="stable")]
        images, kept = _read(shards, tiles, config.data.batch)
        count = len(kept) // parts * parts
        if not count:
            raise UserError(
                f"health.held_out: {config.health.held_out:g} of the patients of {shards.name} are {len(slides)} "
                f"slides with {len(kept)} tiles that can be used; give a larger share, or 0 to hold out none"
            )
        mine = slice(rank * count // ranks, (rank + 1) * count // ranks)
        self.batch = Batch(
            images=images[mine],
            position=torch.arange(count)[mine],
            tile=torch.from_numpy(tiles[kept[mine]]),
            slide=torch.from_numpy(of_slide[tiles[kept[mine]]].astype(np.int64)),
            bad=[],
        )

    @torch.no_grad()
    def measure(
        self, model: StudentTeacher, student: nn.Module, moment: Moment, device: torch.device
    ) -> dict[str, float]:
        """The objective as it is trained, and its two main terms; means over all processes."""
        config = self.phase.config
        views = feed.views(self.phase, self.batch, device)
        parts = divide(views[:3], config.optim.accumulate)
        with autocast(config, device):
            # What this moves centers to is overwritten by the next batch's before it is used.
            targets, _ = model.targets(parts, moment.teacher_temperature)
            of_parts = [model.losses(student, part, target) for part, target in zip(parts, targets)]
        means = {name: torch.stack([terms[name].float() for terms in of_parts]).mean() for name in of_parts[0]}
        means = {name: distributed.all_sum(value) / distributed.ranks() for name, value in means.items()}
        loss = sum(getattr(config.objective, name) * float(value) for name, value in means.items())
        return {
            "held_out_loss": loss,
            "held_out_dino": float(means["dino"]),
            "held_out_ibot": float(means["ibot"]),
        }


class Pictures:
    """Crops of the batch at hand with their masks, and the teacher's patch tokens on the same tiles each time."""

    def __init__(self, phases: list[Phase]) -> None:
        self.phase = phases[0]
        self.fixed = crops_sheet.first_tiles(self.phase, FIXED_TILES)
        self.names = {phase.steps: texts(phase.shards.slides()["slide"]) for phase in phases}
        path = Path(self.phase.config.run.dir) / SCORES
        self.scores = torch.from_numpy(np.load(path, allow_pickle=False)) if path.is_file() else None

    def draw(self, model: StudentTeacher, phase: Phase, batch: Batch, views: feed.Views) -> dict[str, np.ndarray]:
        """The pictures "crops" and "patch tokens"."""
        found = self._patch_tokens(model, views.positions.device)
        if distributed.rank() != 0:
            return {}
        shown = crops_sheet.drawn(phase, batch, views, CROP_TILES)
        return {"crops": crops_sheet.sheet(phase, shown, self.names[phase.steps]), "patch tokens": found}

    def _patch_tokens(self, model: StudentTeacher, device: torch.device) -> np.ndarray:
        config, normalizer = self.phase.config, self.phase.normalizer
        images, slides = self.fixed["images"], self.fixed["slide"]
        seen = _tokens(model, config, images.to(device), slides, normalizer)
        patches = seen[:, model.teacher.backbone.num_prefix_tokens :]  # [n, P, D]
        grid = config.crops.global_size // patch_size(config.model)
        shown = normalizer(images, slides).images if normalizer else images
        features = patches.flatten(0, 1).double().cpu()
        if not features.isfinite().all():
            features = torch.zeros_like(features)
        before = self.scores if self.scores is not None and len(self.scores) == len(features) else None
        colors, self.scores, _ = token_colors(features, on_tissue(shown, grid), before)
        if distributed.rank() == 0:
            with atomic_path(Path(config.run.dir) / SCORES) as temporary:
                np.save(temporary, self.scores.numpy())
        rows = [
            (shown.permute(0, 2, 3, 1).numpy(), cv2.INTER_AREA),
            (colors.view(-1, grid, grid, 3).numpy(), cv2.INTER_NEAREST),
        ]
        return np.vstack(
            [np.hstack([cv2.resize(i, (SIDE, SIDE), interpolation=method) for i in row]) for row, method in rows]
        )


def _tokens(
    model: StudentTeacher, config: Config, images: torch.Tensor, slides: torch.Tensor, normalizer: Normalizer | None
) -> torch.Tensor:
    """The teacher's tokens of uint8 tiles, [B, 3, T, T]: [B, prefix + P, D]."""
    if normalizer:
        images = normalizer(images, slides.to(images.device)).images
    given = preprocess(images, config.crops.global_size, config.augment.mean, config.augment.std)
    with autocast(config, images.device):
        return tokens(model.teacher, given)


def _labeled(shards: Mixture, asked: OnlineProbe, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``asked.tiles`` tiles that have a label and a group, or as many as there are, drawn by the seed; and both."""
    (only,) = shards.sets
    table = only.slides()
    of_slides = {name: texts(table[name]) for name in (asked.label, asked.group) if name in table}
    order = np.argsort(hash32(np.arange(len(shards)), seed, DRAW), kind="stable")
    found: list[tuple[int, str, str]] = []
    known = set(map(str, table.columns))
    for first in range(0, len(order), CHUNK):
        chunk = order[first : first + CHUNK]
        for tile, slide in zip(chunk.tolist(), only.rows(chunk)["slide"].tolist()):
            meta = only.meta(tile)
            known |= set(meta)
            # A tile's own knowledge goes before that of its slide.
            label, group = (
                texts([meta[name]])[0] if name in meta else of_slides[name][slide] if name in of_slides else ""
                for name in (asked.label, asked.group)
            )
            if label and group and len(found) < asked.tiles:
                found.append((tile, label, group))
        if len(found) == asked.tiles:
            break
    for key, name in (("label", asked.label), ("group", asked.group)):
        if name not in known:
            raise UserError(
                f"health.probe.{key}: neither the tiles nor the slides of {shards.name} have '{name}'; "
                f"{nearest(name, sorted(known))}"
            )
    if not found:
        raise UserError(f"health.probe: no tile of {shards.name} has both a '{asked.label}' and a '{asked.group}'")
    tiles, labels, groups = zip(*found)
    return np.array(tiles, dtype=np.int64), np.array(labels), np.array(groups)


def _read(shards: Mixture, tiles: np.ndarray, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """The first ``count`` of ``tiles`` that can be used, [n, 3, T, T] uint8, and which these are, [n].

    The others are left out and said, on rank 0.
    """
    images: list[np.ndarray] = []
    kept: list[int] = []
    bad: list[str] = []
    for first in range(0, len(tiles), CHUNK):
        if len(kept) >= count:
            break
        chunk = tiles[first : first + CHUNK]
        rows = shards.rows(chunk)
        read = zip(shards.images(chunk, rows), rows["crc32"].tolist())
        for place, (image, crc32) in enumerate(read, first):
            try:
                images.append(decode_tile(image, crc32, shards.tile_size))
                kept.append(place)
            except UNUSABLE as error:
                bad.append(f"tile {tiles[place]}: {error}")
    images, kept = images[:count], kept[:count]
    if bad and distributed.rank() == 0:
        print(f"health: {len(bad)} tiles of {shards.name} cannot be used and are left out; the first is {bad[0]}")
    side = shards.tile_size
    stacked = np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(), np.array(kept, dtype=np.int64)
