import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.eval.describe import describe
from eosin.eval.question import Question
from eosin.eval.retrieval import chance, class_means, rank, run_retrieval, vote
from eosin.launch.cli import main


def test_a_ranking_made_by_hand():
    """Tiles by their angle; the query stands at 0 and its own group's tiles, nearest of all, do not count."""
    degrees = np.array([0, 1, 2, 10, 20, 30, 40, 50])
    features = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1) * [[3], *[[1]] * 7]
    labels = np.array([0, 0, 1, 1, 0, 1, 0, 0])
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 3])
    precision, first, near = rank(features, labels, groups, 3)
    # 10 (no), 20 (yes, 1/2), 30 (no), 40 (yes, 2/4), 50 (yes, 3/5)
    assert precision[0] == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert first[0] == 2
    assert near[0].tolist() == [3, 4, 5]
    # From 50: 40 (yes, 1/1), 30 (no), 20 (yes, 2/3), 10 (no), 2 (no), 1 (yes, 3/6), 0 (yes, 4/7)
    assert precision[7] == pytest.approx((1 + 2 / 3 + 3 / 6 + 4 / 7) / 4)
    assert (first[7], near[7].tolist()) == (1, [6, 5, 4])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 500])
def test_average_precision_is_scikit_learns_with_ties_too(chunk, tied, monkeypatch):
    monkeypatch.setattr("eosin.eval.retrieval.CHUNK", chunk)
    rng = np.random.default_rng(0)
    # Corners of a cube in four dimensions are of length 2 and have five cosines, all exact.
    features = rng.choice([-1.0, 1.0], size=(150, 4)) if tied else rng.normal(size=(150, 6))
    labels, groups = rng.integers(0, 3, 150), rng.integers(0, 12, 150)
    precision, first, near = rank(features, labels, groups, 5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for query in range(150):
        others = np.flatnonzero(groups != groups[query])
        like = labels[others] == labels[query]
        assert precision[query] == pytest.approx(average_precision_score(like, cosine[query, others]))
        # A tied tile of another class goes first.
        order = sorted(range(len(others)), key=lambda o: (-cosine[query, others[o]], like[o]))
        assert first[query] == [like[o] for o in order].index(True) + 1
        assert groups[query] not in groups[near[query]]
        np.testing.assert_allclose(cosine[query, near[query]], np.sort(cosine[query, others])[::-1][:5], atol=1e-5)


def test_votes():
    neighbors = np.array([[0, 1, 1], [2, 1, 0], [1, 0, 0], [2, 2, 1]])
    assert vote(neighbors, 3).tolist() == [1, 2, 0, 2]
    assert vote(np.array([[1, 0, 0, 1]]), 2).tolist() == [1]


def test_chance_is_the_mean_over_all_orders():
    """Class 0 in groups 0 and 1, class 1 in groups 0, 1 and 2: every order of every gallery, one by one."""
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    groups = np.array([0, 1, 1, 0, 1, 2, 2, 2])
    said = chance(labels, groups, 2, (1, 3), (3,))
    assert said["vote_3"] == 0.5
    by_class = {name: {0: [], 1: []} for name in ("map", "top_1", "top_3")}
    for query in range(8):
        others = np.flatnonzero(groups != groups[query])
        right = int((labels[others] == labels[query]).sum())
        orders = [np.isin(np.arange(len(others)), c) for c in itertools.combinations(range(len(others)), right)]
        scores = -np.arange(len(others))
        by_class["map"][labels[query]].append(np.mean([average_precision_score(o, scores) for o in orders]))
        for k in (1, 3):
            by_class[f"top_{k}"][labels[query]].append(np.mean([o[:k].any() for o in orders]))
    for name, found in by_class.items():
        assert said[name] == pytest.approx(np.mean([np.mean(v) for v in found.values()])), name


def test_means_of_classes_under_draws_are_those_of_repeated_rows():
    rng = np.random.default_rng(1)
    labels, clusters, values = rng.integers(0, 3, 90), rng.integers(0, 10, 90), rng.random((90, 2))
    weights = rng.multinomial(10, np.full(10, 0.1), size=5).astype(float)
    found = class_means(values, labels, clusters, weights)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(90), drawn[clusters].astype(int))
        for c in range(3):
            np.testing.assert_allclose(found[row, c], values[rows][labels[rows] == c].mean(axis=0))


