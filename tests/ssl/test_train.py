"""The loop against the same loop uninterrupted, killed, told to stop, and on bad input.

Two processes against one, under torchrun and on SLURM: tests/launch/test_training.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from eosin.data_tools.shards import ShardSet, write_slides
from eosin.launch.cli import main
from eosin.ssl import checkpoint

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(recipe, shards, run, *overrides):
    return [
        sys.executable,
        "-m",
        "eosin.launch",
        "train",
        *recipe,
        f"data.shards={shards}",
        f"run.dir={run}",
        *overrides,
    ]


def records(run):
    """Whole lines only: a run that goes on may be in the middle of one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run):
    return {r["step"]: r["loss"] for r in records(run)}


def teacher(run):
    return load_file(checkpoint.latest(run) / checkpoint.TEACHER)


@pytest.fixture(scope="module")
def reference(tiny_shards, tiny_recipe, tmp_path_factory):
    """An uninterrupted run in a process of its own, at one thread."""
    run = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run(command(tiny_recipe, tiny_shards, run), check=True, env=ENVIRONMENT)
    return run


def test_a_run_leaves_what_it_promises(reference):
    assert [p.name for p in checkpoint.steps(reference)] == ["step-00000006", "step-00000008"]  # keep: 2
    assert sorted(losses(reference)) == list(range(1, 9))
    assert (reference / "config.yaml").is_file()
    assert list((reference / "tensorboard").glob("events*"))
    last = records(reference)[-1]
    for name in ("effective_rank", "teacher_entropy", "same_slide_rate", "same_slide_chance", "grad_norm"):
        assert last[name] == pytest.approx(last[name])


