import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as saver
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eosin.launch.cli import main
from eosin.ssl import checkpoint


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def train(run, tiny_shards, tiny_recipe):
    """Arguments that continue it."""
    return ["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}"]


def complaint(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(said.startswith("train: ") for said in progress)
    return line


def names(run):
    return [folder.name for folder in checkpoint.steps(run)]


def content(folder, tmp_path):
    """All tensors of a checkpoint by torch's own reader."""
    dcp_to_torch_save(folder, tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=False)
    moments = {(n, k): v for n, each in state["optimizer"]["state"].items() for k, v in each.items()}
    return state["model"] | moments


def parts_of(state, prefix):
    return {name: value for name, value in state.items() if str(name).startswith(prefix)}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", checkpoint.TEACHER])
def test_one_changed_bit_names_the_file_and_the_folder_to_remove(run, train, capsys, file):
    path = checkpoint.latest(run) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    line = complaint(capsys, *train)
    assert f"{path} is missing or damaged" in line
    assert "remove that folder" in line
    shutil.rmtree(checkpoint.latest(run))
    assert main(train) == 0  # goes on from the one before
    assert checkpoint.latest(run).name == "step-00000008"


def test_a_missing_file_is_one_line(run, train, capsys):
    (checkpoint.latest(run) / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing or damaged" in complaint(capsys, *train)


def test_a_broken_description_is_one_line(run, tmp_path, capsys):
    (checkpoint.latest(run) / "checkpoint.json").write_text("{}")
    assert "incomplete" in complaint(capsys, "export", run, "--out", tmp_path / "release")


def test_the_sums_are_those_of_the_files(run):
    folder = checkpoint.latest(run)
    files = checkpoint.describe(folder)["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {"checkpoint.json"}
    for name, given in files.items():
        said = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout
        assert said.split()[0] == given


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "?"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_while_saving_leaves_the_checkpoints_before(run, train, capsys, monkeypatch, error):
    shutil.rmtree(checkpoint.latest(run))
    kept = names(run)

    def full(*args, **kwargs):
        kwargs["checkpoint_id"].mkdir()
        raise error

    monkeypatch.setattr(saver, "save", full)  # what async_save does beside the training
    if isinstance(error, RuntimeError):  # as torch's writer says it
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    line = complaint(capsys, *train)
    assert "step 8 cannot be saved" in line
    assert "no space" in line.lower()
    assert names(run) == kept
    assert list((run / "checkpoints").glob(".*")) == []
    monkeypatch.undo()
    assert main(train) == 0
    assert names(run)[-1] == "step-00000008"


def test_a_save_that_fails_stops_the_run_at_its_next_step(run, train, capsys, monkeypatch):
    shutil.rmtree(run)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "?")

    monkeypatch.setattr(saver, "save", full)
    assert "step 3 cannot be saved" in complaint(capsys, *train)
    assert len((run / "metrics.jsonl").read_text().splitlines()) in (4, 5)  # it knew after a step or two, not at 6


def test_a_limit_on_file_size_is_one_line(run, train):
    (state,) = checkpoint.latest(run).glob("*.distcp")
    limit = state.stat().st_size - 1
    shutil.rmtree(checkpoint.latest(run))
    kept = names(run)
    ran = subprocess.run(
        [sys.executable, "-m", "eosin.launch", *train],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert ran.returncode == 2
    assert "step 8 cannot be saved" in ran.stderr.splitlines()[-1]
    assert "File too large" in ran.stderr.splitlines()[-1]
    assert names(run) == kept


def test_training_goes_on_while_a_checkpoint_is_written(run, train, tiny_run, tmp_path, monkeypatch):
    """The write waits until three steps later; what it writes is the state of its own step."""
    shutil.rmtree(run)
    write, running = saver.save, threading.Semaphore()
    steps = run / "metrics.jsonl"

    def late(*args, **kwargs):
        assert running.acquire(blocking=False)  # one at a time
        step = int(kwargs["checkpoint_id"].name.split("-")[1].split(".")[0])
        for _ in range(3000):
            lines = steps.read_text().splitlines() if steps.is_file() else []
            if len(lines) >= min(step + 2, 8):
                break
            threading.Event().wait(0.01)
        later = len(lines) - step
        result = write(*args, **kwargs)
        running.release()
        seen.append((step, later > 0 or step == 8, f"step-{step:08d}" in names(run)))
        return result

    seen = []
    monkeypatch.setattr(saver, "save", late)
    assert main(train) == 0
    assert seen == [(3, True, False), (6, True, False), (8, True, False)]
    for name in ("step-00000006", "step-00000008"):
        found, expected = (content(r / "checkpoints" / name, tmp_path) for r in (run, tiny_run))
        assert same(found, expected)
        teacher = load_file(run / "checkpoints" / name / checkpoint.TEACHER)
        assert same({f"teacher.backbone.{n}": v for n, v in teacher.items()}, parts_of(expected, "teacher.backbone."))


def test_those_at_multiples_of_keep_every_stay(run, train, capsys):
    shutil.rmtree(run)
    assert main([*train, "run.checkpoint_every=1", "run.keep=2", "run.keep_every=3"]) == 0
    assert names(run) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    line = complaint(capsys, *train, "run.checkpoint_every=3", "run.keep_every=4")
    assert "run.keep_every: 4 is not a multiple of run.checkpoint_every=3" in line


KILLED_WHILE_SAVING = """
import os, signal, sys
from eosin.launch.cli import main
from eosin.ssl import checkpoint
before = checkpoint.write_json
def write_json(path, value):
    if value["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    before(path, value)
checkpoint.write_json = write_json
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(run, train, tiny_run, tmp_path):
    shutil.rmtree(run)
    ran = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *train], check=False, env=one_thread())
    assert ran.returncode == -signal.SIGKILL
    assert names(run) == ["step-00000003"]
    assert [p.name for p in (run / "checkpoints").glob(".*")] == [".step-00000006.partial"]
    subprocess.run([sys.executable, "-m", "eosin.launch", *train], check=True, env=one_thread())
    assert list((run / "checkpoints").glob(".*")) == []
    whole = tmp_path / "whole"
    again = [a if not a.startswith("run.dir") else f"run.dir={whole}" for a in train]
    subprocess.run([sys.executable, "-m", "eosin.launch", *again], check=True, env=one_thread())
    assert same(content(checkpoint.latest(run), tmp_path), content(checkpoint.latest(whole), tmp_path))


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_a_checkpoint_says_which_torch_wrote_it(run):
    about = json.loads((checkpoint.latest(run) / "checkpoint.json").read_text())
    assert (about["step"], about["torch"], about["rewinds"]) == (8, torch.__version__, 0)
