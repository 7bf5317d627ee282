import time

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.eval import fewshot
from eosin.eval.describe import describe
from eosin.eval.fewshot import (
    draw_episodes,
    episode_scores,
    label_share,
    prototypes,
    run_fewshot,
    simpleshot,
    votes,
)
from eosin.eval.question import Question
from eosin.eval.statistics import bootstrap_weights
from eosin.launch.cli import main


def draw(seed=0, support=300, queries=90, dimension=24, classes=4, offset=3.0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dimension))
    sides = []
    for count in (support, queries):
        labels = rng.integers(0, classes, count)
        sides.append((centers[labels] + 1.5 * rng.normal(size=(count, dimension)) + offset, labels))
    return [(features.astype(np.float32), labels) for features, labels in sides]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_hand(queries, support, rows, form):
    """One episode as the papers write it, in double precision: prototypes and answers."""
    drawn = support.astype(np.float64)[rows]  # [K, S, D]
    mean = drawn.reshape(-1, drawn.shape[2]).mean(axis=0)
    if form == "uni":
        classes = np.stack([unit(samples - mean).mean(axis=0) for samples in drawn])
    else:
        classes = unit(np.stack([samples.mean(axis=0) - mean for samples in drawn]))
    distances = np.linalg.norm(unit(queries - mean)[:, None] - classes[None], axis=2)
    return classes, distances.argmin(axis=1)


@pytest.mark.parametrize("form", ["uni", "thunder"])
@pytest.mark.parametrize("shots", [1, 5])
def test_prototypes_and_answers_are_those_by_hand(form, shots, monkeypatch):
    (support, labels), (queries, _) = draw()
    episodes = draw_episodes(labels, 4, shots, 30, seed=1)
    _, classes = prototypes(torch.from_numpy(support)[torch.from_numpy(episodes)], form)
    expected = [by_hand(queries, support, rows, form) for rows in episodes]
    np.testing.assert_allclose(classes.numpy(), [e[0] for e in expected], atol=1e-6)
    answers = np.stack([e[1] for e in expected])
    np.testing.assert_array_equal(simpleshot(queries, support, episodes, form), answers)
    monkeypatch.setattr(fewshot, "CHUNK", 24 * 37)  # parts of the queries, and of the episodes
    np.testing.assert_array_equal(simpleshot(queries, support, episodes, form), answers)


def test_the_two_forms_differ():
    (support, labels), (queries, _) = draw(1)
    episodes = draw_episodes(labels, 4, 5, 200, seed=1)
    assert (simpleshot(queries, support, episodes, "uni") != simpleshot(queries, support, episodes, "thunder")).any()


def test_a_common_offset_changes_nothing():
    (support, labels), (queries, _) = draw(2)
    episodes = draw_episodes(labels, 4, 5, 50, seed=1)
    np.testing.assert_array_equal(
        simpleshot(queries, support, episodes), simpleshot(queries + 64, support + 64, episodes)
    )


def test_episodes_hold_different_samples_of_each_class_and_come_from_seed_and_number():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 40, 200]))
    episodes = draw_episodes(labels, 3, 10, 500, seed=3)
    assert (labels[episodes] == np.arange(3)[:, None]).all()
    assert (np.diff(np.sort(episodes, axis=2), axis=2) > 0).all()
    np.testing.assert_array_equal(draw_episodes(labels, 3, 10, 20, seed=3), episodes[:20])
    assert len(np.unique(episodes[:, 2], axis=0)) == 500
    assert (draw_episodes(labels, 3, 10, 500, seed=4) != episodes).any()
    # Each of 40 samples is in a quarter of the episodes: binomial, 500 draws, five deviations.
    counts = np.bincount(episodes[:, 1].ravel(), minlength=250)[labels == 1]
    assert abs(counts - 125).max() < 5 * np.sqrt(500 * 0.25 * 0.75)
    with pytest.raises(UserError, match="class 0 has 10 samples, fewer than 11"):
        draw_episodes(labels, 3, 11, 2, seed=3)


def test_scores_of_episodes_and_their_vote():
    labels = np.array([0, 0, 0, 2, 2, 5])
    said = np.random.default_rng(0).choice([0, 2, 5], size=(40, 6)).astype(np.int16)
    accuracy, balanced = episode_scores(said, labels)
    np.testing.assert_allclose(accuracy, [accuracy_score(labels, s) for s in said])
    np.testing.assert_allclose(balanced, [balanced_accuracy_score(labels, s) for s in said])
    said = np.array([[0, 1, 2], [1, 1, 2], [0, 2, 1], [1, 2, 1]])
    np.testing.assert_array_equal(votes(said, 4), [[2, 2, 0, 0], [0, 2, 2, 0], [0, 2, 2, 0]])


