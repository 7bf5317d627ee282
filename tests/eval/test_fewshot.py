import time

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from eosin.data_tools.errors import UserError
from eosin.eval import fewshot
from eosin.eval.fewshot import (
    draw_episodes,
    episode_scores,
    few_ratio,
    label_share,
    majority,
    prototypes,
    simpleshot,
)
from eosin.eval.linear import linear_probabilities
from eosin.ssl.metrics import knn_probabilities


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
    votes = np.array([[0, 1, 2], [1, 1, 2], [0, 2, 1], [1, 2, 1]])
    np.testing.assert_array_equal(majority(votes, 4), [0, 1, 1])


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


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_more_labels_tell_more(probe):
    (train, labels), (queries, truth) = draw(3, support=1200, queries=600)
    groups = np.arange(len(labels)) // 3
    probes = {
        "linear": lambda q, t, y, g: linear_probabilities(q, t, y, g, 4, seed=0)[0],
        "knn": lambda q, t, y, g: knn_probabilities(q, t, y, 4, [3])[0],
    }
    found = list(few_ratio(queries, train, labels, groups, [0.01, 0.1, 1.0], 0, probes[probe]))
    assert [len(rows) for rows, _ in found] == pytest.approx([12, 120, 1200], abs=6)
    rates = [(probabilities.argmax(axis=1) == truth).mean() for _, probabilities in found]
    assert rates[0] + 0.05 < rates[1] < rates[2]


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
