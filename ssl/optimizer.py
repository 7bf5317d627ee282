"""AdamW with DINOv2's parameter groups: layer-wise decay, a slower patch embedding, no weight decay on vectors."""

from __future__ import annotations

import torch
from torch import nn

from eosin.ssl.config import Config
from eosin.ssl.network import Network
from eosin.ssl.schedules import Moment


def build_optimizer(student: Network, config: Config) -> torch.optim.AdamW:
    """One group for each (learning-rate factor, decayed, last layer, backbone); see :func:`set_moment`."""
    optim, depth = config.optim, len(student.backbone.blocks)
    groups: dict[tuple[float, bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        factor = optim.layer_decay ** (depth + 1 - _layer(name, depth))
        if ".patch_embed." in name:
            factor *= optim.patch_embed_lr
        decayed = parameter.ndim > 1 and not name.endswith(("cls_token", "reg_token", "pos_embed"))
        backbone = optim.heads_only > 0 and name.startswith("backbone.")
        key = (factor, decayed, name.endswith("prototypes"), backbone)
        groups.setdefault(key, []).append(parameter)
    # A checkpoint holds the flags and must have the same: runs that do not freeze the backbone go without that one.
    flags = ("factor", "decayed", "last_layer", "backbone")[: 4 if optim.heads_only else 3]
    return torch.optim.AdamW(
        [dict(zip(flags, key)) | {"params": parameters} for key, parameters in groups.items()],
        betas=(optim.betas[0], optim.betas[1]),
        fused=True,
    )


def set_moment(optimizer: torch.optim.Optimizer, moment: Moment) -> None:
    """Set each group's learning rate and weight decay for this step."""
    for group in optimizer.param_groups:
        frozen = (group["last_layer"] and moment.last_layer_frozen) or (
            group.get("backbone") and moment.backbone_frozen
        )
        group["lr"] = 0.0 if frozen else moment.lr * group["factor"]
        group["weight_decay"] = moment.weight_decay if group["decayed"] else 0.0


def _layer(name: str, depth: int) -> int:
    """Depth of a parameter: 0 for the embeddings, 1 … for the blocks, depth + 1 for what comes after."""
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith(("backbone.patch_embed", "backbone.cls_token", "backbone.reg_token", "backbone.pos_embed")):
        return 0
    return 0 if name == "mask_token" else depth + 1
