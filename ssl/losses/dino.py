"""DINO: the student's class token of each crop predicts the teacher's of each other global crop."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dino_loss(student: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean cross-entropy over pairs of different crops (Caron et al. 2021, eq. 3).

    Args:
        student: [V, B, K] scores of V crops, the global ones first.
        targets: [G, B, K] teacher distributions of the G global crops.
    """
    logs = F.log_softmax(student.float() / temperature, dim=2)
    crops, batch, _ = logs.shape
    # Summing targets over the crops each student crop is paired with gives all pairs in one product.
    pairs = targets.sum(dim=0).unsqueeze(0).repeat(crops, 1, 1)
    pairs[: len(targets)] -= targets
    count = len(targets) * (crops - 1)
    return -(pairs * logs).sum() / (count * batch)