@pytest.fixture
def files(cohort, write):
    told, columns = cohort(8.0)
    rng = np.random.default_rng(0)
    number = np.array([int(p[1:]) for p in columns["patient"]])
    # Knows the patient and nothing else: its nearest tiles are of the same patient, so of the same class.
    patient = 10 * np.random.default_rng(1).normal(size=(40, 6))[number] + rng.normal(size=(320, 6))
    same = np.ones((320, 4))
    return [write("told", told, **columns), write("patient", patient, **columns), write("same", same, **columns)]


def test_a_signal_is_found_and_recognition_of_patients_is_not(files, tmp_path):
    results = run_retrieval(Question(files, "label", "patient", tmp_path / "r.json"))
    told, patient, same = ({m: v["value"] for m, v in e["metrics"].items()} for e in results["encoders"])
    assert told["map"] > 0.8
    assert told["top_1"] > 0.95
    assert abs(patient["map"] - results["chance"]["map"]) < 0.05
    assert abs(patient["vote_5"] - 0.5) < 0.2
    # All tiles alike: the share of the class, and nothing first.
    assert same["map"] == pytest.approx(19 / 39)
    assert (same["top_1"], same["top_5"]) == (0, 0)
    pair = next(c for c in results["comparisons"] if (c["a"], c["b"], c["metric"]) == ("told", "patient", "map"))
    assert pair["excludes_zero"]
    assert pair["value"] == pytest.approx(told["map"] - patient["map"])
    assert "told (mAP" in describe(results)
    assert "won: its difference" in describe(results)
    _, predictions = read_results(tmp_path / "r.json")
    rows = predictions[predictions["encoder"] == "told"]
    by_class = rows.groupby("label")
    assert told["map"] == pytest.approx(by_class["average_precision"].mean().mean())
    assert told["top_3"] == pytest.approx((rows["first_rank"] <= 3).groupby(rows["label"]).mean().mean())
    assert told["vote_5"] == pytest.approx((rows["vote_5"] == rows["label"]).groupby(rows["label"]).mean().mean())
    named = results["encoders"][0]["classes"]["tumor"]
    assert named["map"]["value"] == pytest.approx(by_class["average_precision"].mean()["tumor"])
    assert (named["n"], named["clusters"]) == (160, 20)
    group_of = dict(zip(rows["key"], rows["group"]))
    assert all(group_of[n] != g for n, g in zip(rows["nearest"], rows["group"]))


def test_a_patient_or_an_image_in_two_groups_is_refused(write, cohort, tmp_path):
    features, columns = cohort(1.0)
    out = tmp_path / "r.json"
    with pytest.raises(UserError, match=r"40 of 'patient', such as 'p0'"):
        run_retrieval(Question([write("e", features, **columns)], "label", "slide", out))
    crc32 = np.arange(320, dtype=np.uint32)
    crc32[1] = crc32[0]
    size = np.full(320, 9, dtype=np.int32)
    assert run_retrieval(Question([write("f", features, crc32=crc32, size=size, **columns)], "label", "patient", out))[
        "leaks"
    ] == {"found": [], "reason": None}
    crc32[8] = crc32[0]
    path = write("g", features, crc32=crc32, size=size, **columns)
    with pytest.raises(UserError, match="1 of 'image', such as '0-9'"):
        run_retrieval(Question([path], "label", "patient", out))
    results = run_retrieval(Question([path], "label", "patient", out, allow_leak="copies are wanted"))
    assert results["leaks"]["reason"] == "copies are wanted"
    assert any("Reason given: copies are wanted" in n for n in results["notes"])


def test_bad_input_ends_in_one_line(files, write, tmp_path, capsys):
    lonely = write("lonely", np.eye(9), label=["x"] * 6 + ["y"] * 3, patient=["a", "b"] * 3 + ["c"] * 3)
    out = tmp_path / "r.json"
    for path, options, said in [
        (lonely, [], "class 'y' occurs in 1 group only ('c')"),
        (files[0], ["--label", "slide"], "occurs in 1 group only"),
        (files[0], ["--top", "0"], "must lie between 1 and the 312 tiles"),
        (files[0], ["--top", "1", "313"], "must lie between 1 and the 312 tiles"),
        (files[0], ["--group", "pateint"], "did you mean 'patient'"),
        (files[0], ["--cluster", "site"], "no column 'site' for --cluster"),
        (files[0], ["--allow-leak", " "], "needs a reason"),
    ]:
        ask = ["eval", "retrieval", str(path), "--label", "label", "--group", "patient", "--out", str(out), *options]
        code, lines = main(ask), capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert said in lines[0]
        assert not out.exists()
