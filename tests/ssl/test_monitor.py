"""What is looked at now and then: against the offline probe, the training loop itself, and a run without it."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.launch.cli import main
from eosin.ssl import checkpoint, feed
from eosin.ssl.config import load_config
from eosin.ssl.held_out import held_out_slides
from eosin.ssl.log import Log, Speed
from eosin.ssl.monitor import HeldOut, Pictures
from eosin.ssl.network import StudentTeacher
from eosin.ssl.schedules import at

CPU = torch.device("cpu")
SLIDES = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard set of 96 tiles on 24 slides of 12 patients; each patient is of one of two kinds, told by color."""
    folder = tmp_path_factory.mktemp("shards") / "patients"
    folder.mkdir()
    writer, rng = ShardWriter(folder), np.random.default_rng(0)
    kind = np.arange(SLIDES) // 2 % 2
    for i in range(96):
        slide = i % SLIDES
        color = np.array([[190, 120, 170], [140, 100, 180]])[kind[slide]] + rng.normal(0, 25, (8, 8, 3))
        image = color.clip(0, 255).astype(np.uint8).repeat(6, axis=0).repeat(6, axis=1)
        encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 95)
        writer.add(f"t{i}", encoded, "jpg", {"x": i, "y": 0, "mpp": 0.5}, slide=slide)
    slides = pd.DataFrame({"slide": [f"s{n}" for n in range(SLIDES)], "patient": [f"p{n // 2}" for n in range(SLIDES)]})
    writer.finish(slides.assign(stain="H&E", label=[f"k{k}" for k in kind]), tile_size=48, mpp=0.5, config={})
    return folder


TINY = ["model.drop_path=0.1", "data.batch=16", "stain.normalize=off", "run.steps=6", "run.log_every=1"]


def train(recipe, shards, run, *overrides):
    given = [*recipe, *TINY, f"data.shards={shards}", f"run.dir={run}", *overrides]
    assert main(["train", *given]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(checkpoint.latest(run) / checkpoint.TEACHER)


def offline(encoder, shards, out):
    """Balanced accuracy of scikit-learn's k-NN, each patient told by the others, on features of ``eosin embed``."""
    assert main(["embed", encoder, str(shards), "--out", str(out)]) == 0
    found = read_embeddings(out)
    features, labels = found.features.astype(np.float64), found.table["label"].to_numpy()
    said = np.empty_like(labels)
    for others, own in LeaveOneGroupOut().split(features, labels, found.table["patient"]):
        oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        said[own] = oracle.fit(features[others], labels[others]).predict(features[own])
    return balanced_accuracy_score(labels, said)


def test_the_probe_is_the_offline_one_and_changes_nothing(tiny_recipe, shards, tmp_path):
    run = tmp_path / "run"
    records = train(tiny_recipe, shards, run, f"health={{pictures_every: 1, probe: {{shards: {shards}, every: 4}}}}")
    looked = {r["step"]: r["probe_accuracy"] for r in records if "probe_accuracy" in r}
    assert sorted(looked) == [4, 6]  # every 4 steps, and after the last
    assert looked[6] == pytest.approx(offline(str(run), shards, tmp_path / "trained.safetensors"))
    random = offline(f"random:{run}", shards, tmp_path / "random.safetensors")
    assert [r.get("probe_start") for r in records] == [pytest.approx(random), *[None] * 5]
    assert records[-1]["probe_chance"] == 0.5
    assert 0 <= records[-1]["probe_error"] < 0.3
    plain = train(tiny_recipe, shards, tmp_path / "plain", "health.pictures_every=0")
    assert [r["loss"] for r in plain] == [r["loss"] for r in records]
    ours, theirs = weights(run), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_pictures_go_to_tensorboard_and_keep_their_colors_when_a_run_goes_on(tiny_recipe, shards, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(tiny_recipe, shards, run, "run.checkpoint_every=3")
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for name in ("crops", "patch tokens"):
        assert [e.step for e in events.Images(name)] == [3, 6]  # with checkpoints
    assert {"probe_accuracy", "held_out_loss"}.isdisjoint(events.Tags()["scalars"])
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], *TINY, f"data.shards={shards}", f"run.dir={run}"])
    again = Pictures(feed.phases(config, None, CPU))
    np.testing.assert_array_equal(again.scores, np.load(run / "tensorboard" / "patch_scores.npy"))


