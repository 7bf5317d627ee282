"""Color statistics of tiles: what color alone is worth, without a network."""

from __future__ import annotations

import torch


def color_statistics(tiles: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, 10th and 90th percentile of R, G and B of uint8 tiles [B, 3, H, W]: [B, 12] in [0, 1].

    A percentile is the smallest value that at least that share of the pixels does not exceed.
    """
    values = tiles.flatten(2).flatten(0, 1).long()  # [B·3, H·W]
    rows = torch.arange(len(values), device=tiles.device).unsqueeze(1)
    counts = torch.bincount((values + 256 * rows).flatten(), minlength=256 * len(values)).view(len(values), 256)
    shares = counts.double() / values.shape[1]
    level = torch.arange(256, device=tiles.device, dtype=torch.float64)
    mean = shares @ level
    deviation = ((level - mean.unsqueeze(1)).square() * shares).sum(dim=1).sqrt()
    reached = counts.cumsum(dim=1)
    percentiles = [(reached < q * values.shape[1]).sum(dim=1) for q in (0.1, 0.9)]
    statistics = torch.stack([mean, deviation, *percentiles]) / 255  # [4, B·3]
    return statistics.view(4, len(tiles), 3).transpose(0, 1).flatten(1)