def test_shares_are_whole_groups_nested_and_hold_every_class():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(5, 40, 60)) * 7
    labels = (groups // 7) % 3
    labels[groups // 7 == 11] = 3  # a class of one group
    before: set[int] = set()
    for ratio in (0.01, 0.05, 0.1, 0.5, 1.0):
        rows = label_share(labels, groups, ratio, seed=5)
        assert not set(groups[rows]) & set(np.delete(groups, rows))
        assert set(labels[rows]) == {0, 1, 2, 3}
        assert before <= set(rows)
        assert len(rows) >= ratio * len(labels)
        if ratio >= 0.1:
            assert len(rows) < ratio * len(labels) + 3 * 40
        before = set(rows)
    assert len(rows) == len(labels)
    assert set(label_share(labels, groups, 0.1, seed=6)) != set(label_share(labels, groups, 0.1, seed=5))
    with pytest.raises(UserError, match=r"give 0\.01 for 1 %"):
        label_share(labels, groups, 10, seed=5)


@pytest.fixture
def files(cohort, write):
    """Embeddings of one cohort: one that tells the classes, one that does not."""
    told, columns = cohort(3.0)
    columns["slide_half"] = [s[-1] for s in columns["slide"]]
    blind, _ = cohort(0.0, seed=1)
    return [write("good", told, **columns), write("blind", blind, **columns)]


def episodes_by_hand(features, labels, folds, shots, form, episodes, seed):
    """What each episode says of every sample, one after the other: [E, N]."""
    said = np.empty((episodes, len(labels)), dtype=np.int64)
    for fold in np.unique(folds):
        learned, scored = features[folds != fold], features[folds == fold]
        word = fewshot.hash32(seed, fewshot.purpose("few-shot fold"), int(fold))
        drawn = draw_episodes(labels[folds != fold], 2, shots, episodes, word)
        said[:, folds == fold] = [by_hand(scored, learned, rows, form)[1] for rows in drawn]
    return said


@pytest.mark.parametrize("name", ["uni-simpleshot", "thunder-simpleshot"])
def test_results_are_those_of_the_episodes(name, files, tmp_path):
    out = tmp_path / "r.json"
    results = run_fewshot(Question(files, "label", "patient", out), [1, 4], name, 30)
    stored, predictions = read_results(out)
    assert stored["encoders"] == results["encoders"]
    assert [e["name"] for e in results["encoders"]] == [
        f"{e} + {s}" for e in ("good", "blind") for s in ("1 shot", "4 shots")
    ]
    for row in results["encoders"]:
        mine = predictions[predictions["encoder"] == row["name"]]
        labels, shots = (mine["label"] == "tumor").to_numpy().astype(int), row["details"]["shots"]
        features = read_embeddings(files[row["encoder"] == "blind"]).features
        said = episodes_by_hand(features, labels, mine["fold"].to_numpy(), shots, name.split("-")[0], 30, 0)
        np.testing.assert_allclose(mine["probability_tumor"], said.mean(axis=0), atol=1e-12)
        one_by_one = [balanced_accuracy_score(labels, s) for s in said]
        reached = row["details"]["over_episodes"]["balanced_accuracy"]
        assert reached["mean"] == pytest.approx(np.mean(one_by_one))
        assert reached["deviation"] == pytest.approx(np.std(one_by_one, ddof=1))
        expected = np.mean(one_by_one)
        if name == "thunder-simpleshot":
            expected = balanced_accuracy_score(labels, said.mean(axis=0) > 0.5)
            assert "auroc" in row["metrics"]
        else:
            assert set(row["metrics"]) == {"balanced_accuracy", "accuracy"} == set(results["chance"])
            assert row["metrics"]["accuracy"]["value"] == pytest.approx((said == labels).mean())
            assert row["classes"]["tumor"]["recall"]["value"] == pytest.approx(said[:, labels == 1].mean())
        assert row["metrics"]["balanced_accuracy"]["value"] == pytest.approx(expected)
    reached = [e["metrics"]["balanced_accuracy"]["value"] for e in results["encoders"]]
    assert min(reached[:2]) > max(reached[2:]) + 0.02
    said = describe(results)
    assert "good + 4 shots" in said
    assert ("means over the episodes" in said) == (name == "uni-simpleshot")
    assert not list(tmp_path.glob("*.tmp*"))


def test_intervals_of_means_are_those_of_a_bootstrap_by_hand(files, tmp_path):
    """Draw patients as the results say, and average over the episodes each time."""
    results = run_fewshot(
        Question(files, "label", "patient", tmp_path / "r.json", by=("slide_half",)), [2], episodes=20
    )
    mine = read_results(tmp_path / "r.json")[1].groupby("encoder")
    drawn = bootstrap_weights(40, 1000, 0)[1:]
    recalls = {}
    for name, rows in mine:
        right = np.where(rows["label"] == "tumor", rows["probability_tumor"], rows["probability_normal"])
        codes = np.unique(rows["group"], return_inverse=True)[1]
        tumor = (rows["label"] == "tumor").to_numpy()
        weights = drawn[:, codes]  # [draws, tiles]
        recalls[name] = [(weights[:, c] * right[c]).sum(axis=1) / weights[:, c].sum(axis=1) for c in (tumor, ~tumor)]
        row = next(e for e in results["encoders"] if e["name"] == name)
        for found, values in (
            (row["metrics"]["balanced_accuracy"], np.mean(recalls[name], axis=0)),
            (row["metrics"]["accuracy"], (weights * right).sum(axis=1) / weights.sum(axis=1)),
            (row["classes"]["tumor"]["recall"], recalls[name][0]),
        ):
            np.testing.assert_allclose([found["low"], found["high"]], np.percentile(values, [2.5, 97.5]), atol=1e-9)
    pair = next(c for c in results["comparisons"] if c["metric"] == "balanced_accuracy")
    apart = np.mean(recalls[pair["a"]], axis=0) - np.mean(recalls[pair["b"]], axis=0)
    np.testing.assert_allclose([pair["low"], pair["high"]], np.percentile(apart, [2.5, 97.5]), atol=1e-9)
    halves = {row["value"]: row for row in results["by"]["slide_half"]}
    keys = read_embeddings(files[0]).table.set_index("key")["slide_half"]
    rows = mine.get_group("good + 2 shots")
    inside = (keys.loc[rows["key"]] == "1").to_numpy()
    right = np.where(rows["label"] == "tumor", rows["probability_tumor"], rows["probability_normal"])
    expected = [right[inside & (rows["label"] == c).to_numpy()].mean() for c in ("normal", "tumor")]
    assert halves["1"]["encoders"]["good + 2 shots"]["balanced_accuracy"]["value"] == pytest.approx(np.mean(expected))


def test_passes_are_averaged(files, tmp_path):
    question = Question(files[:1], "label", "patient", tmp_path / "r.json", split="monte-carlo", repeats=3)
    results = run_fewshot(question, [4], episodes=10)
    predictions = read_results(tmp_path / "r.json")[1]
    values = []
    for _, rows in predictions.groupby("fold"):
        right = np.where(rows["label"] == "tumor", rows["probability_tumor"], rows["probability_normal"])
        values.append(np.mean([right[rows["label"] == c].mean() for c in ("normal", "tumor")]))
    (row,) = results["encoders"]
    assert row["metrics"]["balanced_accuracy"]["value"] == pytest.approx(np.mean(values))
    assert row["details"]["over_episodes"]["balanced_accuracy"]["mean"] == pytest.approx(np.mean(values))


def test_what_cannot_be_drawn_is_refused_in_one_line(files, tmp_path, capsys):
    out = tmp_path / "no.json"
    ask = ["eval", "fewshot", str(files[0]), "--label", "label", "--group", "patient", "--out", str(out)]
    for more, said in [
        (["--shots", "1", "500"], "samples on the training side of fold"),
        (["--shots", "0"], "--shots 0 draws nothing"),
        (["--episodes", "1"], "--episodes 1 has no deviation"),
        (["--episodes", "1000000000"], "give 2 to 100000"),
        (["--preset", "uni-knn"], "valid here: uni-simpleshot, thunder-simpleshot"),
    ]:
        assert main([*ask, *more]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0]
        assert not list(tmp_path.glob("no*"))
    assert main([*ask, "--shots", "2", "--episodes", "5", "--preset", "thunder-simpleshot", "--device", "cpu"]) == 0
    assert "good + 2 shots" in capsys.readouterr().out
    assert read_results(out)[0]["protocol"] == "thunder-simpleshot"


def test_cheaper_than_a_loop_over_episodes():
    """In CPU time, in one process; the full size is a row of benchmarks/probes.py."""
    (support, labels), (queries, truth) = draw(4, support=2000, queries=1000, dimension=384, classes=9)
    began = time.process_time()
    episodes = draw_episodes(labels, 9, 4, 100, seed=0)
    ours, _ = episode_scores(simpleshot(queries, support, episodes), truth)
    between = time.process_time()
    asked, pool, theirs = torch.from_numpy(queries), torch.from_numpy(support), []
    for rows in torch.from_numpy(episodes):
        drawn = pool[rows]
        mean = drawn.flatten(0, 1).mean(dim=0)
        classes = torch.stack([torch.nn.functional.normalize(d - mean, dim=1).mean(dim=0) for d in drawn])
        normal = torch.nn.functional.normalize(asked - mean, dim=1)
        theirs.append(((normal[:, None] - classes[None]).norm(dim=2).argmin(dim=1).numpy() == truth).mean())
    loop = time.process_time() - between
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert loop > 5 * (between - began)