@pytest.mark.slow
def test_killed_at_random_points_it_ends_bit_identical(reference, tiny_shards, tiny_recipe, tmp_path):
    run, chance = tmp_path / "run", random.Random(0)
    for least in (2, 5, 7):  # before the first checkpoint, between two, after the second
        process = subprocess.Popen(command(tiny_recipe, tiny_shards, run), env=ENVIRONMENT)
        while process.poll() is None and max(losses(run), default=0) < least:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.wait()
    subprocess.run(command(tiny_recipe, tiny_shards, run), check=True, env=ENVIRONMENT)
    assert losses(run) == losses(reference)
    for name, value in teacher(reference).items():
        assert torch.equal(teacher(run)[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_termination_signal_saves_and_the_run_goes_on(number, reference, tiny_shards, tiny_recipe, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(command(tiny_recipe, tiny_shards, run), env=ENVIRONMENT)
    while not records(run):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert 0 < len(losses(run)) < 8
    assert checkpoint.latest(run).name == f"step-{max(losses(run)):08d}"
    subprocess.run(command(tiny_recipe, tiny_shards, run), check=True, env=ENVIRONMENT)
    assert losses(run) == losses(reference)


def test_started_again_a_complete_run_does_nothing(tiny_run, tiny_shards, tiny_recipe, capsys):
    before = (tiny_run / "metrics.jsonl").read_text()
    assert main(command(tiny_recipe, tiny_shards, tiny_run)[3:]) == 0
    assert "is complete at step 8" in capsys.readouterr().out
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_training_changes_the_teacher_and_lowers_no_bit_of_its_name(tiny_run, tiny_recipe):
    import timm

    from eosin.ssl.backbone import model_arguments
    from eosin.ssl.config import read_run_config

    plain = timm.create_model(**model_arguments(read_run_config(tiny_run).model), img_size=32)
    assert set(plain.state_dict()) == set(teacher(tiny_run))


def complaint(capsys, arguments):
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_line_each(tiny_run, tiny_shards, tiny_recipe, tmp_path, capsys):
    def given(run, *overrides, shards=tiny_shards):
        return command(tiny_recipe, shards, run, *overrides)[3:]

    assert "optim.lr=0.001, not 0.1" in complaint(capsys, given(tiny_run, "optim.lr=0.1"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("mine")
    assert "holds something else" in complaint(capsys, given(tmp_path / "other"))
    assert "does not exist" in complaint(capsys, given(tmp_path / "new", shards=tmp_path / "absent"))
    assert "timm cannot build" in complaint(capsys, given(tmp_path / "new", "model.args={depht: 2}"))
    assert list((tmp_path / "new").glob("[!.]*")) == []
    if not torch.cuda.is_available():
        assert "no GPU" in complaint(capsys, given(tmp_path / "gpu", "run.device=cuda"))


def test_a_second_process_in_the_folder_is_refused(tiny_shards, tiny_recipe, tmp_path, capsys):
    import fcntl

    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in complaint(capsys, command(tiny_recipe, tiny_shards, tmp_path)[3:])


def test_a_checkpoint_of_other_data_is_refused(tiny_run, tiny_recipe, tiny_shards, tmp_path, capsys):
    import shutil

    from eosin.data_tools.files import read_json, write_json

    shutil.copytree(tiny_shards, tmp_path / "s")
    dataset = read_json(tmp_path / "s" / "dataset.json", "")
    dataset["shards"][0]["sha256"] = "0" * 64
    write_json(tmp_path / "s" / "dataset.json", dataset)
    assert "another shard set" in complaint(capsys, command(tiny_recipe, tmp_path / "s", tiny_run)[3:])


HIGH = "high_resolution={steps: 2, crops: {global_size: 48, local_size: 32, local_count: 2}}"


def test_the_last_steps_at_high_resolution(tiny_shards, tiny_recipe, tmp_path):
    settings = [*tiny_recipe, f"data.shards={tiny_shards}", "run.steps=4", "run.checkpoint_every=1", "run.keep=9", HIGH]
    assert main(["train", *settings, f"run.dir={tmp_path / 'whole'}"]) == 0
    assert main(["train", *settings, f"run.dir={tmp_path / 'cut'}"]) == 0
    # As after a kill at the switch: it goes on and ends bit for bit the same.
    for step in checkpoint.steps(tmp_path / "cut")[2:]:
        shutil.rmtree(step)
    assert main(["train", *settings, f"run.dir={tmp_path / 'cut'}"]) == 0
    whole, cut = teacher(tmp_path / "whole"), teacher(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    # The same steps without the last phase are another model; the first half is the same.
    plain = [s for s in settings if s != HIGH]
    assert main(["train", *plain, f"run.dir={tmp_path / 'plain'}"]) == 0
    ours, theirs = losses(tmp_path / "whole"), losses(tmp_path / "plain")
    assert [ours[s] == theirs[s] for s in (1, 2, 3)] == [True, True, False]


def test_high_resolution_tiles_of_their_own(tiny_shards, tiny_recipe, tmp_path, capsys):
    other = shutil.copytree(tiny_shards, tmp_path / "other")
    table = ShardSet(other).slides().assign(stain="IHC")
    write_slides(other, table)
    last = f"high_resolution={{steps: 1, shards: '{other}', crops: {{global_size: 48, local_count: 0}}}}"
    run = tmp_path / "run"
    settings = [*tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}", "run.steps=3", last]
    assert main(["train", *settings, "stain.augment=none"]) == 0
    assert "the tiles of 4 of 4 slides stay raw" in capsys.readouterr().out
    assert [r["stain_raw"] for r in records(run)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("{steps: 8, crops: {global_size: 48}}", "not fewer than run.steps=8"),
        ("{steps: 2, crops: {global_size: 50}}", "high_resolution.crops.global_size: 50 is not a multiple"),
        ("{steps: 2}", "high_resolution.crops is not set"),
        ("{steps: 2, crops: {global_size: 48}, shards: nowhere}", "nowhere does not exist"),
    ],
)
def test_an_impossible_last_phase_is_one_line(last, words, tiny_shards, tiny_recipe, tmp_path, capsys):
    settings = [*tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *settings, f"high_resolution={last}"]) == 2
    assert words in capsys.readouterr().err
