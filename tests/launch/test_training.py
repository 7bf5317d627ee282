"""Two processes train as one does, under torchrun and as a SLURM job that is told to save half-way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from safetensors.numpy import load_file

from eosin.data_tools.shards import ShardWriter

STEPS = 24
SETTINGS = [
    "model={args: {depth: 2}, drop_path: 0.2}",
    "crops={global_size: 32, local_size: 16, local_count: 2}",
    "objective={prototypes: 32, hidden: 32, bottleneck: 16, teacher_temperature_warmup: 4, kde: 0.05}",
    "stain.normalize=off",
    "optim={warmup: 4, freeze_last_layer: 2}",
    "data.batch=8",
    f"run={{steps: {STEPS}, checkpoint_every: 1000, log_every: 1, device: cpu}}",
    "health={held_out: 0.4, held_out_every: 5, pictures_every: 9}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the shard set ``shards`` and ``one``, a run of one process on it."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "shards").mkdir()
    writer, rng = ShardWriter(folder / "shards"), np.random.default_rng(0)
    for i in range(36):
        small = rng.integers(120, 255, (4, 4, 3), dtype=np.uint8)
        image = np.ascontiguousarray(small.repeat(8, axis=0).repeat(8, axis=1))
        meta = {"x": i, "y": 0, "mpp": 0.5, "label": f"l{i % 2}"}
        writer.add(f"t{i}", simplejpeg.encode_jpeg(image, 95), "jpg", meta, slide=i % 3)
    slides = pd.DataFrame({"slide": ["a", "b", "c"], "stain": "H&E"})
    writer.finish(slides, tile_size=32, mpp=0.5, config={})
    eosin(*train(folder, "one"))
    return folder


def train(folder: Path, run: str, workers: int = 0) -> list[str]:
    places = [f"data.shards={folder / 'shards'}", f"run.dir={folder / run}", f"data.workers={workers}"]
    probe = f"health.probe={{shards: {folder / 'shards'}, group: slide, every: 7}}"
    return ["train", "small", *places, *SETTINGS, probe]


def eosin(*argv: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eosin.launch", *argv]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def metrics(run: Path) -> list[dict[str, float]]:
    """Whole lines only: a run that goes on may be in the middle of one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def assert_equal_runs(run: Path, one: Path) -> None:
    got, expected = metrics(run), metrics(one)
    assert [m["step"] for m in got] == [m["step"] for m in expected] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in expected], rtol=1e-4, err_msg=name)
    looked = {"held_out_loss": [5, 10, 15, 20, 24], "probe_accuracy": [7, 14, 21, 24], "probe_start": [1]}
    for name, steps in looked.items():
        looks = [{m["step"]: m[name] for m in records if name in m} for records in (got, expected)]
        assert [sorted(look) for look in looks] == [steps, steps]
        assert looks[0] == pytest.approx(looks[1], rel=1e-4)
    weights, expected_weights = (load_file(r / f"checkpoints/step-{STEPS:08d}/teacher.safetensors") for r in (run, one))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        # AdamW turns the last bits of a tiny gradient into a share of a whole step, hence more than rounding.
        np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_under_torchrun_train_as_one(folder):
    eosin("launch", "torchrun", "--nproc", "2", "--", *train(folder, "torchrun"))
    assert_equal_runs(folder / "torchrun", folder / "one")


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_saves_when_told_continues_and_trains_as_one(slurm, folder):
    run, jobs = folder / "slurm", folder / "jobs"
    options = ["--nodes", "2", "--time", "10", "--job-dir", str(jobs)]
    # With a loader worker, which SLURM's signal reaches too.
    said = eosin("launch", "slurm", *options, "--", *train(folder, "slurm", workers=1))
    job_id = said.split()[1]
    end = time.monotonic() + 200
    while len(metrics(run)) < STEPS // 8 and time.monotonic() < end:
        time.sleep(0.02)
    subprocess.run(["scancel", "--signal=TERM", job_id], check=True)
    ended = slurm.wait(job_id, "COMPLETED", "FAILED")
    logs = "\n".join(path.read_text() for path in sorted(jobs.glob("*_log.out")))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs
    assert f"of {STEPS}; run the same command to go on" in logs
    assert_equal_runs(run, folder / "one")
