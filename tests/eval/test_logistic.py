import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eosin.eval import logistic
from eosin.eval.linear import GRID
from eosin.eval.logistic import (
    Scale,
    balanced_weights,
    equal_strength,
    logistic_path,
    norm_penalized,
    scikit_strength,
    uni_strength,
)


def draw(seed=0, n=500, dimension=40, classes=4, spread=3.0):
    """Ill-conditioned features: deviations of the principal axes fall by six orders of magnitude."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    features = rng.normal(size=(n, dimension)) + rng.normal(size=(classes, dimension))[labels] * 0.3
    features = (features * np.logspace(spread, -spread, dimension)) @ rng.normal(size=(dimension, dimension))
    return Scale.of(features)(features), labels


def mean_entropy(features, labels, weights, intercepts, shares=None):
    """In double precision."""
    scores = features.astype(np.float64) @ weights + intercepts
    top = scores.max(axis=1, keepdims=True)
    entropy = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0] - scores[np.arange(len(labels)), labels]
    return np.average(entropy, weights=shares)


def objective(features, labels, weights, intercepts, strength):
    """The documented objective over C·N, in double precision."""
    return mean_entropy(features, labels, weights, intercepts) + 0.5 * (weights**2).sum() / (strength * len(labels))


def test_reaches_scikit_learns_minimum():
    features, labels = draw()
    for strength, fit in zip(GRID, logistic_path(features, labels, GRID)):
        oracle = LogisticRegression(C=strength, tol=1e-6, max_iter=50_000).fit(features.astype(np.float64), labels)
        ours = objective(features, labels, fit.weights, fit.intercepts, strength)
        assert abs(ours - objective(features, labels, oracle.coef_.T, oracle.intercept_, strength)) < 1e-5
        assert fit.objective == pytest.approx(ours, abs=1e-6)
        np.testing.assert_array_equal(fit.probabilities(features).argmax(1), oracle.predict(features))
        np.testing.assert_allclose(fit.probabilities(features), oracle.predict_proba(features), atol=5e-3)


def test_two_classes_are_scikit_learns_at_twice_the_strength():
    features, labels = draw(1, classes=2)
    (fit,) = logistic_path(features, labels, [scikit_strength(0.1, 2)])
    oracle = LogisticRegression(C=0.1, tol=1e-6, max_iter=50_000).fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(fit.weights[:, 1] - fit.weights[:, 0], oracle.coef_[0], atol=1e-3)
    np.testing.assert_allclose(fit.intercepts[1] - fit.intercepts[0], oracle.intercept_[0], atol=1e-3)
    assert scikit_strength(0.1, 3) == 0.1


def test_raw_features_far_from_zero_and_balanced_weights():
    features, labels = draw(2, spread=0.5)
    features = features * 0.2 + 5
    labels[labels == 3] = np.where(np.arange((labels == 3).sum()) < 9, 3, 0)
    (fit,) = logistic_path(features, labels, [0.5], sample_weights=balanced_weights(labels))
    oracle = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-7, max_iter=50_000)
    oracle.fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(fit.probabilities(features), oracle.predict_proba(features), atol=5e-4)
    np.testing.assert_allclose(fit.weights - fit.weights.mean(1, keepdims=True), oracle.coef_.T, atol=1e-3)


def test_scale_is_folded_into_the_weights():
    features, labels = draw(3, spread=0.5)
    raw = features * np.linspace(0.1, 10, features.shape[1]) + 3
    (fit,) = logistic_path(raw, labels, [0.1], scale=Scale.of(raw))
    oracle = LogisticRegression(C=0.1, tol=1e-7, max_iter=50_000).fit(Scale.of(raw)(raw).astype(np.float64), labels)
    np.testing.assert_allclose(fit.probabilities(raw), oracle.predict_proba(Scale.of(raw)(raw)), atol=1e-4)
    assert fit.norm == pytest.approx(np.linalg.norm(oracle.coef_), rel=1e-3)


@pytest.mark.parametrize("strength", [0.4, 1.6, 160.0])
def test_unis_minimum_is_scikit_learns_at_the_equal_strength(strength):
    features, labels = draw(4, spread=0.5)
    assert uni_strength(40, 4) == 1.6
    fit = norm_penalized(features, labels, strength)
    equal = equal_strength(strength, fit.norm, len(labels))
    oracle = LogisticRegression(C=equal, tol=1e-8, max_iter=50_000).fit(features.astype(np.float64), labels)
    value, theirs = (
        mean_entropy(features, labels, weights, intercepts) + 0.5 / strength * np.linalg.norm(weights)
        for weights, intercepts in ((fit.weights, fit.intercepts), (oracle.coef_.T, oracle.intercept_))
    )
    assert abs(value - theirs) < 1e-6
    assert fit.objective == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(fit.probabilities(features), oracle.predict_proba(features), atol=2e-3)
    # No other weights are better: a step along random directions, on the objective itself.
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        moved = fit.weights + size * rng.normal(size=fit.weights.shape) / np.sqrt(fit.weights.size)
        assert (
            mean_entropy(features, labels, moved, fit.intercepts) + 0.5 / strength * np.linalg.norm(moved)
            > value - 1e-7
        )


def test_a_strong_penalty_on_the_norm_leaves_no_weights():
    """At C = ½ / ‖gradient at zero‖ and below zero is the minimum, which no squared penalty has."""
    features, labels = draw(5, spread=0.5)
    shares = np.bincount(labels) / len(labels)
    slope = np.linalg.norm(features.astype(np.float64).T @ (shares - np.eye(4)[labels])) / len(labels)
    assert norm_penalized(features, labels, 0.48 / slope).norm == pytest.approx(0, abs=1e-4)
    assert norm_penalized(features, labels, 0.6 / slope).norm > 1e-2


def test_repeated_and_constant_features():
    features, labels = draw(2, dimension=10)
    doubled = np.c_[features, features, np.full(len(features), 7.0)]
    scale = Scale.of(doubled)
    assert (scale(doubled)[:, -1] == 0).all()
    (fit,) = logistic_path(doubled, labels, [0.1], scale=scale)
    # The penalty shares a weight evenly between equal features and gives a constant none.
    np.testing.assert_allclose(fit.weights[:10], fit.weights[10:20], atol=1e-5)
    np.testing.assert_allclose(fit.weights[20], 0, atol=1e-6)


def test_rows_chunks_and_half_precision(monkeypatch):
    features, labels = draw(6, spread=0.5)
    rows = np.random.default_rng(0).permutation(len(labels))[:300]
    (whole,) = logistic_path(features[rows], labels[rows], [0.1], scale=Scale.of(features[rows]))
    monkeypatch.setattr(logistic, "CHUNK", 700)  # 17 rows
    (parts,) = logistic_path(features, labels[rows], [0.1], rows=rows, scale=Scale.of(features, rows))
    np.testing.assert_allclose(parts.weights, whole.weights, atol=1e-5)
    half = features.astype(np.float16)
    (fit,) = logistic_path(half, labels, [0.1])
    (exact,) = logistic_path(half.astype(np.float64), labels, [0.1])
    np.testing.assert_allclose(fit.weights, exact.weights, atol=1e-6)


def test_scale_is_learned_from_one_side():
    train, other = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[4.0, 6.0]])
    np.testing.assert_allclose(Scale.of(train)(other), [[3.0, 1.0]])


def test_cheaper_than_scikit_learn_to_no_worse_an_objective():
    """In CPU time, in one process; the full size is a row of benchmarks/probes.py."""
    import time

    rng = np.random.default_rng(0)
    labels = np.r_[np.arange(20), rng.integers(0, 20, 3980)]
    axes = np.linalg.qr(rng.normal(size=(256, 256)))[0]
    features = rng.normal(size=(4000, 256)) + 0.3 * (rng.normal(size=(20, 256)) * (rng.random(256) < 0.3))[labels]
    features *= np.arange(1, 257) ** -0.7
    features = Scale.of(features @ axes)(features @ axes)  # float32, which scikit-learn keeps
    ratios = []
    for _ in range(3):
        began = time.process_time()
        (fit,) = logistic_path(features, labels, [1.0])
        between = time.process_time()
        oracle = LogisticRegression(max_iter=5000).fit(features, labels)
        ratios.append((time.process_time() - between) / (between - began))
    ours = objective(features, labels, fit.weights, fit.intercepts, 1.0)
    assert ours < objective(features, labels, oracle.coef_.T, oracle.intercept_, 1.0) + 1e-6
    assert np.median(ratios) > 1.5
