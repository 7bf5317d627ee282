import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import TO_BE_CONTINUED, UserError
from eosin.data_tools.shards import ShardSet
from eosin.eval import watch as watching
from eosin.eval.encoders import load_encoder
from eosin.eval.question import Question
from eosin.eval.suite_file import load_suite
from eosin.eval.watch import pick, validation, watch
from eosin.launch.cli import main


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run of 8 steps, with the checkpoints of steps 6 and 8."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def suite(tmp_path, tiny_shards):
    """Write a suite of one task on the tiny shards."""

    def suite(**task):
        common = {"data": str(tiny_shards), "label": "label", "group": "patient", "folds": 2}
        path = tmp_path / "suite.yaml"
        tasks = {"watched": common | {"probes": [{"knn": {"k": [1, 3]}}]} | task}
        path.write_text(yaml.safe_dump({"name": "mine", "tasks": tasks}))
        return path

    return suite


def rows_of(out):
    return [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]


def test_each_checkpoint_is_evaluated_as_the_single_commands_do(suite, run, tiny_shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["eval", "suite", str(suite()), "--watch", str(run), "--out", str(out)]) == 0  # 8 is the last step
    rows = rows_of(out)
    who = [("color", None), ("random", None), (f"{run}@6", 6), (f"{run}@8", 8)]
    assert [(row["step"], row["variant"]) for row in rows] == [(s, f"k = {k}") for _, s in who for k in (1, 3)]
    assert [row["teacher"] for row in rows[:4]] == ["color", "color", "random", "random"]
    for number, (given, _) in enumerate(who):
        e, r = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.json"
        encoder = f"random:{run}" if given == "random" else given
        assert main(["embed", encoder, str(tiny_shards), "--out", str(e)]) == 0
        asked = ["--label", "label", "--group", "patient", "--folds", "2", "--k", "1", "3"]
        assert main(["eval", "knn", str(e), *asked, "--out", str(r)]) == 0
        truth = [known["metrics"]["balanced_accuracy"] for known in json.loads(r.read_text())["encoders"]]
        mine = rows[2 * number : 2 * number + 2]
        assert [{k: row[k] for k in ("value", "low", "high")} for row in mine] == truth
    means = {step: np.mean([row["value"] for row in rows if row["step"] == step]) for step in (6, 8)}
    best = json.loads((out / "best.json").read_text())
    assert best["step"] == (8 if means[8] > means[6] else 6)
    assert best["value"] == pytest.approx(means[best["step"]])
    beside = {name: np.mean([row["value"] for row in rows if row["teacher"] == name]) for name in ("color", "random")}
    assert best["baselines"] == pytest.approx(beside)
    for name, called in (("color", "color alone"), ("random", "random weights")):
        above = ", above every checkpoint" if beside[name] > best["value"] else ""
        assert f"; {called} {beside[name]:.4f}{above}; " in best["why"]
    assert "every sample was scored (kfold), so all data of it counts as validation" in best["why"]
    assert Image.open(out / "watch.png").width > 500
    assert not (out / "working").exists()
    assert f"picked: step {best['step']}" in capsys.readouterr().out


def test_a_run_at_a_step_is_its_teacher_then(run):
    then, now = (load_encoder(f"{run}@{step}").fingerprint["weights"] for step in (6, 8))
    assert then != now
    assert load_encoder(str(run)).fingerprint["weights"] == now
    shutil.rmtree(run / "checkpoints/step-00000008")
    assert load_encoder(str(run)).fingerprint["weights"] == then
    with pytest.raises(UserError, match="has no checkpoint of step 8; there are: 6"):
        load_encoder(f"{run}@8")


