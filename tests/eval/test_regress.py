import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.eval.describe import describe
from eosin.eval.question import Question
from eosin.eval.regress import run_regress, score
from eosin.launch.cli import main


def test_metrics_of_every_draw_are_those_of_repeated_rows():
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 12, 150))
    clusters[:2], clusters[2:4] = 12, 13  # two clusters of too few samples to have an r of their own
    truth = rng.normal(size=(150, 4)) + clusters[:, None] / 5
    truth[:, 3] = clusters  # never varies within
    predicted = truth + rng.normal(size=(150, 4))
    predicted[clusters == 5, 0] = 0.1  # one that does not vary has told nothing
    weights = np.concatenate([np.ones((1, 14)), rng.multinomial(14, np.full(14, 1 / 14), size=3)])
    fold_of = np.arange(14) % 3
    folds = fold_of[clusters]
    found = score(truth, predicted, clusters, folds, weights)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(150), drawn[clusters].astype(int))
        for g in range(4):
            x, y = truth[rows, g], predicted[rows, g]
            each, times = [], []
            for fold in range(3):
                inside = folds[rows] == fold
                if np.ptp(x[inside]) == 0:  # one cluster was drawn, of what never varies within
                    continue
                each.append(pearsonr(x[inside], y[inside]).statistic)
                times.append(drawn[fold_of == fold].mean())
            assert found["pearson"][row, g] == pytest.approx(np.average(each, weights=times))
            assert found["r2"][row, g] == pytest.approx(r2_score(x, y))
            assert found["mae"][row, g] == pytest.approx(mean_absolute_error(x, y))
            within = []
            for cluster in range(12):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    r = pearsonr(truth[clusters == cluster, g], predicted[clusters == cluster, g]).statistic
                within += [0.0 if cluster == 5 and g == 0 else r] * int(drawn[cluster])
            if g == 3:
                assert np.isnan(found["pearson_within"][row, g])
            else:
                assert found["pearson_within"][row, g] == pytest.approx(np.mean(within))
    flat = score(truth, np.ones_like(truth), clusters, folds, weights)
    assert (flat["pearson"] == 0).all()
    assert np.isnan(score(np.ones_like(truth), truth, clusters, folds, weights)["pearson"]).all()


@pytest.fixture
def genes(cohort, write, tmp_path):
    """Embeddings that hold two genes of each tile, in the hundreds and the thousandths, and ones that hold none."""
    features, columns = cohort(0.0, dimension=12)
    rng = np.random.default_rng(3)
    numbers = {"A": 300 + 50 * (features[:, 1] + 0.3 * rng.normal(size=320)), "B": 1e-3 * (2 - features[:, 2])}
    pd.DataFrame({"tile": [f"t{i}" for i in range(320)]} | numbers).to_csv(tmp_path / "genes.csv", index=False)
    blind = rng.normal(size=(320, 12))
    return [write("good", features, **columns), write("blind", blind, **columns)], columns, numbers


def asked(files, tmp_path, **options):
    plain = {"labels": tmp_path / "genes.csv", "key": "tile"}
    return Question(files, "genes", "patient", tmp_path / "r.json", **(plain | options))


def test_planted_targets_are_told_and_their_absence_too(genes, tmp_path):
    files, _, numbers = genes
    results = run_regress(asked(files, tmp_path))
    stored, predictions = read_results(tmp_path / "r.json")
    assert stored["encoders"] == results["encoders"]
    assert [t["name"] for t in results["targets"]] == ["A", "B"]
    ours, theirs = results["encoders"]
    assert ours["metrics"]["pearson"]["value"] > 0.95
    assert abs(theirs["metrics"]["pearson"]["value"]) < 0.2
    assert ours["targets"]["B"]["pearson"]["value"] > 0.999
    pair = next(c for c in results["comparisons"] if c["metric"] == "pearson")
    assert pair["excludes_zero"]
    assert pair["value"] == pytest.approx(ours["metrics"]["pearson"]["value"] - theirs["metrics"]["pearson"]["value"])
    # Everything again from the predictions.
    for row in (ours, theirs):
        rows = predictions[predictions["encoder"] == row["name"]]
        assert (rows.groupby("group")["fold"].nunique() == 1).all()
        for target, truth in numbers.items():
            x, y = rows[f"true_{target}"].to_numpy(), rows[f"predicted_{target}"].to_numpy()
            np.testing.assert_allclose(x, truth)
            found = {m: v["value"] for m, v in row["targets"][target].items()}
            each = [pearsonr(x[rows["fold"] == f], y[rows["fold"] == f]).statistic for f in range(5)]
            assert found["pearson"] == pytest.approx(np.mean(each))
            assert found["r2"] == pytest.approx(r2_score(x, y))
            assert found["mae"] == pytest.approx(mean_absolute_error(x, y) / x.std())
            within = [pearsonr(x[rows["group"] == g], y[rows["group"] == g]).statistic for g in rows["group"].unique()]
            assert found["pearson_within"] == pytest.approx(np.mean(within))
        for m in ("pearson", "r2", "mae"):
            assert row["metrics"][m]["value"] == pytest.approx(
                np.mean([t[m]["value"] for t in row["targets"].values()])
            )
    text = describe(results)
    assert "genes, 2 targets · 320 tiles in 40 groups of 'patient' · 5 grouped folds" in text
    assert "good (Pearson r 0." in text
    assert "won: its difference to every other encoder excludes zero" in text


