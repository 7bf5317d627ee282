"""Many small heads on frozen features, trained at the same time: a grid of rates and decays in one pass.

All heads see the same batches, and their weights lie side by side in one tensor, so a step is one product for all of
them; each has its own learning rate and weight decay, and moves as it would if it were trained alone. One of them is
chosen on groups of the training side that no head has learned from; what is scored is never looked at.

Oquab et al. 2023 ("DINOv2") and Marza et al. 2025 ("THUNDER") evaluate so. A head is a :class:`Kind`: linear here, with
a hidden layer in :mod:`eosin.eval.mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, product
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from eosin.data_tools.draws import generator, hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.logistic import Scale
from eosin.eval.splits import stratified_folds

INNER_FOLDS = 5  # one in so many of the training side's groups chooses
MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8  # of sgd, and of adam and adamw: torch.optim's
CHUNK = 1 << 24  # numbers of a chunk of rows, as features or as scores


@dataclass(frozen=True)
class Recipe:
    """How heads are trained and how one is chosen; every number of it goes into the results.

    Attributes:
        optimizer: sgd (with momentum), adam (decay as part of the gradient) or adamw (decay apart), as torch.optim.
        learning_rates: for each of them, and
        weight_decays: for each of these, there is a head.
        batch: samples of a step.
        steps: how many; or as many as so many ``epochs`` take.
        cosine: learning rates fall to 0 along half a cosine; otherwise they stay.
        across: a batch goes on where the next epoch begins; otherwise the last batch of an epoch is a smaller one.
        choose: what is highest on the inner fold: accuracy, balanced_accuracy or macro_f1; or least: cross_entropy.
        every_epoch: whether each epoch's heads can be chosen, the first of several equal ones; or the last ones only.
        patience: training ends after this share of all epochs without a better head.
        deviation: of the starting weights, with intercepts of 0; None for what torch.nn.Linear starts from.
        standardize: features by mean and deviation of the training side.
        runs: how often all this is done, from other starting weights and in another order.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    batch: int
    choose: Literal["accuracy", "balanced_accuracy", "macro_f1", "cross_entropy"]
    steps: int | None = None
    epochs: int | None = None
    cosine: bool = False
    across: bool = False
    every_epoch: bool = True
    patience: float | None = None
    deviation: float | None = None
    standardize: bool = False
    runs: int = 1

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each head."""
        return list(product(self.learning_rates, self.weight_decays))


@dataclass(frozen=True)
class Kind:
    """What a head is. Parameters have the heads as their last axis but one: [..., G, width].

    Attributes:
        start: (dimension, n_classes, recipe, torch.Generator) -> parameters of all heads, on the CPU.
        forward: (parameters, features [B, D]) -> scores [B, G, K].
    """

    start: Callable[[int, int, Recipe, torch.Generator], list[torch.Tensor]]
    forward: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Chosen:
    """The head that was best on the inner fold.

    Attributes:
        parameters: of that head, with one head as their last axis but one.
        head: its place in :attr:`Recipe.grid`.
        step: after how many steps.
        value: of :attr:`Recipe.choose`.
        steps: how many were made in all.
    """

    parameters: list[torch.Tensor]
    head: int
    step: int
    value: float
    steps: int


def start_linear(dimension: int, n_classes: int, recipe: Recipe, draw: torch.Generator) -> list[torch.Tensor]:
    """Weights [D, G, K] and intercepts [G, K] of linear heads."""
    heads = len(recipe.grid)
    if recipe.deviation is not None:
        weights = torch.randn(dimension, heads, n_classes, generator=draw) * recipe.deviation
        return [weights, torch.zeros(heads, n_classes)]
    return [like_linear(shape, dimension, draw) for shape in ((dimension, heads, n_classes), (heads, n_classes))]


def like_linear(shape: tuple[int, ...], inputs: int, draw: torch.Generator) -> torch.Tensor:
    """What torch.nn.Linear starts from, weights and intercepts: uniform within ± 1 / √inputs."""
    return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(inputs)


def side_by_side(weights: torch.Tensor, intercepts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[D, G, K], [G, K] and [B, D] -> [B, G, K], as one product."""
    return (features @ weights.flatten(1)).unflatten(1, weights.shape[1:]) + intercepts


