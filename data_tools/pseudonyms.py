"""Names that stand for slides and patients: keyed hashes, so that only who holds the key can tell who is who.

A pseudonym is a letter and the first 16 hexadecimal digits of an id's HMAC-SHA256 (RFC 2104). The same key gives the
same pseudonyms in every run and on every machine, so that further slides of a patient join the earlier ones. Whoever
holds the key and a list of ids can compute them again and find out whom each stands for: keep the key apart from the
output. It is never written anywhere but to the file that the user names.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eosin.data_tools.errors import UserError
from eosin.data_tools.sources import Source, without_ending

KEY_BYTES = 32
# A shorter key could be found by trying.
LEAST_KEY_BYTES = 16
MOST_KEY_BYTES = 4096
DIGITS = 16
# Ids shorter than this are in other values by chance: "7" in an age.
TELLING = 4
SEPARATORS = re.compile(r"[\s,;|/]+")


def read_key(path: Path) -> bytes:
    """The key in a file; a file that does not exist is made, with a new key, for its owner only.

    Of several processes that make it at the same time all read the same key.

    Raises UserError for a file that cannot be made or read, or is no key.
    """
    if not path.exists():
        _make_key(path)
    try:
        with path.open("rb") as file:
            key = file.read(MOST_KEY_BYTES + 1)
    except OSError as error:
        raise UserError(f"the key {path} cannot be read: {error.strerror}") from None
    if not LEAST_KEY_BYTES <= len(key) <= MOST_KEY_BYTES:
        size = f"more than {MOST_KEY_BYTES}" if len(key) > MOST_KEY_BYTES else f"{len(key)}"
        raise UserError(f"{path} holds {size} bytes, so it is no key; name a new file, and one is made")
    return key


def pseudonym(kind: str, name: str, key: bytes) -> str:
    """What stands for a name: ``kind`` ("s" for a slide, "p" for a patient) and 16 hexadecimal digits."""
    return kind + hmac.new(key, f"{kind}\0{name}".encode(), hashlib.sha256).hexdigest()[:DIGITS]


def pseudonymize(sources: Sequence[Source], key: bytes) -> list[Source]:
    """Replace slide names, source names and patients by pseudonyms, in the order given; ``path`` stays, to be opened.

    Raises UserError for a column that holds an original id, as it would give it away (:func:`refuse_ids`).
    """
    refuse_ids([(_further(source), ids_of(source)) for source in sources])
    names = [pseudonym("s", source.slide, key) for source in sources]
    name_of = {source.path: name for source, name in zip(sources, names) if source.path is not None}
    result = []
    for source, name in zip(sources, names):
        patient = source.facts.get("patient", "")
        facts = source.facts | ({"patient": pseudonym("p", patient, key)} if patient else {})
        refused = source.refused
        if source.same_as is not None:
            refused = f"the same bytes as {name_of.get(source.same_as, 'another slide')}"
        result.append(replace(source, slide=name, listed=name, facts=facts, refused=refused))
    return result


def ids_of(source: Source) -> list[str]:
    """What names a slide or its patient: the ids that nothing written may hold."""
    names = {source.slide, source.listed, without_ending(Path(source.listed)), source.facts.get("patient", "")}
    if source.path is not None:
        names |= {source.path.name, source.path.stem}
    return sorted(names - {""})


def refuse_ids(rows: Sequence[tuple[Mapping[str, str], Sequence[str]]]) -> None:
    """Raise UserError, naming the column, where a column of a table gives an id away.

    That is where a value holds an id of its row, or has an id of another row between separators, in whatever case; or,
    for ids of less than four characters, where every value that there is equals an id of its row.

    Args:
        rows: the columns of each row, and its ids.
    """
    all_ids = {name.lower() for _, ids in rows for name in ids if len(name) >= TELLING}
    copies: dict[str, bool] = {}  # whether all values of a column, so far, are ids of their rows
    for facts, ids in rows:
        own = [name.lower() for name in ids]
        for column, value in facts.items():
            value = value.strip().lower()
            held = any(name in value for name in own if len(name) >= TELLING)
            if held or not all_ids.isdisjoint(SEPARATORS.split(value)):
                raise UserError(f"the column '{column}' holds ids of slides or patients; remove it to pseudonymize")
            if value:
                copies[column] = copies.get(column, True) and value in own
    for column, copy in copies.items():
        if copy:
            raise UserError(f"the column '{column}' is that of the slides or patients; remove it to pseudonymize")


def _further(source: Source) -> dict[str, str]:
    """The columns that are kept as they are."""
    return {column: value for column, value in source.facts.items() if column != "patient"}


def _make_key(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Such a file is its owner's only.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.partial-") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
            # Unlike a rename, this never replaces the key that another process has just made.
            os.link(file.name, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"the key {path} cannot be made: {error.strerror}; name another file") from None
