"""One rank of a verb, whoever started it, and what the exit codes of several ranks mean together."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from eosin.data_tools.errors import BUG, DONE, DONE_WITH_REFUSALS, TO_BE_CONTINUED, USER_ERROR

# A rank that ends with one of these did its work and the others go on; with any other the whole group ends.
ORDERLY = (DONE, DONE_WITH_REFUSALS, TO_BE_CONTINUED)

Rank = Callable[[], int]

TOGETHER, SAID = "EOSIN_RANKS", "said"  # variable that names a folder which the ranks of a machine share
PATIENCE = 5.0  # seconds in which a rank that left says why
LEFT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's words, when a rank left


def run_verb(argv: list[str]) -> int:
    """Run ``eosin ARGV`` in this process and return its exit code, whichever way it ends."""
    from eosin.launch.cli import main

    try:
        return main(argv)
    except SystemExit as stopped:  # argparse leaves this way
        return stopped.code if isinstance(stopped.code, int) else USER_ERROR if stopped.code else DONE
    except Exception as error:
        if _left_alone(error):
            return USER_ERROR
        traceback.print_exc()
        return BUG


def first_to_say() -> bool:
    """Whether no rank of this machine has said yet why the group ends; the first one's line is enough."""
    folder = os.environ.get(TOGETHER)
    if folder is None:
        return True
    try:
        (Path(folder) / SAID).touch(exist_ok=False)
    except FileExistsError:
        return False
    except FileNotFoundError:  # the launcher is gone, and its folder
        return True
    return True


def _left_alone(error: Exception) -> bool:
    """Whether ``error`` only means that another rank of this machine left, which says why in a line of its own."""
    folder = os.environ.get(TOGETHER)
    if folder is None or not isinstance(error, RuntimeError) or not any(words in str(error) for words in LEFT):
        return False
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (Path(folder) / SAID).exists():
            return True
        time.sleep(0.05)
    return False


def joint_code(codes: Iterable[int]) -> int:
    """The exit code of a group: a failure before everything else, then 75, then 3, then 0.

    Of several failures the lowest counts, so that a bug (1) is not hidden by bad input (2).
    """
    codes = list(codes)
    failures = [code for code in codes if code not in ORDERLY]
    return min(failures) if failures else max(codes, default=DONE)
