"""Variance of areas under ROC curves and the paired test of two of them, without resampling.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988), by midranks (Sun and Xu, IEEE Signal Processing Letters 2014).
Given groups, the components of samples of one group are summed first (Obuchowski, Biometrics 1997), since tiles of one
patient are not independent; with every sample a group of its own that is DeLong's variance to the digit.
"""

from __future__ import annotations

import numpy as np


def delong(positive: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Areas of K scores of the same samples, and their covariance.

    Args:
        positive: [N], bool.
        scores: [K, N], higher means more probably positive; ties count half.
        groups: [N], group numbers; every sample stands alone where none are given.

    Returns:
        Areas [K] and covariance [K, K], NaN where fewer than two groups hold one of the two sides.
    """
    from scipy.stats import rankdata

    members = np.arange(len(positive)) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    shape = len(scores), int(members.max()) + 1
    if not n_up or not n_down:
        return np.full(shape[0], np.nan), np.full((shape[0], shape[0]), np.nan)
    ranks = rankdata(scores, axis=1)
    won = (ranks[:, positive] - rankdata(scores[:, positive], axis=1)) / n_down  # V10, [K, positives]
    lost = (ranks[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / n_up  # 1 - V01, [K, negatives]
    areas = won.mean(axis=1)
    up, down = np.zeros(shape), np.zeros(shape)  # sums over each group of what its samples deviate by
    for row in range(len(scores)):
        np.add.at(up[row], members[positive], won[row] - areas[row])
        np.add.at(down[row], members[~positive], 1 - lost[row] - areas[row])
    groups_up, groups_down = len(np.unique(members[positive])), len(np.unique(members[~positive]))
    cross = up @ down.T * _correction(shape[1]) / (n_up * n_down)
    covariance = up @ up.T * _correction(groups_up) / n_up**2 + down @ down.T * _correction(groups_down) / n_down**2
    return areas, covariance + cross + cross.T


def delong_test(
    positive: np.ndarray, a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, float]:
    """Paired test of two areas: ``a - b`` as value, its standard error ``se``, ``z``, and the two-sided ``p``.

    Takes [N] each, as :func:`delong`. Where the standard error is 0, p is 1 for equal areas and 0 for others.
    """
    from scipy.stats import norm

    areas, covariance = delong(positive, np.stack([a, b]), groups)
    apart = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = float(np.sqrt(max(variance, 0.0))) if np.isfinite(variance) else np.nan
    if error == 0:
        return {"value": apart, "se": 0.0, "z": float(np.sign(apart) * np.inf) if apart else 0.0, "p": float(not apart)}
    return {"value": apart, "se": error, "z": apart / error, "p": float(2 * norm.sf(abs(apart / error)))}


def _correction(n: int) -> float:
    """n / (n - 1), by which a mean square deviation becomes a variance."""
    return n / (n - 1) if n > 1 else np.nan
