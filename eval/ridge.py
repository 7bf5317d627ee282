"""Ridge regression of many targets at once, in closed form, and its score a target.

``hest-ridge`` (Jaume et al. 2024, "HEST-1k: A dataset for spatial transcriptomics and histology image analysis", its
benchmark): standardize, keep 256 principal components of the training side, ridge with alpha = 100 / (components ·
genes) and no intercept; Pearson's r for each gene.
"""

from __future__ import annotations

import numpy as np

from eosin.eval.logistic import Scale


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
    scale = Scale.of(train)
    rows = scale(train).astype(np.float64)
    kept = min(components, *rows.shape)
    variances, axes = np.linalg.eigh(rows.T @ rows)
    variances, axes = variances[-kept:], axes[:, -kept:]  # along its axes the problem is one division a component
    weights = (axes.T @ (rows.T @ targets)) / (np.maximum(variances, 0) + penalty / (kept * targets.shape[1]))[:, None]
    return scale(queries).astype(np.float64) @ (axes @ weights)


def pearson(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Pearson's r of each column of [N, G], in [-1, 1]; NaN where either side is constant."""
    sides = [side - side.mean(axis=0) for side in (predicted.astype(np.float64), targets.astype(np.float64))]
    lengths = [np.linalg.norm(side, axis=0) for side in sides]
    # A constant leaves rounding errors behind, which are no direction.
    flat = [
        length <= 1e-12 * np.sqrt(len(side)) * np.abs(given).max(axis=0, initial=1e-300)
        for length, side, given in zip(lengths, sides, (predicted, targets))
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (sides[0] * sides[1]).sum(axis=0) / (lengths[0] * lengths[1])
    return np.where(flat[0] | flat[1], np.nan, found)
