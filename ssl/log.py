"""What a run says of itself: ``metrics.jsonl``, TensorBoard, warnings in words, and lists of bad and raw tiles.

The device is waited for only where a record is written.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.stream import Batch
from eosin.ssl import distributed
from eosin.ssl.config import Config
from eosin.ssl.health import Monitors
from eosin.ssl.metrics import effective_rank, expected_usage, mean_cosine, peak_flops, same_group_rate
from eosin.ssl.monitor import Looked
from eosin.ssl.parallel import in_bfloat16
from eosin.ssl.plan import Plan
from eosin.ssl.schedules import Moment
from eosin.ssl.stain.normalizer import NO_FIT, REASONS

BAD, BAD_ALWAYS_ALLOWED, REASONS_SAID = "bad_tiles.jsonl", 3, 3
RAW_LISTED = 10_000  # tiles without stain normalization that a process lists

T = TypeVar("T")


NOTHING_SEEN = Looked({}, {})


class Speed:
    """How much of what its GPUs can do a run does: model FLOPs utilization (Chowdhery et al. 2022, appendix B).

    Counted is what is executed: the student's forward and backward pass on the share of branches that drop path keeps,
    and the teacher's forward pass, by the closed form of :mod:`eosin.ssl.plan`; not what is computed again to save
    memory. None without a peak in bfloat16 that is known: on a CPU, an unknown GPU, and in float32.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        known = device.type == "cuda" and in_bfloat16(config, device)
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if known else None
        self.flops: list[tuple[int, float]] = []  # of an image up to a step
        if self.peak:
            plan, end = Plan(config), 0
            for phase in plan.phases:
                end += phase.steps
                self.flops.append((end, plan.step(phase).total))

    def utilization(self, done: int, images_per_second: float) -> float | None:
        """The share of the GPUs' peak at step ``done`` and a speed of all of them together."""
        if not self.peak:
            return None
        of_image = next(flops for end, flops in self.flops if done <= end)
        return images_per_second * of_image / (self.peak * distributed.ranks())


