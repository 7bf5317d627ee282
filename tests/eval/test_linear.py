import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from eosin.data_tools.errors import UserError
from eosin.eval.linear import GRID, choose_strength, linear_probabilities
from eosin.eval.splits import stratified_folds


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


def test_some_rows_of_a_larger_array_are_the_training_side():
    rng = np.random.default_rng(5)
    features, labels, groups = rng.normal(size=(90, 4)), rng.integers(0, 2, 90), np.arange(90) // 3
    rows = np.flatnonzero(groups % 3 > 0)
    given = (features[:9], features, labels[rows], groups[rows], 2, 1)
    found, strength = linear_probabilities(*given, rows=rows)
    copied, same = linear_probabilities(features[:9], features[rows], labels[rows], groups[rows], 2, 1)
    assert strength == same
    np.testing.assert_allclose(found, copied, atol=1e-6)