def test_what_is_there_is_not_evaluated_again_but_what_was_trained_again_is(suite, run, tmp_path, monkeypatch):
    asked, out, loaded = load_suite(str(suite())), tmp_path / "out", []
    real = watching.load_encoder
    monkeypatch.setattr(watching, "load_encoder", lambda name, **given: loaded.append(name) or real(name, **given))
    aside = shutil.move(run / "checkpoints/step-00000008", tmp_path / "aside")
    watch(asked, run, {}, out, once=True)
    shutil.move(aside, run / "checkpoints/step-00000008")
    watch(asked, run, {}, out, once=True)
    assert loaded == ["color", f"random:{run}", f"{run}@6", f"{run}@8"]
    del loaded[:2]
    # After a rewind there are other weights at step 6, and those that led to step 8 are no more.
    rows = rows_of(out)
    rows[4]["teacher"] = rows[5]["teacher"] = "0" * 64
    (out / "watch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    watch(asked, run, {}, out, once=True)
    assert loaded == [f"{run}@6", f"{run}@8"] * 2
    assert [row["step"] for row in rows_of(out)] == [None] * 4 + [6, 6, 8, 8]
    # Another question is answered anew, of every checkpoint.
    watch(load_suite(str(suite(probes=["knn"]))), run, {}, out, once=True)
    assert loaded == [*[f"{run}@6", f"{run}@8"] * 2, "color", f"random:{run}", f"{run}@6", f"{run}@8"]
    assert [(row["step"], row["variant"]) for row in rows_of(out)] == [(None, ""), (None, ""), (6, ""), (8, "")]
    (out / "watch.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="remove it to evaluate again"):
        watch(asked, run, {}, out, once=True)


def test_a_checkpoint_that_training_removes_is_passed_over(suite, run, tmp_path, monkeypatch, capsys):
    real = watching.load_encoder

    def late(name, **given):
        if name.endswith("@6"):
            shutil.rmtree(run / "checkpoints/step-00000006", ignore_errors=True)
        return real(name, **given)

    monkeypatch.setattr(watching, "load_encoder", late)
    best = watch(load_suite(str(suite())), run, {}, tmp_path / "out")
    assert best["step"] == 8
    assert {row["step"] for row in rows_of(tmp_path / "out")} == {None, 8}
    assert "step 6: removed by the training before it was evaluated" in capsys.readouterr().err


def test_a_checkpoint_whose_features_are_broken_is_listed_and_never_picked(suite, run, tmp_path, monkeypatch):
    real = watching.embedded

    def broken(encoder, *given):
        if encoder.name.endswith("@8"):
            raise UserError("features are not finite")
        real(encoder, *given)

    monkeypatch.setattr(watching, "embedded", broken)
    assert watch(load_suite(str(suite())), run, {}, tmp_path / "out")["step"] == 6
    last = rows_of(tmp_path / "out")[-1]
    assert (last["step"], last["value"], last["refused"]) == (8, None, "features are not finite")


def test_a_probe_that_is_refused_is_named_and_the_exit_code_says_so(suite, run, tmp_path, capsys):
    path = suite(probes=[{"knn": {"k": [3]}}, {"fewshot": {"shots": [500]}}])
    assert main(["eval", "suite", str(path), "--watch", str(run), "--out", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    assert "not answered, and not in the mean: watched fewshot" in printed.out
    assert "not answered: watched fewshot; the reasons are in" in printed.err
    best = json.loads((tmp_path / "out/best.json").read_text())
    knn = {str(row["step"]): row["value"] for row in rows_of(tmp_path / "out") if row["probe"] == "knn" and row["step"]}
    assert best["means"] == pytest.approx(knn)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_test_side_is_gone_before_any_probe_looks(suite, write, cohort, tmp_path, elsewhere):
    features, columns = cohort(3.0)
    patients = np.array([int(p[1:]) for p in columns["patient"]])
    sides = np.array(["train", "Validation", "test"])[np.where(patients < 20, 0, np.where(patients < 30, 1, 2))]
    features[sides == "test"] = 1e6
    path = write("e", features, **columns, **({} if elsewhere else {"split": sides}))
    task = load_suite(str(suite(split="fixed", group="patient"))).tasks["watched"]
    question = Question([path], "label", "patient", tmp_path / "r.json", split="fixed")
    if elsewhere:
        labels = tmp_path / "labels.csv"
        known = sorted(set(zip(columns["slide"], sides, columns["label"])))
        labels.write_text("slide,split,label\n" + "".join(f"{s},{side},{label}\n" for s, side, label in known))
        question = Question([path], "label", "patient", tmp_path / "r.json", labels=labels, split="fixed")
    safe, said = validation(task, question, tmp_path)
    found = read_embeddings(safe.embeddings[0])
    assert list(found.table["split"]) == ["test" if p >= 20 else "train" for p in patients if p < 30]
    np.testing.assert_array_equal(found.features, features[patients < 30].astype(np.float32))
    assert (safe.labels, said) == (None, "the val side of 'split' was scored")
    results = watching.ask(task.probes[0], safe, device="cpu")
    assert results["n"] == (sides == "Validation").sum()


def test_a_fixed_split_without_a_validation_side_is_refused(suite, write, cohort, tmp_path):
    features, columns = cohort(3.0)
    sides = np.where(np.arange(320) < 160, "train", "test")
    path = write("e", features, **columns, split=sides)
    task = load_suite(str(suite(split="fixed"))).tasks["watched"]
    question = Question([path], "label", "patient", tmp_path / "r.json", split="fixed")
    with pytest.raises(UserError, match="names no labeled sample 'val'; checkpoints are picked on validation only"):
        validation(task, question, tmp_path)


def made(values):
    """Rows of {(step, task, probe, variant): value}."""
    return [
        {"step": s, "teacher": s, "task": t, "probe": p, "variant": v, "value": value, "scored": "val"}
        for (s, t, p, v), value in values.items()
    ]


def test_the_pick_is_the_highest_mean_of_means():
    # Over all values step 2 is ahead by .7 to .675; by task step 1 is, by (.6 + .9) / 2 to (.75 + .55) / 2.
    values = {
        **{(1, "a", "knn", f"k = {k}"): 0.6 for k in (1, 5, 20)},
        (1, "b", "linear", ""): 0.9,
        **{(2, "a", "knn", f"k = {k}"): 0.75 for k in (1, 5, 20)},
        (2, "b", "linear", ""): 0.55,
    }
    best = pick(made(values))
    assert best["step"] == 1
    assert best["means"] == {"1": pytest.approx(0.75), "2": pytest.approx(0.65)}


def test_of_equal_steps_the_earliest_is_picked_and_incomplete_ones_never():
    values = {(s, "a", "knn", ""): 0.5 for s in (10, 20)} | {(s, "b", "knn", ""): 0.5 for s in (10, 20)}
    assert pick(made(values))["step"] == 10
    values[30, "a", "knn", ""] = 1.0
    assert pick(made(values))["step"] == 10
    assert pick(made({(30, "b", "knn", ""): None})) is None


def test_it_waits_beside_the_training_stops_on_sigterm_and_ends_with_the_last_step(suite, run, tmp_path):
    aside = shutil.move(run / "checkpoints/step-00000008", tmp_path / "aside")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ["suite", str(suite()), "--watch", str(run), "--out", str(tmp_path / "out"), "--every", "0.05"]
    command = [sys.executable, "-m", "eosin.launch", "eval", *arguments]

    def started():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    process = started()
    while process.poll() is None and not (tmp_path / "out/best.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == TO_BE_CONTINUED
    assert "stopped; the same command goes on" in said
    assert {row["step"] for row in rows_of(tmp_path / "out")} == {None, 6}
    process = started()
    time.sleep(0.5)
    shutil.move(aside, run / "checkpoints/step-00000008")
    assert "step 6" not in process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert {row["step"] for row in rows_of(tmp_path / "out")} == {None, 6, 8}
    assert {path: path.read_bytes() for path in before} == before


def test_labels_that_changed_are_asked_anew(suite, run, tiny_shards, tmp_path):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    asked, out = load_suite(str(suite(data=str(shards)))), tmp_path / "out"
    watch(asked, run, {}, out, once=True)
    before = rows_of(out)
    slides = ShardSet(shards).slides().assign(label=["y", "x", "x", "y"])
    slides.to_parquet(shards / "slides.parquet", index=False)
    watch(asked, run, {}, out, once=True)
    after = rows_of(out)
    assert len(after) == len(before)
    assert {row["asked"] for row in after}.isdisjoint(row["asked"] for row in before)


def test_a_dense_probe_watches_too(suite, run, tiny_shards, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for key in ShardSet(tiny_shards).table()["key"]:
        Image.fromarray(np.repeat([[1, 2]], 32, axis=1).repeat(64, axis=0).astype(np.uint8)).save(masks / f"{key}.png")
    dense = {"masks": str(masks), "probes": ["dense"], "label": None}
    assert watch(load_suite(str(suite(**dense))), run, {}, tmp_path / "out", once=True)["step"] in (6, 8)
    rows = rows_of(tmp_path / "out")
    assert [(row["step"], row["metric"]) for row in rows] == [(s, "dice") for s in (None, None, 6, 8)]
    command = ["eval", "dense", f"{run}@8", str(tiny_shards), "--masks", str(masks), "--group", "patient", "--folds"]
    assert main([*command, "2", "--out", str(tmp_path / "d.json")]) == 0
    truth = json.loads((tmp_path / "d.json").read_text())["encoders"][0]["metrics"]["dice"]
    assert {name: rows[-1][name] for name in ("value", "low", "high")} == truth
    # Masks that changed are another question.
    Image.fromarray(np.ones((64, 64), np.uint8)).save(next(masks.glob("*.png")))
    watch(load_suite(str(suite(**dense))), run, {}, tmp_path / "out", once=True)
    assert {row["asked"] for row in rows_of(tmp_path / "out")}.isdisjoint(row["asked"] for row in rows)


def test_mistakes_are_one_line(suite, run, tiny_shards, tmp_path, capsys):
    for task, place, complaint in [
        ({"split": "fixed", "probes": ["dense"], "masks": "m"}, run, "task 'watched' has a dense probe and a fixed"),
        ({}, tmp_path / "absent", "is not a run"),
        ({"data": None, "embeddings": ["e.safetensors"]}, run, "task 'watched' is of embeddings that exist"),
        ({"split": "fixed"}, run, "no column 'split' for --side"),
    ]:
        assert main(["eval", "suite", str(suite(**task)), "--watch", str(place), "--out", str(tmp_path / "out")]) == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]
