"""From the answers of probes to the numbers of the results: metrics, classes, calibration, differences, subgroups.

Nothing is fitted or written here. A metric that a set of samples leaves undefined is None in the results, never 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from eosin.eval import metrics, statistics
from eosin.eval.calibration import reliability
from eosin.eval.delong import delong, delong_test
from eosin.eval.metrics import Tally

# Below this many clusters the results warn of the whole, and of a subgroup.
FEW_CLUSTERS, FEW_IN_SUBGROUP = 20, 10


class Answered(Protocol):
    """What is scored: :class:`~eosin.eval.question.Answer`, or anything with these."""

    encoder: str
    variant: str
    probabilities: np.ndarray

    @property
    def name(self) -> str:
        """Name of the row in tables and plots."""


@dataclass(frozen=True)
class Samples:
    """What the answers are held against, M rows, and the draws of groups.

    Attributes:
        labels: [M], class numbers.
        groups: [M], numbers in [0, G) of the groups (clusters) that are drawn together.
        passes: [M], pass of the split; values of several passes are averaged.
        classes: names, in the order of the probabilities' columns.
        weights: [1 + draws, G].
        metrics: which ones are computed.
    """

    labels: np.ndarray
    groups: np.ndarray
    passes: np.ndarray
    classes: list[str]
    weights: np.ndarray
    metrics: Sequence[str]

    @classmethod
    def of(
        cls, labels: np.ndarray, groups: np.ndarray, passes: np.ndarray, classes: list[str], ordered: bool, seed: int
    ) -> Samples:
        """Number the groups anew and draw them; AUROC one-vs-one and kappa where the classes allow it."""
        names, numbers = np.unique(groups, return_inverse=True)
        more = [metrics.ONE_VS_ONE] if len(classes) > 2 else []
        more += [metrics.KAPPA] if ordered and len(classes) > 2 else []
        weights = statistics.bootstrap_weights(len(names), statistics.DRAWS, seed)
        return cls(labels, numbers, passes, classes, weights, (*metrics.METRICS, *more))

    def tallies(self, probabilities: np.ndarray) -> list[Tally]:
        """One a pass."""
        inside = [self.passes == p for p in np.unique(self.passes)]
        return [metrics.tally(self.labels[i], probabilities[i], self.groups[i], self.weights) for i in inside]


def score(samples: Samples, answers: Sequence[Answered]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Numbers of each answer, and the paired differences of those that differ in one thing only.

    Returns:
        For each answer ``metrics``, ``classes``, ``calibration`` and, of two classes in one pass, ``delong``; and the
        comparisons, each with metric, difference, interval and, of AUROC, DeLong's test over groups.
    """
    values, rows = [], []
    binary = len(samples.classes) == 2 and len(np.unique(samples.passes)) == 1
    positive = samples.labels == 1
    for answer in answers:
        tallies = samples.tallies(answer.probabilities)
        values.append(_overall(samples, tallies))
        rows.append(
            {
                "metrics": {m: statistics.interval(v) for m, v in values[-1].items()},
                "classes": _classes(samples, tallies),
                "calibration": reliability(samples.labels, answer.probabilities, samples.groups, samples.weights),
            }
        )
        if binary:
            area, variance = delong(positive, answer.probabilities[None, :, 1], samples.groups)
            if np.isfinite(variance[0, 0]):
                rows[-1]["delong"] = {"auroc": float(area[0]), "se": float(np.sqrt(max(variance[0, 0], 0.0)))}
    comparisons = []
    for (a, va), (b, vb) in itertools.combinations(zip(answers, values), 2):
        # Only pairs that differ in one thing say what made the difference.
        if (a.variant == b.variant) == (a.encoder == b.encoder):
            continue
        for metric in samples.metrics:
            found = {"a": a.name, "b": b.name, "metric": metric} | statistics.difference(va[metric], vb[metric])
            if metric == "auroc" and binary:
                test = delong_test(positive, a.probabilities[:, 1], b.probabilities[:, 1], samples.groups)
                if np.isfinite(test["z"]):
                    found["delong"] = {k: test[k] for k in ("se", "z", "p")}
            comparisons.append(found)
    return rows, comparisons


