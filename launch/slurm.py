"""Submits a function as a SLURM job through submitit: one srun task a rank, requeued while it is to be continued.

Signals are kept to one: SLURM sends SIGTERM before the time limit as it does before a preemption, and the ranks get it
undisturbed. submitit's own checkpointing is not used: it would requeue from rank 0's signal handler while the other
ranks still save. Here the batch script requeues the job when every rank has ended. What the environment holds reaches
the job through SLURM and is written to no file of the job folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from eosin.data_tools.errors import TO_BE_CONTINUED, UserError
from eosin.launch.ranks import ORDERLY, Rank, joint_code


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM; what is None is left to the cluster's defaults.

    Attributes:
        folder: the script and the logs go here; on a disk that every node sees.
        time: limit as sbatch reads it (minutes, H:MM:SS, D-HH).
        mem: memory a node as sbatch reads it.
        setup: shell lines that run before the ranks.
        grace_s: seconds between SIGTERM and the time limit.
        max_requeues: how often the job may be started again; 0 is never.
    """

    folder: Path
    name: str = "eosin"
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    mem: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: tuple[str, ...] = ()
    grace_s: int = 120
    max_requeues: int = 20


class _Executor(submitit.SlurmExecutor):
    """submitit's executor, which also writes scripts where SLURM is absent."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def script(request: Request) -> str:
    """The sbatch script that ``submit`` would hand over."""
    executor = _executor(request)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def submit(rank: Rank, request: Request) -> submitit.Job[None]:
    """Submit ``rank``, a function that can be pickled, as a job of nodes x tasks_per_node tasks.

    Raises:
        UserError: there is no sbatch here, or it refused the job; the folder is then as it was.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine; log in where SLURM jobs are submitted, or add --dry-run")
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--job-dir {folder} is a file; give the path of a folder")
    existing = set(folder.iterdir()) if folder.is_dir() else None
    try:
        return _executor(request).submit(_run_task, rank)
    except FailedJobError as error:
        for path in set(folder.iterdir()) - (existing or set()):
            path.unlink()
        if existing is None:
            folder.rmdir()
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines() if line]
        raise UserError(f"sbatch refused the job: {'; '.join(lines)}") from None


def _executor(request: Request) -> _Executor:
    executor = _Executor(request.folder)
    first_node = 'scontrol show node "$SLURMD_NODENAME" | sed -n "s/.*NodeAddr=\\([^ ]*\\).*/\\1/p"'
    ranks = request.nodes * request.tasks_per_node
    settle = [sys.executable, "-m", "eosin.launch.slurm", executor.folder, ranks, request.max_requeues]
    executor.update_parameters(
        job_name=request.name,
        nodes=request.nodes,
        ntasks_per_node=request.tasks_per_node,
        cpus_per_task=request.cpus_per_task,
        gpus_per_node=request.gpus_per_node,
        partition=request.partition,
        time=request.time,
        mem=request.mem,
        account=request.account,
        qos=request.qos,
        stderr_to_stdout=True,
        additional_parameters={
            "signal": f"TERM@{request.grace_s}",
            ("requeue" if request.max_requeues else "no-requeue"): True,
        },
        setup=[
            *request.setup,
            f"export MASTER_ADDR=$({first_node})",
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{request.cpus_per_task}}}",
        ],
        # srun does not inherit --cpus-per-task from sbatch since SLURM 22.05.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={request.cpus_per_task}"],
        teardown=[f"{shlex.join(map(str, settle))} $?"],
    )
    return executor


def _run_task(rank: Rank) -> None:
    """What every srun task runs: the rank, as if nothing but torchrun's variables had started it."""
    for signum in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)  # submitit had taken them
    env = os.environ
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(int(env["SLURM_NTASKS"]) // int(env["SLURM_JOB_NUM_NODES"]))
    record = _record(Path(env["SUBMITIT_FOLDER"]), int(env["RANK"]))
    record.unlink(missing_ok=True)
    code = rank()
    record.write_text(str(code))
    if code not in ORDERLY:
        sys.exit(code)


def settle(folder: Path, ranks: int, max_requeues: int, srun_code: int) -> int:
    """Called by the batch script when every rank has ended: requeue the job if it is to be continued.

    Returns the job's exit code. srun's own is 0 for every orderly end, and tells only of the rank that was ended last
    otherwise; so each rank leaves its code in a file. Names are asked for one by one, since the listing of a network
    folder may lag behind.
    """
    records = [record for record in (_record(folder, rank) for rank in range(ranks)) if record.is_file()]
    code = joint_code(int(record.read_text()) for record in records)
    for record in records:
        record.unlink()
    if srun_code and code in ORDERLY:
        return srun_code  # a signal ended a rank before it could leave its code
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if code == TO_BE_CONTINUED and restarts < max_requeues:
        print(f"eosin: saved; requeued for the {restarts + 1}. time of at most {max_requeues}", flush=True)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return code


def _record(folder: Path, rank: int) -> Path:
    return folder / f"{os.environ['SLURM_JOB_ID']}_{rank}_code"


if __name__ == "__main__":
    sys.exit(settle(Path(sys.argv[1]), *map(int, sys.argv[2:])))
