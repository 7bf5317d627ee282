import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from eosin.eval import metrics, statistics


def draw(seed, n=200, classes=4, groups=17, digits=2):
    """Labels, probabilities with many ties, and groups."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    scores = rng.dirichlet(np.ones(classes), n) + 0.3 * np.eye(classes)[labels]
    return labels, np.round(scores / scores.sum(1, keepdims=True), digits), rng.integers(0, groups, n)


def reference(labels, probabilities):
    """The four metrics by scikit-learn, class by class where it refuses a missing class."""
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in present]
    either = np.union1d(present, predicted)
    return {
        "balanced_accuracy": np.mean([(predicted == labels)[labels == c].mean() for c in present]),
        "macro_f1": f1_score(labels, predicted, labels=either, average="macro"),
        "accuracy": accuracy_score(labels, predicted),
        "auroc": np.mean(areas),
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_values_are_scikit_learns(classes):
    labels, probabilities, groups = draw(0, classes=classes, digits=6)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found = statistics.evaluate(labels, probabilities, groups, np.ones((1, 17)))
    predicted = probabilities.argmax(axis=1)
    multi = {"multi_class": "ovr", "average": "macro"} if classes > 2 else {}
    expected = {
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "accuracy": accuracy_score(labels, predicted),
        "auroc": roc_auc_score(labels, probabilities if classes > 2 else probabilities[:, 1], **multi),
    }
    assert set(expected) == set(statistics.METRICS)
    for metric, value in expected.items():
        assert found[metric][0] == pytest.approx(value, abs=1e-12), metric


def test_weights_are_the_same_as_drawing_the_groups_for_real():
    labels, probabilities, groups = draw(1, groups=6)
    weights = statistics.bootstrap_weights(6, 25, seed=3)
    labels[groups < 2] = np.where(labels[groups < 2] == 3, 2, labels[groups < 2])  # some draws lack class 3
    weights[7] = [3, 3, 0, 0, 0, 0]
    found = statistics.evaluate(labels, probabilities, groups, weights)
    for row, counts in enumerate(weights):
        drawn = np.concatenate([np.tile(np.flatnonzero(groups == g), int(c)) for g, c in enumerate(counts) if c])
        for metric, value in reference(labels[drawn], probabilities[drawn]).items():
            assert found[metric][row] == pytest.approx(value, abs=1e-12), (row, metric)


def test_chunks_change_nothing(monkeypatch):
    labels, probabilities, groups = draw(2)
    weights = statistics.bootstrap_weights(17, 50, seed=0)
    whole = statistics.evaluate(labels, probabilities, groups, weights)["auroc"]
    monkeypatch.setattr(metrics, "CHUNK", 300)
    np.testing.assert_array_equal(statistics.evaluate(labels, probabilities, groups, weights)["auroc"], whole)


def test_bootstrap_draws_groups_with_replacement():
    weights = statistics.bootstrap_weights(30, 4000, seed=5)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 30).all()
    drawn = weights[1:]
    # Multinomial: mean 1, variance 1 - 1/30.
    assert drawn.mean(axis=0) == pytest.approx(np.ones(30), abs=0.08)
    assert drawn.var() == pytest.approx(1 - 1 / 30, abs=0.03)
    np.testing.assert_array_equal(weights, statistics.bootstrap_weights(30, 4000, seed=5))
    assert (weights != statistics.bootstrap_weights(30, 4000, seed=6)).any()


def studies(trials, n_groups=100, of_each=4, shift=1.0, shared=0.5):
    """Scores [N, trials] of patients whose samples share an effect: labels, groups, two probes' scores, the spread."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(n_groups), of_each)
    labels = np.tile([0, 1], len(groups) // 2)
    effect = shared * rng.normal(size=(n_groups, trials))[groups]
    good, fair = (s * (labels - 0.5)[:, None] + effect + rng.normal(size=effect.shape) for s in (shift, 0.6 * shift))
    return labels, groups, good, fair, np.sqrt(1 + shared**2)


def coverage(values, truth):
    """How often the intervals of [1 + draws, trials] hold the truth."""
    found = [statistics.interval(column) for column in values.T]
    return np.mean([f["low"] <= truth <= f["high"] for f in found])


def test_intervals_of_accuracy_and_of_paired_differences_cover_and_rows_would_not():
    """The truth is a closed form of the normal law."""
    labels, groups, good, fair, spread = studies(3000)

    def accuracy(scores, of):
        weights = statistics.bootstrap_weights(of.max() + 1, 1000, 0)
        right = metrics.sums((scores > 0) == labels[:, None], of, weights)  # [R, trials]
        return right / metrics.sums(np.ones((len(labels), 1)), of, weights)

    values = accuracy(good, groups)
    true = norm.cdf(0.5 / spread)
    assert 0.93 <= coverage(values, true) <= 0.97
    assert 0.93 <= coverage(values - accuracy(fair, groups), true - norm.cdf(0.3 / spread)) <= 0.97
    # Patients who are right or wrong as a whole: rows pretend to four times as many independent samples.
    rng = np.random.default_rng(1)
    whole = np.where((rng.random((100, 300)) < 0.7)[groups], labels[:, None] - 0.5, 0.5 - labels[:, None])
    assert 0.91 <= coverage(accuracy(whole, groups), 0.7) <= 0.98
    assert coverage(accuracy(whole, np.arange(len(labels))), 0.7) < 0.8


def test_intervals_of_auroc_cover():
    labels, groups, good, _, spread = studies(1000)
    weights = statistics.bootstrap_weights(100, 1000, 0)
    near, far = norm.cdf(1 / np.sqrt(2)), norm.cdf(1 / np.sqrt(2) / spread)  # pairs within a patient, and between
    values = np.stack([statistics.auroc(labels == 1, score, groups, weights) for score in good.T], axis=1)
    assert 0.93 <= coverage(values, far + (near - far) / 100) <= 0.97


def test_paired_differences():
    labels, probabilities, groups = draw(4, n=400)
    weights = statistics.bootstrap_weights(17, 500, seed=0)
    values = statistics.evaluate(labels, probabilities, groups, weights)["accuracy"]
    same = statistics.difference(values, values)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}
    worse = probabilities.copy()
    worse[::5] = np.eye(4)[(labels[::5] + 1) % 4]  # one answer in five spoiled
    values_worse = statistics.evaluate(labels, worse, groups, weights)["accuracy"]
    found = statistics.difference(values, values_worse)
    lost = (probabilities[::5].argmax(axis=1) == labels[::5]).sum() / 400
    assert found["value"] == pytest.approx(lost)
    assert found["excludes_zero"]
    assert found["low"] > 0
    assert statistics.difference(values_worse, values)["high"] < 0
    # Paired draws cancel what both probes share.
    apart = statistics.difference(values, np.r_[values_worse[0], np.roll(values_worse[1:], 1)])
    assert found["high"] - found["low"] < apart["high"] - apart["low"]


def test_chance_is_what_blind_probes_reach():
    rng = np.random.default_rng(0)
    share = np.array([0.6, 0.3, 0.1])
    labels = rng.choice(3, 60_000, p=share)
    chance = statistics.chance(labels, 3)
    one = np.ones((1, 1))
    groups = np.zeros(len(labels), dtype=int)
    largest = statistics.evaluate(labels, np.tile([1.0, 0, 0], (len(labels), 1)), groups, one)
    assert chance["accuracy"] == pytest.approx(largest["accuracy"][0])
    assert chance["balanced_accuracy"] == pytest.approx(largest["balanced_accuracy"][0])
    guesses = np.eye(3)[rng.choice(3, len(labels), p=share)]
    blind = statistics.evaluate(labels, guesses, groups, one)
    for metric in ("balanced_accuracy", "macro_f1", "auroc"):
        assert chance[metric] == pytest.approx(blind[metric][0], abs=0.01)


def test_an_area_below_a_half_stays_there():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([0.9, 0.8, 0.2, 0.8])
    area = statistics.auroc(labels == 1, scores, np.arange(4), np.ones((1, 4)))
    assert area[0] == pytest.approx(0.5 / 4)  # of four pairs one is tied
