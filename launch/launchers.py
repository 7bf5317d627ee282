"""The verb ``eosin launch``: runs any other verb here, on several processes, or as a SLURM job.

A verb does not know who started it: every launcher gives each rank RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, tells it to save with SIGTERM, and passes its exit code on.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from pathlib import Path

from eosin.data_tools.errors import DONE, UserError, nearest
from eosin.launch.ranks import Rank, run_verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the launchers ``local``, ``torchrun`` and ``slurm`` to the parser of ``eosin launch``."""
    parser.epilog = (
        "example:\n  eosin launch torchrun --nproc 2 -- train demo data.shards=shards run.dir=run\n\n"
        "Each launcher explains itself: eosin launch slurm --help"
    )
    launchers = parser.add_subparsers(dest="launcher", required=True, metavar="local|torchrun|slurm")

    def launcher(name: str, needs: str, summary: str, example: str) -> argparse.ArgumentParser:
        return launchers.add_parser(
            name,
            help=summary,
            description=summary,
            usage=f"eosin launch {name}{needs} [options] -- VERB ...",
            epilog=f"example: eosin launch {name} {example}",
            formatter_class=parser.formatter_class,
        )

    local = launcher("local", "", "run a verb in this process", "-- verify shards")
    torchrun = launcher(
        "torchrun",
        " --nproc N",
        "run a verb on several processes of this machine",
        "--nproc 2 -- train demo data.shards=shards run.dir=run",
    )
    torchrun.add_argument("--nproc", type=int, required=True, metavar="N", help="processes here, one per GPU")
    torchrun.add_argument("--nnodes", type=int, default=1, metavar="K", help="machines in all")
    torchrun.add_argument("--node-rank", type=int, default=0, metavar="R", help="this machine's number, from 0")
    torchrun.add_argument("--rdzv", metavar="HOST:PORT", help="a free port of machine 0")

    slurm = launcher(
        "slurm",
        " --job-dir DIR",
        "submit a verb as a SLURM job; what is saved before a time limit is requeued and continues",
        "--nodes 2 --gpus-per-node 8 --time 24:00:00 --job-dir jobs -- train demo data.shards=shards run.dir=run",
    )
    slurm.add_argument("--job-dir", type=Path, required=True, metavar="DIR", help="script and logs, on a shared disk")
    slurm.add_argument("--nodes", type=int, default=1, metavar="N")
    slurm.add_argument("--gpus-per-node", type=int, metavar="N")
    slurm.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks a node: one per GPU unless given")
    slurm.add_argument("--cpus-per-task", type=int, default=1, metavar="N")
    slurm.add_argument("--partition")
    slurm.add_argument("--time", metavar="LIMIT", help="minutes, H:MM:SS or D-HH")
    slurm.add_argument("--mem", metavar="SIZE", help="memory a node, such as 64G")
    slurm.add_argument("--account")
    slurm.add_argument("--qos")
    slurm.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line before it; repeatable")
    slurm.add_argument("--grace", type=int, default=120, metavar="S", help="seconds to save in before the time limit")
    slurm.add_argument("--max-requeues", type=int, default=20, metavar="N", help="0: never start the job again")
    slurm.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")

    for each in (local, torchrun, slurm):
        each.add_argument("argv", nargs="*", metavar="VERB", help="the verb and its arguments, after --")


def main(args: argparse.Namespace) -> int:
    """Run ``args.argv`` under ``args.launcher``; return the verb's exit code, or 0 for a submitted job."""
    _check_verb(args.argv)
    if args.launcher == "local":
        from eosin.launch.cli import main as run

        return run(args.argv)
    rank = functools.partial(run_verb, args.argv)
    if args.launcher == "torchrun":
        _check_torchrun(args)
        from eosin.launch.torchrun import torchrun

        return torchrun(rank, args.nproc, args.nnodes, args.node_rank, args.rdzv or "")
    return _slurm(rank, args)


def _slurm(rank: Rank, args: argparse.Namespace) -> int:
    from eosin.launch import slurm

    tasks = args.tasks_per_node if args.tasks_per_node is not None else args.gpus_per_node or 1
    _at_least(1, nodes=args.nodes, tasks_per_node=tasks, cpus_per_task=args.cpus_per_task)
    _at_least(0, gpus_per_node=args.gpus_per_node or 0, grace=args.grace, max_requeues=args.max_requeues)
    request = slurm.Request(
        folder=args.job_dir,
        name=f"eosin-{args.argv[0]}",
        nodes=args.nodes,
        tasks_per_node=tasks,
        cpus_per_task=args.cpus_per_task,
        gpus_per_node=args.gpus_per_node,
        partition=args.partition,
        time=args.time,
        mem=args.mem,
        account=args.account,
        qos=args.qos,
        setup=tuple(args.setup),
        grace_s=args.grace,
        max_requeues=args.max_requeues,
    )
    if args.dry_run:
        print(slurm.script(request))
        return DONE
    job = slurm.submit(rank, request)
    print(f"job {job.job_id} submitted: 'eosin {shlex.join(args.argv)}' on {args.nodes} x {tasks} ranks")
    print(f"logs: {job.paths.folder}/{job.job_id}_RANK_log.out")
    print(f"state: squeue -j {job.job_id}; end it: scancel {job.job_id}")
    return DONE


def _check_verb(argv: list[str]) -> None:
    from eosin.launch.cli import VERBS

    verbs = [verb for verb in VERBS if verb != "launch"]
    if not argv:
        raise UserError(f"there is no verb after --; give one of: {', '.join(verbs)}")
    if argv[0] not in verbs:
        raise UserError(f"'{argv[0]}' cannot be launched; {nearest(argv[0], verbs)}")


def _check_torchrun(args: argparse.Namespace) -> None:
    _at_least(1, nproc=args.nproc, nnodes=args.nnodes)
    if not 0 <= args.node_rank < args.nnodes:
        raise UserError(f"--node-rank {args.node_rank} is not a machine of --nnodes {args.nnodes}; they count from 0")
    if args.nnodes > 1 and not re.fullmatch(r"\S+:\d+", args.rdzv or ""):
        raise UserError(f"--nnodes {args.nnodes} needs --rdzv HOST:PORT, an address of machine 0; got {args.rdzv}")


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
