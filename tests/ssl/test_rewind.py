"""Going on from an earlier checkpoint past some batches: which batches a run then takes, and what it keeps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from eosin.data_tools.errors import UserError
from eosin.launch.cli import main
from eosin.ssl import checkpoint, feed, rewind
from eosin.ssl.rewind import Rewind, batch_of


@pytest.fixture(scope="module")
def settings(tiny_shards, tiny_recipe):
    return ["train", *tiny_recipe, f"data.shards={tiny_shards}", "run.checkpoint_every=2", "run.keep=9"]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*settings, f"run.dir={run}"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run of 8 steps, with checkpoints after 2, 4, 6 and 8."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def taken(monkeypatch):
    """Numbers of the global batches that are trained on, as their samples' positions tell."""
    numbers, views = [], feed.views

    def watched(phase, batch, device):
        first = int(batch["position"][0])
        assert batch["position"].tolist() == list(range(first, first + 8))
        numbers.append(first // 8)
        return views(phase, batch, device)

    monkeypatch.setattr(feed, "views", watched)
    return numbers


def steps(run):
    return [checkpoint.step_of(folder) for folder in checkpoint.steps(run)]


def complaint(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_next_batches_are_passed_over(run, settings, taken, tmp_path):
    command = [*settings, f"run.dir={run}", "--rewind", "4", "--skip-batches", "3"]
    assert main(command) == 0
    assert taken == [7, 8, 9, 10]
    assert steps(run) == [2, 4, 6, 8]
    assert sorted(p.name for p in (run / "checkpoints" / "rewound-1").iterdir()) == ["step-00000006", "step-00000008"]
    assert (run / "rewinds.jsonl").read_text() == '{"step": 4, "skip": 3}\n'
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [*range(1, 9)]
    # The command again, as a scheduler repeats it, rewinds nothing.
    assert main(command) == 0
    assert len(taken) == 4
    # Nor does a later start without it forget: it ends bit for bit the same.
    whole = load_file(checkpoint.latest(run) / checkpoint.TEACHER)
    for step in checkpoint.steps(run)[-2:]:
        shutil.rmtree(step)
    assert main([*settings, f"run.dir={run}"]) == 0
    shutil.rmtree(checkpoint.latest(run))
    assert main([*settings, f"run.dir={run}"]) == 0
    assert taken[4:] == [7, 8, 9, 10, 9, 10]
    found = load_file(checkpoint.latest(run) / checkpoint.TEACHER)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_ended_before_its_first_checkpoint_a_rewind_has_happened(run, settings, taken, monkeypatch):
    def ended(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feed, "views", ended)
        assert main([*settings, f"run.dir={run}", "--rewind", "2", "--skip-batches", "5"]) == 2
    assert steps(run) == [2]
    assert main([*settings, f"run.dir={run}"]) == 0
    assert taken == [7, 8, 9, 10, 11, 12]


def test_killed_between_its_record_and_moving_what_it_leaves_behind(run, settings, taken):
    rewind.write(run, [Rewind(4, 1)])
    assert main([*settings, f"run.dir={run}"]) == 0
    assert taken == [5, 6, 7, 8]


def test_twice(run, settings, taken):
    assert main([*settings, f"run.dir={run}", "--rewind", "4", "--skip-batches", "1"]) == 0
    assert main([*settings, f"run.dir={run}", "--rewind", "6", "--skip-batches", "10"]) == 0
    assert main([*settings, f"run.dir={run}", "--rewind", "2"]) == 0  # which undoes both
    assert taken == [5, 6, 7, 8, 17, 18, 2, 3, 4, 5, 6, 7]
    assert steps(run) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("rewinds", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        ([Rewind(2, 3)], [0, 1, 5, 6, 7, 8]),
        ([Rewind(2, 3), Rewind(4, 10)], [0, 1, 5, 6, 17, 18]),
        ([Rewind(4, 10), Rewind(2, 3)], [0, 1, 5, 6, 7, 8]),
        ([Rewind(2, 3), Rewind(2, 1)], [0, 1, 3, 4, 5, 6]),
    ],
)
def test_batch_of_a_step(rewinds, expected):
    assert [batch_of(step, rewinds) for step in range(6)] == expected


def test_what_cannot_be_is_one_line_and_leaves_the_run_as_it_was(run, settings, capsys):
    command = [*settings, f"run.dir={run}"]
    assert "no checkpoint of step 5; there are: 2, 4, 6, 8" in complaint(capsys, *command, "--rewind", "5")
    (run / "checkpoints" / "step-00000004" / "__0_0.distcp").write_bytes(b"cut")
    assert "is missing or damaged" in complaint(capsys, *command, "--rewind", "4", "--skip-batches", "1")
    assert steps(run) == [2, 4, 6, 8]
    assert not (run / "rewinds.jsonl").exists()
    assert "--skip-batches belongs to a rewind" in complaint(capsys, *command, "--skip-batches", "1")
    assert "--rewind: -1 is below 0" in complaint(capsys, *command, "--rewind", "-1")
    assert "leave one out" in complaint(capsys, *command, "--rewind", "2", "--plan")
    (run / "rewinds.jsonl").write_text('{"step": 4}\n')
    assert "is not a record of rewinds" in complaint(capsys, *command)


def test_a_new_run_has_nothing_to_go_back_to(settings, tmp_path, capsys):
    command = [*settings, f"run.dir={tmp_path / 'new'}", "--rewind", "2"]
    assert "no checkpoint of step 2; there is none yet" in complaint(capsys, *command)
    assert list((tmp_path / "new").glob("[!.]*")) == []


def test_the_record_refuses_nothing_it_wrote(tmp_path):
    rewinds = [Rewind(4, 3), Rewind(2, 0)]
    rewind.write(tmp_path, rewinds)
    assert rewind.read(tmp_path) == rewinds
    (tmp_path / rewind.RECORD).write_text("[]\n")
    with pytest.raises(UserError, match="not a record"):
        rewind.read(tmp_path)
