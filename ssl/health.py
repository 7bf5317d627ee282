"""Monitors that say in plain words when a run goes wrong. They look at logged numbers only, and change nothing.

A record is a line of ``metrics.jsonl`` as a mapping; a number that it lacks, or that is not finite, warns of nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

import numpy as np

from eosin.ssl.config import Config

SETTLED = 100  # steps; before them even a healthy teacher still answers evenly
FEW = 5  # records over which what varies from batch to batch is averaged
MANY = 50  # records that a gradient's norm is compared with
# Nats. A teacher whose answers are this near to even tells nothing; in healthy runs, short and small ones included,
# its distance from ln K is three times as large and more.
NOTHING = 0.01
EXPLODED = 10.0  # times its median
# The slide decides where neighbors that could be of the same slide are so more often than not, and five times as often
# as by chance: with few slides in a batch, a slide and its kind of tissue are the same thing. Healthy runs on tissue
# at batches of 32 and 64 stayed below 4.3 times.
OF_SLIDE, OF_CHANCE = 0.5, 5.0
UNUSED = 0.1  # of the prototypes that even use would hit
WAITED = 0.2  # of the time
# Evaluations of the probe in a row that fall short of its best by more than one standard error (the rule of Breiman et
# al. 1984, section 3.4.3). The error is that of other patients; the same are looked at each time, which varies less.
FALLING = 3
TREND, CLEAR = 8, 4.0  # evaluations on held-out patients, and how many of its errors a slope must have


class Monitors:
    """Look at the records of a run one after the other; :meth:`look` remembers those before as far as it needs."""

    def __init__(self, config: Config) -> None:
        optim, objective = config.optim, config.objective
        self.top = math.log(objective.prototypes)
        self.warmup = max(optim.warmup, SETTLED)
        # Where layers begin to move later, the gradient's norm jumps once.
        self.all_move = max(self.warmup, optim.freeze_last_layer, optim.heads_only)
        self.recent: deque[Mapping[str, float]] = deque(maxlen=FEW)
        self.norms: deque[float] = deque(maxlen=MANY + FEW)
        self.best_probe, self.behind = (-math.inf, 0), 0  # accuracy and step; evaluations in a row that fell short
        self.losses: list[float] = []  # of training since the last look at held-out patients
        # Loss on them, and of training until then.
        self.held_out: deque[tuple[float, float]] = deque(maxlen=TREND if config.health.held_out else 0)

    def look(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Sentences about a record in the light of those before, by a short name; none when all is well."""
        known = {k: float(v) for k, v in record.items() if v is not None and math.isfinite(v)}
        if known["step"] > SETTLED:
            self.recent.append(known)
        return {
            **self._collapse(known),
            **self._slides(),
            **self._gradients(known),
            **self._speed(),
            **self._probe(known),
            **self._held_out(known),
        }

    def _collapse(self, r: Mapping[str, float]) -> dict[str, str]:
        said = {}
        settled, warm = r["step"] > SETTLED, r["step"] > self.warmup
        if settled and r.get("prototype_entropy", self.top) < 0.2 * self.top:
            said["one answer"] = "nearly all crops fall on a few prototypes: the teacher has collapsed to one answer"
        if warm and all(r.get(key, 0) > self.top - NOTHING for key in ("teacher_entropy", "dino")):
            said["evenness"] = (
                f"the loss stays at ln K = {self.top:.2f} and the teacher answers evenly: DINO teaches nothing yet; a "
                "lower objective.teacher_temperature makes it choose"
            )
        if warm and r.get("mean_cosine", 0) > 0.98:
            said["one direction"] = (
                "features of different tiles point the same way (mean cosine above .98): they are collapsing"
            )
        if warm and r.get("effective_rank", math.inf) < 3:
            said["low rank"] = "features span fewer than three directions (effective rank below 3): they are collapsing"
        used, even = self._mean("prototypes_used"), self._mean("prototypes_even")
        if warm and used is not None and even is not None and used < UNUSED * even:
            said["few prototypes"] = (
                f"{100 * used:.3g} % of the prototypes are in use, where even use would reach {100 * even:.3g} %: most "
                "learn nothing; objective.targets=sinkhorn spreads crops over them"
            )
        if r.get("skipped", 0) > 0:
            said["skipped"] = f"{r['skipped']:.0f} steps were skipped since their gradient was not finite"
        return said

    def _slides(self) -> dict[str, str]:
        rate, chance, most = (self._mean(f"same_slide_{key}") for key in ("rate", "chance", "most"))
        if rate is None or chance is None or most is None or rate < OF_CHANCE * chance:
            return {}
        if rate - chance <= OF_SLIDE * (most - chance):
            return {}
        return {
            "slides": f"{100 * rate:.0f} % of a tile's nearest neighbors are of its own slide, by chance "
            f"{100 * chance:.1f} % would be: the model learns the slide (its stain, scanner, thickness) instead of the "
            "tissue; stain augmentation and more slides a batch help"
        }

    def _gradients(self, r: Mapping[str, float]) -> dict[str, str]:
        if r["step"] > self.all_move and "grad_norm" in r:
            self.norms.append(r["grad_norm"])
        before, now = list(self.norms)[:-FEW], list(self.norms)[-FEW:]
        if len(before) < FEW or median(now) <= EXPLODED * median(before):
            return {}
        return {
            "gradients": f"the gradient's norm is {median(now):.3g}, {median(now) / median(before):.0f} times what it "
            "was: training is about to diverge; go back with --rewind, or begin anew with a lower optim.lr"
        }

    def _speed(self) -> dict[str, str]:
        waited = self._mean("data_wait")
        if waited is None or waited <= WAITED:
            return {}
        return {
            "waits": f"{100 * waited:.0f} % of the time goes into waiting for tiles; raise data.workers, or put the "
            "shard set on a faster disk"
        }

    def _probe(self, r: Mapping[str, float]) -> dict[str, str]:
        if "probe_accuracy" not in r:
            return {}
        now, error = r["probe_accuracy"], r.get("probe_error", 0.0)
        best, step = self.best_probe
        self.behind = self.behind + 1 if now < best - error else 0
        if now > best:
            self.best_probe = now, int(r["step"])
        if self.behind < FALLING:
            return {}
        return {
            "probe": f"the probe's accuracy is {now:.3f} and was {best:.3f} at step {step:,}; {self.behind} looks in a "
            f"row fell short of that by more than their standard error ({error:.3f}): more training may not help, as "
            "was published for Midnight; consider an earlier checkpoint"
        }

    def _held_out(self, r: Mapping[str, float]) -> dict[str, str]:
        if "loss" in r and self.held_out.maxlen:
            self.losses.append(r["loss"])
        if "held_out_loss" not in r or not self.losses:
            return {}
        self.held_out.append((r["held_out_loss"], fmean(self.losses)))
        self.losses.clear()
        if r["step"] <= self.warmup or len(self.held_out) < TREND:
            return {}
        held_out, trained = zip(*self.held_out)
        if trend(held_out) < CLEAR or trend(trained) > -CLEAR / 2:
            return {}
        return {
            "held-out": f"the loss on held-out patients rises (to {held_out[-1]:.3f}) while that of training falls (to "
            f"{trained[-1]:.3f}): the model memorizes its tiles; more patients, stronger augmentation or fewer steps "
            "help"
        }

    def _mean(self, key: str) -> float | None:
        """Mean over the last records that tell; None where there are too few."""
        values = [r[key] for r in self.recent if key in r]
        return fmean(values) if len(values) == FEW else None


def trend(values: Iterable[float]) -> float:
    """Slope of a straight line through ``values``, in its standard errors; 0 for fewer than three."""
    y = np.fromiter(values, dtype=np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    if len(y) < 3:
        return 0.0
    slope = x @ y / (x @ x)
    left = y - y.mean() - slope * x
    return float(slope / max(math.sqrt(left @ left / (len(y) - 2) / (x @ x)), 1e-12))
