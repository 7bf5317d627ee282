import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from eosin.data_tools.errors import UserError
from eosin.eval.linear import GRID, Scale, choose_strength, linear_probabilities, logistic_path
from eosin.eval.splits import stratified_folds


def draw(seed=0, n=500, dimension=40, classes=4, spread=3.0):
    """Ill-conditioned features: deviations of the principal axes fall by six orders of magnitude."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    features = rng.normal(size=(n, dimension)) + rng.normal(size=(classes, dimension))[labels] * 0.3
    features = (features * np.logspace(spread, -spread, dimension)) @ rng.normal(size=(dimension, dimension))
    return Scale.of(features)(features), labels


def objective(features, labels, weights, intercepts, strength):
    """The documented objective over C·N, in double precision."""
    scores = features.astype(np.float64) @ weights + intercepts
    top = scores.max(axis=1, keepdims=True)
    entropy = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0] - scores[np.arange(len(labels)), labels]
    return entropy.mean() + 0.5 * (weights**2).sum() / (strength * len(labels))


def test_reaches_scikit_learns_minimum():
    features, labels = draw()
    for strength, (weights, intercepts) in zip(GRID, logistic_path(features, labels, GRID)):
        oracle = LogisticRegression(C=strength, tol=1e-6, max_iter=50_000).fit(features.astype(np.float64), labels)
        gap = objective(features, labels, weights, intercepts, strength) - objective(
            features, labels, oracle.coef_.T, oracle.intercept_, strength
        )
        assert gap < 1e-5
        np.testing.assert_array_equal((features @ weights + intercepts).argmax(1), oracle.predict(features))
        ours = np.exp(features @ weights + intercepts)
        ours /= ours.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ours, oracle.predict_proba(features), atol=5e-3)


def test_two_classes_are_scikit_learns_at_twice_the_strength():
    features, labels = draw(1, classes=2)
    ((weights, intercepts),) = logistic_path(features, labels, [0.05])
    oracle = LogisticRegression(C=0.1, tol=1e-6, max_iter=50_000).fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(weights[:, 1] - weights[:, 0], oracle.coef_[0], atol=1e-3)
    np.testing.assert_allclose(intercepts[1] - intercepts[0], oracle.intercept_[0], atol=1e-3)


def test_repeated_and_constant_features():
    features, labels = draw(2, dimension=10)
    doubled = np.c_[features, features, np.full(len(features), 7.0)]
    scale = Scale.of(doubled)
    assert (scale(doubled)[:, -1] == 0).all()
    ((weights, _),) = logistic_path(scale(doubled), labels, [0.1])
    # The penalty shares a weight evenly between equal features and gives a constant none.
    np.testing.assert_allclose(weights[:10], weights[10:20], atol=1e-5)
    np.testing.assert_allclose(weights[20], 0, atol=1e-6)


def test_without_features_the_shares_of_the_classes_remain():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    groups = np.arange(100)
    found, _ = linear_probabilities(np.ones((2, 3)), np.ones((100, 3)), labels, groups, 4, seed=0)
    np.testing.assert_allclose(found, [[0.6, 0.3, 0.1, 0]] * 2, atol=1e-4)


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_chooses_the_strength_a_plain_search_chooses(noise):
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(30), 10)
    labels = (np.arange(30) % 3)[groups]
    features = np.eye(3)[labels] @ rng.normal(size=(3, 30)) + noise * rng.normal(size=(300, 30))
    chosen = choose_strength(features, labels, groups, 3, seed=8)

    from eosin.data_tools.draws import hash32, purpose

    inner = stratified_folds(labels, groups, 3, hash32(8, purpose("inner folds")))
    losses = []
    for strength in GRID:
        loss = 0.0
        for fold in range(3):
            learn, score = inner != fold, inner == fold
            scaler = StandardScaler().fit(features[learn])
            model = LogisticRegression(C=strength, max_iter=10_000).fit(
                scaler.transform(features[learn]), labels[learn]
            )
            loss += log_loss(labels[score], model.predict_proba(scaler.transform(features[score])), normalize=False)
        losses.append(loss)
    assert chosen == GRID[int(np.argmin(losses))]


def test_a_training_side_of_one_group_is_refused():
    with pytest.raises(UserError, match="1 group"):
        choose_strength(np.ones((4, 2)), np.array([0, 1, 0, 1]), np.zeros(4), 2, 0)


def test_scale_is_learned_from_one_side():
    train, other = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[4.0, 6.0]])
    np.testing.assert_allclose(Scale.of(train)(other), [[3.0, 1.0]])
