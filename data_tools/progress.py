"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0


def progress(
    items: Iterable[T],
    *,
    total: int,
    desc: str,
    unit: str,
    start: int = 0,
    status: Callable[[], str] = str,
) -> Iterator[T]:
    """Iterate over ``items`` and show how far it is.

    Args:
        total: number of items when all is done, ``start`` included.
        start: items that an earlier run had done already.
        status: called for a few words to show beside the rate, e.g. the current loss.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(items, total=total, initial=start, desc=desc, unit=f" {unit}", dynamic_ncols=True)
        for item in bar:
            yield item
            bar.set_postfix_str(status(), refresh=False)
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
            parts = [f"{done}/{total} {unit}", f"{rate:.3g} {unit}/s", f"{_clock(left)} left", status()]
            print(f"{desc}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
