"""HED jitter: stain concentrations perturbed per image, in optical density.

Tellez et al., "Quantifying the effects of data augmentation and stain color normalization in convolutional neural
networks for computational pathology", Medical Image Analysis 2019, sec. 3.2: c' = α·c + β for each stain, with
α ~ U(1−σ, 1+σ) and β ~ U(−σ, σ). Here β fades out where there is no tissue, so that white stays white.
"""

from __future__ import annotations

import torch

from eosin.data_tools.draws import purpose, uniform
from eosin.ssl.stain.macenko import BETA, intensity, optical_density

# Ruifrok and Johnston 2001, table 1: rows hematoxylin, eosin, DAB in optical density of R, G, B.
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
ALPHA, SHIFT = purpose("hed alpha"), purpose("hed beta")


def hed_jitter(images: torch.Tensor, keys: torch.Tensor, sigma: float, enabled: torch.Tensor) -> torch.Tensor:
    """Jitter ``images``, [N, 3, H, W] float in [0, 1].

    Args:
        keys: [N] int64, one key an image; equal keys give equal jitter.
        sigma: strength; 0 leaves every image as it is.
        enabled: [N] bool; False leaves that image as it is.
    """
    vectors = torch.tensor(HED, device=images.device)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    stains = torch.arange(3, device=images.device)
    strength = sigma * enabled.unsqueeze(1)  # [N, 1]
    alpha = 1 + strength * (2 * uniform(keys.unsqueeze(1), stains, ALPHA) - 1)  # [N, 3]
    beta = strength * (2 * uniform(keys.unsqueeze(1), stains, SHIFT) - 1)
    matrix = torch.linalg.inv(vectors).expand(len(keys), 3, 3) @ (
        alpha.unsqueeze(2) * vectors
    )  # [N, 3, 3], densities as rows
    density = optical_density(images.flatten(2) * 255)  # [N, 3, P]
    tissue = (density.mean(dim=1, keepdim=True) / BETA).clamp(max=1)
    # A sum and not a product of matrices, whose last bits would depend on the number of images.
    shift = (beta.unsqueeze(2) * vectors).sum(dim=1)  # [N, 3]
    mixed = matrix.transpose(1, 2) @ density + tissue * shift.unsqueeze(2)
    jittered = (intensity(mixed) / 255).view_as(images)
    return torch.where(enabled.view(-1, 1, 1, 1) & (sigma > 0), jittered, images)
