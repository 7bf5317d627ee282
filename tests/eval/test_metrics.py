import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import cohen_kappa_score, f1_score, precision_score, recall_score, roc_auc_score

from eosin.eval import metrics
from eosin.eval.statistics import bootstrap_weights


def draw(seed, n=240, classes=4, groups=12, digits=2):
    """Labels that every group holds, probabilities with many ties, and groups."""
    rng = np.random.default_rng(seed)
    labels, numbers = np.arange(n) % classes, np.arange(n) // classes % groups
    scores = rng.dirichlet(np.ones(classes), n) + 0.4 * np.eye(classes)[labels]
    scores = np.round(scores / scores.sum(1, keepdims=True), digits)
    scores[:, 0] += 1 - scores.sum(1)  # scikit-learn wants a sum of 1
    return labels, np.round(scores, digits), numbers


def resampled(groups, counts):
    """Rows of a draw, written out."""
    return np.concatenate([np.tile(np.flatnonzero(groups == g), int(c)) for g, c in enumerate(counts) if c])


@pytest.mark.parametrize("few_draws", [False, True])  # pairs counted once between groups, or in each draw
def test_every_metric_of_every_draw_is_scikit_learns(few_draws):
    labels, probabilities, groups = draw(0)
    weights = bootstrap_weights(12, 5 if few_draws else 20, seed=1)
    counts = metrics.tally(labels, probabilities, groups, weights)
    found = metrics.overall(counts, (*metrics.METRICS, metrics.ONE_VS_ONE, metrics.KAPPA))
    classes = metrics.per_class(counts)
    for row, drawn in enumerate(resampled(groups, w) for w in weights):
        y, p = labels[drawn], probabilities[drawn]
        guessed = p.argmax(axis=1)
        assert found["auroc"][row] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)
        assert found["auroc_ovo"][row] == pytest.approx(roc_auc_score(y, p, multi_class="ovo"), abs=1e-12)
        kappa = cohen_kappa_score(y, guessed, weights="quadratic")
        assert found["quadratic_kappa"][row] == pytest.approx(kappa, abs=1e-12)
        for metric, reference in (("recall", recall_score), ("precision", precision_score), ("f1", f1_score)):
            np.testing.assert_allclose(classes[metric][row], reference(y, guessed, average=None), atol=1e-12)
        for c in range(4):
            assert classes["auroc"][row, c] == pytest.approx(roc_auc_score(y == c, p[:, c]), abs=1e-12)


def test_both_ways_to_count_pairs_agree_and_chunks_change_nothing(monkeypatch):
    labels, probabilities, groups = draw(1, n=400, groups=30, digits=1)
    weights = bootstrap_weights(30, 100, seed=2)
    ones = [metrics.pairs_won(labels, probabilities[:, 2], 2, groups, w[None], 4)[0] for w in weights]
    whole = metrics.pairs_won(labels, probabilities[:, 2], 2, groups, weights, 4)
    np.testing.assert_array_equal(whole, ones)
    monkeypatch.setattr(metrics, "CHUNK", 1700)
    np.testing.assert_array_equal(metrics.pairs_won(labels, probabilities[:, 2], 2, groups, weights, 4), whole)


def test_pearson_is_scipys_in_every_draw():
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 9, 150)
    truth = 1e6 + rng.normal(size=150)  # far from zero, where sums of squares would lose every digit
    predicted = 0.5 * truth + rng.normal(size=150)
    weights = bootstrap_weights(9, 30, seed=0)
    found = metrics.pearson(truth, predicted, groups, weights)
    for row, counts in enumerate(weights):
        drawn = resampled(groups, counts)
        assert found[row] == pytest.approx(pearsonr(truth[drawn], predicted[drawn]).statistic, abs=1e-9)
    assert np.isnan(metrics.pearson(np.ones(150), predicted, groups, weights)).all()


def test_dice_is_the_f1_of_pixels():
    rng = np.random.default_rng(4)
    truth, predicted = rng.random((6, 2, 8, 8)) < 0.4, rng.random((6, 2, 8, 8)) < 0.5  # images, classes
    truth[:, 1] = predicted[:, 1] = False
    groups = np.array([0, 0, 1, 1, 2, 2])
    weights = np.array([[1.0, 1, 1], [3, 0, 0], [0, 1, 2]])
    areas = [m.sum(axis=(2, 3)) for m in (truth & predicted, truth, predicted)]
    found = metrics.dice(*areas, groups, weights)
    for row, counts in enumerate(weights):
        drawn = resampled(groups, counts)
        assert found[row, 0] == pytest.approx(f1_score(truth[drawn, 0].ravel(), predicted[drawn, 0].ravel()))
    assert np.isnan(found[:, 1]).all()  # no pixel in either: nothing is known, which is not 0


def test_a_class_without_samples_is_undefined_and_means_leave_it_out():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.6, 0.3]])
    counts = metrics.tally(labels, probabilities, np.zeros(4, dtype=int), np.ones((1, 1)))
    classes = metrics.per_class(counts)
    for metric in ("recall", "auroc", "f1"):
        assert np.isnan(classes[metric][0, 2]), metric
    assert list(classes["recall"][0, :2]) == [0.5, 1.0]
    found = metrics.overall(counts, (*metrics.METRICS, metrics.ONE_VS_ONE))
    assert found["balanced_accuracy"][0] == 0.75
    # Class 0 ranks all four pairs right (.7 and .2 above .1 twice), class 1 two of four (.8 above both, .6 above .2).
    assert found["auroc_ovo"][0] == pytest.approx((1 + 3 / 4) / 2)


def test_kappa_by_hand():
    """Two of four a step apart: 1 - 2 / (sum of squared distances of all 16 pairs / 4) = 1 - 2 / 7."""
    labels, guessed = np.array([0, 1, 2, 2]), np.array([0, 2, 1, 2])
    counts = metrics.tally(labels, np.eye(3)[guessed], np.zeros(4, dtype=int), np.ones((1, 1)))
    expected = 1 - 2 / (((labels[:, None] - guessed) ** 2).sum() / 4)
    assert metrics.overall(counts, (metrics.KAPPA,))["quadratic_kappa"][0] == pytest.approx(expected)
