"""Which patients of a shard set are never trained on: drawn by a hash of their names, the same in every set and run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.mixture import Mixture

HELD_OUT = purpose("held out")


def held_out_slides(shards: Mixture, share: float, seed: int) -> frozenset[int]:
    """Rows of the slides table whose patient is held out; a slide without a patient is one of its own.

    Each patient is held out with probability ``share``, whatever the other patients are.
    """
    if not share:
        return frozenset()
    table = shards.slides()
    names = texts(table["slide"])
    if "patient" in table:
        names = [patient or slide for patient, slide in zip(texts(table["patient"]), names)]
    drawn = uniform(HELD_OUT, seed, np.array([purpose(name) for name in names], dtype=np.int64))
    return frozenset(np.flatnonzero(drawn < share).tolist())


def texts(column: Iterable[object]) -> list[str]:
    """The values of a table's column as text; what is missing becomes empty."""
    return ["" if value is None or value != value else str(value).strip() for value in column]
