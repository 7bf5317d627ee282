"""Runs a function on several ranks of this machine (and of others started alike) under PyTorch's elastic agent.

What is added to the agent is the ranks' own exit code, and time to save: SIGTERM goes to every rank and the agent goes
on waiting, where ``torchrun`` kills the ranks 30 seconds later and exits with 1. Ranks are never started again here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from types import FrameType

from eosin.launch.ranks import ORDERLY, TOGETHER, Rank, joint_code


def torchrun(rank: Rank, nproc: int, nnodes: int = 1, node_rank: int = 0, rendezvous: str = "") -> int:
    """Run ``rank`` in ``nproc`` processes here and return their joint exit code.

    A failing rank ends the others and gives its own code, 128 + the signal's number if a signal ended it.

    Args:
        rank: can be pickled. It finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment.
        nnodes: number of machines; each runs this with the same ``rendezvous``.
        node_rank: this machine's number, from 0.
        rendezvous: ``HOST:PORT``, a free port of machine 0; not used for one machine.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Libraries read this while they are imported, hence before the ranks start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # A rank prints its own error; the agent would repeat it with a traceback of the agent.
    logging.disable(logging.ERROR)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, _tell_ranks)
    one_machine = nnodes == 1
    with tempfile.TemporaryDirectory(prefix="eosin-torchrun-") as folder, tempfile.TemporaryDirectory() as together:
        os.environ[TOGETHER] = together
        config = LaunchConfig(
            min_nodes=nnodes,
            max_nodes=nnodes,
            nproc_per_node=nproc,
            run_id="eosin",
            rdzv_backend="c10d" if one_machine else "static",
            rdzv_endpoint="localhost:0" if one_machine else rendezvous,
            rdzv_configs={} if one_machine else {"rank": node_rank},
            local_addr="localhost" if one_machine else None,
            max_restarts=0,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            codes = elastic_launch(config, _orderly)(rank)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as stopped:
            return 128 + stopped.sigval
    return joint_code(codes.values())


def _orderly(rank: Rank) -> int:
    """Return an orderly exit code, which lets the other ranks go on; leave with any other, which ends them."""
    code = rank()
    if code not in ORDERLY:
        sys.exit(code)
    return code


def _tell_ranks(signum: int, frame: FrameType | None) -> None:
    ranks = multiprocessing.active_children()
    if not ranks:
        sys.exit(128 + signum)
    for rank in ranks:
        rank.terminate()  # SIGTERM, which a verb answers by saving
