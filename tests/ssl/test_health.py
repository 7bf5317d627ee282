"""The monitors: on records written by hand, on a planted collapse through the real loop, and on a healthy run."""

import json
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch

from eosin.data_tools.shards import ShardWriter
from eosin.launch.cli import main
from eosin.ssl import network
from eosin.ssl.config import load_config
from eosin.ssl.health import FALLING, FEW, TREND, Monitors, trend
from eosin.ssl.metrics import same_group_rate

TOP = math.log(64)
HEALTHY = {
    "dino": 0.7 * TOP, "teacher_entropy": 0.5 * TOP, "prototype_entropy": 0.9 * TOP, "mean_cosine": 0.2,
    "effective_rank": 20, "skipped": 0, "grad_norm": 1.0, "loss": 4.0, "data_wait": 0.01, "same_slide_rate": 0.06,
    "same_slide_chance": 0.02, "same_slide_most": 0.2, "prototypes_used": 0.5, "prototypes_even": 0.6,
}  # fmt: skip


def watch(*changes, every=10, start=110, **overrides):
    """Names of what is said over records that differ from a healthy one."""
    given = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    config = load_config("demo", ["data.shards=s", "run.dir=r", "objective.prototypes=64", *given])
    monitors = Monitors(config)
    return [
        set(monitors.look(HEALTHY | change | {"step": start + every * number})) for number, change in enumerate(changes)
    ]


def last(*changes, **overrides):
    return watch(*changes, **overrides)[-1]


def test_a_healthy_run_is_quiet():
    assert watch(*[{}] * 100) == [set()] * 100


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("one answer", {"prototype_entropy": 0.01}),
        ("evenness", {"dino": TOP, "teacher_entropy": TOP}),
        ("one direction", {"mean_cosine": 0.999}),
        ("low rank", {"effective_rank": 1.5}),
        ("skipped", {"skipped": 2}),
    ],
)
def test_what_one_record_shows(name, change):
    assert last(change) == {name}
    before = watch(change, start=50)[0]
    assert before == ({name} if name == "skipped" else set())  # too early to tell
    assert watch(change, optim__warmup=200, start=150)[0] == ({name} if name in ("skipped", "one answer") else set())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("few prototypes", {"prototypes_used": 0.05}),
        ("slides", {"same_slide_rate": 0.15}),
        ("waits", {"data_wait": 0.3}),
    ],
)
def test_what_several_records_show(name, change):
    assert last(*[change] * FEW) == {name}
    assert last(*[change] * (FEW - 1)) == set()
    assert last(*[change if n % 5 == 0 else {} for n in range(50)]) == set()  # a batch now and then


def test_evenness_is_not_what_a_slow_start_looks_like():
    # 300 steps of the demo's recipe: the teacher tells 0.05 nats, the student has learned 0.002.
    assert last({"dino": TOP - 0.002, "teacher_entropy": TOP - 0.05}) == set()


def test_few_slides_in_a_batch_are_no_collapse():
    # Of 3 slides of 3 organs, the nearest are of the same slide, and ought to be.
    assert last(*[{"same_slide_rate": 0.95, "same_slide_chance": 0.33, "same_slide_most": 1.0}] * 9) == set()


def test_features_of_slides_and_features_of_tissue():
    generator = torch.Generator().manual_seed(0)
    slides, tissue = torch.randint(0, 40, (128,)), torch.randint(0, 4, (128,))

    def said(features):
        changes = []
        for _ in range(FEW):
            noisy = features + 0.1 * torch.randn(features.shape, generator=generator)
            names = ("same_slide_rate", "same_slide_chance", "same_slide_most")
            changes.append(dict(zip(names, same_group_rate(noisy, slides, 5))))
        return last(*changes)

    assert said(torch.eye(40)[slides]) == {"slides"}
    assert said(torch.eye(4)[tissue]) == set()
    assert said(torch.cat([torch.eye(40)[slides] / 5, torch.eye(4)[tissue]], dim=1)) == set()


def test_a_gradient_that_explodes():
    calm = [{"grad_norm": 1 + 0.5 * math.sin(n)} for n in range(40)]
    assert last(*calm, *[{"grad_norm": 30.0}] * 4) == {"gradients"}
    assert last(*calm, {"grad_norm": 1e6}, *calm[:4]) == set()  # one spike, which clipping takes
    assert last(*[{"grad_norm": 0.9**n} for n in range(60)]) == set()
    # Layers that were frozen add their gradient, once and for all.
    frozen = [*[{"grad_norm": 1.0}] * 40, *[{"grad_norm": 30.0}] * 4]
    assert last(*frozen, optim__heads_only=510, run__steps=2000) == set()


