"""How much of what a probe scores an encoder had seen in pretraining, by the column ``seen`` of its embeddings.

A model that was pretrained on a patient's tiles knows them, labels or not. What it has seen is told by the hashes that
came with its weights (:mod:`eosin.ssl.seen`); without these nothing is known, and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.embeddings import Embeddings
from eosin.ssl.seen import PATIENT, SLIDE, Seen

if TYPE_CHECKING:
    import pandas as pd

    from eosin.eval.task import Task

COLUMN = "seen"
UNKNOWN: dict[str, Any] = {"known": False, "samples": None, "slides": None, "patients": None, "share": None}


def mark(table: pd.DataFrame, seen: Seen | None) -> dict[str, Any]:
    """Add the column to a table of tiles where it is known; return what the embeddings' fingerprint says of it."""
    if seen is None:
        return {}
    patients = table["patient"] if "patient" in table else [""] * len(table)
    table[COLUMN] = seen.marks(table["slide"], patients)
    return fingerprint(seen)


def fingerprint(seen: Seen | None) -> dict[str, Any]:
    """What the fingerprint of embeddings says of what the encoder has seen."""
    return {} if seen is None else {COLUMN: {"sha256": seen.sha256, "complete": seen.complete}}


def contamination(encoders: Sequence[Embeddings], rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """What each encoder had seen of the scored samples.

    Args:
        rows: of the embeddings, one a scored sample; for samples of many tiles, one of each.

    Returns:
        Encoder name -> known (whether all of its pretraining is), samples (of a slide or patient that was seen),
        slides and patients (different ones that were seen) and share (of the samples); None where nothing is known.
    """
    found: dict[str, dict[str, Any]] = {}
    rows = np.unique(rows)
    for encoder in encoders:
        if COLUMN not in encoder.encoder:  # a column of that name may have come from a table of the user's own
            found[encoder.name] = dict(UNKNOWN)
            continue
        table = encoder.table.iloc[rows]
        marks = table[COLUMN].to_numpy().astype(np.int64)
        samples = int((marks > 0).sum())
        found[encoder.name] = {
            "known": bool(encoder.encoder[COLUMN]["complete"]),
            "samples": samples,
            "slides": _different(table, "slide", marks & SLIDE),
            "patients": _different(table, "patient", marks & PATIENT),
            "share": samples / max(len(rows), 1),
        }
    return found


def of_task(task: Task, rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """:func:`contamination` of rows of a task; a bag of tiles is known by its first one."""
    keys = task.encoders[0].table["key"]
    if len(keys) != len(task.table):
        rows = np.flatnonzero(keys.isin(task.table["key"].iloc[rows]))
    return contamination(task.encoders, rows)


def notes(found: dict[str, dict[str, Any]]) -> list[str]:
    """The same in words: what was seen, and once of which encoders it is not known."""
    said = []
    for name, one in found.items():
        if one["samples"]:
            least = "" if one["known"] else "at least "
            said.append(
                f"Seen before: {least}{one['share']:.1%} of the scored samples ({one['samples']}) are of "
                f"{one['slides']} slides and {one['patients']} patients of which '{name}' saw tiles in pretraining; "
                "its numbers say too much about new patients."
            )
    unknown = [name for name, one in found.items() if not one["known"]]
    if unknown:
        said.append(f"Not known: whether the pretraining of {', '.join(unknown)} saw these slides or patients.")
    return said


def _different(table: pd.DataFrame, column: str, marked: np.ndarray) -> int:
    """Different values of a column in the marked rows."""
    return int(table[column][marked > 0].nunique()) if column in table else 0
