"""One rank of a verb, whoever started it, and what the exit codes of several ranks mean together."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable

from eosin.data_tools.errors import BUG, DONE, DONE_WITH_REFUSALS, TO_BE_CONTINUED, USER_ERROR

# A rank that ends with one of these did its work and the others go on; with any other the whole group ends.
ORDERLY = (DONE, DONE_WITH_REFUSALS, TO_BE_CONTINUED)

Rank = Callable[[], int]


def run_verb(argv: list[str]) -> int:
    """Run ``eosin ARGV`` in this process and return its exit code, whichever way it ends."""
    from eosin.launch.cli import main

    try:
        return main(argv)
    except SystemExit as stopped:  # argparse leaves this way
        return stopped.code if isinstance(stopped.code, int) else USER_ERROR if stopped.code else DONE
    except Exception:
        traceback.print_exc()
        return BUG


def joint_code(codes: Iterable[int]) -> int:
    """The exit code of a group: a failure before everything else, then 75, then 3, then 0.

    Of several failures the lowest counts, so that a bug (1) is not hidden by bad input (2).
    """
    codes = list(codes)
    failures = [code for code in codes if code not in ORDERLY]
    return min(failures) if failures else max(codes, default=DONE)
