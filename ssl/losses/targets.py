"""Teacher targets from prototype scores: Sinkhorn-Knopp, or softmax with a moving center. Without gradient."""

from __future__ import annotations

import torch

from eosin.ssl.distributed import all_sum


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Targets [N, K] whose rows are distributions and whose prototypes are used equally, over all processes.

    SwAV (Caron et al. 2020, algorithm 1 and appendix), as in DINOv2: K ``scores``, [N, K], over ``temperature``;
    alternately normalize prototypes to 1/K and samples to 1/N. N may be 0 on a process.
    """
    logits = scores.float() / temperature
    # One shift for all: it cancels, and keeps exp from overflowing.
    peak = logits.amax() if len(logits) else logits.new_tensor(-torch.inf)
    weights = torch.exp(logits - _all_max(peak))
    weights /= all_sum(weights.sum()).clamp(min=1e-30)
    samples = all_sum(torch.tensor(float(len(weights)), device=weights.device)).clamp(min=1)
    for _ in range(iterations):
        weights /= all_sum(weights.sum(dim=0, keepdim=True)).clamp(min=1e-30) * weights.shape[1]
        weights /= weights.sum(dim=1, keepdim=True).clamp(min=1e-30) * samples
    return weights * samples


@torch.no_grad()
def centered(scores: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
    """Targets [N, K]: softmax of ``scores`` minus ``center``, [K] (DINO, Caron et al. 2021, sec. 3.1)."""
    return torch.softmax((scores.float() - center) / temperature, dim=1)


@torch.no_grad()
def update_center(center: torch.Tensor, scores: torch.Tensor, momentum: float = 0.9) -> None:
    """Move ``center`` towards the mean score over all processes (DINO, eq. 4)."""
    total = all_sum(scores.float().sum(dim=0))
    count = all_sum(torch.tensor(float(len(scores)), device=scores.device))
    center.lerp_(torch.where(count > 0, total / count.clamp(min=1), center), 1 - momentum)


def _all_max(value: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value
