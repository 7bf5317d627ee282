"""Checkpoints of a run: ``checkpoints/step-00001000/``, complete or absent.

The state is torch.distributed.checkpoint's, loadable with another number of processes. Its metadata is a pickle, so
only a run's owner resumes it; everyone else reads ``teacher.safetensors`` beside it.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, sync, write_json
from eosin.ssl import distributed

if TYPE_CHECKING:
    from eosin.ssl.network import StudentTeacher

SCHEMA = 1
TEACHER = "teacher.safetensors"


def steps(run: Path | str) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def latest(run: Path | str) -> Path:
    """Folder of the newest complete checkpoint. Raises UserError when there is none."""
    found = steps(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; let 'eosin train' reach run.checkpoint_every steps")
    return found[-1]


def describe(folder: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` of a checkpoint says: step, facts, torch version. Raises UserError when it is broken."""
    about = read_json(folder / "checkpoint.json", "the description of a checkpoint")
    if about.get("schema") != SCHEMA or not {"step", "facts"} <= set(about):
        raise UserError(f"{folder} has schema {about.get('schema')!r} or is incomplete; this version reads {SCHEMA}")
    return about


def save(
    run: Path, step: int, model: StudentTeacher, optimizer: torch.optim.Optimizer, facts: dict[str, Any], keep: int
) -> None:
    """Write the checkpoint after ``step`` steps, aside and renamed once complete; then drop all but ``keep``.

    Every process calls this. ``facts`` is plain data kept in ``checkpoint.json`` and compared on resuming.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    try:
        with _quiet():
            dcp.save(_state(model, optimizer), checkpoint_id=partial, no_dist=distributed.ranks() == 1)
        if distributed.rank() == 0:
            weights = {k: v.detach().cpu().contiguous() for k, v in model.teacher.backbone.state_dict().items()}
            save_file(weights, partial / TEACHER, {"step": str(step)})
    except (RuntimeError, OSError, SafetensorError, dcp.api.CheckpointException) as error:
        if shutil.disk_usage(folder).free > 64 << 20:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"no space to save step {step} in {folder} ({type(error).__name__}); free some and run the same command "
            "again: it goes on from the checkpoint before"
        ) from None
    if distributed.rank() == 0:
        (partial / TEACHER).chmod(0o644)  # safetensors makes it readable by its owner only
        sync(partial / TEACHER)
        write_json(
            partial / "checkpoint.json",
            {"schema": SCHEMA, "step": step, "torch": torch.__version__, "facts": facts},
        )
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(folder)
        for old in steps(run)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def resume(run: Path, model: StudentTeacher, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> int:
    """Load the newest checkpoint into ``model`` and ``optimizer``; return how many steps it has done, 0 if none.

    Raises UserError when the checkpoint was made from other data or is of another schema.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = steps(run)
    if not found:
        return 0
    about = describe(found[-1])
    for key, value in facts.items():
        if about["facts"].get(key) != value:
            raise UserError(f"{found[-1]} was trained on another {key}; start a new run.dir, or give the same {key}")
    state = _state(model, optimizer)
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=found[-1], no_dist=distributed.ranks() == 1)
    except (RuntimeError, ValueError, OSError, EOFError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"{found[-1]} cannot be read ({type(error).__name__}): it is damaged or of another network; "
            "remove that folder to go on from the checkpoint before it"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(about["step"])


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that one process saves alone, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
