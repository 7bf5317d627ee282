"""``eosin train --plan``: a screen of figures without data, a picture, and one line for each mistake."""

from __future__ import annotations

import cv2
import pytest

from eosin.launch import plan
from eosin.launch.cli import main
from eosin.ssl.config import load_config
from eosin.ssl.plan import Plan

TINY = ["small", "model.args={depth: 2}", "crops.local_count=2", "optim={warmup: 200, freeze_last_layer: 20}"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def planned(capsys, *argv):
    assert main(["train", *argv, "--plan"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def assert_fits_a_screen(lines):
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_a_plan_needs_no_data_and_writes_nothing(capsys, tmp_path):
    lines = planned(capsys, *TINY)
    assert_fits_a_screen(lines)
    text = "\n".join(lines)
    for word in ("parameters", "FLOP", "fvcore", "memory", "estimate", "give --tflops", "warm-up end", "last layer"):
        assert word in text, word
    assert not list(tmp_path.iterdir())


def test_data_that_is_set_is_let_alone(capsys, tmp_path):
    assert planned(capsys, *TINY, "data.shards=nowhere", "run.dir=run") == planned(capsys, *TINY)
    assert not list(tmp_path.iterdir())


def test_time_and_cost(capsys):
    lines = planned(capsys, *TINY, "--gpus", "4", "--tflops", "0.5", "--price", "3")
    total = Plan(load_config(TINY[0], [*TINY[1:], "data.shards=s", "run.dir=r"])).flops
    row = next(line for line in lines if line.split()[:1] == ["0.5"]).replace(",", "").split()
    days, hours, cost = map(float, row[2:])
    assert days == pytest.approx(total / (0.5e12 * 4 * 86400), rel=5e-3)  # three digits are shown
    assert hours == pytest.approx(days * 24 * 4, rel=5e-3)
    assert cost == pytest.approx(hours * 3, rel=2e-3)
    assert "give --tflops" not in "\n".join(lines)
    assert any("each of 4 GPUs with 16 images" in line for line in lines)


def test_without_a_speed_three_are_shown(capsys):
    lines = planned(capsys, *TINY)
    start = next(i for i, line in enumerate(lines) if "TFLOP/s a GPU" in line)
    rows = [line.replace(",", "").split() for line in lines[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["100", "200", "400"]
    assert float(rows[0][2]) == pytest.approx(4 * float(rows[2][2]), rel=2e-3)


def test_drop_path_says_what_is_executed(capsys):
    assert not any("as executed" in line for line in planned(capsys, *TINY, "model.drop_path=0"))
    text = "\n".join(planned(capsys, *TINY, "model.drop_path=0.25"))
    assert "a step, as executed" in text
    assert "Drop path 0.25: what a crop's branches drop is not computed" in text


def test_high_resolution_has_lines_of_its_own(capsys):
    lines = planned(capsys, *TINY, "high_resolution={steps: 100, crops: {global_size: 512, local_size: 224}}")
    assert_fits_a_screen(lines)
    assert any("last 100 steps: 2 x 512 px" in line for line in lines)
    assert any("last steps, as executed" in line for line in lines)
    assert any(line.startswith("memory") and "at 512 px" in line for line in lines)


def test_the_largest_plan_fits_a_screen(capsys):
    lines = planned(
        capsys,
        "dinov2",
        "model.architecture=vit_giant_patch14_reg4_dinov2",
        "crops.local_size=98",
        "objective={tied_heads: false, prototypes: 131072}",
        "high_resolution={steps: 12500, crops: {global_size: 518, local_size: 98}}",
        "optim.heads_only=1000",
        *["--gpus", "128", "--price", "2.5"],
    )
    assert_fits_a_screen(lines)
    assert any("gated MLP 4,096" in line and "4 registers" in line for line in lines)


def test_strategy_parts_and_checkpointing_are_planned(capsys):
    more = ["run.strategy=fsdp", "optim.accumulate=4", "run.checkpoint_activations=blocks"]
    lines = planned(capsys, *TINY, *more, "--gpus", "4", "--tflops", "0.5")
    assert_fits_a_screen(lines)
    text = "\n".join(lines)
    assert "each of 4 GPUs with 16 images in 4 parts, bf16, sharded by FSDP2, blocks computed again" in text
    assert "blocks, computed again" in text
    assert "+ 4 x " in text  # images of a part
    assert "+ 12 x " in text  # those that wait
    plain = planned(capsys, *TINY, "--gpus", "4", "--tflops", "0.5")

    def days(lines):
        return float(next(line for line in lines if line.split()[:1] == ["0.5"]).replace(",", "").split()[2])

    # One more forward pass of the student's blocks, where there were 3 and the teacher's.
    assert 1.15 < days(lines) / days(plain) < 1.3
    assert "DDP's buckets" in "\n".join(plain)
    assert "DDP's buckets" not in text


def test_the_schedule_is_drawn(capsys, tmp_path):
    lines = planned(capsys, *TINY, "optim.heads_only=100", "--out", "charts/plan.png")
    assert lines[-1] == "schedules drawn in charts/plan.png"
    assert not any(line.startswith("schedule ") for line in lines)
    image = cv2.imread(str(tmp_path / "charts" / "plan.png"))
    assert image.shape == (952, 1700, 3)
    # Four panels with a purple curve each.
    purple = abs(image.astype(int) - [0x8C, 0x3F, 0x4A]).sum(axis=2) < 30
    assert all(part.sum() > 500 for half in (purple[:476], purple[476:]) for part in (half[:, :850], half[:, 850:]))
    assert [p.name for p in (tmp_path / "charts").iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["start", "warm-up end", "25 %", "50 %", "75 %", "last"]),
        (["optim.warmup=0"], ["start", "25 %", "50 %", "75 %", "last"]),
        (["optim.warmup=1000"], ["start", "25 %", "50 %", "warm-up end", "75 %", "last"]),
        (["optim={warmup: 1, freeze_last_layer: 0}", "run.steps=1"], ["start"]),
    ],
)
def test_steps_worth_a_line(overrides, expected):
    config = load_config(TINY[0], [*plan.UNSET, *TINY[1:], *overrides])
    steps, names = zip(*plan.moments(config))
    assert list(names) == expected
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == config.run.steps - 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--plan", "--tflops", "0"], "--tflops 0 is not a speed"),
        (["--plan", "--tflops", "nan"], "--tflops nan is not a speed"),
        (["--plan", "--gpus", "0"], "--gpus 0 is not a number of GPUs"),
        (["--plan", "--gpus", "3"], "--gpus 3 does not divide data.batch 64; the nearest that do: 2, 4"),
        (["--plan", "--gpus", "65"], "the nearest that do: 64"),
        (["--plan", "--gpus", "3", "optim.accumulate=4"], "--gpus 3 times optim.accumulate=4 does not divide"),
        (["--plan", "optim.accumulate=128"], "the nearest data.batch that 128 divides: 128"),
        (["--plan", "--price=-1"], "--price -1 is not a price"),
        (["--plan", "--out", "plan.pdf"], "--out plan.pdf: the schedules are a PNG"),
        (["--gpus", "2"], "--gpus belongs to a plan; add --plan"),
        (["--out", "plan.png"], "--out belongs to a plan"),
        (["run.stepps=5", "--plan"], "did you mean 'steps'?"),
        (["data.shards=", "--plan"], "data.shards"),
        (["model.architecture=vit_nothing_patch16_224", "--plan"], "vit_nothing_patch16_224"),
    ],
)
def test_a_mistake_is_one_line(argv, words, capsys, tmp_path):
    assert main(["train", *TINY, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.01235"), (5.5, "5.500"), (999.96, "1,000"), (123456.7, "123,457"), (2e-6, "2.00e-06")],
)
def test_digits(value, text):
    assert plan._digits(value) == text


def test_prefixes():
    assert plan._flop(3.936e20) == "393.6 EFLOP"
    assert plan._flop(12) == "12.00 FLOP"


def test_overrides_may_follow_an_option(capsys):
    assert any("plan of smoke: 30 steps" in line for line in planned(capsys, "smoke", "--plan", "run.steps=30"))
