"""What a network makes of whole tiles, without crops, augmentation or gradient; and patch tokens in false color."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from eosin.ssl.stain.density import TISSUE, optical_density

BACKGROUND = 238  # gray of what is no tissue in a picture of patch tokens

if TYPE_CHECKING:
    from eosin.ssl.network import Network


def preprocess(tiles: torch.Tensor, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Resize whole uint8 tiles [B, 3, H, W] to ``size`` (bicubic, antialiased) and standardize their colors."""
    images = tiles.float() / 255
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


@torch.no_grad()
def tokens(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Normalized tokens of preprocessed ``images``, [B, 3, S, S]: [B, prefix + P, D], the class token first.

    The network is called whole, since under FSDP2 only that gathers its weights: every process calls this.
    """
    backbone = network.backbone
    masks = images.new_zeros(len(images), (images.shape[-1] // backbone.patch_embed.patch_size[0]) ** 2).bool()
    keys = torch.arange(len(images), device=images.device)
    seen = network([images.unsqueeze(0)], masks, keys, hide=False, rate=0.0, all_tokens=True).tokens
    return seen.view(len(images), -1, seen.shape[-1]).float()


def token_colors(
    features: torch.Tensor, tissue: torch.Tensor, before: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The first three principal components of patch tokens as RGB.

    The basis is fitted on tokens over tissue, and the colors are stretched from the 2nd to the 98th percentile.

    Args:
        features: [n, D], float64.
        tissue: [n] bool; where it is false, the color is a light gray.
        before: scores of the same patches by an earlier network. Components change their order and turn into each
            other as a network learns, so these are rotated to lie nearest to those (the orthogonal Procrustes problem,
            Schönemann 1966), and a patch keeps its color while it keeps its likeness.

    Returns:
        Colors [n, 3] uint8, scores [n, 3], and the three components' share of the tokens' variance.
    """
    some = tissue if int(tissue.sum()) > 3 else torch.ones_like(tissue)
    fitted = features[some]
    values, vectors = torch.linalg.eigh(torch.cov(fitted.T))
    basis = vectors[:, -3:].flip(1)  # [D, 3]
    # An eigenvector's sign is arbitrary; this makes the picture the same everywhere.
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    scores = (features - fitted.mean(dim=0)) @ (basis * largest.sign())
    if before is not None:
        u, _, v = torch.linalg.svd(scores[some].T @ before[some])
        scores = scores @ (u @ v)
    over = scores[some]
    low, high = torch.quantile(over[:: max(1, len(over) // 100_000)], torch.tensor([0.02, 0.98]).double(), dim=0)
    # One scale for all three, so that a distance in color is one in features; the weaker ones are not blown up.
    colors = (((scores - (low + high) / 2) / (high - low).max().clamp(min=1e-12)).clamp(-0.5, 0.5) + 0.5) * 215 + 20
    colors[~tissue] = BACKGROUND
    share = float(values[-3:].sum() / values.clamp(min=0).sum().clamp(min=1e-12))
    return colors.round().to(torch.uint8), scores, share


def on_tissue(images: torch.Tensor, grid: int) -> torch.Tensor:
    """Which of ``grid`` × ``grid`` patches of uint8 tiles [B, 3, H, W] show tissue, [B · grid · grid] bool."""
    density = optical_density(images).mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(density, grid).flatten() > TISSUE
