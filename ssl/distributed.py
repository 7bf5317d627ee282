"""One process or many: start, stop, and the collectives the objective needs. Without torchrun, everything is local."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def start(device: str) -> torch.device:
    """Join the process group that the launcher's environment describes, and return this process's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        UserError: "cuda" was asked for and there is none.
    """
    from eosin.data_tools.errors import UserError

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: 'cuda' was asked for and no GPU is visible; set run.device=cpu or auto")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    chosen = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return chosen


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum of ``value`` over processes, in place, without gradient."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_rows(value: torch.Tensor) -> torch.Tensor:
    """Rows of every process, [ranks · N, ...] in rank order; the gradient flows back to the process they came from."""
    return _AllRows.apply(value) if dist.is_initialized() else value


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any process."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def all_objects(value: Any) -> list[Any]:
    """A small picklable value of every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def local(value: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds: all of it, unless FSDP2 sharded it."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: torch.Tensor) -> torch.Tensor:
    """A tensor whole. Every process calls this, since a sharded one is gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class _AllRows(torch.autograd.Function):
    """Gather rows; in the backward pass, sum what every process says of this process's rows."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(value)
        gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, value.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)