def settings(recipe, shards, run, *overrides):
    given = [*recipe[1:], *TINY, f"data.shards={shards}", f"run.dir={run}", *overrides]
    return load_config(recipe[0], given)


@pytest.mark.parametrize("balance", ["[]", "[slide]"])
def test_held_out_patients_are_whole_and_never_streamed(balance, tiny_recipe, shards, tmp_path):
    given = ["health.held_out=0.3", "run.steps=200", f"data.balance={balance}"]
    config = settings(tiny_recipe, shards, tmp_path / "run", *given)
    (phase,) = feed.phases(config, None, CPU)
    out = held_out_slides(phase.shards, 0.3, config.run.seed)
    assert 0 < len(out) < SLIDES
    assert all((slide ^ 1) in out for slide in out)  # both slides of a patient
    seen = {int(slide) for _, batch in feed.stream([phase], 0) for slide in batch["slide"]}
    assert seen == set(range(SLIDES)) - out
    held = HeldOut(phase)
    assert set(held.batch["slide"].tolist()) <= out
    assert len(held.batch["tile"]) == min(16, 4 * len(out))
    again = HeldOut(phase)  # as when a run goes on
    assert all(torch.equal(again.batch[key], held.batch[key]) for key in ("images", "position", "tile", "slide"))


def test_who_is_held_out_depends_on_the_patient_alone(tmp_path):
    def write(name, patients):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name)
        writer.add("t", simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), "jpg", {"x": 0, "y": 0, "mpp": 1}, 0)
        table = pd.DataFrame({"slide": [f"{name}{n}" for n in range(len(patients))], "patient": patients})
        writer.finish(table, tile_size=16, mpp=1, config={})
        return str(tmp_path / name)

    names = [f"p{n}" for n in range(1000)]
    first, second = write("a", names), write("b", [None, *names[::-1], ""])
    alone = held_out_slides(Mixture({first: 1.0}), 0.2, 5)
    assert len(alone) == pytest.approx(200, abs=40)
    both = held_out_slides(Mixture({first: 1.0, second: 1.0}), 0.2, 5)
    expected = alone | {1000 + 1 + 999 - slide for slide in alone}
    assert both - {1000, 2001} == expected
    assert held_out_slides(Mixture({first: 1.0}), 0.2, 6) != alone
    assert alone < held_out_slides(Mixture({first: 1.0}), 0.3, 5)
    assert held_out_slides(Mixture({first: 1.0}), 0.0, 5) == frozenset()


@pytest.mark.parametrize("more", ["optim.accumulate=1", "optim.accumulate=2"])
def test_the_held_out_loss_is_what_the_loop_computes(more, tiny_recipe, shards, tmp_path):
    more = [more, "objective.koleo=0", "objective.targets=centering", "model.init_from=null"]
    first = train(tiny_recipe, shards, tmp_path / "run", "run.steps=2", *more)[0]
    # The same tiles, positions and weights as in the first step, as if they had been held out.
    config = settings(tiny_recipe, shards, tmp_path / "run", "health.held_out=0.6", "run.steps=2", *more)
    (phase,) = feed.phases(config, None, CPU)
    held = HeldOut(phase)
    plain = settings(tiny_recipe, shards, tmp_path / "run", "run.steps=2", *more)
    ((_, held.batch), _) = feed.stream(feed.phases(plain, None, CPU), 0)
    torch.manual_seed(config.run.seed)
    model = StudentTeacher(config)
    found = held.measure(model, model.student, at(0, config), CPU)
    for name in ("loss", "dino", "ibot"):
        assert found[f"held_out_{name}"] == pytest.approx(first[name], rel=1e-5)
    assert held.measure(model, model.student, at(0, config), CPU) == found  # the same crops each time
    with torch.no_grad():
        for weight in model.student.parameters():
            weight.mul_(0.9)
    assert held.measure(model, model.student, at(0, config), CPU) != found