def test_hest_ridge_is_the_published_protocol_patient_by_patient(genes, tmp_path):
    files, columns, numbers = genes
    results = run_regress(asked(files, tmp_path, split="leave-one-group-out"), name="hest-ridge")
    from eosin.data_tools.embeddings import read_embeddings

    features, y = read_embeddings(files[0]).features, np.stack(list(numbers.values()), axis=1)
    found = []
    for patient in np.unique(columns["patient"]):
        out = np.array(columns["patient"]) == patient
        turned = make_pipeline(StandardScaler(), PCA(12)).fit(features[~out])
        ridge = Ridge(100 / (12 * 2), fit_intercept=False).fit(turned.transform(features[~out]), y[~out])
        predicted = ridge.predict(turned.transform(features[out]))
        found.append([pearsonr(*pair).statistic for pair in zip(y[out].T, predicted.T)])
    for metric in ("pearson", "pearson_within"):
        assert results["encoders"][0]["metrics"][metric]["value"] == pytest.approx(np.mean(found), abs=1e-4)
    assert results["parameters"]["components"] == 256
    assert any("no intercept" in note for note in results["notes"])


def test_nothing_is_chosen_on_the_scored_side(genes, write, tmp_path):
    files, columns, numbers = genes
    sides = np.where(np.array([int(p[1:]) for p in columns["patient"]]) >= 30, "test", "train")
    from eosin.data_tools.embeddings import read_embeddings

    features = np.array(read_embeddings(files[0]).features)
    told = []
    for name, noise in (("e", 0.0), ("f", 1000.0)):
        target = numbers["A"] + np.where(sides == "test", noise * np.random.default_rng(0).normal(size=320), 0)
        path = write(name, features, A=target, split=sides, **columns)
        results = run_regress(Question([path], "A", "patient", tmp_path / "r.json", split="fixed"), ["A"])
        told.append((results["encoders"][0]["details"], read_results(tmp_path / "r.json")[1]["predicted_A"].to_numpy()))
    assert told[0][0] == told[1][0]
    np.testing.assert_array_equal(told[0][1], told[1][1])
    assert len(told[0][1]) == 80


def test_penalties_are_chosen_by_whole_groups(write, cohort, tmp_path):
    """Features know the patient, and the target is of the patient: folds of rows would take a weak penalty for it."""
    _, columns = cohort(0.0)
    rng = np.random.default_rng(0)
    number = np.array([int(p[1:]) for p in columns["patient"]])
    features = rng.normal(size=(40, 60))[number] + 0.1 * rng.normal(size=(320, 60))
    path = write("e", features, T=rng.normal(size=40)[number] + 0.01 * rng.normal(size=320), **columns)
    results = run_regress(Question([path], "T", "patient", tmp_path / "r.json"), ["T"])
    assert min(results["encoders"][0]["details"]["penalty"]["T"]) >= 1
    assert (
        results["encoders"][0]["metrics"]["pearson"]["low"] < 0 < results["encoders"][0]["metrics"]["pearson"]["high"]
    )


