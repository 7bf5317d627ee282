"""Every quantity that changes over a run, as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eosin.ssl.config import Config


@dataclass(frozen=True)
class Moment:
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    last_layer_frozen: bool
    backbone_frozen: bool


def base_lr(config: Config) -> float:
    """Peak learning rate: ``optim.lr`` scaled by the batch against 1,024 (DINOv2: square root)."""
    ratio = config.data.batch / 1024
    return config.optim.lr * {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[config.optim.scaling]


def at(step: int, config: Config) -> Moment:
    """The values for step ``step``, counted from 0."""
    optim, objective, steps = config.optim, config.objective, config.run.steps
    peak = base_lr(config)
    if step < optim.warmup:
        lr = peak * (step + 1) / optim.warmup
    else:
        lr = cosine(peak, optim.final_lr, (step - optim.warmup) / max(steps - optim.warmup, 1))
    low, high = objective.teacher_temperature
    warm = min(step / objective.teacher_temperature_warmup, 1) if objective.teacher_temperature_warmup else 1.0
    return Moment(
        lr=lr,
        weight_decay=cosine(optim.weight_decay[0], optim.weight_decay[1], step / steps),
        momentum=cosine(objective.momentum[0], objective.momentum[1], step / steps),
        teacher_temperature=low + (high - low) * warm,
        last_layer_frozen=step < optim.freeze_last_layer,
        backbone_frozen=step < optim.heads_only,
    )


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