def _forward(parameters: list[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    weights, intercepts = parameters
    return side_by_side(weights, intercepts, features)


LINEAR = Kind(start_linear, _forward)


def head_probabilities(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device | str = "cpu",
    kind: Kind = LINEAR,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train all heads on the training side less an inner fold of its groups, choose one there, and score the queries.

    As published, the head that was chosen is not trained again with the inner fold.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).
        groups: [T].
        seed: of the inner fold, the starting weights and the order of samples.

    Returns:
        Probabilities [Q, n_classes], zero for a class that ``labels`` lack, and what was chosen.

    Raises UserError as :func:`inner_fold` and :func:`train_heads`.
    """
    held = inner_fold(labels, groups, seed)
    present, codes = np.unique(labels, return_inverse=True)
    scale = Scale.of(train) if recipe.standardize else None

    def on_device(features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(scale(features) if scale else features.astype(np.float32)).to(device)

    chosen = train_heads(on_device(train), torch.from_numpy(codes).to(device), held, len(present), recipe, seed, kind)
    probabilities = np.zeros((len(queries), n_classes))
    for part in _parts(len(queries), max(queries.shape[1], len(present))):
        scores = kind.forward(chosen.parameters, on_device(queries[part]))[:, 0]
        probabilities[part, present] = scores.double().softmax(dim=1).cpu().numpy()
    rate, decay = recipe.grid[chosen.head]
    details = {"learning_rate": rate, "weight_decay": decay, "step": chosen.step, "steps": chosen.steps}
    return probabilities, details | {f"inner_{recipe.choose}": chosen.value}


def inner_fold(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Which samples of a training side choose the head: those of one in :data:`INNER_FOLDS` of the groups, [T] bool.

    Folds are grouped and stratified; the one is drawn among those that leave most classes to learn from.

    Raises UserError when the groups are too few, so that one class or nothing would be left.
    """
    folds = min(INNER_FOLDS, len(np.unique(groups)))
    sides = []
    if folds > 1:
        assigned = stratified_folds(labels, groups, folds, hash32(seed, purpose("inner folds")))
        order = generator(seed, purpose("inner fold")).permutation(folds)
        sides = [assigned == fold for fold in order if (assigned == fold).any()]
    left = [len(np.unique(labels[~held])) for held in sides]
    if not left or max(left) < 2:
        raise UserError(
            f"the training side of a fold has {len(np.unique(groups))} groups, too few to hold some of them out for "
            "the choice of a head and learn two classes from the rest; label samples of more groups"
        )
    return sides[int(np.argmax(left))]


def train_heads(
    features: torch.Tensor,
    labels: torch.Tensor,
    held: np.ndarray,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    kind: Kind = LINEAR,
) -> Chosen:
    """Train the heads of a grid in one pass and return the best on what is held out.

    Args:
        features: [T, D], floats, on the device that trains.
        labels: [T] int64, in [0, n_classes).
        held: [T] bool, what the heads do not learn from.

    Raises UserError when no head keeps to finite numbers.
    """
    device, heads = features.device, len(recipe.grid)
    draw = torch.Generator().manual_seed(hash32(seed, purpose("heads")))
    parameters = kind.start(features.shape[1], n_classes, recipe, draw)
    parameters = [p.to(device, features.dtype).requires_grad_() for p in parameters]
    moments = [[torch.zeros_like(p) for _ in range(1 if recipe.optimizer == "sgd" else 2)] for p in parameters]
    rates, decays = torch.tensor(recipe.grid, dtype=features.dtype, device=device).T[..., None]  # [G, 1] each
    learned, judged = (torch.from_numpy(np.flatnonzero(side)).to(device) for side in (~held, held))
    an_epoch = -(-len(learned) // recipe.batch)
    steps = recipe.steps or (recipe.epochs or 0) * an_epoch
    patience = math.inf if recipe.patience is None else max(1, math.ceil(recipe.patience * steps / an_epoch))
    best, since = Chosen([], -1, 0, -math.inf, 0), 0
    order = _batches(len(learned), recipe.batch, seed, recipe.across)
    for number, (places, ended) in enumerate(islice(order, steps), 1):
        rows = learned[torch.from_numpy(places).to(device)]
        scores = kind.forward(parameters, features[rows])  # [B, G, K]
        loss = F.cross_entropy(scores.flatten(0, 1), labels[rows].repeat_interleave(heads), reduction="sum")
        gradients = torch.autograd.grad(loss / len(rows), parameters)  # the mean over the batch of each head alone
        now = rates * (0.5 * (1 + math.cos(math.pi * (number - 1) / steps))) if recipe.cosine else rates
        with torch.no_grad():
            for parameter, gradient, moment in zip(parameters, gradients, moments):
                _move(recipe.optimizer, parameter, gradient, moment, now, decays, number)
        if number == steps or (ended and recipe.every_epoch):
            values = _judge(kind, parameters, features, labels, judged, n_classes, recipe.choose)
            head, since = int(np.argmax(values)), since + 1
            if values[head] > best.value:
                one = [p.detach()[..., head : head + 1, :].clone() for p in parameters]
                best, since = Chosen(one, head, number, float(values[head]), 0), 0
            if since >= patience:
                break
    if best.head < 0:
        raise UserError("no head of the grid keeps to finite numbers; the features are too large for this protocol")
    value = -best.value if recipe.choose == "cross_entropy" else best.value
    return Chosen(best.parameters, best.head, best.step, value, number)


def _move(
    optimizer: str,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    moments: list[torch.Tensor],
    rates: torch.Tensor,
    decays: torch.Tensor,
    number: int,
) -> None:
    """One step of each head, as torch.optim's SGD, Adam and AdamW."""
    if optimizer == "adamw":
        parameter.mul_(1 - rates * decays)
    else:
        gradient = gradient + decays * parameter
    if optimizer == "sgd":
        parameter.sub_(moments[0].mul_(MOMENTUM).add_(gradient) * rates)
        return
    first, second = moments
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    root = (second.sqrt() / math.sqrt(1 - BETAS[1] ** number)).add_(EPSILON)
    parameter.sub_(first / root * (rates / (1 - BETAS[0] ** number)))


def _batches(samples: int, size: int, seed: int, across: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """Places in [0, samples) of one step after the other, each epoch in an order of its own, and whether it ends."""
    rest = np.empty(0, dtype=np.int64)
    for epoch in count():
        order = np.concatenate([rest, generator(seed, purpose("order"), epoch).permutation(samples)])
        end = len(order) // size * size if across else len(order)
        rest = order[end:]
        for first in range(0, end, size):
            yield order[first : min(first + size, end)], first + size >= end


@torch.no_grad()
def _judge(
    kind: Kind,
    parameters: list[torch.Tensor],
    features: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    n_classes: int,
    choose: str,
) -> np.ndarray:
    """What a head is chosen by, higher is better, [G]; minus infinity where its numbers are not finite."""
    heads = parameters[0].shape[-2]
    confusion = torch.zeros(heads, n_classes, n_classes, dtype=torch.float64, device=features.device)
    losses = torch.zeros(heads, dtype=torch.float64, device=features.device)
    place = torch.arange(heads, device=features.device) * n_classes**2
    for part in _parts(len(rows), max(features.shape[1], heads * n_classes)):
        truth = labels[rows[part]]
        scores = kind.forward(parameters, features[rows[part]])  # [n, G, K]
        mine = truth[:, None, None].expand(-1, heads, 1)
        losses -= scores.log_softmax(dim=2).gather(2, mine).sum(dim=(0, 2), dtype=torch.float64)
        cells = place + truth[:, None] * n_classes + scores.argmax(dim=2)  # [n, G]
        confusion += torch.bincount(cells.flatten(), minlength=confusion.numel()).view_as(confusion)
    table = confusion.cpu().numpy()
    true, said, both = table.sum(axis=2), table.sum(axis=1), table.diagonal(axis1=1, axis2=2)  # [G, K] each
    if choose == "accuracy":
        found = both.sum(axis=1) / len(rows)
    elif choose == "balanced_accuracy":
        found = (both / np.maximum(true, 1)).sum(axis=1) / (true > 0).sum(axis=1)
    elif choose == "macro_f1":
        found = (2 * both / np.maximum(true + said, 1)).sum(axis=1) / (true + said > 0).sum(axis=1)
    else:
        found = -losses.cpu().numpy() / len(rows)
    return np.where(np.isfinite(losses.cpu().numpy()), found, -np.inf)


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // width)
    return (slice(first, first + step) for first in range(0, rows, step))
