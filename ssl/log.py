"""What a run says of itself: ``metrics.jsonl``, TensorBoard, warnings in words, and lists of bad and raw tiles."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import BAD_BOUND, Batch
from eosin.ssl import distributed, health
from eosin.ssl.config import Config
from eosin.ssl.metrics import effective_rank, mean_cosine, same_group_rate
from eosin.ssl.schedules import Moment
from eosin.ssl.stain.normalizer import NO_FIT, REASONS

BAD_ALWAYS_ALLOWED = 3
RAW_LISTED = 10_000  # tiles without stain normalization that a process lists


class Log:
    """``metrics.jsonl``, TensorBoard, warnings in words, and the list of bad tiles. Rank 0 writes."""

    def __init__(self, config: Config, start: int) -> None:
        self.config, self.run = config, Path(config.run.dir)
        self.skipped, self.last = 0, ""
        self.bad: dict[tuple[str, int], str] = {}  # why, by shard set and tile
        self.raw: list[
            tuple[str, torch.Tensor, torch.Tensor]
        ] = []  # since the last record: tiles, and why they are raw
        self.raw_listed: set[tuple[str, int]] = set()
        self.said: set[str] = set()
        self.clock, self.clock_step = time.monotonic(), start
        self.path = self.run / "metrics.jsonl"
        self.events: Any = None
        if distributed.rank() == 0:
            _cut(self.path, start)
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.run / "tensorboard"), purge_step=start + 1)

    def status(self) -> str:
        """A few words for the progress bar."""
        return self.last

    def write(self, done: int, terms: dict[str, torch.Tensor], slides: torch.Tensor, moment: Moment) -> None:
        """Log the state after ``done`` steps. Every process calls this, since means are over all of them."""
        with torch.no_grad():
            cls = distributed.all_rows(terms.pop("cls")[0].float())  # [B, D]
            slides = distributed.all_rows(slides)
            raw, seen = distributed.all_sum(self._list_raw())
            means = {k: float(distributed.all_sum(v.detach().float()) / distributed.ranks()) for k, v in terms.items()}
        if distributed.rank() != 0:
            return
        now = time.monotonic()
        k = min(5, len(cls) - 1)
        rate, chance = same_group_rate(cls, slides, k) if k > 0 else (float("nan"), float("nan"))
        record: dict[str, float | None] = {
            "step": done,
            **means,
            "lr": moment.lr,
            "weight_decay": moment.weight_decay,
            "momentum": moment.momentum,
            "teacher_temperature": moment.teacher_temperature,
            "effective_rank": effective_rank(cls),
            "mean_cosine": mean_cosine(cls),
            "same_slide_rate": rate,
            "same_slide_chance": chance,
            "images_per_second": (done - self.clock_step) * self.config.data.batch / max(now - self.clock, 1e-9),
            "skipped": self.skipped,
            "bad_tiles": len(self.bad),
            "stain_raw": float(raw / seen) if seen else 0.0,
        }
        self.clock, self.clock_step = now, done
        # JSON has no NaN.
        record = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, done)
        self.last = f"loss {means['loss']:.3f}, {record['images_per_second']:.0f} images/s"
        known = {k: float("nan") if v is None else v for k, v in record.items()}
        for sentence in health.warnings(known | {"warmup": self.config.optim.warmup}, self.config.objective.prototypes):
            if sentence not in self.said:
                self.said.add(sentence)
                print(f"step {done}: {sentence}", file=sys.stderr)

    def note_raw(self, batch: Batch, shards: ShardSet, reason: torch.Tensor | None) -> None:
        """Keep which tiles stay without stain normalization, and why; they are counted when a record is written."""
        if reason is not None:
            self.raw.append((str(shards.folder), batch["tile"], reason))

    def _list_raw(self) -> torch.Tensor:
        """Count the tiles kept by :meth:`note_raw`, [2]: raw ones and all; list each raw one once.

        Tiles of a slide without a fit are not listed one by one: the slides table has the slide and its reason.
        """
        counts, lines = torch.zeros(2), []
        for folder, tiles, on_device in self.raw:
            reason = on_device.cpu()
            counts += torch.tensor([float((reason > 0).sum()), float(len(reason))])
            for place in ((reason > 0) & (reason < NO_FIT)).nonzero().flatten().tolist():
                key = (folder, int(tiles[place]))
                if key not in self.raw_listed and len(self.raw_listed) < RAW_LISTED:
                    self.raw_listed.add(key)
                    lines.append(_tile_line(key, REASONS[reason[place]]))
        self.raw.clear()
        if lines:
            with (self.run / "stain_raw.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(lines)
        return counts

    def note_bad(self, batch: Batch, shards: ShardSet) -> None:
        """List tiles that could not be used, and stop the run when they are too many."""
        folder = str(shards.folder)
        fresh = {(folder, t): r for t, r in batch["bad"] if (folder, t) not in self.bad}
        if not fresh:
            return
        self.bad |= fresh
        with (self.run / "bad_tiles.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(_tile_line(key, reason) for key, reason in fresh.items())
        bad = sum(key[0] == folder for key in self.bad)
        if bad > max(BAD_ALWAYS_ALLOWED, BAD_BOUND * len(shards)):
            raise UserError(
                f"{bad} of {len(shards)} tiles of {folder} cannot be used, the last one "
                f"'{list(fresh.values())[-1]}'; see {self.run / 'bad_tiles.jsonl'} and run 'eosin verify'"
            )


def _cut(path: Path, start: int) -> None:
    """Drop records of steps after ``start``, which will be done again, and a line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept))


def _tile_line(key: tuple[str, int], reason: str) -> str:
    return json.dumps({"shards": key[0], "tile": key[1], "reason": reason}) + "\n"
