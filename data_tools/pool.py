"""Work on many inputs in processes: results in order, memory that does not grow, and no harm from one that crashes.

Processes, since threads gave nothing in reading slides. This module knows nothing of what the work is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2

# Jobs a process may be ahead of the oldest unfinished one, so that a long one is not waited for.
AHEAD = 32


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_each(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, ahead: int = AHEAD
) -> Generator[Any, None, None]:
    """Results of ``function`` for each job, in order, from a pool of processes.

    ``ahead`` times ``workers`` results are kept at most; give less than the default where they are large.
    Where a job kills its process (a decoder's crash, memory) its result is the string of the reason. A job may be run
    again after another one's crash, so ``function`` must bear that.
    """
    todo = list(jobs)
    if min(workers, len(todo)) <= 1:
        yield from map(function, todo)
        return
    while todo:
        done = 0
        with _pool(min(workers, len(todo))) as pool:
            try:
                for result in _in_order(pool, function, todo, ahead * workers):
                    yield result
                    done += 1
            except BrokenProcessPool:
                pass
            except BaseException:
                for process in multiprocessing.active_children():
                    process.kill()  # nobody waits for what they are at
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        todo = todo[done:]
        if todo:
            # Which job it was is not known; the first of the rest runs alone, and if it was another, that comes later.
            with _pool(1) as pool:
                try:
                    result = pool.submit(function, todo.pop(0)).result()
                except BrokenProcessPool:
                    result = "reading it killed the process"
            yield result


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], jobs: list[Any], most: int
) -> Generator[Any, None, None]:
    waiting: deque[Any] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fork is unsafe once a library has started threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job, they are for the parent
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    # A killed parent would leave its workers waiting forever.
    threading.Thread(target=follow, daemon=True).start()
