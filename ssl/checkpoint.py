"""Checkpoints of a run: ``checkpoints/step-00001000/``, complete or absent.

They are written beside the training, from a copy in memory, and renamed once complete. The state is
torch.distributed.checkpoint's, loadable with another number of processes and another strategy; since it has no checksum
of its own, ``checkpoint.json`` has one of each file. Its metadata is a pickle, so only a run's owner resumes it;
everyone else reads ``teacher.safetensors`` beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, sha256, sync, write_json
from eosin.ssl import distributed
from eosin.ssl.rewind import Rewind

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemWriter

    from eosin.ssl.network import StudentTeacher

SCHEMA = 2
TEACHER = "teacher.safetensors"
ABOUT = "checkpoint.json"
NEARLY_FULL = 64 << 20  # bytes left on a disk below which an error that says nothing is taken to be for want of space

# One process that saves alone is what is meant; said from the thread that saves, so that no scope can silence it.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def steps(run: Path | str) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def latest(run: Path | str) -> Path:
    """Folder of the newest complete checkpoint. Raises UserError when there is none."""
    found = steps(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; let 'eosin train' reach run.checkpoint_every steps")
    return found[-1]


def step_of(folder: Path) -> int:
    """The steps done at a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix("step-"))


def describe(folder: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` of a checkpoint says. Raises UserError when it is broken.

    ``step``, ``facts``, ``torch`` (version), ``rewinds`` (how many the run had then), ``files`` (SHA-256 by name), and
    ``how`` (see :func:`eosin.ssl.parallel.described`; absent in those of older versions).
    """
    about = read_json(folder / ABOUT, "the description of a checkpoint")
    if about.get("schema") != SCHEMA or not {"step", "facts", "rewinds", "files"} <= set(about):
        raise UserError(f"{folder} has schema {about.get('schema')!r} or is incomplete; this version reads {SCHEMA}")
    return about


def tidy(run: Path, rewinds: Sequence[Rewind]) -> None:
    """Remove what a kill left half-written, and move what a rewind left behind to ``checkpoints/rewound-N/``.

    Every process calls this.
    """
    behind = [(f, number) for f in steps(run) if rewinds and (number := _left_behind_by(describe(f), rewinds))]
    distributed.barrier()
    if distributed.rank() == 0:
        for leftover in (run / "checkpoints").glob(".*.partial"):
            shutil.rmtree(leftover)
        for folder, number in behind:
            aside = folder.parent / f"rewound-{number}"
            aside.mkdir(exist_ok=True)
            folder.rename(aside / folder.name)
    distributed.barrier()


def _left_behind_by(about: dict[str, Any], rewinds: Sequence[Rewind]) -> int:
    """The number, from 1, of the first rewind after a checkpoint was saved that went back before it; 0 for none."""
    later = enumerate(rewinds[about["rewinds"] :], about["rewinds"] + 1)
    return next((number for number, rewind in later if rewind.step < about["step"]), 0)


class Saver:
    """Saves checkpoints while the training goes on, one at a time. Every process has one and uses it alike.

    Used as a context manager, it lets a checkpoint under way be completed before it leaves, or removes it.
    """

    def __init__(
        self,
        run: Path,
        facts: dict[str, Any],
        rewinds: int,
        how: dict[str, Any],
        *,
        keep: int,
        keep_every: int | None = None,
    ) -> None:
        """``facts`` is plain data, compared on resuming, ``how`` plain data for readers. Of the checkpoints before the
        newest ``keep``, those at multiples of ``keep_every`` stay."""
        self.folder = run / "checkpoints"
        self.about = {"schema": SCHEMA, "torch": torch.__version__, "rewinds": rewinds, "facts": facts, "how": how}
        self.keep, self.keep_every = keep, keep_every
        # Collectives of a group must have one order on all processes: those of a thread need a group of their own.
        self.group: Any = torch.distributed.new_group(backend="gloo") if distributed.ranks() > 1 else None
        self.thread = ThreadPoolExecutor(1)
        self.saving: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()
        # A run that ends for another reason, such as no room for its metrics either, does not wait for what failed.
        if self.saving and self.failed() and distributed.rank() == 0:
            shutil.rmtree(self._partial(self.saving[0]), ignore_errors=True)

    def save(self, step: int, model: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state after ``step`` steps and begin to write it; wait for the one before first.

        Raises UserError when that one could not be saved.
        """
        from torch.distributed.checkpoint import async_save

        self.wait()
        partial = self._partial(step)
        weights = {}
        for name, value in model.teacher.backbone.state_dict().items():
            whole = distributed.full(value.detach())
            if distributed.rank() == 0:
                weights[name] = whole.to("cpu", copy=True).contiguous()
        state = async_save(
            _state(model, optimizer),
            checkpoint_id=partial,
            storage_writer=_writer(partial),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(state, Future)  # since nothing is staged asynchronously
        self.saving = step, self.thread.submit(self._complete, step, state, weights)

    def failed(self) -> bool:
        """Whether this process already knows that the checkpoint under way cannot be saved; :meth:`wait` says why."""
        return self.saving is not None and self.saving[1].done() and self.saving[1].exception() is not None

    def wait(self) -> None:
        """Wait for the checkpoint under way. Raises UserError, on every process, when it could not be saved."""
        if self.saving is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        (step, result), self.saving = self.saving, None
        error = result.exception()
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        if not distributed.any_rank(error is not None):
            return
        if distributed.rank() == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        # Whichever process is the first to end says the reason, also of one that failed alone.
        found = distributed.all_objects(None if error is None else self._reason(error))
        why = next((reason for reason in found if reason), None)
        if why is None:
            raise error or UserError(f"step {step} cannot be saved in {self.folder}: another process says why")
        raise UserError(
            f"step {step} cannot be saved in {self.folder}: {why}; mend that and run the same command again: it goes "
            "on from the checkpoint before"
        )

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _complete(self, step: int, state: Future[Any], weights: dict[str, torch.Tensor]) -> None:
        """Wait for all processes' state; then let rank 0 add the rest, rename, and drop old checkpoints."""
        from safetensors.torch import save_file

        state.result()
        if distributed.rank() != 0:
            return
        partial = self._partial(step)
        save_file(weights, partial / TEACHER, {"step": str(step)})
        (partial / TEACHER).chmod(0o644)  # safetensors makes it readable by its owner only
        sync(partial / TEACHER)
        files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        write_json(partial / ABOUT, self.about | {"step": step, "files": files})
        partial.rename(self.folder / f"step-{step:08d}")
        sync(self.folder)
        for old in steps(self.folder.parent)[: -self.keep]:
            if not self.keep_every or step_of(old) % self.keep_every:
                # Renamed first, so that a kill leaves nothing that looks complete.
                shutil.rmtree(old.rename(self._partial(step_of(old))))

    def _reason(self, error: BaseException) -> str | None:
        """Why a user's disk or folder refused a checkpoint, in a few words; None for what is a bug."""
        if isinstance(error, OSError):
            return os.strerror(error.errno) if error.errno else str(error)
        if said := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, which is Rust, says an OSError so
            return os.strerror(int(said[1]))
        return "no space" if shutil.disk_usage(self.folder.parent).free < NEARLY_FULL else None


def _writer(folder: Path) -> FileSystemWriter:
    """torch's writer, but an error of the disk stays one.

    torch's covers it with a RuntimeError about positions, and what that came from is lost between processes.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    class Writer(FileSystemWriter):
        def write_data(self, *plan: Any) -> Any:
            try:
                return super().write_data(*plan)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    return Writer(folder)


def resume(
    run: Path,
    model: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    at: int | None = None,
) -> int:
    """Load the newest checkpoint, or that of step ``at``, into ``model`` and ``optimizer``; return the steps done.

    Every process calls this. Without a checkpoint nothing is loaded, and 0 steps are done.

    Raises:
        UserError: there is none at ``at``, it was made from other data or by another network, is damaged or is of
            another schema.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = {step_of(folder): folder for folder in steps(run)}
    if at is not None and at not in found:
        there = f"there are: {', '.join(map(str, found))}" if found else "there is none yet"
        raise UserError(f"{run} has no checkpoint of step {at}; {there}")
    if not found:
        return 0
    folder = found[max(found) if at is None else at]
    about = describe(folder)
    for key, value in facts.items():
        if about["facts"].get(key) != value:
            raise UserError(f"{folder} was trained on another {key}; start a new run.dir, or give the same {key}")
    _check_files(folder, about["files"])
    state = _state(model, optimizer)
    try:
        _refuse_other_network(folder, state["model"])
        dcp.load(state, checkpoint_id=folder, no_dist=distributed.ranks() == 1)
    except (RuntimeError, ValueError, OSError, EOFError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"{folder} cannot be read ({type(error).__name__}): it is of another network or torch version; "
            "remove that folder to go on from the checkpoint before it"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(about["step"])


def _refuse_other_network(folder: Path, model: dict[str, torch.Tensor]) -> None:
    """Raise UserError where a checkpoint's tensors are not those of ``model``: torch lets what it has too much lie."""
    from torch.distributed.checkpoint import FileSystemReader

    there = {
        name.removeprefix("model."): tuple(found.size)
        for name, found in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and hasattr(found, "size")
    }
    here = {name: tuple(value.shape) for name, value in model.items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            said = [f"{list(shape)}" if (shape := names.get(name)) is not None else "none" for names in (there, here)]
            raise UserError(
                f"{folder} is of another network: its {name} is {said[0]}, that of the settings is {said[1]}; give the "
                "settings it was trained with, or a new run.dir"
            )


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Compare each file with its SHA-256, every process some of them. Raises UserError on all that names one."""
    mine = sorted(files)[distributed.rank() :: distributed.ranks()]
    changed = [name for name in mine if not (folder / name).is_file() or sha256(folder / name) != files[name]]
    for name in (name for names in distributed.all_objects(changed) for name in names):
        raise UserError(
            f"{folder / name} is missing or damaged: it is not what was saved; remove that folder to go on from the "
            "checkpoint before it"
        )


def load_teacher(path: Path, backbone: nn.Module) -> None:
    """Load the teacher's weights of a checkpoint or a release into a timm backbone; every tensor must match."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the weights of a backbone")
    try:
        backbone.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} does not fit the configured backbone: {' '.join(str(error).split())[:300]}") from None


def _state(model: StudentTeacher, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}