def by_subgroup(
    samples: Samples, answers: Sequence[Answered], keys: np.ndarray, names: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """The metrics of each answer within each subgroup, with intervals over the groups that it holds.

    Args:
        samples: M rows.
        answers: their probabilities.
        keys: [M], the samples, of which a subgroup may hold several rows.
        names: [M], the subgroup of each, empty where it is not known.
        seed: of the draws.

    Returns:
        For each subgroup ``value`` (None where it is not known), ``n``, ``clusters``, ``lacks`` (classes without a
        sample), ``few_clusters`` and ``encoders``: name -> metric -> value and interval. The interval is None with one
        group, the whole where undefined.
    """
    found = []
    for name in np.unique(names):
        inside = names == name
        part = Samples.of(
            samples.labels[inside], samples.groups[inside], samples.passes[inside], samples.classes, False, seed
        )
        part = Samples(part.labels, part.groups, part.passes, part.classes, part.weights, samples.metrics)
        groups = part.weights.shape[1]
        counts = np.bincount(part.labels, minlength=len(part.classes))
        scored = {}
        for answer in answers:
            values = _overall(part, part.tallies(answer.probabilities[inside]))
            scored[answer.name] = {m: _interval(v, groups) for m, v in values.items()}
        found.append(
            {
                "value": str(name) or None,
                "n": len(np.unique(keys[inside])),
                "clusters": groups,
                "lacks": [c for c, n in zip(part.classes, counts) if not n],
                "few_clusters": groups < FEW_IN_SUBGROUP,
                "encoders": scored,
            }
        )
    return found


def notes(samples: Samples, split: dict[str, Any], subgroups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What a reader has to know of the numbers: few groups, classes that are missing somewhere."""
    lines = []
    clusters = samples.weights.shape[1]
    if clusters < FEW_CLUSTERS:
        lines.append(f"Only {clusters} groups: intervals from so few are too narrow.")
    for side, words in (("train_lacks", "to learn from"), ("scored_lacks", "to be scored")):
        for c in samples.classes:
            where = [i for i, fold in enumerate(split["folds"]) if c in fold[side]]
            if where:
                listed = ", ".join(map(str, where[:5])) + (", ..." if len(where) > 5 else "")
                of = len(split["folds"])
                lines.append(f"Class '{c}' has no sample {words} in {len(where)} of {of} folds ({listed}).")
    cells = np.zeros((clusters, len(samples.classes)))
    np.add.at(cells, (samples.groups, samples.labels), 1)
    absent = ((samples.weights[1:] @ cells) == 0).mean(axis=0)
    for c, share in zip(samples.classes, absent):
        if share == 1:
            lines.append(f"Class '{c}' is never scored; means over classes leave it out.")
        elif share:
            lines.append(f"Class '{c}' is missing from {100 * share:.1f} % of the draws, whose means leave it out.")
    for column, rows in subgroups.items():
        few = ", ".join(f"{r['value'] or 'not given'} ({r['clusters']})" for r in rows if r["few_clusters"])
        if few:
            lines.append(f"By {column}, fewer than {FEW_IN_SUBGROUP} clusters: {few}; intervals are too narrow.")
        lacking = [f"{r['value'] or 'not given'} has no '{c}'" for r in rows for c in r["lacks"]]
        if lacking:
            lines.append(f"By {column}, means over classes leave out what is missing: {'; '.join(lacking)}.")
    return lines


def _overall(samples: Samples, tallies: list[Tally]) -> dict[str, np.ndarray]:
    found = [metrics.overall(t, samples.metrics) for t in tallies]
    return {m: metrics.mean_defined(np.stack([f[m] for f in found], axis=-1)) for m in samples.metrics}


def _classes(samples: Samples, tallies: list[Tally]) -> dict[str, dict[str, Any]]:
    """For each class its samples, the groups that hold any, and its metrics."""
    found = [metrics.per_class(t) for t in tallies]
    groups = samples.weights.shape[1]
    classes = {}
    for number, name in enumerate(samples.classes):
        mine = samples.labels == number
        classes[name] = {"n": int(mine.sum()), "clusters": len(np.unique(samples.groups[mine]))} | {
            m: _interval(metrics.mean_defined(np.stack([f[m][:, number] for f in found], axis=-1)), groups)
            for m in metrics.PER_CLASS
        }
    return classes


def _interval(values: np.ndarray, groups: int) -> dict[str, float | None] | None:
    """As :func:`~eosin.eval.statistics.interval`; None where undefined, without bounds where one group was drawn."""
    if not np.isfinite(values[0]):
        return None
    if groups < 2 or not np.isfinite(values[1:]).any():
        return {"value": float(values[0]), "low": None, "high": None}
    return dict(statistics.interval(values))
