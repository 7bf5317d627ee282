"""``eosin launch``: its arguments, and ranks under torchrun as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from eosin.data_tools.errors import USER_ERROR
from eosin.launch.cli import main
from eosin.launch.ranks import joint_code, run_verb

RANKS = """
import json, os, signal, sys, time
from pathlib import Path

def tell(folder):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    told = {"sum": total.item(), "world": dist.get_world_size()}
    dist.destroy_process_group()
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    return 0

def leave(folder, *codes):
    code = codes[int(os.environ["RANK"])]
    if code == "hang":
        Path(folder, "hanging").write_text(str(os.getpid()))
        time.sleep(600)
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if code == "late 0":
        time.sleep(2)
        code = 0
    Path(folder, f"left-{os.environ['RANK']}").write_text(os.environ["OMP_NUM_THREADS"])
    return code

def save(folder):
    rank, told = int(os.environ["RANK"]), []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    Path(folder, f"running-{rank}").touch()
    while not told:
        time.sleep(0.1)
    time.sleep(2 * rank)
    Path(folder, f"saved-{rank}").touch()
    return 75
"""


def start(folder: Path, call: str, **options: object) -> subprocess.Popen[str]:
    """Start a launcher of ``call``, an expression of the ranks above, as a process."""
    (folder / "ranks_of_the_test.py").write_text(RANKS)
    launcher = folder / f"launcher-{options.get('node_rank', 0)}.py"
    launcher.write_text(
        textwrap.dedent(f"""
            import functools, sys, ranks_of_the_test as ranks
            from eosin.launch.torchrun import torchrun
            if __name__ == "__main__":
                sys.exit(torchrun(functools.partial({call}), **{options!r}))
            """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, str(launcher)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def wait_for(*paths: Path) -> None:
    for _ in range(1000):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{paths} did not appear")


@pytest.mark.slow
def test_two_machines_are_one_group(tmp_path, free_port):
    call, rendezvous = f"ranks.tell, {str(tmp_path)!r}", f"127.0.0.1:{free_port}"
    machines = [start(tmp_path, call, nproc=1, nnodes=2, node_rank=node, rendezvous=rendezvous) for node in (0, 1)]
    for machine in machines:
        output, _ = machine.communicate(timeout=200)
        assert machine.returncode == 0, output
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.json").read_text() == '{"sum": 3.0, "world": 2}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "exit_code"),
    [
        (("late 0", 3), 3),
        (("hang", 2), 2),
        (("hang", "kill"), 137),
    ],
)
def test_the_launcher_leaves_with_the_ranks_code(tmp_path, codes, exit_code):
    launcher = start(tmp_path, f"ranks.leave, {str(tmp_path)!r}, *{codes!r}", nproc=2)
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == exit_code, output
    assert "Traceback" not in output
    if codes[0] == "late 0":  # a rank that refused something does not end the other
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        assert (tmp_path / "left-0").read_text() == str(threads)
    if (tmp_path / "hanging").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "hanging").read_text()), 0)


@pytest.mark.slow
def test_a_launcher_told_to_end_waits_for_its_ranks_to_save(tmp_path):
    launcher = start(tmp_path, f"ranks.save, {str(tmp_path)!r}", nproc=2)
    wait_for(tmp_path / "running-0", tmp_path / "running-1")
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 75, output
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("local", "there is no verb after --"),
        ("local -- trian", "did you mean 'train'?"),
        ("local -- launch local -- train", "'launch' cannot be launched"),
        ("torchrun --nproc 0 -- train", "--nproc is 0; it must be at least 1"),
        ("torchrun --nproc 1 --nnodes 2 -- train", "--nnodes 2 needs --rdzv HOST:PORT"),
        ("torchrun --nproc 1 --nnodes 2 --node-rank 2 --rdzv h:1 -- train", "--node-rank 2 is not a machine"),
        ("slurm --job-dir jobs --nodes 0 -- train", "--nodes is 0; it must be at least 1"),
        ("slurm --job-dir jobs -- train", "sbatch is not on this machine"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["launch", *arguments.split()]) == USER_ERROR
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_a_script_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    options = ["--job-dir", "jobs", "--gpus-per-node", "4", "--setup", "module load cuda", "--dry-run"]
    assert main(["launch", "slurm", *options, "--", "train", "demo", "--unknown-to-launch", "--", "x"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --ntasks-per-node=4\n" in script
    assert "\nmodule load cuda\n" in script
    assert list(tmp_path.iterdir()) == []


def test_local_gives_the_verb_all_that_follows(monkeypatch):
    import eosin.launch.cli as cli
    from eosin.launch import launchers

    given = []
    monkeypatch.setattr(cli, "main", lambda argv: given.append(argv) or 3)
    import argparse

    parser = argparse.ArgumentParser()
    launchers.add_arguments(parser)
    args = parser.parse_args(["local", "--", "train", "demo", "run.dir=x", "--flag", "--", "-y"])
    assert launchers.main(args) == 3
    assert given == [["train", "demo", "run.dir=x", "--flag", "--", "-y"]]


@pytest.mark.parametrize(
    ("codes", "joint"),
    [([0, 0], 0), ([0, 3], 3), ([3, 75, 0], 75), ([75, 2], 2), ([2, 1, 75], 1), ([143, 0], 143), ([], 0)],
)
def test_joint_code(codes, joint):
    assert joint_code(codes) == joint


def test_a_rank_has_a_code_however_its_verb_ends(monkeypatch, capsys):
    import eosin.launch.cli as cli

    def ends(how):
        def verb(argv):
            raise how

        return verb

    for how, code in ((SystemExit(2), 2), (SystemExit(None), 0), (SystemExit("bad"), 2), (ValueError("bug"), 1)):
        monkeypatch.setattr(cli, "main", ends(how))
        assert run_verb(["train"]) == code
    assert "ValueError: bug" in capsys.readouterr().err
