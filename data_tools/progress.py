"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0


def progress(items: Iterable[T], *, total: int, desc: str, unit: str, start: int = 0) -> Iterator[T]:
    """Iterate over ``items`` and show how far it is.

    Args:
        total: number of items when all is done, ``start`` included.
        start: items that an earlier run had done already.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, initial=start, desc=desc, unit=f" {unit}", dynamic_ncols=True)
        return
    began = said = time.monotonic()
    done = start
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES or done == total:
            said = now
            rate = (done - start) / max(now - began, 1e-9)
            left = (total - done) / max(rate, 1e-9)
            print(f"{desc}: {done}/{total} {unit}, {rate:.3g} {unit}/s, {_clock(left)} left", file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
