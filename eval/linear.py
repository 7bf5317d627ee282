"""The linear probe: logistic regression on standardized features, its strength chosen on the training side only.

The objective is that of :func:`eosin.eval.logistic.logistic_path`; features are standardized by the mean and deviation
of the side that is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.logistic import TOLERANCE as TOLERANCE
from eosin.eval.logistic import Scale as Scale
from eosin.eval.logistic import logistic_path
from eosin.eval.splits import stratified_folds

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_FOLDS = 3
# A class that a training side lacks gets no probability; the logarithm needs a floor.
FLOOR = 1e-12


def linear_probabilities(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, float]:
    """Fit on the training side, with C chosen there by inner grouped folds, and score the queries.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).
        groups: [T].

    Returns:
        Probabilities [Q, n_classes], and the C that was chosen.
    """
    strength = choose_strength(train, labels, groups, n_classes, seed, device)
    return next(_path(train, np.arange(len(train)), labels, queries, n_classes, (strength,), device)), strength


def choose_strength(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> float:
    """The C of :data:`GRID` with the least cross-entropy over inner grouped folds; ties go to the stronger penalty.

    A sample whose class the inner training side lacks is not scored. The walk from strong to weak penalties ends at
    the first that is worse than the one before it, since weak penalties take the most time.

    Raises UserError when the training side has a single group.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise UserError(
            "the training side of a fold has 1 group, too few to choose C by grouped folds inside it; "
            "label samples of more groups"
        )
    inner = stratified_folds(labels, groups, min(INNER_FOLDS, n_groups), hash32(seed, purpose("inner folds")))
    paths, scored = [], []
    for fold in range(int(inner.max()) + 1):
        learn = inner != fold
        score = ~learn & np.isin(labels, labels[learn])
        if score.any() and len(np.unique(labels[learn])) > 1:
            rows = np.flatnonzero(learn)
            paths.append(_path(features, rows, labels[learn], features[score], n_classes, GRID, device))
            scored.append(labels[score])
    losses: list[float] = []
    for probabilities in zip(*paths):
        losses.append(sum(_cross_entropy(p, y) for p, y in zip(probabilities, scored)))
        if len(losses) > 1 and losses[-1] > losses[-2]:
            break
    return GRID[int(np.argmin(losses))] if losses else GRID[len(GRID) // 2]


def _path(
    features: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    n_classes: int,
    strengths: Sequence[float],
    device: torch.device | str,
) -> Iterator[np.ndarray]:
    """Probabilities of the queries, [Q, n_classes], at each strength in turn; zero for classes not in ``labels``.

    Learns from some rows of the features, whose labels are given.
    """
    present, codes = np.unique(labels, return_inverse=True)
    scale = Scale.of(features, rows)
    for fit in logistic_path(features, codes, strengths, rows=rows, scale=scale, device=device):
        probabilities = np.zeros((len(queries), n_classes))
        probabilities[:, present] = fit.probabilities(queries)
        yield probabilities


def _cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Summed over samples."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], FLOOR)).sum())
