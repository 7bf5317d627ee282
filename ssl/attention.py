"""Attention of packed crops: each token attends to its own crop. Three backends, one signature.

PyTorch's own ``scaled_dot_product_attention``, one call a crop size, runs everywhere. The other two take all crops in
one call and exist on CUDA only: ``torch.nn.attention.varlen`` and xformers' block-diagonal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from eosin.data_tools.errors import UserError

Groups = list[tuple[int, int]]  # (crops, tokens a crop) for each crop size, in order
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Groups], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Attention of queries, keys and values [T, H, C], whose rows are the tokens of ``groups``; returns [T, H, C]."""
    sizes = [n * t for n, t in groups]
    parts = []
    for group, *qkv in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes)):
        heads = (x.unflatten(0, group).transpose(1, 2) for x in qkv)  # [N, H, t, C]
        parts.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    """As :func:`sdpa`, by ``torch.nn.attention.varlen``, in half precision (its kernels know no other)."""
    if not len(q):
        return v
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = borders(groups, q.device), max(t for n, t in groups if n)
    half = v.dtype if v.dtype != torch.float32 else torch.bfloat16
    out = varlen_attn(q.to(half), k.to(half), v.to(half), ends, ends, longest, longest)
    assert isinstance(out, torch.Tensor)
    return out


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    """As :func:`sdpa`, by xformers' ``memory_efficient_attention``."""
    if not len(q):
        return v
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens([t for n, t in groups for _ in range(n)])
    return memory_efficient_attention(*(x.to(v.dtype).unsqueeze(0) for x in (q, k, v)), attn_bias=mask)[0]


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "varlen": varlen, "xformers": xformers}


def check(name: str, device: torch.device) -> None:
    """Raise UserError where the backend ``name`` does not run on ``device``, or its package is missing."""
    if name != "sdpa" and device.type != "cuda":
        raise UserError(f"run.attention: '{name}' has kernels for CUDA only and this run is on the CPU; set it to sdpa")
    if name == "xformers" and find_spec("xformers") is None:
        raise UserError("run.attention: 'xformers' is not installed; pip install 'eosin[gpu]', or set it to varlen")


def borders(groups: Groups, device: torch.device) -> torch.Tensor:
    """Where crops begin among packed tokens, and where the last one ends, [crops + 1] int32; made on ``device``."""
    parts, start = [], 0
    for n, t in groups:
        parts.append(torch.arange(n, device=device, dtype=torch.int32) * t + start)
        start += n * t
    return torch.cat([*parts, torch.full((1,), start, device=device, dtype=torch.int32)])
