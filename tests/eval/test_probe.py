import json

import numpy as np
import pandas as pd
import pytest

from eosin.data_tools.results import read_results
from eosin.eval.describe import describe, verdict
from eosin.eval.mil import AttentionProtocol
from eosin.eval.probe import Question, run_knn, run_linear, run_mil
from eosin.launch.cli import main

PROBES = {"knn": run_knn, "linear": run_linear, "mil": run_mil}


@pytest.fixture
def files(cohort, write):
    """Embeddings of one cohort: one that tells the classes, one that does not."""
    told, columns = cohort(6.0)
    blind, _ = cohort(0.0, seed=1)
    return [write("good", told, **columns), write("blind", blind, **columns)]


def metric(results, name, which="balanced_accuracy"):
    return next(e for e in results["encoders"] if e["name"] == name)["metrics"][which]


@pytest.mark.parametrize("probe", PROBES)
def test_a_planted_signal_is_found_and_its_absence_too(probe, files, tmp_path, monkeypatch):
    short = AttentionProtocol(repeats=2, epochs=10)
    monkeypatch.setattr("eosin.eval.mil.AttentionProtocol", lambda: short)
    results = PROBES[probe](Question(files, "label", "patient", tmp_path / "r.json"))
    stored, predictions = read_results(tmp_path / "r.json")
    assert stored["encoders"] == results["encoders"]
    for variant in ("",) if probe != "mil" else (" + mean", " + attention"):
        assert metric(results, f"good{variant}")["value"] > 0.9
        blind = metric(results, f"blind{variant}")
        assert blind["value"] < 0.75  # 40 patients whose features lie apart by chance
        pair = next(c for c in results["comparisons"] if c["a"] == f"good{variant}" and c["b"] == f"blind{variant}")
        assert pair["metric"] == "balanced_accuracy"
        assert pair["excludes_zero"]
        assert pair["value"] == pytest.approx(metric(results, f"good{variant}")["value"] - blind["value"])
    assert results["groups"] == 40
    assert results["n"] == (80 if probe == "mil" else 320)
    assert results["chance"]["balanced_accuracy"] == 0.5
    # Every sample once an encoder, and no patient in two folds.
    for _, rows in predictions.groupby("encoder"):
        assert rows["key"].is_unique
        assert len(rows) == results["n"]
        assert (rows.groupby("group")["fold"].nunique() == 1).all()
        np.testing.assert_allclose(rows[["probability_normal", "probability_tumor"]].sum(axis=1), 1, atol=1e-5)
        best = rows[["probability_normal", "probability_tumor"]].to_numpy().argmax(axis=1)
        assert list(rows["predicted"]) == [["normal", "tumor"][b] for b in best]
    if probe == "mil":
        attention = pd.read_parquet(tmp_path / "r.attention.parquet")
        assert list(attention.columns) == ["encoder", "key", "slide", "attention"]
        assert len(attention) == 640
        np.testing.assert_allclose(attention.groupby(["encoder", "slide"])["attention"].sum(), 1, atol=1e-5)
    text = describe(results)
    assert "won: its difference to every other encoder excludes zero" in text
    assert all(part in text for part in ("good", "blind", "chance", "paired difference", "excludes zero"))


def test_permuted_labels_are_at_chance(cohort, write, tmp_path):
    """Over shuffles of the patients' labels the mean is at chance; a leak of patients would lift it far above."""
    told, columns = cohort(6.0)
    patients = np.unique(columns["patient"])
    found = {"knn": [], "linear": []}
    for seed in range(4):
        shuffled = dict(zip(patients, np.random.default_rng(seed).permutation(np.arange(40) % 2)))
        label = [f"c{shuffled[p]}" for p in columns["patient"]]
        path = write(f"e{seed}", told, **(columns | {"label": label}))
        for probe, values in found.items():
            results = PROBES[probe](Question([path], "label", "patient", tmp_path / "r.json", seed=seed))
            values.append(metric(results, f"e{seed}")["value"])
    for values in found.values():
        assert np.mean(values) == pytest.approx(0.5, abs=0.1)


