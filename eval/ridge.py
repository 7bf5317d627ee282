"""Ridge regression of many targets at once, in closed form, every penalty from one eigendecomposition.

Sums over samples are all that a ridge regression needs, and sums add: those of the parts of a training side are made
in one pass over it, and give the fits on all of it and on all but one part, and the errors on the part that was left
out.

``hest-ridge`` (Jaume et al. 2024, "HEST-1k: A dataset for spatial transcriptomics and histology image analysis", its
benchmark): standardize, keep 256 principal components of the training side, ridge with alpha = 100 / (components ·
genes) and no intercept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.splits import stratified_folds

# Penalties a sample, from strong to weak: scikit-learn's alpha is one of these times the number of samples.
GRID = tuple(float(p) for p in np.logspace(3, -5, 17))
INNER_FOLDS = 3
CHUNK = 1 << 22  # numbers of a chunk of rows


@dataclass(frozen=True)
class Moments:
    """Sums over samples, in float64."""

    count: int
    x: np.ndarray  # [D]
    y: np.ndarray  # [G]
    xx: np.ndarray  # [D, D]
    xy: np.ndarray  # [D, G]
    yy: np.ndarray  # [G]

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> Moments:
        """Sum over [N, D] and [N, G], in chunks of rows."""
        count, dimension = features.shape
        x, y, yy = np.zeros(dimension), np.zeros(targets.shape[1]), np.zeros(targets.shape[1])
        xx, xy = np.zeros((dimension, dimension)), np.zeros((dimension, targets.shape[1]))
        for first in range(0, count, size := max(1, CHUNK // dimension)):
            rows, given = (side[first : first + size].astype(np.float64) for side in (features, targets))
            x += rows.sum(axis=0)
            y += given.sum(axis=0)
            xx += rows.T @ rows
            xy += rows.T @ given
            yy += np.square(given).sum(axis=0)
        return cls(count, x, y, xx, xy, yy)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def about(self, x: np.ndarray, scale: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sums xx, xy and yy of features less ``x`` over ``scale``, and of targets less ``y``."""
        xx = self.xx - np.outer(self.x, x) - np.outer(x, self.x) + self.count * np.outer(x, x)
        xy = self.xy - np.outer(self.x, y) - np.outer(x, self.y) + self.count * np.outer(x, y)
        yy = self.yy - 2 * y * self.y + self.count * y * y
        return xx / np.outer(scale, scale), xy / scale[:, None], yy


@dataclass(frozen=True)
class Axes:
    """A training side, its features standardized, along its principal axes: there each axis is a division of its own.

    Attributes:
        middle: [D], mean of the features.
        scale: [D], their deviation; 1 for a constant one.
        level: [G], mean of the targets.
        axes: [D, d].
        spread: [d], sums of squares along them.
        cross: [d, G], sums of products with the targets, less their mean.
    """

    middle: np.ndarray
    scale: np.ndarray
    level: np.ndarray
    axes: np.ndarray
    spread: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(cls, moments: Moments, components: int | None = None) -> Axes:
        """All axes, or so many of the widest."""
        middle, level = moments.x / moments.count, moments.y / moments.count
        deviation = np.sqrt(np.maximum(np.diag(moments.xx) / moments.count - middle**2, 0))
        # Rounding leaves a constant feature with a tiny deviation that would blow noise up to unit size.
        scale = np.where(deviation <= 1e-6 * np.maximum(1e-6, np.abs(middle)), 1.0, deviation)
        xx, xy, _ = moments.about(middle, scale, level)
        spread, axes = np.linalg.eigh(xx)
        kept = min(components or len(spread), len(spread), moments.count)
        axes = axes[:, -kept:]
        return cls(middle, scale, level, axes, np.maximum(spread[-kept:], 0), axes.T @ xy)

    def weights(self, penalty: float | np.ndarray) -> np.ndarray:
        """Minimize ``‖Z W - Y‖² + penalty ‖W‖²``, with one penalty or one a target [G]: [d, G]."""
        return self.cross / (self.spread[:, None] + penalty)

    def predict(self, queries: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Of [Q, D], in chunks of rows: [Q, G] float64, without the mean of the targets."""
        slopes = (self.axes @ weights) / self.scale[:, None]
        found = np.empty((len(queries), weights.shape[1]))
        for first in range(0, len(queries), size := max(1, CHUNK // len(self.middle))):
            found[first : first + size] = (queries[first : first + size].astype(np.float64) - self.middle) @ slopes
        return found


def ridge_predictions(
    queries: np.ndarray,
    train: np.ndarray,
    targets: np.ndarray,
    *,
    components: int = 256,
    penalty: float = 100.0,
) -> np.ndarray:
    """Minimize ``‖Z W - Y‖² + penalty / (d · G) · ‖W‖²`` on the d principal components Z, and predict the queries.

    Args:
        queries: [Q, D].
        train: [T, D].
        targets: [T, G]; not centered, since there is no intercept.
        components: at most so many; fewer where the training side has no more samples or features.
        penalty: alpha · components · targets.

    Returns:
        [Q, G] float64.
    """
    # Components sum to zero, so that the mean of the targets changes nothing in the weights.
    axes = Axes.of(Moments.of(train, targets), components)
    return axes.predict(queries, axes.weights(penalty / (axes.axes.shape[1] * targets.shape[1])))


def chosen_ridge(
    queries: np.ndarray,
    train: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    seed: int,
    grid: Sequence[float] = GRID,
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge with an intercept on standardized features; each target has the penalty that inner folds choose for it.

    The penalty is the one with the least squared error over inner grouped folds; ties go to the stronger one. Targets
    do not touch each other: a target's answer is the same whatever is asked beside it, and in whatever unit.

    Args:
        queries: [Q, D].
        train: [T, D].
        targets: [T, G].
        groups: [T].
        grid: penalties a sample, from strong to weak.

    Returns:
        Predictions [Q, G] float64, and the penalty a sample of each target, [G].

    Raises UserError when the training side has a single group.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise UserError(
            "the training side of a fold has 1 group, too few to choose a penalty by grouped folds inside it; "
            "give targets of more groups"
        )
    same = np.zeros(len(groups), dtype=np.int64)
    inner = stratified_folds(same, groups, min(INNER_FOLDS, n_groups), hash32(seed, purpose("inner folds")))
    parts = [Moments.of(train[inner == fold], targets[inner == fold]) for fold in np.unique(inner)]
    errors = np.zeros((len(grid), targets.shape[1]))
    for left_out, part in enumerate(parts):
        axes = Axes.of(_sum([other for number, other in enumerate(parts) if number != left_out]))
        xx, xy, yy = part.about(axes.middle, axes.scale, axes.level)
        turned, cross = axes.axes.T @ xx @ axes.axes, axes.axes.T @ xy
        samples = sum(p.count for p in parts) - part.count
        for number, penalty in enumerate(grid):
            weights = axes.weights(penalty * samples)
            errors[number] += yy - 2 * (weights * cross).sum(axis=0) + (weights * (turned @ weights)).sum(axis=0)
    penalties = np.array(grid)[errors.argmin(axis=0)]
    axes = Axes.of(_sum(parts))
    return axes.predict(queries, axes.weights(penalties * len(train))) + axes.level, penalties


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
