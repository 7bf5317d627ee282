"""The training loop, top to bottom: read a batch, make crops, compare student and teacher, step, log, save."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eosin.data_tools.errors import DONE, TO_BE_CONTINUED, UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import BAD_BOUND, Batch
from eosin.ssl import checkpoint, distributed, feed, health
from eosin.ssl.config import Config, read_run_config, write_config
from eosin.ssl.initialize import initialize
from eosin.ssl.metrics import effective_rank, mean_cosine, same_group_rate
from eosin.ssl.network import StudentTeacher
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import Moment, at
from eosin.ssl.stain.normalizer import (
    NO_FIT,
    REASONS,
    describe_run,
    save_description,
)

# What may differ when a run is continued: none of it changes what is learned.
FREE = {"data.shards", "data.workers", "run.dir", "run.device", "run.log_every", "run.checkpoint_every", "run.keep"}
BAD_ALWAYS_ALLOWED = 3
TERMS = ("dino", "ibot", "koleo", "kde")
RAW_LISTED = 10_000  # tiles without stain normalization that a process lists


def train(config: Config) -> int:
    """Train, or continue, the run of ``config.run.dir``. Every process of a distributed run calls this.

    Returns:
        0 when all steps are done, 75 when a SIGTERM or SIGUSR1 asked to save and stop.

    Raises:
        UserError: for what the user can mend: no data, another run in the folder, a batch that does not divide.
    """
    device = distributed.start(config.run.device)
    try:
        _refuse_other_run(config)
        with _locked(Path(config.run.dir)), _stop_flag() as stop:
            return _train(config, device, stop)
    finally:
        distributed.stop()


def _train(config: Config, device: torch.device, stop: list[int]) -> int:
    run, steps = Path(config.run.dir), config.run.steps
    normalization = describe_run(run, config.stain)
    phases = feed.phases(config, normalization, device)
    if distributed.rank() == 0:
        for line in (line for phase in phases for line in feed.stain_notes(phase)):
            print(line)

    torch.manual_seed(config.run.seed)
    model = StudentTeacher(config).to(device)
    optimizer = build_optimizer(model.student, config)
    facts = feed.identities(phases)
    start = checkpoint.resume(run, model, optimizer, facts)
    if not start:
        initialize(model, config.model)
    if distributed.rank() == 0 and start:
        print(f"{run} is complete at step {start}" if start == steps else f"{run} goes on after step {start}")
    student: nn.Module = model.student
    if config.run.compile:
        for block in [*model.student.backbone.blocks, *model.teacher.backbone.blocks]:
            block.compile()
    if distributed.ranks() > 1:
        student = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
    parameters = list(model.student.parameters())
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device.type == "cuda")

    stream = feed.stream(phases, start)
    if distributed.rank() == 0:
        # Only now, when all that can be refused has been, does the run exist.
        save_description(run, normalization)
        write_config(run / "config.yaml", config)
    log = _Log(config, start)
    if distributed.rank() == 0:
        stream = progress(stream, total=steps, start=start, desc="train", unit="steps", status=log.status)
    for step, (phase, batch) in enumerate(stream, start):
        moment = at(step, config)
        set_moment(optimizer, moment)
        crops, masks, positions, slides, raw = feed.views(phase, batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = model.losses(student, crops, masks, positions, moment.teacher_temperature)
        loss = sum(getattr(config.objective, name) * terms[name] for name in TERMS)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        # The check is on the whole gradient and before the optimizer, so that a bad step leaves no trace.
        if torch.isfinite(norm):
            optimizer.step()
            model.update_teacher(moment.momentum)
        else:
            log.skipped += 1
        optimizer.zero_grad()

        log.note_bad(batch, phase.shards)
        log.note_raw(batch, phase.shards, raw)
        done = step + 1
        if done % config.run.log_every == 0 or done in (1, steps):
            log.write(done, terms | {"loss": loss.detach(), "grad_norm": norm}, slides, moment)
        stopping = distributed.any_rank(bool(stop))
        if stopping or done % config.run.checkpoint_every == 0 or done == steps:
            checkpoint.save(run, done, model, optimizer, facts, config.run.keep)
        if stopping and done < steps:
            if distributed.rank() == 0:
                print(f"saved after step {done} of {steps}; run the same command to go on")
            return TO_BE_CONTINUED
    return DONE


class _Log:
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


def _tile_line(key: tuple[str, int], reason: str) -> str:
    return json.dumps({"shards": key[0], "tile": key[1], "reason": reason}) + "\n"


def _refuse_other_run(config: Config) -> None:
    """Raise UserError when the run folder holds something else or a run with other settings."""
    run = Path(config.run.dir)
    if run.is_file():
        raise UserError(f"run.dir: {run} is a file; give the path of a folder")
    if not (run / "config.yaml").is_file():
        if run.is_dir() and any(not p.name.startswith(".") for p in run.iterdir()):
            raise UserError(f"run.dir: {run} holds something else; give a new folder")
        return
    there, given = _flat(read_run_config(run).model_dump()), _flat(config.model_dump())
    for key in sorted(set(there) | set(given)):
        if key not in FREE and there.get(key) != given.get(key):
            raise UserError(
                f"run.dir: {run} was begun with {key}={there.get(key)}, not {given.get(key)}; "
                "give the same settings to continue it, or another run.dir"
            )


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder: one training at a time. Only rank 0 locks."""
    if distributed.rank() != 0:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run.dir: another process is training in {run}; wait for it, or give another") from None
        yield


@contextlib.contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that is empty until a SIGTERM or SIGUSR1 arrives; the loop saves at the end of its step, never here."""
    seen: list[int] = []
    before = {s: signal.signal(s, lambda number, _: seen.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
