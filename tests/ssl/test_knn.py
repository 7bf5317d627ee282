import numpy as np
import pytest
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.neighbors import KNeighborsClassifier

from eosin.ssl import metrics
from eosin.ssl.metrics import knn_across_groups, knn_probabilities


def draw(seed=0, queries=70, train=300, dimension=16, classes=5):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dimension))
    labels = rng.integers(0, classes, train)
    features = centers[labels] + rng.normal(size=(train, dimension))
    return rng.normal(size=(queries, dimension)).astype(np.float32), features.astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 10, 20, 300])
def test_equals_scikit_learns_brute_force(k):
    queries, train, labels = draw()
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = oracle.fit(train.astype(np.float64), labels).predict_proba(queries.astype(np.float64))
    found = knn_probabilities(queries, train, labels, 5, [k])[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_every_k_in_one_pass_and_any_chunk(monkeypatch):
    queries, train, labels = draw(1)
    together = knn_probabilities(queries, train, labels, 5, [20, 3, 100])
    for row, k in enumerate([20, 3, 100]):
        np.testing.assert_allclose(together[row], knn_probabilities(queries, train, labels, 5, [k])[0], atol=1e-6)
    monkeypatch.setattr(metrics, "CHUNK", 900)
    np.testing.assert_allclose(knn_probabilities(queries, train, labels, 5, [20, 3, 100]), together, atol=1e-6)
    monkeypatch.setattr(metrics, "BLOCK", 64)  # fewer than the neighbors, and a rest
    np.testing.assert_allclose(knn_probabilities(queries, train, labels, 5, [20, 3, 100]), together, atol=1e-6)
    np.testing.assert_allclose(knn_probabilities(queries, train, labels, 5, [3])[0], together[1], atol=1e-6)


def test_by_hand():
    train = np.array([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]], dtype=np.float32)
    found = knn_probabilities(np.array([[3.0, 4.0]], dtype=np.float32), train, np.array([0, 1, 2]), 3, [2])[0, 0]
    near, far = np.exp(0.8 / 0.07), np.exp(0.6 / 0.07)
    np.testing.assert_allclose(found, [far / (near + far), near / (near + far), 0], rtol=1e-4)


def test_half_precision_and_class_never_seen():
    queries, train, labels = draw(2)
    found = knn_probabilities(queries.astype(np.float16), train.astype(np.float16), labels, 6, [20])[0]
    assert found.shape == (70, 6)
    assert (found[:, 5] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="exceeds"):
        knn_probabilities(queries, train, labels, 5, [301])


def test_across_groups_equals_scikit_learn_left_one_group_out():
    _, features, labels = draw(3)
    groups = np.arange(300) % 7 * 3  # numbers need not follow each other
    expected = np.empty_like(labels)
    for own, out in LeaveOneGroupOut().split(features, labels, groups):
        oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        expected[out] = oracle.fit(features[own].astype(np.float64), labels[own]).predict(features[out])
    np.testing.assert_array_equal(knn_across_groups(features, labels, groups, 5, 20), expected)


def test_across_groups_a_tile_is_not_told_by_its_own_group():
    # Groups lie in pairs of different labels: whoever looks into its own group is always right, and else always wrong.
    groups = np.arange(80) // 20
    labels = groups % 2
    features = np.hstack([np.eye(2)[groups // 2], 0.1 * np.eye(4)[groups]]).astype(np.float32)
    assert (knn_probabilities(features, features, labels, 2, [5])[0].argmax(1) == labels).all()
    assert (knn_across_groups(features, labels, groups, 2, 5) != labels).all()


@pytest.mark.parametrize("block", [1 << 15, 1000])
def test_a_long_row_of_similarities_equals_brute_force(block, monkeypatch):
    """Longer than what is looked at whole, with a rest, and neighbors that lie close to each other in it."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    queries, train, labels = draw(4, train=3013, dimension=8, classes=5)
    train = train[np.argsort(train[:, 0])]
    cosine = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float64) @ (
        train / np.linalg.norm(train, axis=1, keepdims=True)
    ).T
    for weighted in (True, False):
        found = knn_probabilities(queries, train, labels, 5, [1, 9, 40], weighted=weighted)
        for row, k in enumerate((1, 9, 40)):
            near = np.argsort(-cosine, axis=1)[:, :k]
            weights = np.exp(np.take_along_axis(cosine, near, 1) / 0.07) if weighted else np.ones(near.shape)
            expected = np.stack([(weights * (labels[near] == c)).sum(axis=1) for c in range(5)], axis=1)
            np.testing.assert_allclose(found[row], expected / expected.sum(axis=1, keepdims=True), atol=2e-5)


def test_centered_and_voted_equals_scikit_learn_on_centered_features():
    queries, train, labels = draw(5)
    queries, train = queries + 30, train + 30
    mean = train.astype(np.float64).mean(axis=0)
    unit = [(side - mean) / np.linalg.norm(side - mean, axis=1, keepdims=True) for side in (queries, train)]
    expected = KNeighborsClassifier(20).fit(unit[1], labels).predict_proba(unit[0])
    found = knn_probabilities(queries, train, labels, 5, [20], weighted=False, center=True)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (knn_probabilities(queries, train, labels, 5, [20], weighted=False)[0] != expected).any()
