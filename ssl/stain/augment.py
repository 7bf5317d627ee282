"""Stain augmentation of crops: random per crop, batched, drawn from the crop's own key, with white left white.

An operation is on for a crop with its probability, and only on slides that are H&E. The order is that of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eosin.data_tools.draws import hash32, purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet
from eosin.ssl.stain import lab
from eosin.ssl.stain.density import mix_and_shift, unmixing
from eosin.ssl.stain.fits import is_he, slide_fits
from eosin.ssl.stain.normalizer import Normalizer, stacked

if TYPE_CHECKING:
    from eosin.ssl.config import Stain

# Ruifrok and Johnston 2001, table 1: rows hematoxylin, eosin, DAB in optical density of R, G, B.
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
COLOR_OPERATIONS = ("randstainna", "reinhard")  # transfer Lab statistics
LEAST_DEVIATION = 0.1  # of the mean one: what a drawn deviation is clamped to

Crops = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Augmenter:
    """The stain operations of a recipe on the tiles of a shard set.

    Attributes:
        stain: the recipe's section.
        he: [slides] bool.
        candidates: [F], numbers of the slides with color statistics, ascending.
        known: [slides] bool, which have stain vectors.
        vectors: [slides, 2, 3], of the tiles as the operations see them.
        lab_mean, lab_std: [slides, 3].
    """

    stain: Stain
    he: torch.Tensor
    candidates: torch.Tensor
    known: torch.Tensor
    vectors: torch.Tensor
    lab_mean: torch.Tensor
    lab_std: torch.Tensor

    def to(self, device: torch.device) -> Augmenter:
        """The same with its tensors on a device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Augmenter(self.stain, **moved)

    def of(self, images: torch.Tensor, slides: torch.Tensor) -> Crops:
        """The operations for crops of ``images``, [B, 3, T, T] uint8 as normalized, of slide numbers ``slides``, [B].

        Returns:
            A function of crops [N, 3, S, S] float in [0, 1], their keys [N] and the number [N] of each one's tile in
            the batch, that returns the crops augmented.
        """
        operations = self.stain.augment
        # A crop shows too little tissue to speak of its color, so that a tile's statistics hold for all its crops.
        colors = any(operation.op in COLOR_OPERATIONS for operation in operations)
        found = lab.statistics(images) if colors else lab.Statistics(*[images.new_zeros(len(images))] * 3)

        def apply(crops: torch.Tensor, keys: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
            slide = slides[tile]
            source = lab.Statistics(*(t[tile] for t in found))
            for place, operation in enumerate(operations):
                key = hash32(keys, purpose("stain operation"), place)
                on = self.he[slide] & (uniform(key, purpose("stain on")) < operation.p)
                if operation.op == "hed":
                    crops = hed(crops, key, operation.sigma, on)
                elif operation.op == "perturb":
                    on = on & self.known[slide]
                    crops = perturb(
                        crops, key, self.vectors[slide], operation.alpha, operation.beta, operation.vector, on
                    )
                elif operation.op == "randstainna":
                    # No bits of it depend on the number of slides on a rank: all ranks hold the whole table.
                    means, deviations = self.lab_mean[self.candidates], self.lab_std[self.candidates]
                    crops = randstainna(crops, key, source, means, deviations, operation.spread, on)
                else:
                    partner = draw_partner(key, slide, self.candidates)
                    crops = reinhard(crops, source, self.lab_mean[partner], self.lab_std[partner], on)
            return crops

        return apply


def make_augmenter(stain: Stain, shards: ShardSet | Mixture, normalizer: Normalizer | None = None) -> Augmenter | None:
    """The stain augmentation of a recipe for the tiles of ``shards``; None where it has none.

    Raises:
        UserError: an operation needs the slides' fits and there are none, or no slide is H&E.
    """
    if not stain.augment:
        return None
    he = torch.tensor(is_he(shards.slides()))
    names = [o.op for o in stain.augment]
    if len(he) and not he.any():
        raise UserError(
            f"stain.augment: {names[0]} is for H&E, and no slide of {shards.name} is; set stain.augment=none"
        )
    colors = [name for name in names if name in COLOR_OPERATIONS]
    own_stains = "perturb" in names and normalizer is None
    fits: Sequence[Any] = slide_fits(shards, stain.convention) if colors or own_stains else [None] * len(he)
    fitted = torch.tensor([f is not None for f in fits], dtype=torch.bool)
    if colors and int(fitted.sum()) < 2:
        raise UserError(
            f"stain.augment: {colors[0]} draws from the colors of other slides, and {shards.name} has "
            f"{int(fitted.sum())} with a stain fit; use hed, or set stain.augment=none"
        )
    vectors, _, _, mean, std = stacked(fits)
    known = fitted
    if normalizer is not None:
        # Normalized tiles have the reference's stains, whatever their slide's were.
        vectors, known = normalizer.reference.tensors()[0].expand_as(vectors), normalizer.reason == 0
    return Augmenter(stain, he, fitted.nonzero().squeeze(1), known, vectors, mean, std)


def hed(images: torch.Tensor, keys: torch.Tensor, sigma: float, on: torch.Tensor) -> torch.Tensor:
    """HED jitter: concentrations c of each stain become α·c + β, α ~ U(1−σ, 1+σ), β ~ U(−σ, σ).

    β fades out where there is no tissue. Tellez et al., "Quantifying the effects of data augmentation and stain color
    normalization in convolutional neural networks for computational pathology", Medical Image Analysis 2019, sec. 3.2.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        keys: [N] int64, one key an image; equal keys give equal jitter.
        sigma: strength; 0 leaves every image as it is.
        on: [N] bool; False leaves that image as it is.
    """
    vectors = torch.tensor(HED, device=images.device)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    alpha = 1 + sigma * _both_ways(keys, "hed alpha", 3)
    beta = sigma * _both_ways(keys, "hed beta", 3)
    matrices = torch.linalg.inv(vectors).expand(len(keys), 3, 3) @ (alpha.unsqueeze(2) * vectors)
    # A sum and not a product of matrices, whose last bits would depend on the number of images.
    shifts = (beta.unsqueeze(2) * vectors).sum(dim=1)  # [N, 3]
    return mix_and_shift(images, matrices, shifts, on & (sigma > 0))


def perturb(
    images: torch.Tensor,
    keys: torch.Tensor,
    vectors: torch.Tensor,
    alpha: float,
    beta: float,
    vector: float,
    on: torch.Tensor,
) -> torch.Tensor:
    """Perturb an image's own stains: concentrations become a·c + b, and the stain vectors themselves move.

    What lies outside the two stains stays. With ``vector`` 0 it is torchstain's Macenko augmentor.

    Args:
        images: [N, 3, H, W] float in [0, 1].
        keys: [N] int64.
        vectors: [N, 2, 3], the stain vectors.
        alpha, beta: a ~ U(1−alpha, 1+alpha), b ~ U(−beta, beta); b fades out where there is no tissue.
        vector: each component of a stain vector moves by U(−vector, vector), before it is made unit again.
        on: [N] bool; False leaves that image as it is.
    """
    moved = vectors + vector * _both_ways(keys, "stain vector", 6).view(-1, 2, 3)
    moved = moved.clamp(min=1e-3)
    moved = moved / (moved * moved).sum(dim=2, keepdim=True).sqrt()
    a = (1 + alpha * _both_ways(keys, "stain alpha", 2)).clamp(min=0).unsqueeze(2)
    b = (beta * _both_ways(keys, "stain beta", 2)).unsqueeze(2)
    eye = torch.eye(3, device=images.device)
    matrices = eye + unmixing(vectors) @ (a * moved - vectors)
    shifts = (b * moved).sum(dim=1)
    return mix_and_shift(images, matrices, shifts, on)


def randstainna(
    images: torch.Tensor,
    keys: torch.Tensor,
    source: lab.Statistics,
    means: torch.Tensor,
    deviations: torch.Tensor,
    spread: float,
    on: torch.Tensor,
) -> torch.Tensor:
    """Bring each image to a virtual template: Lab means and deviations drawn from their distribution over slides.

    Normal distributions, as the paper's; a drawn deviation is clamped to a tenth of the mean one. Only tissue changes.
    Shen et al., "RandStainNA", MICCAI 2022, sec. 2.2.

    Args:
        images: [N, 3, H, W] float in [0, 1], or uint8.
        keys: [N] int64.
        source: statistics of each image's tile.
        means, deviations: [slides, 3], Lab statistics of slides.
        spread: times the standard deviation over slides.
        on: [N] bool; False leaves that image as it is.
    """

    def drawn(values: torch.Tensor, name: str) -> torch.Tensor:
        return values.mean(dim=0) + spread * values.std(dim=0) * _normal(keys, name, 3)

    std = torch.maximum(drawn(deviations, "template deviation"), LEAST_DEVIATION * deviations.mean(dim=0))
    return reinhard(images, source, drawn(means, "template mean"), std, on)


def reinhard(
    images: torch.Tensor, source: lab.Statistics, mean: torch.Tensor, std: torch.Tensor, on: torch.Tensor
) -> torch.Tensor:
    """Transfer the Lab statistics of another slide (RudolfV, sec. 2.3; Reinhard et al. 2001). Only tissue changes.

    Args:
        images: [N, 3, H, W] float in [0, 1], or uint8.
        source: statistics of each image's tile; images of tiles with too little tissue stay as they are.
        mean, std: [N, 3], to be transferred.
        on: [N] bool; False leaves that image as it is.
    """
    return lab.transfer(images, *lab.matching(source, mean, std), on & source.good)


def draw_partner(keys: torch.Tensor, slides: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each key of [N] one of the ``candidates``, [F] ascending slide numbers, another than its own slide of [N]."""
    place = torch.searchsorted(candidates, slides.contiguous())
    own = candidates[place.clamp(max=len(candidates) - 1)] == slides
    among = len(candidates) - own.long()
    drawn = (uniform(keys, purpose("partner slide")) * among).long().clamp(max=len(candidates) - 1)
    # The own slide is skipped.
    return candidates[(drawn + (own & (drawn >= place))).clamp(max=len(candidates) - 1)]


def _both_ways(keys: torch.Tensor, name: str, count: int) -> torch.Tensor:
    """Uniform draws in [-1, 1), [N, count]."""
    return 2 * uniform(keys.unsqueeze(1), torch.arange(count, device=keys.device), purpose(name)) - 1


def _normal(keys: torch.Tensor, name: str, count: int) -> torch.Tensor:
    """Standard normal draws, [N, count], by Box and Muller."""
    words = torch.arange(count, device=keys.device)
    u, v = (uniform(keys.unsqueeze(1), words, purpose(f"{name} {part}")) for part in ("radius", "angle"))
    return torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * math.pi * v)
