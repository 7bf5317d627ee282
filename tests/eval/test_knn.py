import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from eosin.eval import knn
from eosin.eval.knn import knn_probabilities


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
    monkeypatch.setattr(knn, "CHUNK", 900)
    np.testing.assert_allclose(knn_probabilities(queries, train, labels, 5, [20, 3, 100]), together, atol=1e-6)


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
