"""Measures of features shared by the training monitors and the probes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def effective_rank(features: torch.Tensor) -> float:
    """RankMe: exp of the entropy of the normalized singular values of ``features``, [N, D], in [1, min(N, D)].

    Garrido et al. 2023, eq. 2. Features are centered first, so that a common offset does not count as a direction.
    NaN where a feature is not finite.
    """
    if not torch.isfinite(features).all():
        return float("nan")
    centered = features.float() - features.float().mean(dim=0)
    singular = torch.linalg.svdvals(centered)
    shares = singular / singular.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()))


def mean_cosine(features: torch.Tensor) -> float:
    """Mean cosine of all pairs of different rows of ``features``, [N, D], in [-1, 1]; 1 means collapse to a point."""
    unit = F.normalize(features.float(), dim=1)
    count = len(unit)
    return float((unit.sum(dim=0).square().sum() - count) / max(count * (count - 1), 1))


def same_group_rate(features: torch.Tensor, groups: torch.Tensor, k: int) -> tuple[float, float]:
    """How often the k nearest neighbors of a row share its group, and how often that happens by chance.

    Args:
        features: [N, D].
        groups: [N] int64, e.g. slide numbers.
        k: neighbors, fewer than N.
    """
    unit = F.normalize(features.float(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    nearest = similarity.topk(k, dim=1).indices  # [N, k]
    rate = float((groups[nearest] == groups.unsqueeze(1)).float().mean())
    counts = torch.bincount(groups.unique(return_inverse=True)[1]).double()
    chance = float((counts * (counts - 1)).sum() / (len(groups) * (len(groups) - 1)))
    return rate, chance