def test_a_probe_that_falls_for_good():
    def looks(*values, error=0.01):
        return last(*[{"probe_accuracy": v, "probe_error": error} for v in values])

    assert looks(0.7, 0.8, 0.78, 0.77, 0.76) == {"probe"}
    assert looks(0.7, 0.8, 0.78, 0.77) == set()  # twice only
    assert looks(0.7, 0.8, 0.78, 0.795, 0.76, 0.77) == set()  # within its error in between
    assert looks(0.7, 0.8, 0.78, 0.77, 0.76, error=0.05) == set()
    assert looks(*np.linspace(0.3, 0.9, 20)) == set()
    # Records without an evaluation between two do not count.
    sparse = [{"probe_accuracy": v, "probe_error": 0.01} for v in (0.8, 0.7, 0.7)]
    assert last(*(part for look in sparse for part in (look, {}, {}))) == set()
    assert FALLING == 3


def test_a_held_out_loss_that_rises_while_training_goes_down():
    def looks(held_out, trained):
        changes = []
        for on_them, own in zip(held_out, trained):
            changes += [{"loss": own + 0.1 * math.sin(len(changes) + n)} for n in range(9)]
            changes += [{"loss": own, "held_out_loss": on_them}]
        return last(*changes, health__held_out=0.1)

    down, up, flat = np.linspace(5, 4, TREND), np.linspace(4, 4.4, TREND), np.full(TREND, 4.5)
    wobble = 0.02 * np.cos(np.arange(TREND) * 2.4)
    assert looks(up + wobble, down) == {"held-out"}
    assert looks(up + wobble, up) == set()  # the teacher grew sharper: both rise
    assert looks(down + wobble, down) == set()
    assert looks(flat + wobble, down) == set()
    assert looks((up + wobble)[1:], down[1:]) == set()  # too few to tell


def test_trend_is_the_slope_over_its_error():
    from scipy.stats import linregress

    y = np.random.default_rng(0).normal(size=8) + 0.3 * np.arange(8)
    expected = linregress(np.arange(8), y)
    assert trend(y) == pytest.approx(expected.slope / expected.stderr)


def test_what_is_missing_or_not_finite_warns_of_nothing():
    monitors = Monitors(load_config("demo", ["data.shards=s", "run.dir=r"]))
    assert [monitors.look({"step": n} | dict.fromkeys(HEALTHY)) for n in range(101, 140)] == [{}] * 39
    assert [monitors.look({"step": n}) for n in range(140, 150)] == [{}] * 10


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """A shard set of 96 tiles of twelve colors under noise, on 48 slides of 24 patients: there is something to tell."""
    folder = tmp_path_factory.mktemp("shards") / "colors"
    folder.mkdir()
    writer, rng = ShardWriter(folder), np.random.default_rng(0)
    kinds = rng.integers(40, 230, (12, 2, 2, 3))
    for i in range(96):
        image = kinds[i % 12].repeat(16, axis=0).repeat(16, axis=1) + rng.normal(0, 20, (32, 32, 3))
        encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image.clip(0, 255).astype(np.uint8)), 95)
        writer.add(f"t{i}", encoded, "jpg", {"x": i, "y": 0, "mpp": 0.5}, slide=int(rng.integers(48)))
    slides = pd.DataFrame({"slide": [f"s{n}" for n in range(48)], "patient": [f"p{n // 2}" for n in range(48)]})
    writer.finish(slides.assign(stain="none"), tile_size=32, mpp=0.5, config={})
    return folder


RECIPE = [
    "model={args: {depth: 2, embed_dim: 48, num_heads: 3, init_values: 0.1}}",
    "crops={global_size: 32, local_size: 16, local_count: 2}",
    "objective={prototypes: 48, hidden: 48, bottleneck: 16}",
    "stain={normalize: off, augment: none}",
    "data={batch: 32}",
    "optim={warmup: 20}",
    "run={steps: 300, checkpoint_every: 300, log_every: 10}",
    "health.pictures_every=0",
]


def warned(folder, shards, capsys, *overrides):
    """What the real loop says on stderr, as steps and sentences, and its records."""
    capsys.readouterr()
    assert main(["train", "demo", *RECIPE, f"data.shards={shards}", f"run.dir={folder}", *overrides]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(int(line.split()[1].rstrip(":")), line) for line in lines], records


@pytest.mark.slow
def test_a_healthy_run_raises_no_warning(colors, tmp_path, capsys):
    said, records = warned(tmp_path / "run", colors, capsys)
    assert said == []
    # It is healthy: the student learned what there is to tell, and spreads over many directions.
    assert records[-1]["dino"] < math.log(48) - 0.2
    assert records[-1]["effective_rank"] > 5
    assert all(b["step"] > a["step"] for a, b in pairwise(records))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (["objective.targets=centering"], "collapsed to one answer"),  # and the center never moves
        (["objective.teacher_temperature=[1.0,1.0]"], "answers evenly"),
        (["objective.teacher_temperature=[1.0,1.0]", "objective.koleo=0"], "point the same way"),
    ],
)
def test_a_planted_collapse_is_caught(plant, sentence, colors, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(network, "update_center", lambda center, scores: None)
    said, _ = warned(tmp_path / "run", colors, capsys, "run.steps=160", *plant)
    (step,) = {step for step, line in said if sentence in line}
    assert step <= 120
