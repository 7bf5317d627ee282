"""What the loop trains on: the tiles of each phase of a run, and the views that are made of a batch.

A run has one phase, or two where its recipe ends at high resolution (UNI): other crops, and other tiles where it names
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from eosin.data_tools.mixture import Mixture, Sampling
from eosin.data_tools.stream import Batch, batches
from eosin.ssl import distributed
from eosin.ssl.augment import multi_crop
from eosin.ssl.config import Config, patch_size
from eosin.ssl.held_out import held_out_slides
from eosin.ssl.masks import block_masks
from eosin.ssl.rewind import Rewind, batch_of
from eosin.ssl.stain.augment import Augmenter, make_augmenter
from eosin.ssl.stain.normalizer import Normalizer, make_normalizer


@dataclass
class Phase:
    """A part of a run.

    Attributes:
        steps: its steps.
        config: the run's configuration with the crops and the shards of this phase.
        shards, normalizer, augmenter: its tiles and their stain.
    """

    steps: range
    config: Config
    shards: Mixture
    normalizer: Normalizer | None
    augmenter: Augmenter | None


class Views(NamedTuple):
    """What the objective compares.

    Attributes:
        crops: global [2, B, 3, G, G] and local [L, B, 3, S, S].
        masks: [2, B, P] bool.
        positions, slides: [B] int64.
        raw: [B] uint8, why a tile was not stain-normalized; None where that is off.
    """

    crops: list[torch.Tensor]
    masks: torch.Tensor
    positions: torch.Tensor
    slides: torch.Tensor
    raw: torch.Tensor | None


def phases(config: Config, normalization: dict[str, Any] | None, device: torch.device) -> list[Phase]:
    """The phases of a run in order. Raises UserError where a shard set or its stain fits are missing."""
    last = config.high_resolution
    switch = config.run.steps - (last.steps if last else 0)
    made = [_phase(range(switch), config, normalization, device)]
    if last:
        data = config.data.model_copy(update={"shards": last.shards or config.data.shards})
        later = config.model_copy(update={"crops": last.crops, "data": data})
        made.append(_phase(range(switch, config.run.steps), later, normalization, device))
    return made


def _phase(steps: range, config: Config, normalization: dict[str, Any] | None, device: torch.device) -> Phase:
    given = config.data.shards
    shards = Mixture({given: 1.0} if isinstance(given, str) else given)
    normalizer = make_normalizer(normalization, shards)
    augmenter = make_augmenter(config.stain, shards, normalizer)
    return Phase(steps, config, shards, normalizer, augmenter.to(device) if augmenter else None)


def stain_notes(phase: Phase) -> Iterator[str]:
    """What stain operations do not reach, in words."""
    if phase.augmenter is not None and not phase.augmenter.he.all():
        off = int((~phase.augmenter.he).sum())
        yield f"stain: {off} of {len(phase.augmenter.he)} slides are not H&E; stain augmentation is off for them"
    if phase.normalizer is not None:
        for reason, count in phase.normalizer.raw_slides().items():
            yield f"stain: the tiles of {count} of {len(phase.normalizer.reason)} slides stay raw: {reason}"


def sampling(config: Config, shards: Mixture) -> Sampling:
    """How a recipe draws tiles."""
    data = config.data
    return Sampling(
        block=data.shuffle_block,
        window=data.shuffle_window,
        balance=data.balance,
        cap=data.slide_cap,
        weights=data.weights,
        clusters=data.clusters,
        leave_out=held_out_slides(shards, config.health.held_out, config.run.seed),
    )


def stream(phases: list[Phase], start: int, rewinds: Sequence[Rewind] = ()) -> Iterator[tuple[Phase, Batch]]:
    """This process's share of the global batches from step ``start`` on, each with its phase.

    ``rewinds`` of the run say which batches are passed over.

    Raises UserError at once where a shard set is empty or the batch does not divide by the processes.
    """
    parts = [
        (
            phase,
            batches(
                phase.shards,
                batch=phase.config.data.batch,
                steps=[batch_of(step, rewinds) for step in range(max(phase.steps.start, start), phase.steps.stop)],
                seed=phase.config.run.seed,
                sampling=sampling(phase.config, phase.shards),
                rank=distributed.rank(),
                ranks=distributed.ranks(),
                workers=phase.config.data.workers,
            ),
        )
        for phase in phases
    ]
    return ((phase, batch) for phase, part in parts for batch in part)


def views(phase: Phase, batch: Batch, device: torch.device) -> Views:
    """Normalize a batch, and make its crops and masks on ``device``."""
    config = phase.config
    images, positions, slides = (batch[k].to(device, non_blocking=True) for k in ("images", "position", "slide"))
    raw = None
    if phase.normalizer:
        images, raw = phase.normalizer(images, slides)
    stain = phase.augmenter.of(images, slides) if phase.augmenter else None
    crops = multi_crop(images, positions, config, stain)
    masks = block_masks(
        batch["position"],
        2,
        config.crops.global_size // patch_size(config.model),
        seed=config.run.seed,
        probability=config.objective.mask_probability if config.objective.ibot else 0.0,
        ratio=config.objective.mask_ratio,
    )
    return Views(list(crops), masks.to(device), positions, slides, raw)


def trained_on(phases: list[Phase]) -> list[tuple[Mixture, frozenset[int]]]:
    """The shard sets of a run, each with the rows of its slides table that are never drawn."""
    return [(phase.shards, sampling(phase.config, phase.shards).leave_out) for phase in phases]


def identities(phases: list[Phase]) -> dict[str, str]:
    """What a checkpoint remembers of the tiles it was trained on, and of what they were drawn by."""
    found = {}
    for name, phase in zip(["shard set", "high-resolution shard set"], phases):
        found[name] = phase.shards.identity
        if marks := phase.shards.marks(sampling(phase.config, phase.shards)):
            found[f"weights, clusters or balanced columns of its {name}"] = marks
    return found
