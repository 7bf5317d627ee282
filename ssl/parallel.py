"""How a network is spread over processes and its blocks are run: DDP or FSDP2, compiled, recomputed.

Nothing here changes what is learned, nor the name of a weight. FSDP2's parameters stay float32 and are cast by
autocast, as DDP's are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from eosin.ssl import distributed
from eosin.ssl.config import Config
from eosin.ssl.network import StudentTeacher

# FSDP2 warns that an output which is a view must not be changed in place; none is.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def spread(model: StudentTeacher, config: Config, device: torch.device) -> nn.Module:
    """Prepare student and teacher for training by all processes; returns the student to call.

    Under FSDP2 the parameters of ``model`` are shards from here on: an optimizer is made afterwards.
    """
    _prepare_blocks(model, config)
    if distributed.ranks() == 1:
        return model.student
    if config.run.strategy != "fsdp":
        return DistributedDataParallel(model.student, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (distributed.ranks(),))
    for network in (model.student, model.teacher):
        # The root too is sharded again after a forward pass: the teacher has no backward pass that would do it, and
        # the moving average is taken over shards.
        for module in (*network.backbone.blocks, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model.student


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Within this, matrix products are in bfloat16 where the run is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(config, device))


def in_bfloat16(config: Config, device: torch.device) -> bool:
    """Whether a run computes in bfloat16."""
    asked = config.run.precision
    return asked == "bf16" or (asked == "auto" and device.type == "cuda")


def described(config: Config, device: torch.device) -> dict[str, Any]:
    """How a run computes, for its checkpoints to say: ``ranks``, ``strategy`` and ``precision``."""
    strategy = "fsdp" if config.run.strategy == "fsdp" else "ddp"
    return {
        "ranks": distributed.ranks(),
        "strategy": strategy if distributed.ranks() > 1 else None,
        "precision": "bf16" if in_bfloat16(config, device) else "fp32",
    }


@contextlib.contextmanager
def gradients_shared(student: nn.Module, share: bool) -> Iterator[None]:
    """Within this, a forward and backward pass adds to gradients; they are averaged over processes if ``share``."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(share)
    if isinstance(student, DistributedDataParallel) and not share:
        with student.no_sync():
            yield
    else:
        yield


def clip(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Scale gradients so that their norm over all processes is at most ``most``; returns what it was, []."""
    norm = distributed.full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def _prepare_blocks(model: StudentTeacher, config: Config) -> None:
    # Replacing ``forward`` keeps the weights' names, and the hooks of FSDP2 stay outside of what is compiled.
    for network in (model.student, model.teacher):
        for block in network.backbone.blocks:
            if config.run.checkpoint_activations == "blocks" and network is model.student:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            if config.run.compile:
                block.forward = torch.compile(block.forward)
