"""Jobs on a real SLURM of two nodes: what ranks are told, how their codes come back, and what a signal leads to."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from eosin.data_tools.errors import UserError
from eosin.launch.slurm import Request, script, settle, submit

# A job cannot import this file, so its functions travel whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

TWO_NODES = {"nodes": 2, "partition": "low", "time": "5"}


def log(folder: Path, rank: int = 0) -> str:
    [path] = folder.glob(f"*_{rank}_log.out")
    return path.read_text()


# The ranks of the jobs below.


def tell(folder: Path) -> int:
    """Write down what this rank was told, and let rank 1 reach rank 0 under the told address."""
    ssl.create_default_context()
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    told = {name: os.environ[name] for name in names} | {"node": os.environ["SLURMD_NODENAME"], "ssl": ssl.__file__}
    address = (told["MASTER_ADDR"], int(told["MASTER_PORT"]))
    if told["RANK"] == "0":
        with socket.create_server(("", address[1])) as server:
            server.settimeout(20)
            server.accept()[0].sendall(b"hello from 0")
    else:
        for _ in range(200):
            try:
                with socket.create_connection(address) as connection:
                    told["heard"] = connection.recv(64).decode()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
    (folder / f"{told['RANK']}.json").write_text(json.dumps(told))
    return 0


def leave(codes: tuple[int | str, int | str]) -> int:
    """Leave with this rank's code; "hang" never leaves, "kill" ends as if memory had run out."""
    code = codes[int(os.environ["RANK"])]
    if code == "hang":
        Path(os.environ["SUBMITIT_FOLDER"], f"hanging-{os.environ['RANK']}").touch()
        time.sleep(600)
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(code)


