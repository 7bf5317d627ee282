"""Macenko's stain estimation and normalization, batched, on CPU or GPU, one image's result independent of the others.

Optical density here is ``-ln((I + 1) / 256)``: white has exactly none, and the inverse is exact. A fit is the two
stain vectors (hematoxylin, eosin) and their 99th-percentile concentrations. Images that cannot be fitted (too little
tissue, one stain, pen, no finite solution) are marked, never forced.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BETA = 0.15  # least mean optical density of a tissue pixel (Macenko, sec. 2)
ALPHA = 1.0  # percent of angles cut off at each end (Macenko, sec. 2)
MIN_TISSUE = 0.02  # least fraction of tissue pixels for a fit
MIN_ANGLE = 8.0  # degrees between the two stain vectors, below which they are one stain
PIXELS = 1 << 14  # of an image that estimation looks at, on a regular grid

# The built-in reference, our choice: blue-purple nuclei on pink, the colors of a well-stained section in daylight.
REFERENCE_VECTORS = ((0.61, 0.73, 0.31), (0.17, 0.88, 0.44))
REFERENCE_MAX = (1.7, 1.0)


@dataclass
class Fit:
    """Stain fits of B images.

    Attributes:
        vectors: [B, 2, 3], unit vectors of hematoxylin and eosin in optical density (RGB).
        maxima: [B, 2], 99th-percentile concentrations over tissue pixels.
        good: [B] bool; where False the other two hold the reference and must not be used.
        reason: why not, "" where good.
    """

    vectors: torch.Tensor
    maxima: torch.Tensor
    good: torch.Tensor
    reason: list[str]


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """The built-in reference: unit stain vectors [2, 3] and maxima [2]."""
    vectors = torch.tensor(REFERENCE_VECTORS)
    return vectors / vectors.norm(dim=1, keepdim=True), torch.tensor(REFERENCE_MAX)


def optical_density(images: torch.Tensor) -> torch.Tensor:
    """Optical density of RGB values in [0, 255], any shape: ``-ln((I + 1) / 256)``, in [0, 5.55]."""
    return -torch.log((images.float() + 1) / 256)


def intensity(density: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`optical_density`, clipped to [0, 255], float."""
    return (256 * torch.exp(-density) - 1).clamp(0, 255)


