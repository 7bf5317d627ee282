"""The linear probe: multinomial logistic regression by L-BFGS, its strength chosen on the training side only.

The objective is scikit-learn's, ``C · Σ cross-entropy + ½ ‖W‖²`` with one weight vector a class and free intercepts,
on features standardized by the training side's mean and deviation. For two classes scikit-learn keeps one vector,
which is this objective at twice our C; UNI's "C" is another quantity altogether.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.splits import stratified_folds

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_FOLDS = 3
ITERATIONS = 1000
TOLERANCE = 1e-5  # largest component of the preconditioned gradient of the mean objective
# Variance below which a direction of standardized features cannot change the mean objective by 1e-6 at any C of GRID.
NO_VARIANCE = 1e-10
# Numbers in a training side below which one thread is fastest: more of them wait for each other between small
# products, up to a hundred times longer on a machine that is busy with something else.
SMALL = 1 << 24
# A class that a training side lacks gets no probability; the logarithm needs a floor.
FLOOR = 1e-12


@dataclass
class Scale:
    """Standardization learned from one side and applied to any."""

    mean: np.ndarray  # [D]
    deviation: np.ndarray  # [D]

    @classmethod
    def of(cls, features: np.ndarray) -> Scale:
        """Learn from [N, D]; a constant feature is centered and left at that."""
        mean = features.mean(axis=0, dtype=np.float64)
        deviation = features.std(axis=0, dtype=np.float64)
        # Rounding leaves a constant float32 feature with a tiny deviation that would blow noise up to unit size.
        constant = deviation <= 1e-6 * np.maximum(1e-6, np.abs(mean))
        return cls(mean.astype(np.float32), np.where(constant, 1.0, deviation).astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Standardize [N, D] to float32."""
        return (features.astype(np.float32) - self.mean) / self.deviation


def linear_probabilities(
    queries: np.ndarray, train: np.ndarray, labels: np.ndarray, groups: np.ndarray, n_classes: int, seed: int
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
    strength = choose_strength(train, labels, groups, n_classes, seed)
    scale = Scale.of(train)
    return next(_path(scale(train), labels, scale(queries), n_classes, (strength,))), strength


def choose_strength(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, n_classes: int, seed: int) -> float:
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
            scale = Scale.of(features[learn])
            paths.append(_path(scale(features[learn]), labels[learn], scale(features[score]), n_classes, GRID))
            scored.append(labels[score])
    losses: list[float] = []
    for probabilities in zip(*paths):
        losses.append(sum(_cross_entropy(p, y) for p, y in zip(probabilities, scored)))
        if len(losses) > 1 and losses[-1] > losses[-2]:
            break
    return GRID[int(np.argmin(losses))] if losses else GRID[len(GRID) // 2]


def logistic_path(
    features: np.ndarray, labels: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Minimize ``C · Σ cross-entropy + ½ ‖W‖²`` at each C of ``strengths``, each fit starting from the one before.

    L-BFGS runs along the principal axes of the features, each scaled by its curvature at equal probabilities, which
    takes several times fewer steps than along the features themselves; the minimum is the same.

    Args:
        features: [N, D], standardized.
        labels: [N], class numbers in [0, C), each of them present.

    Yields:
        Weights [D, C] and intercepts [C].
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    n, n_classes = len(labels), int(labels.max()) + 1
    features = features.astype(np.float32)
    with threadpool_limits(1 if features.size < SMALL else None):
        variances, axes = np.linalg.eigh((features.T @ features).astype(np.float64) / n)
        variances, axes = variances[variances > NO_VARIANCE], axes[:, variances > NO_VARIANCE]
        rotated = features @ axes.astype(np.float32)  # [N, R]
    target = np.zeros((n, n_classes), dtype=np.float32)
    target[np.arange(n), labels] = 1
    equal = (1 - 1 / n_classes) / n_classes  # p (1 - p)
    solution = np.zeros((len(variances) + 1, n_classes))  # the last row are the intercepts

    for strength in strengths:
        penalty = 1 / (strength * n)
        scale = np.sqrt(np.append(variances * equal + penalty, equal))[:, None]  # [R + 1, 1]

        def objective(
            flat: np.ndarray, scale: np.ndarray = scale, penalty: float = penalty
        ) -> tuple[float, np.ndarray]:
            weights = flat.reshape(-1, n_classes) / scale
            scores = rotated @ weights[:-1].astype(np.float32) + weights[-1].astype(np.float32)  # [N, C]
            scores -= scores.max(axis=1, keepdims=True)
            odds = np.exp(scores)
            total = odds.sum(axis=1, keepdims=True)
            loss = (np.log(total).sum(dtype=np.float64) - (scores * target).sum(dtype=np.float64)) / n
            odds /= total
            odds -= target
            gradient = np.concatenate([rotated.T @ odds, odds.sum(axis=0, keepdims=True)]).astype(np.float64) / n
            gradient[:-1] += penalty * weights[:-1]
            return loss + 0.5 * penalty * float(np.square(weights[:-1]).sum()), (gradient / scale).ravel()

        with threadpool_limits(1 if features.size < SMALL else None):
            options = {"maxiter": ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-12}
            found = minimize(objective, (solution * scale).ravel(), jac=True, method="L-BFGS-B", options=options)
        solution = found.x.reshape(solution.shape) / scale
        yield axes @ solution[:-1], solution[-1]


def _path(
    train: np.ndarray, labels: np.ndarray, queries: np.ndarray, n_classes: int, strengths: Sequence[float]
) -> Iterator[np.ndarray]:
    """Probabilities of the queries, [Q, n_classes], at each strength in turn; zero for classes not in ``labels``."""
    from scipy.special import softmax

    present, codes = np.unique(labels, return_inverse=True)
    for weights, intercepts in logistic_path(train, codes, strengths):
        probabilities = np.zeros((len(queries), n_classes))
        probabilities[:, present] = softmax(queries @ weights + intercepts, axis=1)
        yield probabilities


def _cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Summed over samples."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], FLOOR)).sum())