def test_looking_at_held_out_patients_changes_nothing(tiny_recipe, shards, tmp_path):
    given = ["health.pictures_every=0", "health.held_out=0.3", "objective.targets=centering"]
    often = train(tiny_recipe, shards, tmp_path / "often", *given, "health.held_out_every=1")
    rarely = train(tiny_recipe, shards, tmp_path / "rarely", *given)
    assert ["held_out_loss" in r for r in often] == [True] * 6
    assert ["held_out_loss" in r for r in rarely] == [False] * 5 + [True]
    assert [r["loss"] for r in often] == [r["loss"] for r in rarely]
    assert all(torch.equal(w, weights(tmp_path / "rarely")[name]) for name, w in weights(tmp_path / "often").items())
    # It is another run than one that holds out nobody.
    others = [*tiny_recipe, *TINY, f"data.shards={shards}", f"run.dir={tmp_path / 'often'}"]
    assert main(["train", *others, *given, "health.held_out=0.4"]) == 2
    assert main(["train", *others, *given, f"health.probe={{shards: {shards}}}"]) == 0  # the probe is free


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("health.probe={shards: SHARDS, label: lable}", "have 'lable'; did you mean 'label'?"),
        ("health.probe={shards: SHARDS, group: centre}", "health.probe.group: neither"),
        ("health.probe={shards: SHARDS, label: stain}", "all 96 tiles are of one 'stain'"),
        ("health.probe={shards: SHARDS, group: label}", "occurs in 1 label only"),
        ("health.probe={shards: SHARDS, tiles: 20}", "20 outside of each patient are needed"),
        ("health.probe={shards: nowhere}", "nowhere does not exist"),
        ("health.held_out=0.001", "give a larger share"),
        ("health.held_out=0.999", "no tile has a weight above 0 on the slides that are not held out"),
        ("health={held_out: 0.3, pictures: 3}", "no key 'health.pictures'"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line_and_leaves_nothing(given, said, tiny_recipe, shards, tmp_path, capsys):
    arguments = [*tiny_recipe, *TINY, f"data.shards={shards}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *arguments, given.replace("SHARDS", str(shards))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list((tmp_path / "run").glob("[!.]*")) == []


def test_tiles_of_the_probe_that_are_broken_are_left_out_and_said(tiny_recipe, shards, tmp_path, capsys):
    import shutil

    other = shutil.copytree(shards, tmp_path / "other")
    row = ShardSet(other).row(7)
    with (other / "tiles-000000.tar").open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(b"\0" * int(row["size"]))
    records = train(tiny_recipe, shards, tmp_path / "run", f"health.probe={{shards: {other}}}")
    assert "1 tiles of" in (said := capsys.readouterr().out)
    assert "tile 7: its bytes are not those" in said
    assert records[-1]["bad_tiles"] == 0


def log(recipe, shards, run, *overrides):
    run.mkdir()
    return Log(settings(recipe, shards, run, *overrides), 0, CPU)


def test_a_record_counts_prototypes_and_says_how_far_the_teacher_is_from_even(tiny_recipe, shards, tmp_path):
    writer = log(tiny_recipe, shards, tmp_path / "run")
    writer.note_answers(torch.tensor([[5, 5], [9, 0]]))
    writer.note_answers(torch.tensor([[5, 63], [63, 63]]))
    terms = {name: torch.tensor(1.0) for name in ("dino", "ibot", "koleo", "kde", "loss", "grad_norm")}
    terms |= {"teacher_entropy": torch.tensor(3.0), "prototype_entropy": torch.tensor(math.log(7))}
    terms |= {"cls": torch.randn(2, 16, 8), "answers": torch.zeros(2, 2)}
    for step in (1, 2):
        writer.write(step, dict(terms), torch.arange(16), at(0, writer.config))
        writer.note_answers(torch.tensor([[1, 1]]))
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["prototypes_used"] == pytest.approx(4 / 64)
    assert first["prototypes_even"] == pytest.approx(1 - (63 / 64) ** 8)
    assert first["prototype_perplexity"] == pytest.approx(7 / 64)
    assert first["teacher_entropy_gap"] == pytest.approx(math.log(64) - 3, abs=1e-6)
    assert (second["prototypes_used"], second["mfu"]) == (1 / 64, None)
    import resource

    assert first["memory_gib"] <= second["memory_gib"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_the_time_waited_for_tiles_is_a_share_of_the_wall_time(tiny_recipe, shards, tmp_path):
    writer = log(tiny_recipe, shards, tmp_path / "run")

    def slow():
        for number in range(4):
            time.sleep(0.1)
            yield number

    began = time.monotonic()
    for _ in writer.timed(slow()):
        time.sleep(0.1)
    assert writer.waited == pytest.approx(0.4, abs=0.05)
    assert time.monotonic() - began == pytest.approx(0.8, abs=0.2)


def test_mfu_is_the_flops_that_were_executed_over_the_peak(tiny_recipe, shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    gpu = torch.device("cuda", 0)
    fixed = ["model.drop_path=0", "objective.mask_probability=1", "objective.mask_ratio=[0.25,0.25]"]
    config = settings(tiny_recipe, shards, "r", *fixed, "run.precision=bf16")
    (phase,) = feed.phases(config, None, CPU)
    _, batch = next(feed.stream([phase], 0))
    model = StudentTeacher(config)
    part = feed.views(phase, batch, CPU)[:3]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (targets,), _ = model.targets([part], 0.04)
        terms = model.losses(model.student, part, targets)
        (terms["dino"] + terms["ibot"]).backward()
    of_image = counter.get_total_flops() / len(batch["tile"])
    assert Speed(config, gpu).utilization(1, 5000.0) == pytest.approx(5000 * of_image / 756e12, rel=1e-3)
    # Half of the branches dropped: what they would have cost is not counted as done.
    half = settings(tiny_recipe, shards, "r", *fixed, "model.drop_path=0.5")
    assert Speed(half, gpu).utilization(1, 5000.0) < 0.9 * Speed(config, gpu).utilization(1, 5000.0)
    full = settings(tiny_recipe, shards, "r", "run.precision=fp32")
    assert Speed(full, gpu).utilization(1, 5000.0) is None
    assert Speed(config, CPU).utilization(1, 5000.0) is None


def test_each_phase_has_its_own_flops(tiny_recipe, shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    last = "high_resolution={steps: 2, crops: {global_size: 64, local_size: 32, local_count: 2}}"
    speed = Speed(settings(tiny_recipe, shards, "r", last), torch.device("cuda", 0))
    found = [speed.utilization(step, 100.0) for step in range(1, 7)]
    assert found[:4] == [found[0]] * 4
    assert found[4:] == [found[4]] * 2
    assert found[4] > 2 * found[0]


def test_pictures_take_no_longer_than_a_blink(tiny_recipe, shards, tmp_path):
    config = settings(tiny_recipe, shards, tmp_path / "run")
    phases = feed.phases(config, None, CPU)
    pictures, model = Pictures(phases), StudentTeacher(config)
    _, batch = next(feed.stream(phases, 0))
    views = feed.views(phases[0], batch, CPU)
    began = time.process_time()
    drawn = pictures.draw(model, phases[0], batch, views)
    assert time.process_time() - began < 1
    assert {name: picture.shape[2] for name, picture in drawn.items()} == {"crops": 3, "patch tokens": 3}
