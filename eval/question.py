"""What every probe of classes shares: the question, the split, and from answers to results.

A probe is fitted on one side of each fold and scored on the other, so every sample is scored by a probe that never saw
its group. A number never stands alone: beside it stand its interval, chance, and the other encoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.data_tools.results import write_results
from eosin.eval import contamination, metrics, scores, splits, statistics
from eosin.eval.describe import PRIMARY, verdict
from eosin.eval.frame import ALONE, asked, clusters_of, leaks_and_reason, refuse_foreign, settings
from eosin.eval.splits import Split
from eosin.eval.task import Task, column_of, identities, load_task

SPLITS = ("kfold", "leave-one-group-out", "monte-carlo", "fixed")
OF_EPISODES = (
    "Values are means over the episodes, whose deviation is in the details; intervals are over groups. "
    "The probabilities, and the calibration, are of the episodes' votes."
)


@dataclass(frozen=True)
class Question:
    """What is asked of the embeddings, the same for every probe; see :func:`~eosin.eval.task.load_task`.

    Attributes:
        split: one of :data:`SPLITS`.
        repeats: passes of a Monte Carlo split, each of which scores one in ``folds`` of the groups.
        side: column that says train, val or test, of a fixed split.
        by: columns for whose values the metrics are given apart.
        cluster: column that names what the bootstrap draws as a whole; the group where there is none.
        allow_leak: why a split with a patient, slide or image on both sides is to be scored all the same.
    """

    embeddings: list[Path]
    label: str
    group: str
    out: Path
    labels: Path | None = None
    key: str = "slide"
    folds: int = 5
    seed: int = 0
    split: str = "kfold"
    repeats: int = 10
    side: str = "split"
    by: tuple[str, ...] = ()
    allow_leak: str | None = None
    cluster: str | None = None


@dataclass
class Answer:
    """What one probe on one encoder says of every sample, each scored out of fold.

    Attributes:
        encoder: the encoder's name.
        variant: what else tells rows apart (k, aggregator), empty where the encoder alone does.
        probabilities: [M, C], a row for each of :attr:`Split.rows <eosin.eval.splits.Split.rows>`.
        details: what was chosen on the way, such as C in each fold; goes into the results.
    """

    encoder: str
    variant: str
    fingerprint: dict[str, Any]
    probabilities: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the row in tables and plots."""
        return f"{self.encoder} + {self.variant}" if self.variant else self.encoder


def prepare(question: Question) -> tuple[Task, Split, list[dict[str, Any]]]:
    """The task, its split and what leaks through it; all refusals happen before the first fit."""
    task = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    for column, option in asked_columns(question).items():
        column_of(task, column, option)
    split = make_split(question, task)
    return task, split, leaks_of(question, split, task)


def asked_columns(question: Question) -> dict[str, str]:
    """The columns that are asked for beside label and group -> the option that names them."""
    side = {question.side: "--side"} if question.split == "fixed" else {}
    return dict.fromkeys(question.by, "--by") | side | ({question.cluster: "--cluster"} if question.cluster else {})


def make_split(question: Question, task: Task) -> Split:
    """The split that was asked for. Raises UserError as :mod:`eosin.eval.splits` does, and for one class only."""
    refuse_foreign(question.out)
    if len(task.classes) < 2:
        raise UserError(f"label '{question.label}' has one class only ('{task.classes[0]}'); a probe needs two or more")
    labels, groups = np.array(task.classes)[task.labels], np.array(task.group_names)[task.groups]
    if question.split == "kfold":
        split = splits.kfold(labels, groups, question.folds, question.seed)
    elif question.split == "leave-one-group-out":
        split = splits.leave_one_group_out(labels, groups)
    elif question.split == "monte-carlo":
        split = splits.monte_carlo(labels, groups, question.folds, question.repeats, question.seed)
    else:
        split = splits.fixed(column_of(task, question.side, "--side"), labels, question.side)
    clusters_of(question, task, split.rows)  # refuses what it must before anything is fitted
    return split