def test_monte_carlo_values_are_means_over_passes(genes, tmp_path):
    files, _, _ = genes
    results = run_regress(asked(files[:1], tmp_path, split="monte-carlo", repeats=4), ["A"])
    _, predictions = read_results(tmp_path / "r.json")
    by_pass = [pearsonr(rows["true_A"], rows["predicted_A"]).statistic for _, rows in predictions.groupby("fold")]
    assert len(by_pass) == 4
    assert results["encoders"][0]["metrics"]["pearson"]["value"] == pytest.approx(np.mean(by_pass))


def test_columns_and_rows_that_cannot_be_told_are_left_out_and_said(genes, tmp_path):
    files, _, _ = genes
    table = pd.read_csv(tmp_path / "genes.csv").assign(
        name="gene", same=4, nothing="", patient=range(320), fold=np.arange(320) % 4
    )
    table.loc[:2, "A"] = [np.nan, np.nan, 5]
    table.loc[2:3, "B"] = np.nan
    table["B"] = table["B"].map(lambda v: "NA" if np.isnan(v) else str(v))
    table[table["tile"] != "t319"].drop(columns="patient").to_csv(tmp_path / "genes.csv", index=False)
    results = run_regress(asked(files, tmp_path, side="fold"))
    assert [t["name"] for t in results["targets"]] == ["A", "B"]
    assert results["left_out"] == {"a target missing": 5}
    assert results["n"] == 315
    said = "\n".join(results["notes"])
    for column, why in (("name", "not a number everywhere"), ("same", "the same in every tile"), ("nothing", "empty")):
        assert f"Column '{column}' is no target: {why}" in said
    # A target of whole patients varies in none of them.
    sizes = pd.DataFrame({"patient": [f"p{i}" for i in range(40)], "size": np.random.default_rng(0).normal(size=40)})
    sizes.to_csv(tmp_path / "sizes.csv", index=False)
    results = run_regress(asked(files, tmp_path, labels=tmp_path / "sizes.csv", key="patient"))
    assert list(results["chance"]) == ["pearson", "r2", "mae"]
    assert results["encoders"][0]["targets"]["size"]["pearson_within"] is None
    assert any("varies within a 'patient'" in note for note in results["notes"])
    assert "chance" in describe(results)


def test_bad_input_ends_in_one_line_and_leaves_nothing(genes, tmp_path, capsys):
    files, _, _ = genes
    out, csv = tmp_path / "r.json", tmp_path / "genes.csv"
    pd.read_csv(csv).assign(word="x", same=1, wild="inf", huge=1e200).to_csv(csv, index=False)
    empty = tmp_path / "empty.csv"
    pd.DataFrame({"tile": ["t0", "t1"], "word": ["x", "y"]}).to_csv(empty, index=False)
    given = ["--targets-from", str(csv)]
    for options, said in [
        ([], "no targets are given"),
        (["--targets", "lable"], "did you mean 'label'"),
        (["--targets", "label"], "target 'label' holds 'tumor', which is no number"),
        ([*given, "--targets", "wild"], "target 'wild' holds 'inf', which is no number"),
        ([*given, "--targets", "huge"], "target 'huge' holds '1e+200', which is no number, or too large a one"),
        ([*given, "--targets", "same"], "target 'same' is the same in every tile"),
        ([*given, "--targets", "C"], "has no column 'C'"),
        (["--targets-from", str(empty)], "adds no numeric column"),
        ([*given, "--folds", "41"], "40 groups cannot fill 41 folds"),
        ([*given, "--folds", "1"], "2 folds or more"),
        ([*given, "--group", "slide"], "'patient', such as 'p0', would stand on both sides"),
        ([*given, "--split", "fixed"], "no column 'split' for --side"),
        ([*given, "--split", "monte-carlo", "--repeats", "0"], "scores nothing"),
        ([*given, "--out", str(csv)], "exists and holds no results"),
    ]:
        ask = ["eval", "regress", str(files[0]), "--group", "patient", "--key", "tile", "--out", str(out), *options]
        code, lines = main(ask), capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert said in lines[0]
        assert not list(tmp_path.glob("r.*"))
    with pytest.raises(UserError, match="of another kind"):
        run_regress(asked(files, tmp_path), name="uni-knn")
    assert (
        main(["eval", "regress", str(files[0]), "--group", "patient", "--key", "tile", "--out", str(out), *given]) == 0
    )
    assert "targets of genes.csv, 2 targets" in capsys.readouterr().out
