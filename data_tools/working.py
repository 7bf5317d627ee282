"""The folder of a long job before it is done: held by one process, tied to its settings, finished by one rename.

    OUT.unfinished/
      settings.json    what the work is; another job's is refused
      .lock            held by flock, so that no two processes work on one output

What a killed process leaves here is what the same command goes on from.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, refuse_occupied, sync, write_json

SETTINGS, LOCK = "settings.json", ".lock"


@contextlib.contextmanager
def working_folder(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Hold the folder in which ``out`` is made; it stays where the work stops, and :func:`publish` ends it.

    Raises UserError where ``out`` is taken, another process works on it, or work of other settings lies there. A job
    that ends with a UserError leaves nothing.
    """
    refuse_occupied(out)
    folder = out.with_name(f"{out.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is making {out}; wait for it, or give another --out") from None
        if (folder / SETTINGS).exists():
            there = read_json(folder / SETTINGS, "the settings of unfinished work")
            if there != settings:
                differs = difference(there, settings)
                raise UserError(
                    f"{folder} holds unfinished work of other settings ({differs}); give the same command to finish "
                    "it, or remove it"
                )
        else:
            write_json(folder / SETTINGS, settings)
        for leftover in folder.rglob(".*.partial-*"):  # of atomic_path in a process that was killed
            leftover.unlink()
        try:
            yield folder
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def publish(folder: Path, out: Path) -> None:
    """Give finished work its name, once all of it is on the disk."""
    for file in sorted(folder.rglob("*")):
        sync(file)
    folder.rename(out)
    sync(out.parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove from finished work what only unfinished work needs; a kill may have left it."""
    for name in (SETTINGS, LOCK):
        (out / name).unlink(missing_ok=True)


def difference(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    name = next(k for k in sorted({*there, *asked}) if there.get(k) != asked.get(k))
    return f"{name}: {there.get(name)!r} there, {asked.get(name)!r} asked"
