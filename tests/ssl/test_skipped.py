"""Batches without a finite gradient: they leave no trace, are listed, and stop the run when they follow each other."""

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eosin.launch.cli import main
from eosin.ssl import checkpoint, feed


@pytest.fixture
def settings(tiny_shards, tiny_recipe, tmp_path):
    return ["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'run'}", "optim.max_skipped=3"]


@pytest.fixture
def broken(monkeypatch):
    """A set: the batches of these numbers make the objective NaN. With it, the tiles of every batch."""
    numbers, tiles, views = set(), {}, feed.views

    def with_nan(phase, batch, device):
        made, number = views(phase, batch, device), int(batch["position"][0]) // 8
        tiles[number] = batch["tile"].tolist()
        if number in numbers:
            made.crops[0][0, 3, :, 5, 5] = torch.nan
        return made

    monkeypatch.setattr(feed, "views", with_nan)
    return numbers, tiles


def content(folder, tmp_path):
    dcp_to_torch_save(folder, tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=False)
    moments = {(n, k): v for n, each in state["optimizer"]["state"].items() for k, v in each.items()}
    return state["model"] | moments


def listed(run):
    return [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_bad_batch_leaves_no_trace(settings, broken, tmp_path, targets, capsys):
    numbers, tiles = broken
    numbers |= {3, 5, 6}
    more = ["run.checkpoint_every=1", "run.keep=9", f"objective.targets={targets}", "run.log_every=1"]
    assert main([*settings, *more]) == 0
    after = {checkpoint.step_of(f): content(f, tmp_path) for f in checkpoint.steps(tmp_path / "run")}
    changed = [
        any(not torch.equal(after[step][name], after[step + 1][name]) for name in after[step]) for step in range(1, 8)
    ]
    # Batch 3 is step 4, which nothing changes in; likewise steps 6 and 7.
    assert dict(zip(range(2, 9), changed)) == {2: True, 3: True, 4: False, 5: True, 6: False, 7: False, 8: True}
    assert all(value.isfinite().all() for value in after[8].values())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert [r["loss"] is None for r in records] == [False, False, False, True, False, True, True, False]
    assert [(bad["step"], list(bad["tiles"].values())) for bad in listed(tmp_path / "run")] == [
        (step, [tiles[step - 1]]) for step in (4, 6, 7)
    ]
    assert "steps were skipped since their gradient was not finite" in capsys.readouterr().err


@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_in_a_row_stop_the_run_and_name_their_tiles(settings, broken, tmp_path, log_every, capsys):
    numbers, tiles = broken
    numbers |= {1, 3, 4, 5, 6, 7}  # the first is alone and counts for nothing
    assert main([*settings, f"run.log_every={log_every}", "run.checkpoint_every=2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "steps 4 to 6 had no finite gradient" in line
    assert f"{tmp_path / 'run' / 'bad_batches.jsonl'}" in line
    assert [bad["step"] for bad in listed(tmp_path / "run")] == [2, 4, 5, 6]
    (places,) = {name for bad in listed(tmp_path / "run") for name in bad["tiles"]}
    assert places.endswith("tiny")
    assert listed(tmp_path / "run")[-1]["tiles"][places] == tiles[5]
    # What the line advises: past the last of the bad ones, from a checkpoint before them.
    more = ["run.checkpoint_every=2", f"run.log_every={log_every}", "--rewind", "2", "--skip-batches", "6"]
    assert main([*settings, *more]) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-00000008"
