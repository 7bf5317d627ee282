"""Which slides and patients a model has seen: hashes that a run keeps, and that travel with its release.

    RUN/seen.json      schema, salt, slides, patients: keyed BLAKE2b (RFC 7693) of the names on the training side
                       before: the same of the runs whose weights it began with
                       complete: false where it began with weights that do not say what they saw

So whoever embeds their own slides learns which of them the model knows, and names stand nowhere. The salt keeps the
hashes of two data sets apart and tables of ready-made hashes from fitting; who has the file can still try names one by
one. Only names that are written alike are found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, sha256, write_json
from eosin.data_tools.mixture import Mixture
from eosin.ssl.held_out import texts

SEEN_FILE, SCHEMA = "seen.json", 1
BYTES = 16  # of a hash and of the salt
SLIDE, PATIENT = 1, 2  # bits of what is marked
KINDS = {"slides": SLIDE, "patients": PATIENT}


@dataclass(frozen=True)
class Seen:
    """What a model's pretraining saw.

    Attributes:
        lists: of each data set its salt and its hashes: {"salt", "slides", "patients"}.
        complete: whether these are all.
        sha256: of the file, "" where there is none since nothing was seen.
    """

    lists: tuple[dict[str, Any], ...] = ()
    complete: bool = True
    sha256: str = ""

    def marks(self, slides: Iterable[object], patients: Iterable[object]) -> np.ndarray:
        """For each tile, by the names of its slide and patient, SLIDE and PATIENT added up where seen: [N] int8."""
        found = []
        for kind, names in (("slides", texts(slides)), ("patients", texts(patients))):
            known = {name for one in self.lists for name in _known(one, kind, set(names))}
            found.append(np.array([KINDS[kind] if name in known else 0 for name in names], dtype=np.int8))
        return found[0] | found[1]


NOTHING = Seen()  # of weights that were never trained


def hashed(kind: str, name: str, salt: str) -> str:
    """The hash of a name, in hexadecimal; ``kind`` is "slides" or "patients"."""
    return hashlib.blake2b(f"{kind}\0{name}".encode(), key=bytes.fromhex(salt), digest_size=BYTES).hexdigest()


def read_seen(folder: Path) -> Seen | None:
    """What the model of a run or release folder saw; None where it does not say. Raises UserError for a broken file."""
    path = folder / SEEN_FILE
    if not path.is_file():
        return None
    found = read_json(path, "a list of what a model has seen")
    try:
        if found["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {found['schema']!r}; this version reads {SCHEMA}")
        lists = tuple({"salt": one["salt"]} | {k: set(one[k]) for k in KINDS} for one in (found, *found["before"]))
        for one in lists:
            hashed("slides", "", one["salt"])
        return Seen(lists, bool(found["complete"]), sha256(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no list of what a model has seen ({error}); copy it again from its run") from None


def write_seen(run: Path, trained_on: Sequence[tuple[Mixture, frozenset[int]]], init_from: str | None) -> None:
    """Note what a run trains on, beside what it noted earlier; nothing where all of that is there.

    Args:
        trained_on: shard sets, and the rows of their slides tables that are left out. A slide counts where it has
            tiles, also if weights or a cap keep them from being drawn.
        init_from: where the first weights came from, None for random ones.
    """
    path = run / SEEN_FILE
    names: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for shards, left_out in trained_on:
        for kind, found in _names(shards, left_out).items():
            names[kind] |= found
    if path.is_file():
        there = read_json(path, "a list of what a model has seen")
    else:
        identity = " ".join(shards.identity for shards, _ in trained_on)
        salt = hashlib.blake2b(identity.encode(), digest_size=BYTES, person=b"eosin seen").hexdigest()
        there = {"schema": SCHEMA, "salt": salt, "slides": [], "patients": []} | _inherited(init_from)
    hashes = {kind: {hashed(kind, name, there["salt"]) for name in found} for kind, found in names.items()}
    merged = there | {kind: sorted(hashes[kind] | set(there[kind])) for kind in KINDS}
    if merged != there or not path.is_file():
        write_json(path, merged)


def _names(shards: Mixture, left_out: frozenset[int]) -> dict[str, set[str]]:
    table = shards.slides()
    kept = np.array([row not in left_out for row in range(len(table))], dtype=bool)
    if "tiles" in table:
        kept &= (table["tiles"].fillna(0) > 0).to_numpy()
    table = table[kept]
    patients = texts(table["patient"]) if "patient" in table else []
    return {"slides": set(texts(table["slide"])) - {""}, "patients": set(patients) - {""}}


def _inherited(init_from: str | None) -> dict[str, Any]:
    """What the first weights had seen, where a run or release that they came from says it."""
    if init_from is None:
        return {"before": [], "complete": True}
    source = Path(init_from)
    # A file of weights lies in a release, or at RUN/checkpoints/STEP.
    folders = [source, *list(source.parents)[:3]] if source.exists() else []
    for folder in folders:
        if (folder / SEEN_FILE).is_file():
            found = read_json(folder / SEEN_FILE, "a list of what a model has seen")
            own = {key: found[key] for key in ("salt", *KINDS)}
            return {"before": [own, *found["before"]], "complete": found["complete"]}
    return {"before": [], "complete": False}


def _known(one: dict[str, Any], kind: str, names: set[str]) -> set[str]:
    return {name for name in names if name and hashed(kind, name, one["salt"]) in one[kind]}
