import errno
import shutil

import pytest

from eosin.launch.cli import main
from eosin.ssl import checkpoint


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def complaint(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_cut_state_names_the_folder_to_remove(run, tiny_shards, tiny_recipe, capsys):
    train = ["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}"]
    (state,) = checkpoint.latest(run).glob("*.distcp")
    state.write_bytes(state.read_bytes()[:100])
    assert "remove that folder" in complaint(capsys, *train)
    shutil.rmtree(checkpoint.latest(run))
    assert main(train) == 0  # goes on from the one before
    assert checkpoint.latest(run).name == "step-00000008"


def test_a_broken_description_is_one_line(run, tmp_path, capsys):
    (checkpoint.latest(run) / "checkpoint.json").write_text("{}")
    assert "incomplete" in complaint(capsys, "export", run, "--out", tmp_path / "release")


def test_a_full_disk_while_saving_leaves_the_checkpoints_before(run, tiny_shards, tiny_recipe, capsys, monkeypatch):
    import torch.distributed.checkpoint as dcp

    shutil.rmtree(checkpoint.latest(run))
    kept = checkpoint.steps(run)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    line = complaint(capsys, "train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}")
    assert "no space to save step 8" in line
    assert checkpoint.steps(run) == kept
    assert list((run / "checkpoints").glob(".*")) == []
