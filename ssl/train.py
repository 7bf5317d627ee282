"""The training loop, top to bottom: read a batch, make crops, compare student and teacher, step, log, save."""

from __future__ import annotations

import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eosin.data_tools.errors import DONE, TO_BE_CONTINUED, UserError
from eosin.data_tools.progress import progress
from eosin.ssl import attention, checkpoint, distributed, feed
from eosin.ssl.config import Config, read_run_config, write_config
from eosin.ssl.initialize import initialize
from eosin.ssl.log import Log
from eosin.ssl.network import StudentTeacher
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import at
from eosin.ssl.stain.normalizer import describe_run, save_description

# What may differ when a run is continued: none of it changes what is learned.
FREE = {"data.shards", "data.workers", "run.dir", "run.device", "run.log_every", "run.checkpoint_every", "run.keep"}
TERMS = ("dino", "ibot", "koleo", "kde")


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

    attention.check(config.run.attention, device)
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
    log = Log(config, start)
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


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
