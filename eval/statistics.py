"""Metrics with intervals: a value, its 95 % interval, and paired differences between probes.

Intervals come from the cluster bootstrap: whole groups (patients, slides) are drawn with replacement, since tiles of
one slide are not independent samples. All draws are computed at once from per-group counts; the metrics themselves
are in :mod:`eosin.eval.metrics`. An interval holds for the probes as they were fitted: it covers the choice of groups
that were scored, not the fitting of new probes. A value below chance is reported as it is, never mirrored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eosin.data_tools.draws import generator, purpose
from eosin.eval.metrics import METRICS, auroc, chance, evaluate

__all__ = ["DRAWS", "LEVEL", "METRICS", "auroc", "bootstrap_weights", "chance", "difference", "evaluate", "interval"]

DRAWS = 1000
LEVEL = 0.95


def bootstrap_weights(n_groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn: [1 + draws, n_groups]. Row 0 is all ones, which gives the value itself."""
    uniform = np.full(n_groups, 1.0 / n_groups)
    counts = generator(seed, purpose("cluster bootstrap")).multinomial(n_groups, uniform, size=draws)
    return np.concatenate([np.ones((1, n_groups)), counts])


def interval(values: np.ndarray) -> dict[str, float]:
    """Value and percentile interval of [1 + draws] values, the first of which is the value itself.

    Draws that leave the metric undefined are left out.
    """
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Paired difference ``a - b`` of two probes' values of any metric under the same draws; does it exclude zero?"""
    found = interval(a - b)
    return found | {"excludes_zero": bool(found["low"] > 0 or found["high"] < 0)}
