"""Macenko's stain estimation, batched, on CPU or GPU, one image's result independent of the others.

A fit is the two stain vectors (hematoxylin, eosin) and their 99th-percentile concentrations. Images that cannot be
fitted (too little tissue, one stain, pen, no finite solution) are marked, never forced.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from eosin.ssl.stain import lab
from eosin.ssl.stain.density import TISSUE, WHITE, by_pixels, mix, optical_density, unmixing

MIN_TISSUE = 0.02  # least fraction of tissue pixels for a fit
MIN_ANGLE = 8.0  # degrees between the two stain vectors, below which they are one stain
MOST = 5.0  # a stain's maximum concentration; 8 bits hold densities up to 5.5
MAXIMUM = 0.99  # quantile of a stain's concentrations that counts as its maximum (Macenko, sec. 2)
NEGATIVE, MOST_NEGATIVE = 0.2, 0.014  # of a maximum, below which an amount is negative; the share of such pixels
GLASS_LEVEL, GLASS_CHROMA, GLASS_SHARE, GLASS_QUANTILE = 200, 30, 0.002, 0.9
LUMINOSITY = 0.8  # tiatoolbox: L of a tissue pixel, of 1, after its contrast is stretched
STRETCH = 0.02  # tiatoolbox: share of all levels at each end that its stretch of the contrast cuts off


@dataclass(frozen=True)
class Convention:
    """How an implementation of Macenko's method reads an image.

    Attributes:
        white: the level (plus ``offset``) that has density 0.
        offset: what is added to levels before the logarithm; with 0, level 0 counts as 1.
        tissue: pixels that count: "mean" or "every" channel above density .15, or "luminosity".
        cuts: fraction of angles beyond hematoxylin's and beyond eosin's end.
        centered: whether the plane is that of the covariance, or of the second moments and so through white.
        interpolated: quantiles between two pixels are interpolated, else the nearest pixel's value is taken.
        over: pixels over which maxima are taken.
        pixels: about so many of an image are looked at, on a regular grid; all for 0.
    """

    white: float
    offset: int
    tissue: Literal["mean", "every", "luminosity"]
    cuts: tuple[float, float]
    centered: bool
    interpolated: bool
    over: Literal["tissue", "all"]
    pixels: int


CONVENTIONS = {
    # The mean over channels: asking each channel for .15 would drop pure eosin, which hardly absorbs red. Second
    # moments, as the paper's SVD of densities: the plane of stains passes through white. Nuclei are rare, so their end
    # is cut less.
    "eosin": Convention(WHITE, 1, "mean", (0.001, 0.03), False, True, "tissue", 1 << 14),
    "torchstain": Convention(240, 1, "every", (0.01, 0.01), True, False, "all", 0),
    "tiatoolbox": Convention(255, 0, "luminosity", (0.01, 0.01), True, True, "all", 0),
}
REASONS = ("", "too little tissue", "only one stain", "not the colors of H&E", "no finite solution")


@dataclass
class Fit:
    """Stain fits of B images.

    Attributes:
        vectors: [B, 2, 3], unit vectors of hematoxylin and eosin in optical density (RGB).
        maxima: [B, 2], 99th-percentile concentrations.
        reason: [B] uint8, a number of REASONS; 0 where the fit is good. Where it is not, the others hold no fit.
        pixels: [B], tissue pixels used.
        residual: [B], share of the tissue's density that lies outside the two stains, 0 to 1.
    """

    vectors: torch.Tensor
    maxima: torch.Tensor
    reason: torch.Tensor
    pixels: torch.Tensor
    residual: torch.Tensor

    @property
    def good(self) -> torch.Tensor:
        """Which images have a fit, [B] bool."""
        return self.reason == 0


def fit(images: torch.Tensor, convention: Convention = CONVENTIONS["eosin"], white: torch.Tensor | None = None) -> Fit:
    """Estimate stain vectors and maxima of ``images``, [B, 3, H, W], uint8, or float in [0, 1].

    Args:
        convention: the constants.
        white: [B, 3] or [1, 3], level + 1 of the white point, in place of the convention's.
    """
    white = None if white is None else white.expand(len(images), 3)
    if images.device.type != "cpu" or len(images) < 2:
        return _fit(images, convention, white)
    whites = [None] * len(images) if white is None else white.split(1)
    parts = [_fit(image, convention, w) for image, w in zip(images.split(1), whites)]
    return Fit(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Fit)))


def white_point(levels: torch.Tensor) -> torch.Tensor:
    """Level + 1 of empty glass in pixels [B, 3, P], 0 to 255: [B, 3]; 256 where there is too little.

    Glass is bright and nearly gray. The staining protocol (arXiv 2603.12886) takes each channel's maximum for the white
    point; a quantile of glass does not follow the bright rims that sharpening draws.
    """
    low, high = levels.amin(dim=1), levels.amax(dim=1)
    glass = (low >= GLASS_LEVEL) & (high - low <= GLASS_CHROMA)  # [B, P]
    enough = glass.sum(dim=1) >= max(64, GLASS_SHARE * levels.shape[2])
    rules = CONVENTIONS["eosin"]
    found = [_quantiles(c.float(), glass, [1 - GLASS_QUANTILE], rules, upper=True)[0] for c in levels.unbind(1)]
    return torch.where(enough.unsqueeze(1), torch.stack(found, dim=1) + 1, WHITE)


def thinned(images: torch.Tensor, pixels: int) -> torch.Tensor:
    """About ``pixels`` pixels of each image [B, 3, H, W], on a regular grid: [B, 3, P]; all for 0.

    Of twice as many or more, each is the mean of 2 × 2, so that the ends of the angles are those of stains, and
    not of a lens's colored edges or a JPEG's noise.
    """
    if pixels and images.shape[2] * images.shape[3] >= 2 * pixels and min(images.shape[2:]) > 1:
        images = torch.nn.functional.avg_pool2d(images.float(), 2)
    flat = images.flatten(2)
    return flat[:, :, :: max(1, flat.shape[2] // pixels)] if pixels else flat


def _fit(images: torch.Tensor, convention: Convention, white: torch.Tensor | None) -> Fit:
    levels = thinned(images, convention.pixels)
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if images.dtype == torch.uint8:
        levels = levels.float()  # from 0 to 255, averaged or not
    else:
        finite = torch.isfinite(levels).flatten(1).all(dim=1)
        levels = (levels * 255).nan_to_num(255.0, 255.0, 255.0).clamp(0, 255)
    density = _density(levels, convention, white)  # [B, 3, P]
    tissue = _tissue(levels, density, convention)  # [B, P]
    count = tissue.sum(dim=1)

    vectors, residual = _vectors(density, tissue, count, convention)
    concentrations = unmixing(vectors).transpose(1, 2) @ density  # [B, 2, P]
    over = tissue if convention.over == "tissue" else torch.ones_like(tissue)
    maxima = torch.stack(
        [_quantiles(c, over, [1 - MAXIMUM], convention, upper=True)[0] for c in concentrations.unbind(1)], dim=1
    )

    cosine = (vectors[:, 0] * vectors[:, 1]).sum(dim=1).clamp(-1, 1)
    # H&E absorbs all three channels and green most, and hematoxylin red more than blue; pen, a tinted background and
    # other stains do not.
    foreign = (vectors < -0.05).flatten(1).any(1) | (vectors[..., 1] < vectors[..., 2] - 0.2).any(1)
    red, green, blue = vectors[:, 0].unbind(1)
    foreign |= (red < blue) | (red > green + 0.25) | (vectors[:, 1, 2] > vectors[:, 1, 1] - 0.15)
    # Both stains are there in no negative amount, but for noise.
    negative = (concentrations < -NEGATIVE * maxima.unsqueeze(2)).any(dim=1) & tissue
    foreign |= negative.sum(dim=1) > MOST_NEGATIVE * count
    wrong = [
        count < max(64, MIN_TISSUE * tissue.shape[1]),
        torch.rad2deg(torch.acos(cosine)) < MIN_ANGLE,
        foreign,
        ~(finite & torch.isfinite(vectors).flatten(1).all(1) & ((maxima > 1e-2) & (maxima < MOST)).all(1)),
    ]
    reason = torch.zeros(len(images), dtype=torch.uint8, device=images.device)
    for number in range(len(wrong), 0, -1):  # the first that applies is the one that is said
        reason = reason.masked_fill(wrong[number - 1], number)
    return Fit(vectors, maxima, reason, count, residual)


def normalize(
    images: torch.Tensor,
    fits: Fit,
    vectors: torch.Tensor,
    maxima: torch.Tensor,
    convention: Convention = CONVENTIONS["eosin"],
) -> torch.Tensor:
    """Bring ``images`` from their own fits to one reference; those without a fit come back as they are.

    Args:
        images: [B, 3, H, W], uint8, or float in [0, 1].
        vectors, maxima: the reference, [2, 3] and [2].
        convention: that of the fits.
    """
    matrices = transform(fits.vectors, fits.maxima, vectors, maxima, keep_rest=convention.white == WHITE)
    return render(images, matrices, fits.good, convention)


def render(images: torch.Tensor, matrices: torch.Tensor, good: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Apply density matrices [B, 3, 3] in a convention's densities; images that are not ``good`` come back as is."""
    if convention.white == WHITE:
        return mix(images, matrices, on=good)

    def pixels(part: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        levels = part.float() if part.dtype == torch.uint8 else part * 255
        light = (matrix @ _density(levels, convention, None)).neg_().exp_().mul_(convention.white).clamp_(0, 255)
        # These peers cut the fraction off, where others round.
        return light.to(torch.uint8) if part.dtype == torch.uint8 else light / 255

    return by_pixels(pixels, images, good, matrices.transpose(1, 2))


def transform(
    vectors: torch.Tensor,
    maxima: torch.Tensor,
    to_vectors: torch.Tensor,
    to_maxima: torch.Tensor,
    *,
    keep_rest: bool = True,
) -> torch.Tensor:
    """The 3×3 matrices, [B, 3, 3], that take densities (as rows) from one stain to another.

    What lies outside the two stains (pen, pigment, a third stain) stays as it is, or with ``keep_rest`` false is lost,
    as the published implementations do, which turns it purple.

    Args:
        vectors, maxima: the source fits, [B, 2, 3] and [B, 2].
        to_vectors, to_maxima: the reference, [2, 3] and [2].
    """
    scale = to_maxima / maxima.clamp(min=1e-3)  # [B, 2]
    target = scale.unsqueeze(2) * to_vectors
    if keep_rest:
        return torch.eye(3, device=vectors.device) + unmixing(vectors) @ (target - vectors)
    return unmixing(vectors) @ target


def pooled(fits: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One fit for several, by the median of vectors [2, 3] (made unit again) and of maxima [2]."""
    vectors = torch.stack([f[0] for f in fits]).quantile(0.5, dim=0)
    maxima = torch.stack([f[1] for f in fits]).quantile(0.5, dim=0)
    return vectors / vectors.norm(dim=1, keepdim=True), maxima


def _density(levels: torch.Tensor, convention: Convention, white: torch.Tensor | None) -> torch.Tensor:
    if convention.offset == 0:
        return -torch.log(levels.clamp(min=1) / convention.white).clamp(max=-1e-6)
    if white is None:
        return optical_density(levels, convention.white)
    return optical_density(levels, white.unsqueeze(2))


def _tissue(levels: torch.Tensor, density: torch.Tensor, convention: Convention) -> torch.Tensor:
    if convention.tissue == "mean":
        return density.mean(dim=1) > TISSUE
    if convention.tissue == "every":
        return (density >= TISSUE).all(dim=1)
    flat = levels.flatten(1)
    everywhere = torch.ones_like(flat, dtype=torch.bool)
    low, high = (
        _quantiles(flat, everywhere, [STRETCH], convention, upper=end)[0].view(-1, 1, 1) for end in (False, True)
    )
    stretched = ((levels - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    luminosity = lab.from_rgb(stretched.mul(255).floor_().div_(255))[:, 0] / 100
    return luminosity < LUMINOSITY


def _vectors(
    density: torch.Tensor, tissue: torch.Tensor, count: torch.Tensor, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stain vectors [B, 2, 3] and residuals [B] of densities [B, 3, P] at ``tissue`` [B, P]."""
    inside = density * tissue.unsqueeze(1)
    n = count.clamp(min=2).view(-1, 1, 1)
    moments = (inside @ inside.transpose(1, 2)).double() / n  # [B, 3, 3]
    spread = moments
    if convention.centered:
        mean = inside.double().sum(dim=2, keepdim=True) / n
        spread = (moments - mean @ mean.transpose(1, 2)) * n / (n - 1)
    plane = torch.linalg.eigh(spread).eigenvectors[:, :, 1:].float()  # [B, 3, 2], ascending
    plane = plane * torch.where(plane.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)

    projected = plane.transpose(1, 2) @ density  # [B, 2, P]
    angle = torch.atan2(projected[:, 1], projected[:, 0])
    # Each cut at the lower end of the angles and at the upper one: [B, 4] = (H, E) lower, (H, E) upper.
    low, high = (_quantiles(angle, tissue, convention.cuts, convention, upper=end) for end in (False, True))
    ends = torch.stack([*low, *high], dim=1)
    directions = torch.stack([ends.cos(), ends.sin()], dim=2)  # [B, 4, 2]
    found = directions @ plane.transpose(1, 2)  # [B, 4, 3]
    found = found * torch.where(found.sum(dim=2, keepdim=True) < 0, -1.0, 1.0)
    # Hematoxylin absorbs more red than eosin does.
    lower = found[:, 0, 0] > found[:, 2, 0]
    vectors = torch.where(lower.view(-1, 1, 1), found[:, [0, 3]], found[:, [2, 1]])  # [B, 2, 3]
    total = moments.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=1e-12)
    inplane = (plane.double().transpose(1, 2) @ moments @ plane.double()).diagonal(dim1=1, dim2=2).sum(dim=1)
    return vectors, (1 - inplane / total).clamp(0, 1).sqrt().float()


def _quantiles(
    values: torch.Tensor, valid: torch.Tensor, shares: Sequence[float], convention: Convention, *, upper: bool
) -> list[torch.Tensor]:
    """The values beyond which a share of each row's valid values lies, [B, P] -> [B] each; 0 where none is valid.

    Only the values beyond them are sorted, from the ``upper`` or the lower end.
    """
    last = valid.sum(dim=1) - 1
    most = min(int(max(shares) * values.shape[1]) + 2, values.shape[1])
    masked = torch.where(valid, values, -torch.inf if upper else torch.inf)
    ordered = masked.topk(most, dim=1, largest=upper).values  # from the end inward
    found = []
    for share in shares:
        place = share * last.clamp(min=0)
        if not convention.interpolated:
            # Rounded as a place counted from below: halves go to the even one.
            place = last - ((1 - share) * last).round() if upper else place.round()
        near = place.clamp(min=0).floor().long()
        far = torch.minimum(near + 1, last.clamp(min=0)).clamp(max=most - 1)
        a, b = (ordered.gather(1, i.unsqueeze(1)).squeeze(1) for i in (near, far))
        found.append(torch.where(last >= 0, a + (b - a) * (place - near), 0.0))
    return found