def count(folder: Path, until: int = 10_000) -> int:
    """Count, a tenth of a second each, or at once when continuing. Save when told, rank 1 two seconds late."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: told.append(signum))
    rank = os.environ["RANK"]
    saved = folder / f"count-{rank}"
    done, pause = (int(saved.read_text()), 0.0) if saved.exists() else (0, 0.1)
    (folder / f"running-{rank}").touch()
    while done < until:
        time.sleep(pause)
        done += 1
        if told:
            time.sleep(2 * int(rank))
            saved.write_text(str(done))
            return 75
    with (folder / f"finished-{rank}").open("a") as file:
        file.write(f"{done}\n")
    return 0


def submit_counting(folder: Path, **request: object) -> str:
    """Submit ``count`` on two nodes and wait until both ranks are counting."""
    folder.mkdir()
    job = submit(functools.partial(count, folder), Request(folder / "job", **(TWO_NODES | request)))  # type: ignore[arg-type]
    wait_for(folder / "running-0", folder / "running-1")
    return job.job_id


def wait_for(*paths: Path) -> None:
    for _ in range(1000):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{paths} did not appear")


@pytest.mark.slow
def test_ranks_are_told_who_they_are_and_reach_each_other(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_the_environment")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = submit(functools.partial(tell, tmp_path), Request(tmp_path / "job", cpus_per_task=2, **TWO_NODES))
    assert slurm.wait(job.job_id, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(tmp_path / "job")
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [t["RANK"] for t in told] == ["0", "1"]
    assert [t["node"] for t in told] == ["n1", "n2"]
    assert [(t["WORLD_SIZE"], t["LOCAL_RANK"], t["LOCAL_WORLD_SIZE"]) for t in told] == [("2", "0", "1")] * 2
    assert [t["OMP_NUM_THREADS"] for t in told] == ["2", "2"]
    assert told[1]["heard"] == "hello from 0"
    assert Path(told[0]["ssl"]) == Path(ssl.__file__)
    for path in (tmp_path / "job").iterdir():
        assert b"hf_a_secret" not in path.read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "exit_code"),
    [
        ((0, 3), "3:0"),
        ((2, 2), "2:0"),
        (("hang", 2), "2:0"),
        (("hang", "kill"), "143:0"),  # srun tells of the rank that it ended
    ],
)
def test_the_job_ends_with_the_ranks_code(slurm, tmp_path, codes, exit_code):
    job = submit(functools.partial(leave, codes), Request(tmp_path, **TWO_NODES))
    assert slurm.wait(job.job_id, "COMPLETED", "FAILED")["ExitCode"] == exit_code, log(tmp_path)
    assert not list(tmp_path.glob("*_code"))


@pytest.mark.slow
def test_a_rank_that_does_not_save_ends_when_told(slurm, tmp_path):
    job = submit(functools.partial(leave, ("hang", "hang")), Request(tmp_path, **TWO_NODES))
    wait_for(tmp_path / "hanging-0", tmp_path / "hanging-1")
    subprocess.run(["scancel", "--signal=TERM", job.job_id], check=True)
    ended = slurm.wait(job.job_id, "COMPLETED", "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("143:0", "0")


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_is_requeued_once_every_rank_has_saved(slurm, tmp_path):
    # SLURM counts limits in minutes, looks every 30 seconds, and warns up to a minute early.
    job_id = submit_counting(tmp_path / "limit", time="1", grace_s=59)
    ended = slurm.wait(job_id, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log(tmp_path / "limit/job")
    assert "eosin: saved; requeued" in log(tmp_path / "limit/job")
    for rank in (0, 1):
        assert 0 < int((tmp_path / f"limit/count-{rank}").read_text()) < 10_000
        assert (tmp_path / f"limit/finished-{rank}").read_text() == "10000\n"


@pytest.mark.slow
def test_a_preempted_job_saves_and_continues_once(slurm, tmp_path):
    job_id = submit_counting(tmp_path / "preempted")
    subprocess.run(["srun", "--partition=high", "--nodes=2", "--exclusive", "true"], check=True, timeout=60)
    assert slurm.wait(job_id, "COMPLETED", "FAILED")["Restarts"] == "1"
    for rank in (0, 1):
        assert 0 < int((tmp_path / f"preempted/count-{rank}").read_text()) < 10_000
        assert (tmp_path / f"preempted/finished-{rank}").read_text() == "10000\n"


@pytest.mark.slow
def test_a_canceled_job_saves_and_stays_canceled(slurm, tmp_path):
    job_id = submit_counting(tmp_path / "canceled")
    subprocess.run(["scancel", job_id], check=True)
    wait_for(tmp_path / "canceled/count-0", tmp_path / "canceled/count-1")
    time.sleep(2)
    job = slurm.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_a_refused_job_is_one_line_and_leaves_nothing(slurm, tmp_path):
    with pytest.raises(UserError, match=r"sbatch refused the job: .*invalid partition") as raised:
        submit(functools.partial(leave, (0, 0)), Request(tmp_path / "job", partition="nowhere"))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_dry_run_is_the_script_that_is_submitted(slurm, tmp_path):
    request = Request(tmp_path / "a job", setup=("export GREETING='good morning'",), partition="low")
    written = script(request)
    job = submit(functools.partial(leave, (0,)), request)
    slurm.wait(job.job_id, "COMPLETED")
    submitted = (tmp_path / "a job" / f"{job.job_id}_submission.sh").read_text()
    assert submitted == written


# What needs no SLURM.


def test_the_script_asks_for_what_was_requested(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    text = script(
        Request(
            tmp_path,
            name="eosin-train",
            nodes=2,
            tasks_per_node=4,
            cpus_per_task=8,
            gpus_per_node=4,
            partition="gpu",
            time="12:00:00",
            mem="64G",
            account="lab",
            qos="long",
            setup=("module load cuda",),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert asked >= {
        "job-name=eosin-train",
        "nodes=2",
        "ntasks-per-node=4",
        "cpus-per-task=8",
        "gpus-per-node=4",
        "partition=gpu",
        "time=12:00:00",
        "mem=64G",
        "account=lab",
        "qos=long",
        "signal=TERM@120",
        "requeue",
    }
    [srun] = [i for i, line in enumerate(lines) if line.startswith("srun ")]
    assert lines.index("module load cuda") < srun
    assert " --cpus-per-task=8 " in lines[srun]
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "no-requeue" in script(Request(tmp_path, max_requeues=0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("records", "srun_code", "restarts", "code", "requeued"),
    [
        ([0, 0], 0, 0, 0, False),
        ([3, 75], 0, 0, 75, True),
        ([75, 75], 0, 2, 75, False),
        ([75, 1], 143, 0, 1, False),
        ([2, 1], 2, 0, 1, False),
        ([75], 137, 0, 137, False),
    ],
)
def test_settling_the_ranks_codes(tmp_path, monkeypatch, records, srun_code, restarts, code, requeued):
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    for rank, record in enumerate(records):
        (tmp_path / f"17_{rank}_code").write_text(str(record))
    assert settle(tmp_path, ranks=2, max_requeues=2, srun_code=srun_code) == code
    assert (tmp_path / "called").exists() == requeued
    assert not list(tmp_path.glob("*_code"))