def fit(images: torch.Tensor, pixels: int = PIXELS) -> Fit:
    """Estimate stain vectors and maxima of ``images``, [B, 3, H, W] uint8, from about ``pixels`` pixels of each."""
    step = max(1, images.shape[2] * images.shape[3] // pixels)
    density = optical_density(images.flatten(2)[:, :, ::step]).transpose(1, 2)  # [B, P, 3]
    # The mean over channels: asking each channel for BETA would drop pure eosin, which hardly absorbs red.
    tissue = density.mean(dim=2) > BETA  # [B, P]
    count = tissue.sum(dim=1)
    reasons = {}
    enough = count >= max(64, MIN_TISSUE * tissue.shape[1])

    weight = tissue.unsqueeze(2).float()
    n = count.clamp(min=2).view(-1, 1, 1)
    mean = (density * weight).sum(dim=1, keepdim=True) / n
    centered = (density - mean) * weight
    covariance = centered.transpose(1, 2) @ centered / (n - 1)  # [B, 3, 3]
    # Eigenvectors of a matrix that is not finite would raise; none is, since densities are bounded.
    plane = torch.linalg.eigh(covariance.double()).eigenvectors[:, :, 1:].float()  # [B, 3, 2], ascending
    plane = plane * torch.where(plane.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)

    projected = density @ plane  # [B, P, 2]
    angle = torch.atan2(projected[..., 1], projected[..., 0])
    low = _quantile(angle, tissue, ALPHA / 100)
    high = _quantile(angle, tissue, 1 - ALPHA / 100)
    ends = torch.stack([low, high], dim=1)  # [B, 2]
    directions = torch.stack([torch.cos(ends), torch.sin(ends)], dim=2)  # [B, 2, 2]
    vectors = directions @ plane.transpose(1, 2)  # [B, 2, 3]
    vectors = vectors * torch.where(vectors.sum(dim=2, keepdim=True) < 0, -1.0, 1.0)
    # Hematoxylin absorbs more red than eosin does.
    swap = vectors[:, 0, 0] < vectors[:, 1, 0]
    vectors = torch.where(swap.view(-1, 1, 1), vectors.flip(1), vectors)

    concentrations = density @ unmixing(vectors)  # [B, P, 2]
    maxima = torch.stack([_quantile(concentrations[..., i], tissue, 0.99) for i in (0, 1)], dim=1)
    cosine = (vectors[:, 0] * vectors[:, 1]).sum(dim=1).clamp(-1, 1)
    reasons["too little tissue"] = ~enough
    reasons["only one stain"] = torch.rad2deg(torch.acos(cosine)) < MIN_ANGLE
    # H&E absorbs all three channels and green most; pen and other stains do not.
    reasons["not the colors of H&E"] = (vectors < -0.05).flatten(1).any(1) | (
        vectors[..., 1] < vectors[..., 2] - 0.2
    ).any(1)
    reasons["no finite solution"] = ~(torch.isfinite(vectors).flatten(1).all(1) & (maxima > 1e-2).all(1))
    reason = [""] * len(images)
    for text, where in reversed(reasons.items()):
        for i in where.nonzero().flatten().tolist():
            reason[i] = text
    good = torch.tensor([not r for r in reason], device=images.device)
    ref_vectors, ref_maxima = (t.to(images.device) for t in reference())
    vectors = torch.where(good.view(-1, 1, 1), vectors, ref_vectors)
    return Fit(vectors, torch.where(good.view(-1, 1), maxima, ref_maxima), good, reason)


def unmixing(vectors: torch.Tensor) -> torch.Tensor:
    """Least-squares unmixing matrices [B, 3, 2] of stain vectors [B, 2, 3]: concentrations = density @ unmixing."""
    gram = vectors @ vectors.transpose(1, 2)
    a, b, d = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    # Closed form of a 2×2 inverse: a batch of them must not depend on a solver's blocking.
    determinant = (a * d - b * b).clamp(min=1e-6)
    inverse = torch.stack([torch.stack([d, -b], 1), torch.stack([-b, a], 1)], 1) / determinant.view(-1, 1, 1)
    return vectors.transpose(1, 2) @ inverse


def transform(
    vectors: torch.Tensor, maxima: torch.Tensor, to_vectors: torch.Tensor, to_maxima: torch.Tensor
) -> torch.Tensor:
    """The 3×3 matrices, [B, 3, 3], that take densities (as rows) from one stain to another.

    Args:
        vectors, maxima: the source fits, [B, 2, 3] and [B, 2].
        to_vectors, to_maxima: the reference, [2, 3] and [2].
    """
    scale = to_maxima / maxima.clamp(min=1e-3)  # [B, 2]
    return unmixing(vectors) @ (scale.unsqueeze(2) * to_vectors)


def apply(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Apply density matrices [B, 3, 3] to ``images``, [B, 3, H, W] uint8; the result is uint8.

    Images whose matrix is the identity come back bit for bit.
    """
    table = optical_density(torch.arange(256, device=images.device))
    density = table.index_select(0, images.reshape(-1).int()).view(len(images), 3, -1)
    mixed = matrices.transpose(1, 2).to(density.dtype) @ density
    # In place, and rounded by the cast of I + 1/2: memory traffic is what this costs.
    return mixed.neg_().exp_().mul_(256).sub_(0.5).clamp_(0, 255).to(torch.uint8).view_as(images)


def _quantile(values: torch.Tensor, valid: torch.Tensor, q: float) -> torch.Tensor:
    """Quantile ``q`` of each row's valid values, [B, P] -> [B], linearly interpolated; 0 where none is valid."""
    ordered = torch.where(valid, values, torch.inf).sort(dim=1).values
    place = q * (valid.sum(dim=1) - 1).clamp(min=0)
    below = place.floor().long()
    above = torch.minimum(below + 1, (valid.sum(dim=1) - 1).clamp(min=0))
    low, high = (ordered.gather(1, i.unsqueeze(1)).squeeze(1) for i in (below, above))
    result = low + (high - low) * (place - below)
    return torch.where(valid.any(dim=1), result, torch.zeros_like(result))
