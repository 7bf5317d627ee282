"""KoLeo: spreads features by pushing each away from its nearest neighbor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eosin.ssl.distributed import all_rows, rank

EPS = 1e-8


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Mean of ``-ln(distance to the nearest neighbor)`` of L2-normalized ``features``, [B, D].

    Sablayrolles et al. 2019, eq. 2, as in DINOv2, in float32, with neighbors from all processes.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=1, eps=EPS)  # [B, D]
        others = all_rows(own)  # [ranks·B, D]
        with torch.no_grad():
            similarity = own @ others.T
            here = torch.arange(len(own), device=own.device)
            similarity[here, here + rank() * len(own)] = -2  # a feature is not its own neighbor
            nearest = similarity.argmax(dim=1)
        # index_select, since the backward pass of plain indexing varies where a neighbor occurs twice.
        distance = (own - others.index_select(0, nearest) + EPS).norm(dim=1)
        return -torch.log(distance + EPS).mean()