class Log:
    """``metrics.jsonl``, TensorBoard, warnings in words, and the list of bad tiles. Rank 0 writes."""

    def __init__(self, config: Config, start: int, device: torch.device) -> None:
        self.config, self.run, self.device = config, Path(config.run.dir), device
        self.skipped, self.last = 0, ""
        self.bad = _listed(self.run / BAD)  # why, by shard set and tile
        # Since the last record: tiles, and why they are raw.
        self.raw: list[tuple[Mixture, torch.Tensor, torch.Tensor]] = []
        self.raw_listed: set[tuple[str, int]] = set()
        # Since the last record: prototypes that some crop was most, such crops, and seconds waited for tiles.
        self.used = torch.zeros(config.objective.prototypes, dtype=torch.bool, device=device)
        self.answers, self.waited = 0, 0.0
        self.clock, self.clock_step = time.monotonic(), start
        self.path = self.run / "metrics.jsonl"
        self.events: Any = None
        self.speed = Speed(config, device)
        self.monitors, self.said = Monitors(config), set[str]()
        if distributed.rank() == 0:
            for record in _cut(self.path, start):
                self.said |= self.monitors.look(record).keys()
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.run / "tensorboard"), purge_step=start + 1)

    def status(self) -> str:
        """A few words for the progress bar."""
        return self.last

    def timed(self, stream: Iterator[T]) -> Iterator[T]:
        """``stream``, while the time that the loop waits for it is counted.

        On a GPU this is the most that it can have waited: it may still have had work.
        """
        while True:
            began = time.monotonic()
            item = next(stream, None)
            self.waited += time.monotonic() - began
            if item is None:
                return
            yield item

    def note_answers(self, answers: torch.Tensor) -> None:
        """Note the prototypes that the teacher says crops are most, of any shape. Nothing waits for the device."""
        self.used.index_fill_(0, answers.flatten(), True)
        self.answers += answers.numel()

    def write(
        self,
        done: int,
        terms: dict[str, torch.Tensor],
        slides: torch.Tensor,
        moment: Moment,
        looked: Looked = NOTHING_SEEN,
    ) -> None:
        """Log the state after ``done`` steps. Every process calls this, since means are over all of them."""
        now = time.monotonic()
        spent = max(now - self.clock, 1e-9)
        with torch.no_grad():
            cls = distributed.all_rows(terms.pop("cls")[0].float())  # [B, D]
            slides = distributed.all_rows(slides)
            raw, seen = distributed.all_sum(self._list_raw())
            used = distributed.all_sum(self.used.float()) > 0
            # Where one process waits, all do.
            waited, memory = distributed.all_rows(torch.tensor([[self.waited / spent, _memory(self.device)]])).amax(0)
            terms.pop("answers")
            means = {k: float(distributed.all_sum(v.detach().float()) / distributed.ranks()) for k, v in terms.items()}
        prototypes, crops = len(self.used), self.answers * distributed.ranks()
        speed = (done - self.clock_step) * self.config.data.batch / spent
        self.clock, self.clock_step, self.answers, self.waited = now, done, 0, 0.0
        self.used.zero_()
        if distributed.rank() != 0:
            return
        k = min(5, len(cls) - 1)
        rate, chance, most = same_group_rate(cls, slides, k) if k > 0 else (math.nan,) * 3
        record: dict[str, float | None] = {
            "step": done,
            **means,
            "lr": moment.lr,
            "weight_decay": moment.weight_decay,
            "momentum": moment.momentum,
            "teacher_temperature": moment.teacher_temperature,
            "teacher_entropy_gap": math.log(prototypes) - means["teacher_entropy"],
            "prototype_perplexity": math.exp(means["prototype_entropy"]) / prototypes,
            "prototypes_used": float(used.float().mean()),
            "prototypes_even": expected_usage(crops, prototypes),
            "effective_rank": effective_rank(cls),
            "mean_cosine": mean_cosine(cls),
            "same_slide_rate": rate,
            "same_slide_chance": chance,
            "same_slide_most": most,
            **looked.numbers,
            "images_per_second": speed,
            "mfu": self.speed.utilization(done, speed),
            "data_wait": float(waited),
            "memory_gib": float(memory),
            "skipped": self.skipped,
            "bad_tiles": len(self.bad),
            "stain_raw": float(raw / seen) if seen else 0.0,
        }
        # JSON has no NaN.
        record = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, done)
        for name, picture in looked.pictures.items():
            self.events.add_image(name, picture, done, dataformats="HWC")
        self.last = f"loss {means['loss']:.3f}, {speed:.0f} images/s, waits {100 * float(waited):.0f} % for data"
        for name, sentence in self.monitors.look(record).items():
            if name not in self.said:
                self.said.add(name)
                print(f"step {done}: {sentence}", file=sys.stderr)
                self.events.add_text("health", sentence, done)
        self.events.flush()  # a thread writes them: what it could not write is raised here, not at a later record

    def note_raw(self, batch: Batch, shards: Mixture, reason: torch.Tensor | None) -> None:
        """Keep which tiles stay without stain normalization, and why; they are counted when a record is written."""
        if reason is not None:
            self.raw.append((shards, batch["tile"], reason))

    def _list_raw(self) -> torch.Tensor:
        """Count the tiles kept by :meth:`note_raw`, [2]: raw ones and all; list each raw one once.

        Tiles of a slide without a fit are not listed one by one: the slides table has the slide and its reason.
        """
        counts, lines = torch.zeros(2), []
        for shards, tiles, on_device in self.raw:
            reason = on_device.cpu()
            counts += torch.tensor([float((reason > 0).sum()), float(len(reason))])
            for place in ((reason > 0) & (reason < NO_FIT)).nonzero().flatten().tolist():
                key = _place(shards, int(tiles[place]))
                if key not in self.raw_listed and len(self.raw_listed) < RAW_LISTED:
                    self.raw_listed.add(key)
                    lines.append(_tile_line(key, REASONS[reason[place]]))
        self.raw.clear()
        if lines:
            with (self.run / "stain_raw.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(lines)
        return counts

    def note_bad(self, batch: Batch, shards: Mixture) -> None:
        """List tiles that could not be used, and stop the run when they are too many."""
        fresh = {place: reason for t, reason in batch["bad"] if (place := _place(shards, t)) not in self.bad}
        if not fresh:
            return
        self.bad |= fresh
        with (self.run / BAD).open("a", encoding="utf-8") as file:
            file.writelines(_tile_line(key, reason) for key, reason in fresh.items())
        if len(self.bad) > max(BAD_ALWAYS_ALLOWED, self.config.data.max_bad * len(shards)):
            reasons = Counter(self.bad.values()).most_common()
            said = "; ".join(f"{count} × {reason}" for reason, count in reasons[:REASONS_SAID])
            more = f"; and {len(reasons) - REASONS_SAID} other reasons" if len(reasons) > REASONS_SAID else ""
            raise UserError(
                f"{len(self.bad)} of {len(shards)} tiles of {shards.name} cannot be used, more than data.max_bad="
                f"{self.config.data.max_bad:g}: {said}{more}; see {self.run / BAD} and run 'eosin verify'"
            )


def _place(shards: Mixture, tile: int) -> tuple[str, int]:
    there, number = shards.at(tile)
    return there.name, number


def _listed(path: Path) -> dict[tuple[str, int], str]:
    """The tiles that a list written before holds; a line that a kill cut short is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            row = json.loads(line)
            found[row["shards"], row["tile"]] = row["reason"]
    return found


def _cut(path: Path, start: int) -> list[dict[str, Any]]:
    """Drop records of steps after ``start``, which will be done again, and a line that a kill cut short.

    Returns those that stay.
    """
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if (record := json.loads(line))["step"] <= start:
                kept.append(record)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _memory(device: torch.device) -> float:
    """GiB at most so far: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _tile_line(key: tuple[str, int], reason: str) -> str:
    return json.dumps({"shards": key[0], "tile": key[1], "reason": reason}) + "\n"
