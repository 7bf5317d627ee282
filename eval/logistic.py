"""Multinomial logistic regression by L-BFGS, on a CPU or a GPU, with the objective in the name of the function.

Two objectives are published under one letter C. scikit-learn's is ``C · Σ wᵢ CEᵢ + ½ ‖W‖²``, which over C · Σ w is

    mean CE + ‖W‖² / (2 C N);

UNI's (Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology", its linear probe) is

    mean CE + (1/C) · ½ ‖W‖,    C = D · K / 100,

with the norm not squared. Both leave the intercepts free and keep one weight vector a class. They have the same
minimum where scikit-learn's C is 2 C ‖W‖ / N (:func:`equal_strength`). For two classes scikit-learn keeps a single
vector, which is the objective above at half its C (:func:`scikit_strength`).

Rows are read in chunks, so features may be mapped from a file; one float32 copy of the training side is made, along its
principal axes. Nothing is chosen here: see :mod:`eosin.eval.linear` for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

ITERATIONS = 1000
TOLERANCE = 1e-5  # largest component of the preconditioned gradient of the mean objective
MEMORY = 10  # pairs of steps that L-BFGS keeps
CHUNK = 1 << 22  # numbers of a chunk of rows on a CPU, where it should stay in the cache
GPU_CHUNK = 1 << 27
# A direction of variance v gains at most v / λ at penalty λ; below this much it is left out.
NO_GAIN = 1e-9
# Least log-probability in a gradient: below it numbers become subnormal, and products take fifty times as long.
LEAST = -60.0
# Numbers in a training side below which one thread is fastest: more of them wait for each other between small
# products, up to a hundred times longer on a machine that is busy with something else.
SMALL = 1 << 24


@dataclass(frozen=True)
class Scale:
    """Standardization learned from one side and applied to any."""

    mean: np.ndarray  # [D]
    deviation: np.ndarray  # [D]

    @classmethod
    def of(cls, features: np.ndarray, rows: np.ndarray | None = None, *, standardize: bool = True) -> Scale:
        """Learn from [N, D], or from some of its rows; a constant feature is centered and left at that.

        Without ``standardize`` features are centered only, which free intercepts make a change of coordinates.
        """
        count = len(features) if rows is None else len(rows)
        total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
        for chunk in _chunks(features, rows):
            total += chunk.sum(axis=0, dtype=np.float64)
        mean = total / count
        if not standardize:
            return cls(mean.astype(np.float32), np.ones(len(mean), dtype=np.float32))
        for chunk in _chunks(features, rows):
            squares += np.square(chunk - mean).sum(axis=0)
        deviation = np.sqrt(squares / count)
        # Rounding leaves a constant float32 feature with a tiny deviation that would blow noise up to unit size.
        constant = deviation <= 1e-6 * np.maximum(1e-6, np.abs(mean))
        return cls(mean.astype(np.float32), np.where(constant, 1.0, deviation).astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Standardize [N, D] to float32."""
        return (features.astype(np.float32) - self.mean) / self.deviation


