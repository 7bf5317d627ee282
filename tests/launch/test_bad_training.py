"""What a user can get wrong, or a machine do, while training: one line, whichever rank says it, and nothing lost."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from eosin.launch.cli import main
from eosin.launch.ranks import TOGETHER, first_to_say, run_verb
from eosin.ssl import checkpoint

PLAIN = ["health.pictures_every=0", "run.checkpoint_every=2"]


@pytest.fixture
def settings(tiny_recipe, tiny_shards, tmp_path):
    """Arguments of a run on a copy of the tiny shard set."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    return ["train", *tiny_recipe, f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", *PLAIN]


def by_two(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and what two processes say on stderr, without progress."""
    command = [sys.executable, "-m", "eosin.launch", "launch", "torchrun", "--nproc", "2", "--", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    return ran.returncode, [line for line in ran.stderr.splitlines() if line and not line.startswith("train: ")]


def complaint(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(said.startswith("train: ") for said in progress)
    return line


def spoil(shards: Path) -> None:
    for tar in shards.glob("*.tar"):
        os.truncate(tar, 0)


def spoil_after(records: int, run: Path, shards: Path) -> None:
    """Take the tiles away once a run has written some records."""
    end = time.monotonic() + 150
    while time.monotonic() < end:
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= records:
            spoil(shards)
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_said_once(settings, tmp_path):
    code, said = by_two(*settings, "data.batch=7")
    assert code == 2
    assert len(said) == 1
    assert "data.batch 7 does not divide by 2 processes" in said[0]
    assert said[0].endswith("the nearest that does is 8")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_where_another_trains_is_said_once(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, said = by_two(*settings)
    assert (code, len(said)) == (2, 1)
    assert "another process is training in" in said[0]
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # the other's


@pytest.mark.slow
def test_tiles_that_vanish_end_two_processes_in_one_line_and_the_run_goes_on(settings, tiny_shards, tmp_path):
    run, shards = tmp_path / "run", tmp_path / "shards"
    watch = threading.Thread(target=spoil_after, args=(3, run, shards))
    watch.start()
    code, said = by_two(*settings, "run.steps=60", "run.strategy=fsdp")
    watch.join()
    assert (code, len(said)) == (2, 1), said
    assert "tiles" in said[0]
    done = checkpoint.step_of(checkpoint.latest(run))
    assert 2 <= done < 60
    assert not list((run / "checkpoints").glob(".*"))
    shutil.copytree(tiny_shards, shards, dirs_exist_ok=True)
    assert main([*settings, "run.steps=60", "run.strategy=fsdp"]) == 0
    assert checkpoint.step_of(checkpoint.latest(run)) == 60


def test_tiles_that_vanish_end_a_run_in_one_line(settings, tiny_shards, tmp_path, capsys, monkeypatch):
    from eosin.ssl.log import Log

    write, run, shards = Log.write, tmp_path / "run", tmp_path / "shards"

    def write_and_spoil(self, done, *rest):
        write(self, done, *rest)
        if done == 5:
            spoil(shards)

    monkeypatch.setattr(Log, "write", write_and_spoil)
    line = complaint(capsys, settings)
    assert str(shards) in line
    assert [f.name for f in checkpoint.steps(run)] == ["step-00000002", "step-00000004"]
    assert not (run / ".lock").exists()
    monkeypatch.undo()
    shutil.copytree(tiny_shards, shards, dirs_exist_ok=True)
    assert main(settings) == 0
    assert checkpoint.latest(run).name == "step-00000008"


@pytest.mark.parametrize(("key", "value"), [("depth", 1), ("depth", 3), ("embed_dim", 96)])
def test_a_checkpoint_of_another_network_is_refused(settings, tmp_path, capsys, key, value):
    run = tmp_path / "run"
    settings = [*settings, "run.steps=2"]
    assert main(settings) == 0
    # The run's settings are compared first; whoever edits them meets the weights.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["args"][key] = value
    config["run"]["steps"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(p for p in run.rglob("*"))
    line = complaint(capsys, [*settings, f"model.args.{key}={value}", "run.steps=3"])
    assert "step-00000002 is of another network: its student.backbone" in line
    assert sorted(p for p in run.rglob("*")) == before


def test_a_missing_gpu_leaves_nothing(settings, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no GPU is visible" in complaint(capsys, [*settings, "run.device=cuda"])
    assert not (tmp_path / "run").exists()


def test_what_is_refused_leaves_a_finished_run_as_it_was(tiny_run, tiny_recipe, tiny_shards, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / ".lock").unlink(missing_ok=True)
    state = checkpoint.latest(run) / ".metadata"
    state.write_bytes(state.read_bytes()[:-1])
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    line = complaint(capsys, ["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}"])
    assert "missing or damaged" in line
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_one_of_several_ranks_says_a_line(tmp_path, monkeypatch, capsys):
    assert [first_to_say(), first_to_say()] == [True, True]  # alone
    monkeypatch.setenv(TOGETHER, str(tmp_path))
    assert [run_verb(["nonsense"]), run_verb(["other"])] == [2, 2]
    assert not first_to_say()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:1"), 2, 0),
        (RuntimeError("a bug"), 1, 1),
        (ValueError("Connection closed by peer"), 1, 1),
    ],
)
def test_a_rank_that_was_left_is_silent_when_another_says_why(error, code, lines, tmp_path, monkeypatch, capsys):
    from eosin.launch import cli

    def left(argv):
        raise error

    monkeypatch.setattr(cli, "main", left)
    monkeypatch.setenv(TOGETHER, str(tmp_path))
    first_to_say()
    assert run_verb([]) == code
    assert ("Traceback" in capsys.readouterr().err) == bool(lines)
