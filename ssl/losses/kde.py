"""KDE: spreads features by lowering the density that all others give each of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from eosin.ssl.distributed import all_rows, rank


def kde_loss(features: torch.Tensor, concentration: float) -> torch.Tensor:
    """Mean log density of L2-normalized ``features``, [B, D], under a kernel density estimate from all others.

    ``mean_i ln (1 / (N - 1)) sum_{j != i} exp(κ x_i · x_j)`` with the von Mises-Fisher kernel, up to its constant, over
    the N features of all processes, in float32 (Virchow2, Zimmermann et al. 2024, sec. 3.2, in place of KoLeo, with
    κ = 5). Minimized, so that near-duplicates are pushed apart; a feature says nothing of its own density. With one
    feature in all it is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=1, eps=1e-8)  # [B, D]
        others = all_rows(own)  # [N, D]
        if len(others) < 2:
            return own.sum() * 0
        here = torch.arange(len(own), device=own.device)
        itself = torch.zeros(len(own), len(others), dtype=torch.bool, device=own.device)
        itself[here, here + rank() * len(own)] = True
        scores = (concentration * own @ others.T).masked_fill(itself, -torch.inf)
        return (scores.logsumexp(dim=1) - math.log(len(others) - 1)).mean()