def test_the_command_line_writes_the_same_results_twice(files, tmp_path, capsys):
    written = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        question = [*map(str, files), "--label", "label", "--group", "patient", "--out", str(out)]
        assert main(["eval", "knn", *question, "--k", "20", "5", "--device", "cpu"]) == 0
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert "blind + k = 5" in capsys.readouterr().out
    results = json.loads(written[0])
    assert [e["name"] for e in results["encoders"]] == [f"{e} + k = {k}" for e in ("good", "blind") for k in (20, 5)]
    # Pairs differ in the encoder or in k, never in both.
    assert {(c["a"], c["b"]) for c in results["comparisons"]} == {
        ("good + k = 20", "good + k = 5"),
        ("good + k = 20", "blind + k = 20"),
        ("good + k = 5", "blind + k = 5"),
        ("blind + k = 20", "blind + k = 5"),
    }


def test_one_encoder_alone_brings_the_advice(files, tmp_path):
    question = Question(files[:1], "label", "patient", tmp_path / "r.json")
    results = run_knn(question)
    assert results["comparisons"] == []
    assert "random:RUN" in describe(results)


def made_up(*rows, pairs):
    """Results with balanced accuracies (name, value, low) and pairs (a, b, excludes zero)."""
    return {
        "chance": {"balanced_accuracy": 0.5},
        "encoders": [
            {"name": n, "variant": "", "metrics": {"balanced_accuracy": {"value": v, "low": low, "high": 1.0}}}
            for n, v, low in rows
        ],
        "comparisons": [
            {"a": a, "b": b, "metric": "balanced_accuracy", "value": 0.1, "excludes_zero": z} for a, b, z in pairs
        ],
    }


def test_the_verdict_in_words():
    rows = [("ours", 0.8, 0.7), ("random", 0.7, 0.6), ("color", 0.75, 0.6)]

    def said(ours_random, ours_color, random_color, rows=rows):
        pairs = [
            ("ours", "random", ours_random),
            ("ours", "color", ours_color),
            ("random", "color", random_color),
        ]
        (line,) = verdict(made_up(*rows, pairs=pairs))
        return line

    assert "ours (balanced accuracy 0.800) won" in said(True, True, False)
    assert "difference to color does not exclude zero" in said(True, False, False)
    assert said(False, False, False).startswith("No difference excludes zero")
    assert "color (balanced accuracy 0.900) won" in said(True, True, True, [rows[0], rows[1], ("color", 0.9, 0.8)])
    assert "not distinguishable from chance" in said(False, False, False, [(n, v, 0.4) for n, v, _ in rows])


def test_bad_input_ends_in_one_line_and_leaves_nothing(files, write, tmp_path, capsys):
    lonely = write(
        "lonely", np.eye(20), label=["x"] * 10 + ["y"] * 10, patient=[f"p{i % 8}" for i in range(10)] + ["q"] * 10
    )
    plain = {"patient": [f"p{i}" for i in range(20)]}
    single = write("single", np.eye(20), label=["x"] * 20, **plain)
    two = write("two", np.eye(20), label=["x", "y"] * 10, patient=["p", "q"] * 10)
    occupied = tmp_path / "mine.json"
    occupied.write_text('{"thesis": 1}')
    out = tmp_path / "r.json"
    for probe, path, options, said in [
        ("knn", files[0], ["--label", "lable"], "did you mean 'label'"),
        ("knn", files[0], ["--group", "pateint"], "did you mean 'patient'"),
        ("linear", lonely, [], "class 'y' occurs in 1 group only"),
        ("linear", single, [], "one class only"),
        ("mil", two, [], "2 groups cannot fill 5 folds"),
        ("knn", files[0], ["--k", "1000"], "must lie between 1 and the"),
        ("knn", files[0], ["--folds", "50"], "40 groups cannot fill 50 folds"),
        ("knn", tmp_path / "absent", [], "does not exist"),
        ("knn", occupied, [], "not readable as safetensors"),
        ("knn", files[0], ["--out", str(occupied)], "exists and holds no results"),
        ("mil", files[0], ["--bag", "label"], "tiles of two groups"),
        ("knn", files[0], ["--device", "abacus"], "no device 'abacus'"),
    ]:
        code = main(["eval", probe, str(path), "--label", "label", "--group", "patient", "--out", str(out), *options])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert said in lines[0]
        assert not list(tmp_path.glob("*r.*"))
    assert occupied.read_text() == '{"thesis": 1}'
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "knn", str(files[0]), "--label", "label", "--out", str(out)])
    assert stopped.value.code == 2
    assert "--group" in capsys.readouterr().err
