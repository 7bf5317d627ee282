"""The frame of results of every kind: rows with intervals, paired differences, verdict and notes, written to disk.

What classes have beside it (calibration, DeLong, subgroups) is added by :mod:`eosin.eval.question`. Nothing is computed
here but intervals.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json
from eosin.data_tools.results import write_results
from eosin.eval import contamination, statistics
from eosin.eval.describe import verdict
from eosin.eval.scores import FEW_CLUSTERS
from eosin.eval.task import Task, column_of

if TYPE_CHECKING:
    import pandas as pd

    from eosin.eval.question import Question


ALONE = ["A number alone says little: embed 'color' and 'random:RUN' too and give all files at once."]


@dataclass(frozen=True)
class Row:
    """One encoder's row of the results.

    Attributes:
        encoder: the encoder's name.
        fingerprint: what it is.
        values: metric -> [1 + draws], the value itself first.
        more: goes into the row as it is: classes or targets, details.
    """

    encoder: str
    fingerprint: dict[str, Any]
    values: dict[str, np.ndarray]
    more: dict[str, Any] = field(default_factory=dict)


def refuse_foreign(out: Path) -> None:
    """Raise UserError when ``out`` exists and is no results file, or lies where nothing can be written."""
    folder = next((parent for parent in out.absolute().parents if parent.exists()), out)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is no folder that can be written to; give another --out")
    try:
        foreign = out.exists() and read_json(out, "results").get("kind") != "eosin results"
    except UserError:
        foreign = True
    if foreign:
        raise UserError(f"{out} exists and holds no results; give another --out")


def asked(question: Question) -> dict[str, Any]:
    """What was asked of whom, as it stands in the results."""
    labels = {"path": str(question.labels), "key": question.key} if question.labels else None
    side = {"side": question.side} if question.split == "fixed" else {}
    return {
        "label": question.label,
        "labels": labels,
        "group": question.group,
        "cluster": question.cluster or question.group,
    } | side


def settings(question: Question) -> dict[str, Any]:
    """The parameters that all protocols have."""
    return {"seed": question.seed, "bootstrap_draws": statistics.DRAWS, "level": statistics.LEVEL}


def clusters_of(question: Question, task: Task, rows: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """What the bootstrap draws as a whole, --cluster or the group: number of each row, [M], and their names.

    Raises UserError when --cluster names no column, one that is empty somewhere, or all are of one cluster.
    """
    names = np.array(task.group_names)[task.groups]
    if question.cluster:
        names = column_of(task, question.cluster, "--cluster")
    names = names if rows is None else names[rows]
    if (names == "").any():
        raise UserError(f"{(names == '').sum()} samples have no '{question.cluster}'; give another --cluster")
    values, numbers = np.unique(names, return_inverse=True)
    if len(values) < 2:
        raise UserError(
            f"all that is scored is of one '{question.cluster or question.group}' ('{values[0]}'), so that no interval "
            "can be drawn; give a finer --cluster or --group"
        )
    return numbers, [str(v) for v in values]


def interval(values: np.ndarray) -> dict[str, float] | None:
    """As :func:`~eosin.eval.statistics.interval`; None where the value is undefined."""
    return statistics.interval(values) if np.isfinite(values[0]) and np.isfinite(values[1:]).any() else None


def write_frame(
    question: Question,
    task: Task,
    rows: Sequence[Row],
    predictions: pd.DataFrame,
    *,
    protocol: str,
    parameters: dict[str, Any],
    primary: str,
    chance: dict[str, float | None],
    clusters: int,
    scored: np.ndarray | None = None,
    own: dict[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare the rows pairwise, say who is ahead, and write results and predictions; return the results.

    Args:
        chance: for each metric of the rows, in the order of display; None where it is not known.
        clusters: how many groups were drawn from.
        scored: rows of the task that were scored; all where not given.
        own: what results of this kind have beside the frame; at least ``classes``.
    """
    scored = np.arange(len(task.groups)) if scored is None else scored
    groups = task.groups[scored]
    seen = contamination.of_task(task, scored) if task.encoders else {}
    comparisons = [
        {"a": a.encoder, "b": b.encoder, "metric": metric} | statistics.difference(a.values[metric], b.values[metric])
        for a, b in itertools.combinations(rows, 2)
        for metric in chance
    ]
    results = {
        "protocol": protocol,
        "parameters": parameters | settings(question),
        "primary": primary,
        **asked(question),
        "unit": "tile",
        "n": len(groups),
        "groups": len(np.unique(groups)),
        "clusters": clusters,
        "left_out": task.left_out,
        "chance": chance,
        "encoders": [
            {
                "name": row.encoder,
                "encoder": row.encoder,
                "variant": "",
                "fingerprint": row.fingerprint,
                "metrics": {metric: statistics.interval(row.values[metric]) for metric in chance},
            }
            | row.more
            | ({"contamination": seen[row.encoder]} if seen else {})
            for row in rows
        ],
        "comparisons": comparisons,
    } | own
    results["verdict"] = verdict(results)
    few = [f"Only {clusters} groups: intervals from so few are too narrow."] if clusters < FEW_CLUSTERS else []
    results["notes"] = [*notes, *contamination.notes(seen), *few, *(ALONE if len(rows) == 1 else [])]
    write_results(question.out, results, predictions)
    return results


def leaks_and_reason(question: Question, leaks: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What leaks, as it stands in the results, and the notes that say it."""
    reason = question.allow_leak.strip() if leaks and question.allow_leak else None
    notes = [
        f"Leak allowed: {leak['count']} of '{leak['what']}' stand on both sides and touch {leak['samples']} scored "
        f"samples; these numbers measure recognition too. Reason given: {reason}"
        for leak in leaks
    ]
    return {"found": leaks, "reason": reason}, notes
