"""Long extractions in parts, so that a killed one goes on and several ranks share the work.

    OUT.unfinished/
      settings.json    the fingerprint of what is made; leftovers of another are refused
      part-000012.npz  features of a part and what is known of its tiles, there when all of it is

What a part holds depends on its number alone, and rank r of n makes the parts r, r + n, r + 2n, ... So the file that
they are joined to has the same bytes whatever the number of ranks and however often the work was killed, where the
model itself repeats its bytes: on one device, with as many threads and tiles in a batch.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.embeddings import Embeddings, read_embeddings, write_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.working import working_folder
from eosin.ssl import distributed

if TYPE_CHECKING:
    import pandas as pd

POLL_S = 0.2


@dataclass
class Summary:
    """What came of an extraction; on ranks but the first, nothing.

    Attributes:
        tiles: rows in the file.
        dimension: of a feature.
        refused: (key, reason) of each tile, or (file, reason) of each slide, left out.
        cached: the file was there already and nothing was done.
        raw: how many tiles stayed without stain normalization, by reason.
        notices: what the user should know, one line each.
    """

    tiles: int = 0
    dimension: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    cached: bool = False
    raw: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)


@dataclass
class Part:
    """What a part of an extraction gave.

    Attributes:
        features: [n, D] float32.
        columns: what is known of each of the n tiles.
        refused: (key, reason) of each tile or slide left out.
        raw: how many tiles stayed without stain normalization, by reason.
        facts: what else is known.
        tiles: n.
    """

    features: np.ndarray
    columns: dict[str, list[Any]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    raw: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    tiles: int = 0


def made_already(out: Path, fingerprint: dict[str, Any]) -> Summary | None:
    """What the embeddings at ``out`` are, None where there are none. Raises UserError where it holds anything else."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the path of a file")
    if not out.exists():
        return None
    there = read_embeddings(out)
    if there.encoder != fingerprint:
        keys = sorted({*there.encoder, *fingerprint})
        other = ", ".join(key for key in keys if there.encoder.get(key) != fingerprint.get(key))
        raise UserError(
            f"{out} holds other embeddings (of '{there.name}', with other {other}); give another --out, or remove it "
            "first"
        )
    shutil.rmtree(_folder(out), ignore_errors=True)  # where a kill came between the last two steps
    return Summary(len(there.features), there.features.shape[1], cached=True)


def in_parts(
    out: Path,
    fingerprint: dict[str, Any],
    count: int,
    make: Callable[[list[int], list[Path]], Generator[tuple[int, Part], None, None]],
    join: Callable[[list[Part]], pd.DataFrame],
) -> Summary:
    """Make ``count`` parts and join them to ``out``; the reasons of what was refused go beside it. All ranks call this.

    Args:
        fingerprint: of the embeddings; decides whether unfinished work is this work.
        make: gives the parts with the asked numbers, in order; also gets the files of this rank that are there.
        join: the table of all parts, which come without their features. Its UserError removes the parts, while one of
            ``make`` or in writing keeps those that are finished.
    """
    failed: UserError | None = None
    summary = Summary()
    with _held(out, fingerprint) as folder:
        paths = [folder / f"part-{number:06d}.npz" for number in range(count)]
        mine = range(distributed.rank(), count, distributed.ranks())
        done = [number for number in mine if paths[number].exists()]
        try:
            with closing(make(sorted(set(mine) - set(done)), [paths[number] for number in done])) as made:
                for number, part in made:
                    _write(paths[number], part)
        except UserError as error:
            if not any(path.exists() for path in paths):
                raise
            failed = error
        if distributed.rank() == 0 and failed is None:
            while not all(path.exists() for path in paths):
                time.sleep(POLL_S)  # a rank that fails ends the others
            features, parts = _joined(paths)
            embeddings = Embeddings(features, join(parts), fingerprint)
            refused = [one for part in parts for one in part.refused]
            summary = Summary(
                len(features), features.shape[1], refused, raw=sum((part.raw for part in parts), Counter())
            )
            try:
                _write_refused(out, refused)  # first, since embeddings that are there count as done
                write_embeddings(out, embeddings)
                shutil.rmtree(folder)
            except UserError as error:
                failed = error
    if failed:
        raise UserError(f"{failed}; finished parts are kept in {_folder(out)}")
    return summary


def read_part(path: Path, features: bool = False) -> Part:
    """Read what :func:`in_parts` has written; ``features`` are [0, D] unless asked for."""
    with np.load(path, allow_pickle=False) as stored:
        known = json.loads(stored["known"].tobytes())
        found = stored["features"] if features else np.empty((0, known["shape"][1]), dtype=np.float32)
    refused = [(key, reason) for key, reason in known["refused"]]
    return Part(found, known["columns"], refused, Counter(known["raw"]), known["facts"], known["shape"][0])


def refused_path(out: Path) -> Path:
    """Path of the list of what was refused that belongs to the embeddings at ``out``."""
    return out.with_suffix(".refused.csv")


def _joined(paths: list[Path]) -> tuple[np.ndarray, list[Part]]:
    """Features of all parts, [N, D], and the parts without theirs. Holds one part beside the whole."""
    parts = [read_part(path) for path in paths]
    features = np.empty((sum(p.tiles for p in parts), max(p.features.shape[1] for p in parts)), dtype=np.float32)
    first = 0
    for path, part in zip(paths, parts):
        if part.tiles:
            features[first : first + part.tiles] = read_part(path, features=True).features
        first += part.tiles
    return features, parts


def _write_refused(out: Path, refused: list[tuple[str, str]]) -> None:
    refused_path(out).unlink(missing_ok=True)
    if refused:
        with atomic_path(refused_path(out)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("key", "reason"), *refused])


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def _write(path: Path, part: Part) -> None:
    known = {"columns": part.columns, "refused": part.refused, "raw": dict(part.raw), "facts": part.facts}
    known["shape"] = part.features.shape
    text = np.frombuffer(json.dumps(known).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary:
        np.savez(temporary, features=part.features, known=text)


@contextmanager
def _held(out: Path, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """The folder of the parts: rank 0 makes and locks it before any rank works in it."""
    settings = json.loads(json.dumps({"verb": "embed"} | fingerprint))
    with ExitStack() as stack:
        error: UserError | None = None
        if distributed.rank() == 0:
            try:
                stack.enter_context(working_folder(out, settings))
            except UserError as raised:
                error = raised
        if distributed.any_rank(error is not None):
            raise error or UserError(f"rank 0 cannot make {out}, and says why")
        yield _folder(out)
