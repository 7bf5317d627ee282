"""Rewinds of a run: steps from which it went on anew, past some batches of the stream; ``rewinds.jsonl`` keeps them.

The record alone says which batch a step takes, so that a run that is resumed any number of times stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path

RECORD = "rewinds.jsonl"


class Rewind(NamedTuple):
    """``step`` is the number of steps done where the run goes on; ``skip`` global batches are passed over there."""

    step: int
    skip: int


def read(run: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first. Raises UserError when the record is broken."""
    path = run / RECORD
    if not path.is_file():
        return []
    try:
        return [Rewind(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a record of rewinds: {' '.join(str(error).split())}") from None


def write(run: Path, rewinds: Sequence[Rewind]) -> None:
    """Write the record, atomically: with this a rewind has happened."""
    with atomic_path(run / RECORD) as temporary:
        temporary.write_text("".join(json.dumps(rewind._asdict()) + "\n" for rewind in rewinds), encoding="utf-8")


def batch_of(step: int, rewinds: Sequence[Rewind]) -> int:
    """The batch of the stream that step ``step``, counted from 0, takes.

    A rewind undoes those at its own step or after it, as it undoes the training there.
    """
    standing: list[Rewind] = []
    for rewind in rewinds:
        standing = [r for r in standing if r.step < rewind.step] + [rewind]
    return step + sum(rewind.skip for rewind in standing if rewind.step <= step)
