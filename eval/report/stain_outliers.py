"""What of a shard set's stain fits stands out, and how much slides differ in color: numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OUTLIER, CONSISTENT = 3.5, 0.6745  # Iglewicz and Hoaglin 1993: limit, and what makes MAD a standard deviation
LEAST_MAD = 1e-6  # where most slides agree to the last digit
MOST_SCORE = 99.0


@dataclass(frozen=True)
class Figure:
    """A figure of slides: what it is called, its values, and the values on the scale where they are compared, [n]."""

    name: str
    shown: np.ndarray
    judged: np.ndarray


@dataclass(frozen=True)
class Deviation:
    """A slide's value of a figure, that of the median slide, and the robust z-score between them."""

    name: str
    value: float
    usual: float
    score: float

    def __str__(self) -> str:
        score = min(max(self.score, -MOST_SCORE), MOST_SCORE)
        return f"{self.name} {self.value:.3f}, usually {self.usual:.3f} (z\u00a0{score:+.1f})".replace("-", "−")


def variances(colors: np.ndarray) -> np.ndarray:
    """Variance between slides of L, a and b, [3], of their colors [n, 3]; the sum is the trace of the covariance."""
    known = colors[np.isfinite(colors).all(axis=1)]
    return known.var(axis=0, ddof=1) if len(known) > 1 else np.full(3, np.nan)


def robust_scores(values: np.ndarray) -> np.ndarray:
    """Robust z-scores, [n]: the distance from the median over the median distance; 0 where a value is not known."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values))
    middle = np.median(known)
    spread = max(float(np.median(np.abs(known - middle))), LEAST_MAD)
    return np.nan_to_num(CONSISTENT * (values - middle) / spread, posinf=0, neginf=0)


def find_outliers(figures: Sequence[Figure]) -> dict[int, list[Deviation]]:
    """What of each slide lies beyond the limit, by the slide's place; the furthest first."""
    found: dict[int, list[Deviation]] = {}
    for figure in figures:
        scores = robust_scores(figure.judged)
        for i in np.flatnonzero(np.abs(scores) > OUTLIER):
            deviation = Deviation(
                figure.name, float(figure.shown[i]), float(np.nanmedian(figure.shown)), float(scores[i])
            )
            found.setdefault(int(i), []).append(deviation)
    for deviations in found.values():
        deviations.sort(key=lambda d: -abs(d.score))
    return dict(sorted(found.items(), key=lambda item: (-abs(item[1][0].score), item[0])))