@dataclass(frozen=True)
class Fit:
    """A minimum that was found.

    Attributes:
        weights: [D, K] float64, for features as they were given (not standardized ones).
        intercepts: [K] float64.
        norm: Frobenius norm of the weights that were penalized: those of standardized features where there is a scale.
        objective: mean cross-entropy and penalty.
        steps: of L-BFGS.
    """

    weights: np.ndarray
    intercepts: np.ndarray
    norm: float
    objective: float
    steps: int

    def probabilities(self, features: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Of each class for [Q, D], or for some of its rows: [Q, K] float64, in chunks of rows."""
        from scipy.special import softmax

        found = np.empty((len(features) if rows is None else len(rows), len(self.intercepts)))
        first = 0
        for chunk in _chunks(features, rows):
            part = slice(first, first := first + len(chunk))
            found[part] = softmax(chunk.astype(np.float64) @ self.weights + self.intercepts, axis=1)
        return found


def logistic_path(
    features: np.ndarray,
    labels: np.ndarray,
    strengths: Sequence[float],
    *,
    rows: np.ndarray | None = None,
    scale: Scale | None = None,
    sample_weights: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Fit]:
    """Minimize ``C · Σ wᵢ CEᵢ + ½ ‖W‖²``, scikit-learn's, at each C, each fit starting from the one before.

    Args:
        features: [N, D], finite; an array, or one mapped from a file.
        labels: [N], or of ``rows``: class numbers in [0, K), each of them present.
        strengths: values of C; from strong to weak penalties (rising) is the fastest way.
        rows: [M] int64, which rows to learn from; all if not given.
        scale: by which features are standardized, and the penalty is on the weights of standardized features; not
            standardized if not given.
        sample_weights: [N], or of ``rows``, positive; see :func:`balanced_weights`.
    """
    problem = _Problem(features, labels, rows, scale, sample_weights, device)
    for strength in strengths:
        yield problem.solve(1 / (strength * problem.total), squared=True)


def norm_penalized(
    features: np.ndarray,
    labels: np.ndarray,
    strength: float,
    *,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Fit:
    """Minimize ``mean CE + (1/C) · ½ ‖W‖``, UNI's objective, whose C is :func:`uni_strength`.

    Args:
        features, labels, rows, device: as of :func:`logistic_path`.
        strength: C.
    """
    return _Problem(features, labels, rows, None, None, device).solve(1 / (2 * strength), squared=False)


def uni_strength(dimension: int, n_classes: int) -> float:
    """UNI's C: D · K / 100."""
    return dimension * n_classes / 100


def equal_strength(strength: float, norm: float, count: int) -> float:
    """The C of ``C · Σ CE + ½ ‖W‖²`` whose minimum is that of UNI's objective: 2 · C · ‖W‖ / N, of its W.

    At a minimum the penalties' gradients are equal: W / (2 C ‖W‖) = W / (C' N).
    """
    return 2 * strength * norm / count


def scikit_strength(strength: float, n_classes: int) -> float:
    """The C of :func:`logistic_path` that gives ``sklearn.linear_model.LogisticRegression(C=strength)``.

    For two classes that keeps one vector w, and ours are ±w/2, whose squares sum to half as much.
    """
    return strength / 2 if n_classes == 2 else strength


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Sample weights N / (K · count of its class), [N], as scikit-learn's ``class_weight="balanced"``."""
    counts = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[labels]


class _Problem:
    """A training side along its principal axes, and the solution where the last fit ended.

    Each axis is scaled by its curvature at equal probabilities, which takes L-BFGS several times fewer steps than along
    the features themselves; the minimum is the same. Features and scores are float32, sums over chunks float64.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray | None,
        scale: Scale | None,
        sample_weights: np.ndarray | None,
        device: torch.device | str,
    ) -> None:
        self.scale = scale or Scale.of(features, rows, standardize=False)
        self.device = torch.device(device)
        count, dimension = len(labels), features.shape[1]
        self.n_classes = int(labels.max()) + 1
        self.small = count * dimension < SMALL
        with _threads(self.small):
            gram = torch.zeros(dimension, dimension, dtype=torch.float64, device=self.device)
            for chunk in _chunks(features, rows):
                part = torch.from_numpy(self.scale(chunk)).to(self.device)
                gram += part.T @ part
            variances, axes = torch.linalg.eigh(gram / count)
            self.variances = variances.clamp(min=0).cpu().numpy()
            self.axes = axes.cpu().numpy()
            self.rotated = torch.empty(count, dimension, device=self.device)  # [N, D]
            axes, first = axes.float(), 0
            for chunk in _chunks(features, rows):
                torch.matmul(
                    torch.from_numpy(self.scale(chunk)).to(self.device),
                    axes,
                    out=self.rotated[first : first + len(chunk)],
                )
                first += len(chunk)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(self.device)[:, None]  # [N, 1]
        weights = np.ones(count) if sample_weights is None else np.asarray(sample_weights, dtype=np.float64)
        self.total = float(weights.sum())
        self.weights = torch.from_numpy((weights / self.total).astype(np.float32)).to(self.device)[:, None]  # [N, 1]
        self.solution = np.zeros((dimension + 1, self.n_classes))  # the last row are the intercepts
        numbers = CHUNK if self.device.type == "cpu" else GPU_CHUNK
        self.step = _rows(max(dimension, self.n_classes), numbers)

    def solve(self, penalty: float, squared: bool) -> Fit:
        """Minimize mean CE + penalty · (½ ‖W‖² or ‖W‖) from where the last fit ended."""
        steps = 0
        with _threads(self.small):
            if squared:
                value, steps = self._descend(penalty, penalty, squared)
            else:
                # Of the norm the curvature is penalty / ‖W‖, which the first descent finds out.
                for _ in range(2):
                    curvature = penalty / max(float(np.linalg.norm(self.solution[:-1])), 1.0)
                    value, more = self._descend(penalty, curvature, squared)
                    steps += more
        norm = float(np.linalg.norm(self.solution[:-1]))
        weights = (self.axes @ self.solution[:-1]) / self.scale.deviation[:, None].astype(np.float64)
        return Fit(weights, self.solution[-1] - self.scale.mean @ weights, norm, value, steps)

    def _descend(self, penalty: float, curvature: float, squared: bool) -> tuple[float, int]:
        from scipy.optimize import minimize

        equal = (1 - 1 / self.n_classes) / self.n_classes  # p (1 - p)
        used = self.variances > NO_GAIN * curvature
        scale = np.sqrt(np.append(self.variances * equal + curvature, equal))[:, None]  # [D + 1, 1]
        scale[:-1][~used] = np.inf

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(-1, self.n_classes) / scale
            loss, gradient = self._cross_entropy(weights)
            square = float(np.square(weights[:-1]).sum())
            if squared:
                gradient[:-1] += penalty * weights[:-1]
                return loss + 0.5 * penalty * square, (gradient / scale).ravel()
            if square > 0:  # at zero the zero of the subdifferential
                gradient[:-1] += penalty / np.sqrt(square) * weights[:-1]
            return loss + penalty * np.sqrt(square), (gradient / scale).ravel()

        start = np.where(np.isinf(scale), 0, self.solution * np.where(np.isinf(scale), 0, scale))
        options = {"maxiter": ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-12, "maxcor": MEMORY}
        found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        self.solution = found.x.reshape(self.solution.shape) / scale
        return float(found.fun), int(found.nit)

    def _cross_entropy(self, solution: np.ndarray) -> tuple[float, np.ndarray]:
        """Weighted mean over the samples, and its gradient [D + 1, K]."""
        weights = torch.from_numpy(solution).to(self.device, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        gradient = torch.zeros(solution.shape[::-1], dtype=torch.float64, device=self.device)  # [K, D + 1]
        for first in range(0, len(self.rotated), self.step):
            part = slice(first, first + self.step)
            rows, labels, shares = self.rotated[part], self.labels[part], self.weights[part]
            logs = torch.log_softmax(torch.addmm(weights[-1], rows, weights[:-1]), dim=1)  # [n, K]
            loss -= (logs.gather(1, labels) * shares).sum(dtype=torch.float64)
            odds = logs.clamp_(min=LEAST).exp_().mul_(shares).scatter_add_(1, labels, -shares)
            gradient[:, :-1] += odds.T @ rows
            gradient[:, -1] += odds.sum(dim=0)
        return float(loss), gradient.T.cpu().numpy()


def _chunks(features: np.ndarray, rows: np.ndarray | None) -> Iterator[np.ndarray]:
    """Rows of [N, D] as float32, in order, some at a time."""
    step = _rows(features.shape[1], CHUNK)
    for first in range(0, len(features) if rows is None else len(rows), step):
        part = features[first : first + step] if rows is None else features[rows[first : first + step]]
        yield part.astype(np.float32)


def _rows(width: int, numbers: int) -> int:
    return max(1, numbers // max(width, 1))


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """One thread for what is small, as many as there were for the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if one else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
