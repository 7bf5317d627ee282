import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from eosin.data_tools.results import read_results
from eosin.eval.clustering import adjusted_rand, matched_share, mutual_information, run_cluster, tables
from eosin.eval.describe import describe
from eosin.eval.question import Question
from eosin.eval.statistics import bootstrap_weights, interval
from eosin.launch.cli import main


@pytest.mark.parametrize("k", [2, 3, 5])
def test_metrics_are_scikit_learns_and_those_of_repeated_tiles(k):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 3, 200)
    clusters = np.where(rng.random(200) < 0.6, labels % k, rng.integers(0, k, 200))
    groups = rng.integers(0, 20, 200)
    weights = np.concatenate([np.ones((1, 20)), rng.multinomial(20, np.full(20, 1 / 20), size=4)])
    counted = tables(clusters, labels, groups, weights, k, 3)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(200), drawn[groups].astype(int))
        ours, theirs = clusters[rows], labels[rows]
        assert mutual_information(counted)[row] == pytest.approx(normalized_mutual_info_score(theirs, ours))
        # Of all ways to give classes to clusters, one at most each, the best.
        names = [*range(3), *range(-1, -1 - k, -1)]
        best = max(np.mean(np.array(given)[ours] == theirs) for given in itertools.permutations(names, k))
        assert matched_share(counted)[row] == pytest.approx(best)
    rand = adjusted_rand(clusters, labels, groups, weights)
    assert rand[0] == pytest.approx(adjusted_rand_score(labels, clusters))
    # Every pair of tiles by itself: of two groups as often as both are drawn together, of one as often as it is drawn.
    i, j = np.triu_indices(200, 1)
    for row, drawn in enumerate(weights):
        w = np.where(groups[i] == groups[j], drawn[groups[i]], drawn[groups[i]] * drawn[groups[j]])
        a, b = (w @ (of[i] == of[j]) for of in (clusters, labels))
        both, chance = w @ ((clusters[i] == clusters[j]) & (labels[i] == labels[j])), a * b / w.sum()
        assert rand[row] == pytest.approx((both - chance) / ((a + b) / 2 - chance))


def test_clusters_of_patients_that_know_no_class_are_not_above_chance():
    """40 patients, each nearly a cluster of its own, 100 times: about 2.5 % of the intervals may lie above 0."""
    above = 0
    weights = bootstrap_weights(40, 300, 0)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels, clusters = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
        groups = np.repeat(np.arange(40), 8)
        of_tiles = np.where(rng.random(320) < 0.9, clusters[groups], rng.integers(0, 3, 320))
        above += interval(adjusted_rand(of_tiles, labels[groups], groups, weights))["low"] > 0
    assert above <= 7


def test_clusters_that_are_there_are_found(write, cohort, tmp_path, capsys):
    features, columns = cohort(0.0)
    rng = np.random.default_rng(0)
    tumor = columns["label"] == "tumor"
    apart = rng.normal(size=(320, 8)) * 0.1 + np.where(tumor[:, None], np.eye(8)[0], np.eye(8)[1])
    # As far apart in direction at any length: what is compared is the cosine.
    good = write("good", apart * rng.uniform(0.01, 100, size=(320, 1)), **columns)
    blind = write("blind", features, **columns)
    out = tmp_path / "r.json"
    ask = ["eval", "cluster", str(good), str(blind), "--label", "label", "--group", "patient", "--out", str(out)]
    assert main(ask) == 0
    said = capsys.readouterr().out
    assert "good (ARI 1.000) won: its difference to every other encoder excludes zero" in said
    assert "ARI from 1.000 to 1.000 over 5 starts" in said
    results, predictions = read_results(out)
    ours, theirs = results["encoders"]
    assert ours["metrics"]["ari"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert ours["metrics"]["matched_accuracy"]["value"] == 1
    assert theirs["metrics"]["ari"]["value"] < 0.15
    assert theirs["metrics"]["ari"]["low"] <= 0 < theirs["metrics"]["ari"]["high"]
    for found in theirs["metrics"].values():
        assert found["low"] < found["value"] < found["high"]
    assert results["chance"] == {"ari": 0.0, "nmi": None, "matched_accuracy": 0.5}
    # The value is the mean over starts, each of which can be read from the predictions.
    rows = predictions[predictions["encoder"] == "blind"]
    each = [adjusted_rand_score(rows["label"], rows[f"cluster_{n}"]) for n in range(5)]
    np.testing.assert_allclose(theirs["details"]["by_start"]["ari"], each, atol=1e-12)
    assert theirs["metrics"]["ari"]["value"] == pytest.approx(np.mean(each))
    share = (rows["label"] == rows["predicted"]).mean()
    assert theirs["details"]["by_start"]["matched_accuracy"][0] == pytest.approx(share)
    # The same again, and something else from another seed.
    question = Question([good, blind], "label", "patient", out)
    assert run_cluster(question) == {k: v for k, v in results.items() if k not in ("schema", "kind")}
    other = run_cluster(Question([good, blind], "label", "patient", out, seed=1))
    assert other["encoders"][1]["details"]["by_start"] != theirs["details"]["by_start"]


def test_more_clusters_than_classes_leave_tiles_unmatched(write, cohort, tmp_path):
    features, columns = cohort(0.0)
    results = run_cluster(Question([write("e", features, **columns)], "label", "patient", tmp_path / "r.json"), 8, 1)
    _, predictions = read_results(tmp_path / "r.json")
    assert set(predictions["predicted"]) == {"normal", "tumor", ""}
    matched = results["encoders"][0]["metrics"]["matched_accuracy"]["value"]
    assert matched == pytest.approx((predictions["predicted"] == predictions["label"]).mean())
    assert "A number alone says little" in describe(results)


def test_bad_input_ends_in_one_line(write, cohort, tmp_path, capsys):
    features, columns = cohort(0.0)
    path = write("e", features, one=["x"] * 320, **columns)
    out = tmp_path / "r.json"
    for label, options, said in [
        ("one", [], "one class only"),
        ("label", ["--k", "1"], "must lie between 2 and the 320 tiles"),
        ("label", ["--k", "321"], "must lie between 2 and the 320 tiles"),
        ("label", ["--starts", "0"], "give 1 or more"),
        ("label", ["--group", "one"], "all that is scored is of one 'one' ('x')"),
        ("lable", [], "did you mean 'label'"),
        ("label", ["--out", str(path)], "exists and holds no results"),
    ]:
        code = main(["eval", "cluster", str(path), "--label", label, "--group", "patient", "--out", str(out), *options])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert said in lines[0]
        assert not out.exists()
