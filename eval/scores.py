"""From the answers of probes to the numbers of the results: metrics, classes, calibration, differences, subgroups.

Nothing is fitted or written here. A metric that a set of samples leaves undefined is None in the results, never 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eosin.eval import metrics, statistics
from eosin.eval.calibration import reliability
from eosin.eval.delong import delong, delong_test
from eosin.eval.describe import PRIMARY
from eosin.eval.metrics import Tally

if TYPE_CHECKING:
    from eosin.eval.splits import Split
    from eosin.eval.task import Task

# Below this many clusters the results warn of the whole, and of a subgroup.
FEW_CLUSTERS, FEW_IN_SUBGROUP = 20, 10
MOST_LISTED = 8
# Means over samples, so that their means over episodes follow from how many episodes are right of each sample.
OF_EPISODES = (PRIMARY, "accuracy")


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
        rows: [M], the samples; those of several passes stand there several times.
        labels: [M], class numbers.
        groups: [M], numbers in [0, G) of the groups (clusters) that are drawn together.
        passes: [M], pass of the split; values of several passes are averaged.
        classes: names, in the order of the probabilities' columns.
        weights: [1 + draws, G].
        metrics: which ones are computed.
        episodes: the answers are shares of episodes, and metrics are means over the episodes, of :data:`OF_EPISODES`;
            otherwise the answers are probabilities.
    """

    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    passes: np.ndarray
    classes: list[str]
    weights: np.ndarray
    metrics: Sequence[str]
    episodes: bool = False

    @classmethod
    def of(cls, task: Task, split: Split, clusters: np.ndarray, seed: int, episodes: bool = False) -> Samples:
        """What a split scores; AUROC one-vs-one and kappa where the classes allow it.

        Args:
            clusters: [M], numbers in [0, G) of what is drawn together.
        """
        more = [metrics.ONE_VS_ONE] if len(task.classes) > 2 else []
        more += [metrics.KAPPA] if task.ordered and len(task.classes) > 2 else []
        asked = OF_EPISODES if episodes else (*metrics.METRICS, *more)
        rows, weights = split.rows, _draws(clusters, seed)
        return cls(rows, task.labels[rows], clusters, split.passes, task.classes, weights, asked, episodes)

    def tallies(self, probabilities: np.ndarray) -> list[Tally]:
        """One a pass."""
        tally = _episodes if self.episodes else metrics.tally
        inside = [self.passes == p for p in np.unique(self.passes)]
        return [tally(self.labels[i], probabilities[i], self.groups[i], self.weights) for i in inside]

    def part(self, inside: np.ndarray, seed: int) -> Samples:
        """Some of the rows, [M] bool, with their groups numbered and drawn anew."""
        _, groups = np.unique(self.groups[inside], return_inverse=True)
        kept = {name: getattr(self, name)[inside] for name in ("rows", "labels", "passes")}
        return replace(self, **kept, groups=groups, weights=_draws(groups, seed))


def score(samples: Samples, answers: Sequence[Answered]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Numbers of each answer, and the paired differences of those that differ in one thing only.

    Returns:
        For each answer ``metrics``, ``classes``, ``calibration`` and, of two classes in one pass, ``delong``; and the
        comparisons, each with metric, difference, interval and, of AUROC, DeLong's test over groups.
    """
    values, rows = [], []
    binary = len(samples.classes) == 2 and len(np.unique(samples.passes)) == 1 and "auroc" in samples.metrics
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


def by_subgroup(samples: Samples, answers: Sequence[Answered], names: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """The metrics of each answer within each subgroup, with intervals over the groups that it holds.

    Args:
        samples: M rows.
        answers: their probabilities.
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
        part = samples.part(inside, seed)
        groups = part.weights.shape[1]
        counts = np.bincount(part.labels, minlength=len(part.classes))
        scored = {}
        for answer in answers:
            values = _overall(part, part.tallies(answer.probabilities[inside]))
            scored[answer.name] = {m: _interval(v, groups) for m, v in values.items()}
        found.append(
            {
                "value": str(name) or None,
                "n": len(np.unique(part.rows)),
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
    passes, number = np.unique(samples.passes, return_inverse=True)
    cells = np.zeros((len(passes), clusters, len(samples.classes)))
    np.add.at(cells, (number, samples.groups, samples.labels), 1)
    absent = ((samples.weights[1:] @ cells) == 0).mean(axis=(0, 1))
    for c, share in zip(samples.classes, absent):
        if share == 1:
            lines.append(f"Class '{c}' is never scored; means over classes leave it out.")
        elif share:
            lines.append(f"Class '{c}' is missing from {100 * share:.1f} % of the draws, whose means leave it out.")
    for column, rows in subgroups.items():
        few = _listed([f"{r['value'] or 'not given'} ({r['clusters']})" for r in rows if r["few_clusters"]], ", ")
        if few:
            lines.append(f"By {column}, fewer than {FEW_IN_SUBGROUP} clusters: {few}; intervals are too narrow.")
        lacking = [f"{r['value'] or 'not given'} has no '{c}'" for r in rows for c in r["lacks"]]
        if lacking:
            lines.append(f"By {column}, means over classes leave out what is missing: {_listed(lacking, '; ')}.")
    return lines


def _listed(parts: list[str], between: str) -> str:
    """The first of many, and how many more there are."""
    more = [f"and {len(parts) - MOST_LISTED} more"] if len(parts) > MOST_LISTED else []
    return between.join([*parts[:MOST_LISTED], *more])


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
        classes[name] = {"n": len(np.unique(samples.rows[mine])), "clusters": len(np.unique(samples.groups[mine]))} | {
            m: _interval(metrics.mean_defined(np.stack([f[m][:, number] for f in found], axis=-1)), groups)
            for m in ("recall",) * samples.episodes or metrics.PER_CLASS
        }
    return classes


def _episodes(labels: np.ndarray, shares: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Tally:
    """As :func:`~eosin.eval.metrics.tally`, of which ``both`` is a mean over episodes, and what is none is NaN.

    Args:
        shares: [N, C], of the episodes that say each class of each sample.
    """
    member = np.eye(shares.shape[1])[labels]
    true, both = (metrics.sums(part, groups, weights) for part in (member, member * shares))
    unknown = np.full_like(true, np.nan)
    return Tally(true, unknown, both, unknown[:, :, None], np.full((len(weights), 5), np.nan))


def _draws(groups: np.ndarray, seed: int) -> np.ndarray:
    return statistics.bootstrap_weights(int(groups.max()) + 1, statistics.DRAWS, seed)


def _interval(values: np.ndarray, groups: int) -> dict[str, float | None] | None:
    """As :func:`~eosin.eval.statistics.interval`; None where undefined, without bounds where one group was drawn."""
    if not np.isfinite(values[0]):
        return None
    if groups < 2 or not np.isfinite(values[1:]).any():
        return {"value": float(values[0]), "low": None, "high": None}
    return dict(statistics.interval(values))
