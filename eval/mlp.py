"""The probe with one hidden layer: what is in the features, but not along straight lines.

Where it beats the linear probe by much, the classes lie in the features and the encoder does not lay them apart. Heads
are trained as in :mod:`eosin.eval.sgd`, all at the same time, and one is chosen, with the epoch after which it was
best, on groups of the training side that none learned from. The defaults are ours and of no paper.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from eosin.eval.sgd import Kind, Recipe, like_linear, side_by_side

WIDEST = 1 << 16
RECIPE = Recipe(
    optimizer="adamw",
    learning_rates=(3e-4, 3e-3),
    weight_decays=(1e-2, 1.0),
    batch=256,
    choose="cross_entropy",
    steps=2000,
    patience=0.2,
    standardize=True,
)


def hidden_layer(width: int) -> Kind:
    """Heads with a hidden layer of ``width`` and GELU."""

    def start(dimension: int, n_classes: int, recipe: Recipe, draw: torch.Generator) -> list[torch.Tensor]:
        heads = len(recipe.grid)
        inner = [like_linear(shape, dimension, draw) for shape in ((dimension, heads, width), (heads, width))]
        outer = [like_linear(shape, width, draw) for shape in ((width, heads, n_classes), (heads, n_classes))]
        return inner + outer

    return Kind(start, _forward)


def _forward(parameters: list[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    weights, intercepts, outer, last = parameters
    hidden = F.gelu(side_by_side(weights, intercepts, features))  # [B, G, H]
    return torch.einsum("bgh,hgk->bgk", hidden, outer) + last
