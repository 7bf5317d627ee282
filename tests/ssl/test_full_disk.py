"""A disk that really fills while a run saves or logs: one line, exit code 2, nothing lost, and the run goes on."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import pytest

from eosin.launch.cli import main
from eosin.ssl import checkpoint
from eosin.ssl.checkpoint import Saver
from eosin.ssl.log import Log

PLAIN = ["health.pictures_every=0", "run.keep=10"]


@pytest.fixture
def settings(tiny_recipe, tiny_shards):
    """Arguments of a run, but for its folder."""
    return ["train", *tiny_recipe, f"data.shards={tiny_shards}", *PLAIN]


@contextlib.contextmanager
def disk(folder, size):
    """A disk of so many bytes at ``folder``, whose name is yielded; the test is skipped where none can be mounted."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def make_room(folder):
    subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)


def run_by(ranks, arguments, **how):
    """Exit code and what ``eosin`` says on stderr, without progress; a hang is an error."""
    launched = ["launch", "torchrun", "--nproc", str(ranks), "--", *arguments] if ranks > 1 else arguments
    command = [sys.executable, "-m", "eosin.launch", *launched]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False, **how)
    return ran.returncode, [line for line in ran.stderr.splitlines() if line and not line.startswith("train: ")]


def names(run):
    """Everything in the folder of checkpoints, also what is hidden."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# A checkpoint of two processes is of 2.5 to 2.8 MB: .4 MB is the teacher, which rank 0 writes last and alone.
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "size"), [("ddp", "4m"), ("fsdp", "5300k")], ids=["in the state", "in the rest"])
def test_it_fills_while_two_processes_save(settings, tmp_path, strategy, size):
    with disk(tmp_path / "disk", size) as folder:
        run = folder / "run"
        # No record is written between, since either may meet the full disk first.
        settings = [*settings, f"run.dir={run}", f"run.strategy={strategy}", "run.log_every=100", "run.steps=12"]
        code, said = run_by(2, settings)
        assert (code, len(said)) == (2, 1), said
        assert said[0] == (
            f"eosin: step 6 cannot be saved in {run}/checkpoints: No space left on device; mend that and run the same "
            "command again: it goes on from the checkpoint before"
        )
        assert names(run) == ["step-00000003"]
        make_room(folder)
        assert main(settings) == 0
        assert names(run) == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


def test_a_limit_within_a_file_is_one_line(settings, tmp_path):
    limit = 400 << 10  # bytes: within the tensors of the state, where torch's writer says something about positions
    code, said = run_by(
        1,
        [*settings, f"run.dir={tmp_path / 'run'}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (code, len(said)) == (2, 1), said
    assert "step 3 cannot be saved" in said[0]
    assert "File too large" in said[0]
    assert names(tmp_path / "run") == []


def test_it_is_full_for_tensorboard(settings, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / folder)
    with disk(run / "tensorboard", "4k"):
        code, said = run_by(1, [*settings, f"run.dir={run}"])
        assert (code, len(said)) == (2, 1), said
        assert said[0] == (
            f"eosin: cannot read or write: No space left on device ({run}); mend that and run the same command again"
        )
        make_room(run / "tensorboard")
        assert main([*settings, f"run.dir={run}"]) == 0
    assert names(run) == [f"step-{step:08d}" for step in (3, 6, 8)]


def test_what_fails_beside_a_full_log_is_removed(settings, tmp_path, capsys, monkeypatch):
    """The record after a checkpoint meets the full disk before the loop asks what became of the checkpoint."""
    save, write = Saver.save, Log.write

    def fill_and_save(self, step, *state):
        if step == 6:
            with contextlib.suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        save(self, step, *state)

    def write_anew(self, done, *rest):
        if done == 7:
            self.path = run / "anew.jsonl"  # the page that was begun may have room
        write(self, done, *rest)

    monkeypatch.setattr(Saver, "save", fill_and_save)
    monkeypatch.setattr(Log, "write", write_anew)
    with disk(tmp_path / "disk", "20m") as folder:
        run = folder / "run"
        capsys.readouterr()
        assert main([*settings, f"run.dir={run}"]) == 2
        assert f"No space left on device ({run})" in capsys.readouterr().err.splitlines()[-1]
        assert names(run) == ["step-00000003"]
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
        monkeypatch.undo()
        (folder / "other").unlink()
        assert main([*settings, f"run.dir={run}"]) == 0
        assert names(run) == [f"step-{step:08d}" for step in (3, 6, 8)]
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("size", ["4k", "8k"])
def test_it_is_full_before_a_run_begins(settings, tmp_path, capsys, size):
    with disk(tmp_path / "disk", size) as folder:
        settings = [*settings, f"run.dir={folder / 'run'}"]
        capsys.readouterr()
        assert main(settings) == 2
        assert f"No space left on device ({folder / 'run'})" in capsys.readouterr().err.splitlines()[-1]
        make_room(folder)
        assert main(settings) == 0
        assert checkpoint.latest(folder / "run").name == "step-00000008"