def leaks_of(question: Question, split: Split, task: Task) -> list[dict[str, Any]]:
    """What stands on both sides; refused unless a reason to allow it was given."""
    if question.allow_leak is not None and not question.allow_leak.strip():
        raise UserError("--allow-leak needs a reason, which the results will carry")
    found = splits.find_leaks(split, identities(task, question.group))
    if found and not question.allow_leak:
        said = " and ".join(f"{leak['count']} of '{leak['what']}', such as '{leak['example']}'," for leak in found)
        raise UserError(
            f"{said} would stand on both sides of a split, so that scores measure recognition; group by what they "
            "share, or give --allow-leak 'REASON', which the results will carry"
        )
    return found


def each_fold(split: Split, desc: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The rows that each fold answers, [M] bool, and its sides, learned from and scored, [N] bool; with progress."""
    folds = split.folds
    for fold, (learned, scored) in enumerate(progress(split, total=len(split), desc=desc, unit="folds")):
        yield folds == fold, learned, scored


def conclude(
    question: Question,
    task: Task,
    split: Split,
    leaks: list[dict[str, Any]],
    answers: list[Answer],
    protocol: str,
    parameters: dict[str, Any],
    unit: str,
    episodes: bool = False,
) -> dict[str, Any]:
    """Score the answers, compare them pairwise, and write results and predictions.

    Args:
        episodes: the answers are shares of episodes, and metrics are means over the episodes.
    """
    rows, once = split.rows, np.unique(split.rows)
    clusters, _ = clusters_of(question, task, rows)
    samples = scores.Samples.of(task, split, clusters, question.seed, episodes)
    numbers, comparisons = scores.score(samples, answers)
    subgroups = {
        column: scores.by_subgroup(samples, answers, column_of(task, column, "--by")[rows], question.seed)
        for column in question.by
    }
    described = split.describe(task.labels, task.groups, task.classes)
    chance = statistics.chance(task.labels[once], len(task.classes))
    seen = contamination.of_task(task, once)
    leaking, leak_notes = leaks_and_reason(question, leaks)
    results = {
        "protocol": protocol,
        "parameters": parameters
        | ({"folds": question.folds} if question.split in ("kfold", "monte-carlo") else {})
        | settings(question),
        "primary": PRIMARY,
        **asked(question),
        "unit": unit,
        "n": len(once),
        "groups": len(np.unique(task.groups[once])),
        "clusters": samples.weights.shape[1],
        "classes": task.classes,
        "class_counts": np.bincount(task.labels[once], minlength=len(task.classes)).tolist(),
        "left_out": task.left_out,
        "split": described,
        "leaks": leaking,
        "chance": {metric: chance[metric] for metric in samples.metrics},
        "encoders": [
            {"name": a.name, "encoder": a.encoder, "variant": a.variant, "fingerprint": a.fingerprint}
            | found
            | {"contamination": seen[a.encoder], "details": a.details}
            for a, found in zip(answers, numbers)
        ],
        "comparisons": comparisons,
        "by": subgroups,
    }
    results["verdict"] = verdict(results)
    results["notes"] = [
        *leak_notes,
        *contamination.notes(seen),
        *scores.notes(samples, described, subgroups),
        *([OF_EPISODES] if episodes else []),
        *(ALONE if len(task.encoders) == 1 else []),
    ]
    write_results(question.out, results, _predictions(task, split, answers))
    return results


def primary(task: Task, split: Split, probabilities: np.ndarray) -> float:
    """The primary metric over all answers."""
    groups = np.zeros(len(split.rows), dtype=np.int64)
    return float(metrics.evaluate(task.labels[split.rows], probabilities, groups, np.ones((1, 1)))[PRIMARY][0])


def _predictions(task: Task, split: Split, answers: list[Answer]) -> Any:
    import pandas as pd

    classes, groups = np.array(task.classes, dtype=object), np.array(task.group_names, dtype=object)
    rows, folds = split.rows, split.folds
    frames = []
    for answer in answers:
        known = {
            "encoder": answer.name,
            "key": task.keys[rows],
            "group": groups[task.groups[rows]],
            "fold": folds,
            "label": classes[task.labels[rows]],
            "predicted": classes[answer.probabilities.argmax(axis=1)],
        }
        shares = {f"probability_{c}": answer.probabilities[:, i] for i, c in enumerate(task.classes)}
        frames.append(pd.DataFrame(known | shares))
    return pd.concat(frames, ignore_index=True)
