"""iBOT: the student predicts the teacher's distribution of the patches it does not see."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ibot_loss(student: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy over masked patches, averaged within each crop and then over all crops, unmasked ones as 0.

    Zhou et al. 2022, eq. 2, weighted as in DINOv2. With no masked patch the result is 0 and still has a gradient, so
    that every process takes part in the backward pass.

    Args:
        student, targets: [M, K] for the M masked patches, in the order of ``masks``.
        masks: [C, P] bool, crops by patches, with M true entries.
    """
    losses = -(targets * F.log_softmax(student.float() / temperature, dim=1)).sum(dim=1)  # [M]
    per_crop = masks.sum(dim=1).clamp(min=1)
    weight = (1 / per_crop).unsqueeze(1).expand_as(masks)[masks]
    return (losses * weight).sum() / len(masks)
