"""Writing files so that a kill at any moment leaves the old state or the new one, never half of either."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since many writers choose a format by it.
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it is synced and renamed to ``path``, else removed.

    Raises UserError when ``path`` is a file or a folder that is not empty.
    """
    path = Path(path)
    refuse_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-{socket.gethostname()}-"
    _remove_leftovers(path.parent, prefix)
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove temporary folders whose process, on this host, was killed."""
    for folder in parent.glob(glob.escape(prefix) + "*"):
        number = folder.name.removeprefix(prefix)
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, and running
    return True


def refuse_occupied(path: Path) -> None:
    """Raise UserError when ``path`` is a file or a folder that is not empty."""
    if path.is_file():
        raise UserError(f"{path} is a file; give the path of a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} already holds something else; give a new folder, or remove it first")


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused, as JSON has neither."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str, what: str) -> dict[str, Any]:
    """Read a JSON object; ``what`` names it in the one-line error raised when it is absent or broken."""
    path = Path(path)
    return parse_json(path.read_bytes, str(path), what)


def parse_json(read: Callable[[], bytes], where: str, what: str) -> dict[str, Any]:
    """As :func:`read_json`, of the bytes that ``read`` brings from ``where``."""
    try:
        value = json.loads(read())
    except FileNotFoundError:
        raise UserError(f"{where} does not exist; expected {what}") from None
    except (OSError, ValueError, RecursionError) as error:  # what cannot be opened, decoded or parsed
        raise UserError(f"{where} is not readable as {what}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not {what}: a JSON object was expected")
    return value


def read_csv(path: Path | str, required: list[str]) -> list[dict[str, str]]:
    """Read a CSV with a header as rows of strings; every column of ``required`` must be there.

    Raises UserError for a missing file, a missing column, two columns of one name or a ragged row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}; expected a CSV file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(_without_nul(file))
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable as a CSV file in UTF-8: {error}") from None
    for column in required:
        if column not in header:
            raise UserError(f"{path} has no column '{column}'; its columns are: {', '.join(header) or 'none'}")
    twice = [column for column, n in Counter(header).items() if n > 1 and column]  # Excel leaves nameless ones
    if twice:
        raise UserError(f"{path} has two columns '{twice[0]}'; rename one of them")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path} line {number} does not have the header's {len(header)} fields")
    return rows


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a text; a NUL, which a path cannot hold, is an error."""
    for line in lines:
        if "\0" in line:
            raise csv.Error("it holds a NUL byte")
        yield line


def sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
