"""The training loop, top to bottom: read a batch, make crops, compare student and teacher, step, log, save."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from eosin.data_tools.errors import DONE, TO_BE_CONTINUED, UserError
from eosin.data_tools.progress import progress
from eosin.ssl import attention, checkpoint, distributed, feed, parallel, rewind
from eosin.ssl.checkpoint import Saver
from eosin.ssl.config import Config, OnlineProbe, read_run_config, write_config
from eosin.ssl.initialize import initialize
from eosin.ssl.log import Log
from eosin.ssl.monitor import Monitor
from eosin.ssl.network import Part, StudentTeacher, divide
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.rewind import Rewind
from eosin.ssl.schedules import Moment, at
from eosin.ssl.seen import write_seen
from eosin.ssl.skipped import Skipped
from eosin.ssl.stain.normalizer import describe_run, save_description

# What may differ when a run is continued: none of it changes what is learned.
FREE = {
    "data.shards",  # of which the checkpoint keeps the tiles' identity
    "high_resolution.shards",
    "data.workers",
    "data.max_bad",
    "optim.max_skipped",
    *(f"run.{key}" for key in ("dir", "device", "strategy", "checkpoint_activations")),
    *(f"run.{key}" for key in ("log_every", "checkpoint_every", "keep", "keep_every")),
    *(f"health.{key}" for key in ("pictures_every", "held_out_every")),
    *(f"health.probe.{key}" for key in OnlineProbe.model_fields),
}
TERMS = ("dino", "ibot", "koleo", "kde")
COLLECT_EVERY = 50  # steps
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def train(config: Config, back: Rewind | None = None) -> int:
    """Train, or continue, the run of ``config.run.dir``. Every process of a distributed run calls this.

    Args:
        back: go on from the checkpoint of ``back.step``, past the next ``back.skip`` batches. Asked for again right
            after, as by a scheduler that repeats the command, it has happened and the run just goes on.

    Returns:
        0 when all steps are done, 75 when a SIGTERM, SIGUSR1 or SIGUSR2 asked to save and stop.

    Raises:
        UserError: for what the user can mend: no data, another run in the folder, a batch that does not divide.
    """
    with _events_said_once():
        device = distributed.start(config.run.device)
        try:
            _refuse_other_run(config)
            with _locked(Path(config.run.dir)), _stop_flag() as stop, _garbage_by_hand():
                return _train(config, device, back, stop)
        except OSError as error:
            # Python names a file that cannot be opened, but none that has no room: those of training are in one folder.
            if error.errno in NO_ROOM and error.filename is None:
                error.filename = config.run.dir
            raise
        finally:
            distributed.stop()


def _train(config: Config, device: torch.device, back: Rewind | None, stop: list[int]) -> int:
    run, steps = Path(config.run.dir), config.run.steps
    attention.check(config.run.attention, device)
    _refuse_uneven(config)
    normalization = describe_run(run, config.stain)
    phases = feed.phases(config, normalization, device)
    if distributed.rank() == 0:
        for line in (line for phase in phases for line in feed.stain_notes(phase)):
            print(line)

    rewinds = rewind.read(run)
    checkpoint.tidy(run, rewinds)
    back = None if rewinds[-1:] == [back] else back
    torch.manual_seed(config.run.seed)
    model = StudentTeacher(config).to(device)
    if not checkpoint.steps(run):
        initialize(model, config.model)
    student = parallel.spread(model, config, device)
    parameters, optimizer = list(model.student.parameters()), build_optimizer(model.student, config)
    facts = feed.identities(phases)
    start = checkpoint.resume(run, model, optimizer, facts, back and back.step)
    rewinds += [back] if back else []
    stream = feed.stream(phases, start, rewinds)
    monitor = Monitor(config, phases, normalization)
    if distributed.rank() == 0:
        # Only now, when all that can be refused has been, does the run exist, or is it rewound.
        # Its settings come first: where the disk then is full, the folder is a run that the same command begins.
        write_config(run / "config.yaml", config)
        save_description(run, normalization)
        write_seen(run, feed.trained_on(phases), config.model.init_from)
        if back:
            rewind.write(run, rewinds)
        if start:
            print(f"{run} is complete at step {start}" if start == steps else f"{run} goes on after step {start}")
    checkpoint.tidy(run, rewinds)
    if not start:
        monitor.begin(model, device)
    log, skipped = Log(config, start, device), Skipped(run, config.optim.max_skipped)
    stream = log.timed(stream)
    if distributed.rank() == 0:
        stream = progress(stream, total=steps, start=start, desc="train", unit="steps", status=log.status)

    how = parallel.described(config, device)
    with Saver(run, facts, len(rewinds), how, keep=config.run.keep, keep_every=config.run.keep_every) as saver:
        for step, (phase, batch) in enumerate(stream, start):
            moment = at(step, config)
            set_moment(optimizer, moment)
            views = feed.views(phase, batch, device)
            terms = _gradient(model, student, divide(views[:3], config.optim.accumulate), moment, device)
            norm = parallel.clip(parameters, config.optim.clip)
            # The check is on the whole gradient and before the optimizer, so that a bad step leaves no trace. It stays
            # on the device: a fused optimizer changes nothing where found_inf is 1.
            finite = norm.isfinite()
            optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
            optimizer.step()
            model.update_teacher(moment.momentum, finite)
            optimizer.zero_grad()

            done = step + 1
            log.note_bad(batch, phase.shards)
            log.note_answers(terms["answers"])
            log.note_raw(batch, phase.shards, views.raw)
            skipped.note(done, phase.shards, batch["tile"], finite)
            if done % config.run.log_every == 0 or done in (1, steps) or monitor.due(done):
                skipped.check()
                log.skipped = skipped.count
                looked = monitor.look(done, model, student, phase, batch, views, moment)
                log.write(done, terms | {"grad_norm": norm}, views.slides, moment, looked)
            if done % COLLECT_EVERY == 0:
                gc.collect(1)
            stopping = distributed.any_rank(bool(stop) or saver.failed())
            if stopping or done % config.run.checkpoint_every == 0 or done == steps:
                skipped.check()  # too many in a row end the run before they push out an older checkpoint
                saver.save(done, model, optimizer)
            if stopping and done < steps:
                saver.wait()
                if distributed.rank() == 0:
                    print(f"saved after step {done} of {steps}; run the same command to go on")
                return TO_BE_CONTINUED
        saver.wait()
    return DONE


def _gradient(
    model: StudentTeacher, student: nn.Module, parts: list[Part], moment: Moment, device: torch.device
) -> dict[str, torch.Tensor]:
    """Add the gradient of this process's share of a batch, part by part; return the terms' means, and measures."""
    config = model.config
    with parallel.autocast(config, device):
        targets, seen = model.targets(parts, moment.teacher_temperature)
    means: dict[str, torch.Tensor] = {}
    for number, (part, target) in enumerate(zip(parts, targets, strict=True), 1):
        with parallel.gradients_shared(student, number == len(parts)):
            with parallel.autocast(config, device):
                terms = model.losses(student, part, target)
            terms["loss"] = sum(getattr(config.objective, name) * terms[name] for name in TERMS) / len(parts)
            terms["loss"].backward()
        for name, value in terms.items():
            share = value.detach() if name == "loss" else value.detach() / len(parts)
            means[name] = means[name] + share if name in means else share
    return means | seen


def _refuse_uneven(config: Config) -> None:
    """Raise UserError when a process's share of the batch does not divide into the parts of accumulation."""
    batch, parts = config.data.batch, distributed.ranks() * config.optim.accumulate
    if batch % parts:
        valid = max(parts, round(batch / parts) * parts)
        raise UserError(
            f"data.batch {batch} does not divide by {distributed.ranks()} processes times optim.accumulate="
            f"{config.optim.accumulate}; the nearest that does is {valid}"
        )


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
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and there.get(key) != given.get(key):
            raise UserError(
                f"run.dir: {run} was begun with {key}={there.get(key)}, not {given.get(key)}; "
                "give the same settings to continue it, or another run.dir"
            )


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder: one training at a time. Rank 0 locks, all raise UserError. A refused run leaves nothing."""
    there, path = run.exists(), run / ".lock"
    with contextlib.ExitStack() as stack:
        file = None
        if distributed.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
        if distributed.any_rank(file is not None and not _lock(file, path)):
            raise UserError(f"run.dir: another process is training in {run}; wait for it, or give another")
        try:
            yield
        finally:
            if file is not None:
                path.unlink()
                if not there:
                    with contextlib.suppress(OSError):  # a run that was not refused is in it
                        run.rmdir()


def _lock(file: IO[str], path: Path) -> bool:
    """Whether ``file``, opened from ``path``, is locked now and still the one there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # One that was just refused may have removed the file that was opened.
        return path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except BlockingIOError:
        return False


@contextlib.contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that is empty until a signal of STOP arrives; the loop saves at the end of its step, never here."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in STOP}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _garbage_by_hand() -> Iterator[None]:
    """No garbage collection but the loop's own: processes that pause at different steps wait for each other."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def _events_said_once() -> Iterator[None]:
    """No traceback of TensorBoard's thread: what it could not write is raised where a record is written."""
    before = threading.excepthook

    def say(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            before(failed)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
