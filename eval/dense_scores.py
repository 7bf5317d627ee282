"""Metrics of dense probes with intervals: Dice and IoU from confusions of pixels, Pearson's r from sums over cells.

Counts and sums are added over the tiles of a cluster (patient), clusters are drawn with replacement, and every metric
is computed from the sums of each draw. A class without a truth in a draw is undefined there, and means leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eosin.eval.frame import interval
from eosin.eval.metrics import mean_defined

FLAT = 1e-10  # share of a sum of squares below which it is rounding


def class_values(
    confusion: np.ndarray,
    rows: np.ndarray,
    clusters: np.ndarray,
    passes: np.ndarray,
    draws: np.ndarray,
    classes: Sequence[str],
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Mean Dice, mean IoU and the share of pixels told right, and each class's own.

    Args:
        confusion: [M, C, C], pixels of each tile by truth and answer.
        rows: [M], the tiles; those of several passes stand there several times.
        clusters: [M], numbers in [0, G).
        passes: [M]; values of several passes are averaged.
        draws: [1 + draws, G], how often each cluster is drawn; the first row is all ones.

    Returns:
        Metric -> [1 + draws], and class -> n (pixels), clusters, and its metrics with intervals.
    """
    found: dict[str, list[np.ndarray]] = {"dice": [], "iou": []}
    accuracy = []
    for number in np.unique(passes):
        mine = passes == number
        drawn = _drawn(confusion[mine], clusters[mine], draws)  # [R, C, C]
        right = np.einsum("rcc->rc", drawn)
        real, told = drawn.sum(axis=2), drawn.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found["dice"].append(np.where(real > 0, 2 * right / (real + told), np.nan))
            found["iou"].append(np.where(real > 0, right / (real + told - right), np.nan))
            accuracy.append(right.sum(axis=1) / real.sum(axis=1))
    each = {metric: mean_defined(np.stack(values, axis=-1)) for metric, values in found.items()}  # [R, C]
    mean = {
        metric: mean_defined(np.stack([mean_defined(v) for v in values], axis=-1)) for metric, values in found.items()
    }
    pixels, (_, once) = confusion.sum(axis=2), np.unique(rows, return_index=True)
    per_class = {
        name: {"n": int(pixels[once, c].sum()), "clusters": len(np.unique(clusters[pixels[:, c] > 0]))}
        | {metric: interval(values[:, c]) for metric, values in each.items()}
        for c, name in enumerate(classes)
    }
    return mean | {"pixel_accuracy": mean_defined(np.stack(accuracy, axis=-1))}, per_class


def value_values(
    truth: np.ndarray,
    told: np.ndarray,
    clusters: np.ndarray,
    passes: np.ndarray,
    draws: np.ndarray,
    names: Sequence[str],
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Means over channels of Pearson's r and of the absolute error in deviations of the truth, and each channel's own.

    Args:
        truth: [M, h, w, C].
        told: [M, h, w, C].
        clusters, passes, draws: as of :func:`class_values`.

    Returns:
        Metric -> [1 + draws], and channel -> its metrics with intervals.
    """
    cells = [side.reshape(len(side), -1, side.shape[-1]).astype(np.float64) for side in (truth, told)]
    # About their means, so that no digits are lost in the sums of squares.
    real, said = (side - side.mean(axis=(0, 1)) for side in cells)
    error = np.abs(cells[0] - cells[1])
    ones = np.ones_like(real)
    sums = np.stack(
        [part.sum(axis=1) for part in (ones, real, said, real * real, said * said, real * said, error)], axis=1
    )  # [M, 7, C]
    deviation = cells[0].std(axis=(0, 1))
    found: dict[str, list[np.ndarray]] = {"pearson": [], "mae": []}
    for number in np.unique(passes):
        mine = passes == number
        n, x, y, xx, yy, xy, off = np.moveaxis(_drawn(sums[mine], clusters[mine], draws), 1, 0)  # [R, C] each
        with np.errstate(invalid="ignore", divide="ignore"):
            spread, told_spread = xx - x * x / n, yy - y * y / n
            r = (xy - x * y / n) / np.sqrt(spread * told_spread)
            # What never varies tells nothing of what does.
            r = np.where(told_spread > FLAT * yy, r, 0.0)
            found["pearson"].append(np.where(spread > FLAT * xx, r, np.nan))
            found["mae"].append(off / n / deviation)
    each = {metric: mean_defined(np.stack(values, axis=-1)) for metric, values in found.items()}  # [R, C]
    per_channel = {
        name: {metric: interval(values[:, c]) for metric, values in each.items()} for c, name in enumerate(names)
    }
    return {metric: mean_defined(values) for metric, values in each.items()}, per_channel


def _drawn(counts: np.ndarray, clusters: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Sums over clusters under each draw: [M, ...] -> [1 + draws, ...]."""
    summed = np.zeros((draws.shape[1], *counts.shape[1:]))
    np.add.at(summed, clusters, counts)
    return np.tensordot(draws, summed, axes=1)
