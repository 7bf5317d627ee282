import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.eval.describe import describe, verdict
from eosin.eval.metrics import METRICS
from eosin.eval.mil import AttentionProtocol
from eosin.eval.presets import preset
from eosin.eval.probe import run_knn, run_linear, run_mil, run_preset
from eosin.eval.question import Question
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


def test_presets_are_those_protocols_fold_by_fold(files, tmp_path, capsys):
    """uni-knn against brute force, pathobench-linear against scikit-learn, on the folds that the results name."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from eosin.data_tools.embeddings import read_embeddings

    features = {e.name: np.array(e.features, dtype=np.float64) for e in map(read_embeddings, files)}

    def unit(rows, mean):
        return (rows - mean) / np.linalg.norm(rows - mean, axis=1, keepdims=True)

    for verb, name in (("knn", "uni-knn"), ("linear", "pathobench-linear")):
        out = tmp_path / f"{name}.json"
        common = ["--label", "label", "--group", "patient", "--device", "cpu"]
        assert main(["eval", verb, *map(str, files), *common, "--preset", name, "--out", str(out)]) == 0
        results, predictions = read_results(out)
        assert results["protocol"] == name
        for encoder, rows in predictions.groupby("encoder"):
            here = features[encoder][rows.index - rows.index[0]]
            labels, folds = rows["label"].to_numpy(), rows["fold"].to_numpy()
            for fold in np.unique(folds):
                train, test = here[folds != fold], here[folds == fold]
                if name == "uni-knn":
                    mean = train.mean(axis=0)
                    oracle = KNeighborsClassifier(20).fit(unit(train, mean), labels[folds != fold])
                    said = oracle.predict_proba(unit(test, mean))
                else:
                    oracle = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-8, max_iter=10_000)
                    said = oracle.fit(train, labels[folds != fold]).predict_proba(test)
                found = rows.loc[folds == fold, ["probability_normal", "probability_tumor"]].to_numpy()
                np.testing.assert_allclose(found, said, atol=2e-3)
    capsys.readouterr()
    wrong = ["--preset", "uni-knn", "--out", str(tmp_path / "no.json")]
    assert main(["eval", "linear", *map(str, files), *common, *wrong]) == 2
    assert "valid here: uni-linear, pathobench-linear, thunder-linear" in capsys.readouterr().err


def test_shares_of_the_labels_are_learned_from_alone(files, tmp_path):
    """Against brute force on the groups that label_share names; whole groups, the same for each encoder."""
    from sklearn.neighbors import KNeighborsClassifier

    from eosin.data_tools.embeddings import read_embeddings
    from eosin.eval.fewshot import label_share

    out = tmp_path / "r.json"
    results = run_preset(Question(files, "label", "patient", out), "uni-knn", "knn", ratios=[0.1, 1, 0.1])
    assert [e["variant"] for e in results["encoders"]] == ["10 % of labels", "100 % of labels"] * 2
    assert results["parameters"]["ratios"] == [0.1, 1]
    stored, predictions = read_results(out)
    assert stored["encoders"] == results["encoders"]
    for row in results["encoders"]:
        mine = predictions[predictions["encoder"] == row["name"]].reset_index()
        labels, folds = mine["label"].to_numpy(), mine["fold"].to_numpy()
        _, groups = np.unique(mine["group"], return_inverse=True)
        features = np.array(read_embeddings(files[row["encoder"] == "blind"]).features, dtype=np.float64)
        share = row["details"]["share"]
        for fold in np.unique(folds):
            learned = np.flatnonzero(folds != fold)
            taken = learned[label_share(labels[learned], groups[learned], share["ratio"], 0)]
            assert (share["samples"][fold], share["groups"][fold]) == (len(taken), len(set(groups[taken])))
            assert len(taken) == (len(learned) if share["ratio"] == 1 else pytest.approx(0.1 * len(learned), abs=16))
            mean = features[taken].mean(axis=0)
            unit = (features - mean) / np.linalg.norm(features - mean, axis=1, keepdims=True)
            said = KNeighborsClassifier(20).fit(unit[taken], labels[taken]).predict_proba(unit[folds == fold])
            found = mine.loc[folds == fold, ["probability_normal", "probability_tumor"]]
            np.testing.assert_allclose(found, said, atol=1e-6)
    text = describe(results)
    assert "samples learned from" in text
    assert "good + 10 % of labels" in text


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_more_labels_tell_more(probe, write, cohort, tmp_path, capsys):
    features, columns = cohort(4.0)
    path = write("e", features, **columns)
    ask = ["eval", probe, str(path), "--label", "label", "--group", "patient", "--device", "cpu"]
    k = ["--k", "5"] if probe == "knn" else []
    assert main([*ask, *k, "--out", str(tmp_path / "r.json"), "--ratios", ".01", "1"]) == 0
    few, all_of_them = read_results(tmp_path / "r.json")[0]["encoders"]
    assert (few["variant"], all_of_them["variant"]) == ("1 % of labels", "100 % of labels")
    assert few["metrics"]["auroc"]["value"] + 0.05 < all_of_them["metrics"]["auroc"]["value"]
    assert min(few["details"]["share"]["groups"]) == 2  # no less than two groups, and both classes
    # The share of 100 % is what is said without any.
    assert main([*ask, *k, "--out", str(tmp_path / "w.json")]) == 0
    (whole,) = read_results(tmp_path / "w.json")[0]["encoders"]
    assert whole["metrics"] == all_of_them["metrics"]
    capsys.readouterr()
    for more, said in [
        (["--ratios", "2"], "a share of labels of 2.0 is not in (0, 1]"),
        *(
            [(["--ratios", ".01", "--k", "50"], "to vote of the smallest share; give another --k or larger --ratios")]
            * (probe == "knn")
        ),
        *(
            [(["--ratios", ".01", "--preset", "thunder-linear"], "2 groups, too few to hold some of them out")]
            * (probe == "linear")
        ),
    ]:
        assert main([*ask, "--out", str(tmp_path / "no.json"), *more]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
        assert not list(tmp_path.glob("no*"))


def test_runs_of_a_preset_are_averaged_and_their_spread_is_told(files, tmp_path, monkeypatch):
    """eva-linear with few steps: every run scores every sample once, values are means of the runs' own."""
    chosen = preset("eva-linear")
    short = replace(chosen, parameters=dict(chosen.parameters) | {"steps": 20, "runs": 3})
    monkeypatch.setattr("eosin.eval.presets.PRESETS", {"eva-linear": short})
    results = run_preset(Question(files, "label", "patient", tmp_path / "r.json"), "eva-linear", "logistic")
    predictions = read_results(tmp_path / "r.json")[1]
    assert (results["n"], len(predictions), results["split"]["passes"]) == (320, 2 * 3 * 320, 3)
    for name, rows in predictions.groupby("encoder"):
        runs = [rows[rows["fold"] // 5 == run] for run in range(3)]
        assert all(run["key"].is_unique and len(run) == 320 for run in runs)
        assert all((run.groupby("group")["fold"].nunique() == 1).all() for run in runs)
        by_run = [balanced_accuracy_score(run["label"], run["predicted"]) for run in runs]
        assert metric(results, name)["value"] == pytest.approx(np.mean(by_run))
        details = next(e for e in results["encoders"] if e["name"] == name)["details"]
        assert details["balanced_accuracy_by_run"] == pytest.approx(by_run)
        assert details["balanced_accuracy_deviation"] == pytest.approx(np.std(by_run, ddof=1))
        assert len(details["step"]) == 15
        assert (runs[0]["probability_tumor"].to_numpy() != runs[1]["probability_tumor"].to_numpy()).any()
    text = describe(results)
    assert "5 grouped folds, mean of 3 runs" in text
    assert "SD over runs" in text
    assert "not as published: the epoch is chosen on a grouped fold" in text


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


def ask(files, out, probe="knn", **more):
    """Results of a question about the cohort, and the predictions."""
    results = PROBES[probe](Question(files, "label", "patient", out, **more))
    return results, read_results(out)[1]


def test_every_split_from_files_to_results(write, cohort, tmp_path):
    features, columns = cohort(4.0)
    numbers = np.array([int(p[1:]) for p in columns["patient"]])
    sides = np.where(numbers < 20, "train", np.where(numbers < 24, "val", "test"))
    path = write("good", features, split=sides, site=np.array(["a", "b", "c"])[numbers % 3], **columns)
    for kind, more, rows, folds in [
        ("fixed", {}, 128, 1),
        ("leave-one-group-out", {}, 320, 40),
        ("monte-carlo", {"repeats": 3}, None, 3),
    ]:
        results, predictions = ask([path], tmp_path / "r.json", split=kind, **more)
        assert results["split"]["kind"] == kind
        assert len(results["split"]["folds"]) == folds == predictions["fold"].nunique()
        assert len(predictions) == (rows or sum(f["scored"] for f in results["split"]["folds"]))
        assert results["n"] == predictions["key"].nunique()
        scored = predictions.drop_duplicates("key")["label"].value_counts().to_dict()
        assert {c: found["n"] for c, found in results["encoders"][0]["classes"].items()} == scored
        assert metric(results, "good")["value"] > 0.7
        # The value again from the predictions, one pass at a time.
        passes = predictions.groupby("fold" if kind == "monte-carlo" else lambda _: 0)
        again = [balanced_accuracy_score(p["label"], p["predicted"]) for _, p in passes]
        assert metric(results, "good")["value"] == pytest.approx(np.mean(again))
    results, predictions = ask([path], tmp_path / "r.json", split="fixed")
    assert set(predictions["key"]) == {f"t{i}" for i in np.flatnonzero(numbers >= 24)}
    assert results["split"]["folds"][0]["train"] == 160


def test_bags_under_a_split_that_leaves_some_aside(write, cohort, tmp_path, monkeypatch):
    short = AttentionProtocol(repeats=1, epochs=3)
    monkeypatch.setattr("eosin.eval.mil.AttentionProtocol", lambda: short)
    features, columns = cohort(4.0)
    numbers = np.array([int(p[1:]) for p in columns["patient"]])
    sides = np.where(numbers < 20, "train", np.where(numbers < 24, "val", "test"))
    aside = features.copy()
    aside[sides == "val"] = 1e4  # would spoil any fit that looked
    found = []
    for name, x in (("e", features), ("f", aside)):
        path = write(name, x, split=sides, **columns)
        _, predictions = ask([path], tmp_path / "r.json", "mil", split="fixed")
        assert set(predictions["key"]) == {s for s, side in zip(columns["slide"], sides) if side == "test"}
        found.append(predictions["probability_tumor"].to_numpy())
        attention = pd.read_parquet(tmp_path / "r.attention.parquet")
        assert set(attention["key"]) == {f"t{i}" for i in np.flatnonzero(sides == "test")}
    np.testing.assert_array_equal(*found)
    ask([path], tmp_path / "m.json", "mil", split="monte-carlo", repeats=2)
    attention = pd.read_parquet(tmp_path / "m.attention.parquet")
    np.testing.assert_allclose(attention.groupby("slide")["attention"].sum(), 1, atol=1e-5)
    mixed = write("mixed", features, split=np.where(np.arange(320) % 8 == 0, "test", "train"), **columns)
    with pytest.raises(UserError, match="a bag holds tiles of two 'split'"):
        ask([mixed], tmp_path / "x.json", "mil", split="fixed")


def test_subgroups_are_those_samples_alone(write, cohort, tmp_path):
    features, columns = cohort(1.0)
    numbers = np.array([int(p[1:]) for p in columns["patient"]])
    site = np.where(numbers < 5, "small", np.where(numbers < 39, "big", ""))
    path = write("good", features, site=site, **columns)
    results, predictions = ask([path], tmp_path / "r.json", by=("site",))
    table = {row["value"]: row for row in results["by"]["site"]}
    assert {v: (r["n"], r["clusters"]) for v, r in table.items()} == {None: (8, 1), "small": (40, 5), "big": (272, 34)}
    for value, row in table.items():
        mine = predictions[site == (value or "")]
        found = row["encoders"]["good"]
        recalls = [(g["predicted"] == g["label"]).mean() for _, g in mine.groupby("label")]
        assert found["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls))
        if value:
            area = roc_auc_score(mine["label"] == "tumor", mine["probability_tumor"])
            assert found["auroc"]["value"] == pytest.approx(area)
            assert found["auroc"]["low"] < area < found["auroc"]["high"]
    # One patient has one class: no area, no interval, and both are said.
    assert table[None]["encoders"]["good"]["auroc"] is None
    assert table[None]["encoders"]["good"]["accuracy"]["low"] is None
    assert table[None]["lacks"] in (["tumor"], ["normal"])
    assert [r["few_clusters"] for r in table.values()] == [True, False, True]
    said = describe(results)
    assert "By site, fewer than 10 clusters: not given (1), small (5)" in said
    assert f"not given has no '{table[None]['lacks'][0]}'" in said
    # Of 40 patients, each a cluster of one class, a few are named.
    notes = " ".join(ask([path], tmp_path / "p.json", by=("patient",))[0]["notes"])
    assert "p15 (1), and 32 more; intervals are too narrow" in notes
    assert notes.count(" has no '") == 8


def test_the_bootstrap_draws_what_it_is_told_to(write, cohort, tmp_path):
    features, columns = cohort(0.5)
    path = write("good", features, **columns)
    by_patient, by_slide = ask([path], tmp_path / "a.json")[0], ask([path], tmp_path / "b.json", cluster="slide")[0]
    assert (by_patient["clusters"], by_slide["clusters"], by_slide["groups"]) == (40, 80, 40)
    a, b = metric(by_patient, "good"), metric(by_slide, "good")
    assert a["value"] == b["value"]
    assert b["high"] - b["low"] < a["high"] - a["low"]  # slides of a patient resemble each other


def test_a_planted_leak_is_refused_or_stands_in_the_results(write, cohort, tmp_path, capsys):
    features, columns = cohort(1.0)
    path = write("good", features, **columns)
    out = tmp_path / "r.json"
    with pytest.raises(UserError, match=r"\d+ of 'patient', such as 'p\d+', would stand on both sides"):
        run_knn(Question([path], "label", "slide", out))
    assert not out.exists()
    ask = ["eval", "knn", str(path), "--label", "label", "--group", "slide", "--out", str(out), "--device", "cpu"]
    assert main([*ask, "--allow-leak", " "]) == 2
    assert "--allow-leak needs a reason" in capsys.readouterr().err
    assert main([*ask, "--allow-leak", "to measure recognition"]) == 0
    assert "Reason given: to measure recognition" in capsys.readouterr().out
    leaks = read_results(out)[0]["leaks"]
    assert leaks["reason"] == "to measure recognition"
    assert leaks["found"][0]["what"] == "patient"
    # The same bytes twice, under two keys and two patients; twice within a patient harms nobody.
    crc32 = np.arange(320, dtype=np.uint32)
    crc32[1] = crc32[0]
    clean = write("clean", features, crc32=crc32, size=np.full(320, 9, dtype=np.int32), **columns)
    assert run_knn(Question([clean], "label", "patient", out))["leaks"] == {"found": [], "reason": None}
    crc32[8::8] = crc32[0]
    copied = write("copied", features, crc32=crc32, size=np.full(320, 9, dtype=np.int32), **columns)
    for probe in ("knn", "mil"):
        with pytest.raises(UserError, match="1 of 'image', such as '0-9'"):
            PROBES[probe](Question([copied], "label", "patient", out))


def test_nothing_is_chosen_on_the_scored_side(write, cohort, tmp_path):
    """The C of a fixed split stays when the labels and features that are scored turn into something else."""
    features, columns = cohort(1.0, dimension=40)
    numbers = np.array([int(p[1:]) for p in columns["patient"]])
    scored = numbers >= 25
    sides = np.where(scored, "test", "train")
    flipped = np.where(scored & (columns["label"] == "tumor"), "normal", np.where(scored, "tumor", columns["label"]))
    noise = np.where(scored[:, None], np.random.default_rng(0).normal(size=features.shape) * 30, features)
    found = []
    for name, x, label in (("e", features, columns["label"]), ("f", features, flipped), ("g", noise, flipped)):
        path = write(name, x, split=sides, **(columns | {"label": label}))
        results, predictions = ask([path], tmp_path / "r.json", "linear", split="fixed")
        found.append((results["encoders"][0]["details"]["C"], predictions["probability_tumor"].to_numpy(), results))
    assert found[0][0] == found[1][0] == found[2][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    # An answer worse than chance is reported so.
    assert metric(found[1][2], "f", "auroc")["value"] == pytest.approx(1 - metric(found[0][2], "e", "auroc")["value"])


def test_what_else_a_result_holds(files, write, cohort, tmp_path):
    results, predictions = ask(files, tmp_path / "r.json")
    pair = next(c for c in results["comparisons"] if c["metric"] == "auroc")
    positive = predictions[predictions["encoder"] == "good"]["label"].to_numpy() == "tumor"
    good, blind = (g["probability_tumor"].to_numpy() for _, g in predictions.groupby("encoder", sort=False))
    assert results["encoders"][0]["delong"]["auroc"] == pytest.approx(roc_auc_score(positive, good))
    assert 0 < pair["delong"]["p"] < 0.001
    assert pair["delong"]["z"] * pair["delong"]["se"] == pytest.approx(
        roc_auc_score(positive, good) - roc_auc_score(positive, blind)
    )
    assert "p < .001" in describe(results)
    recall = results["encoders"][0]["classes"]["tumor"]["recall"]["value"]
    rows = predictions[(predictions["encoder"] == "good") & (predictions["label"] == "tumor")]
    assert recall == pytest.approx((rows["predicted"] == "tumor").mean())
    assert sum(b["n"] for b in results["encoders"][0]["calibration"]["bins"]) == 320
    # Grades, which are ordered, and one that occurs in two patients only, so that draws and folds miss it.
    features, columns = cohort(0.0)
    numbers = np.array([int(p[1:]) for p in columns["patient"]])
    grade = np.where(numbers < 2, 10, numbers % 2 + 1)
    path = write("grades", features, grade=grade, **columns)
    results = run_knn(Question([path], "grade", "patient", tmp_path / "g.json"))
    assert results["classes"] == ["1", "2", "10"]
    assert (
        set(results["chance"]) == {*METRICS, "auroc_ovo", "quadratic_kappa"} == set(results["encoders"][0]["metrics"])
    )
    predictions = read_results(tmp_path / "g.json")[1]
    kappa = cohen_kappa_score(*(predictions[c].astype(int) for c in ("label", "predicted")), weights="quadratic")
    assert metric(results, "grades", "quadratic_kappa")["value"] == pytest.approx(kappa)
    assert any(n.startswith("Class '10' has no sample to be scored in 3 of 5 folds") for n in results["notes"])
    assert any(n.startswith("Class '10' is missing from 1") and "of the draws" in n for n in results["notes"])


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
    features = np.random.default_rng(0).normal(size=(40, 4))
    pairs = {"label": ["x", "y"] * 20, "patient": [f"p{i // 4}" for i in range(40)]}
    gaps = write("gaps", features, block=["b", "c", "b", ""] * 10, **pairs)
    for probe, path, options, said in [
        ("knn", files[0], ["--label", "lable"], "did you mean 'label'"),
        ("knn", files[0], ["--group", "pateint"], "did you mean 'patient'"),
        ("linear", lonely, [], "class 'y' occurs in 1 group only"),
        ("linear", single, [], "one class only"),
        ("mil", two, [], "2 groups cannot fill 5 folds"),
        ("knn", files[0], ["--k", "1000"], "must lie between 1 and the"),
        ("knn", files[0], ["--k", "5", "--preset", "uni-knn"], "give --k or --preset, not both"),
        ("knn", files[0], ["--out", str(occupied / "r.json")], "is no folder that can be written to"),
        ("mil", gaps, ["--cluster", "block"], "have no 'block'"),
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
