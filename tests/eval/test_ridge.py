import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.ridge import GRID, Moments, chosen_ridge
from eosin.eval.splits import stratified_folds


def draw(seed=0, samples=240, dimension=30, queries=50):
    """Targets of which one is told by the features, one by a single feature under much noise, one by none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples + queries, dimension)) * np.logspace(1, -1, dimension) + 5
    told = x @ rng.normal(size=dimension)
    y = np.stack([told + 100, x[:, 0] + 30 * rng.normal(size=len(x)), rng.normal(size=len(x)) - 3], axis=1)
    return x[:samples], y[:samples], x[samples:], np.arange(samples) // 8


def test_penalties_and_predictions_are_scikit_learns():
    train, targets, queries, groups = draw()
    predicted, penalties = chosen_ridge(queries, train, targets, groups, seed=7)
    inner = stratified_folds(np.zeros(240, int), groups, 3, hash32(7, purpose("inner folds")))
    for column in range(3):
        y = targets[:, column]
        errors = []
        for penalty in GRID:
            # The folds are of equal size but for a group, so alpha follows the samples that are learned from.
            told = np.empty(240)
            for fold in range(3):
                learn = inner != fold
                fit = make_pipeline(StandardScaler(), Ridge(penalty * learn.sum())).fit(train[learn], y[learn])
                told[~learn] = fit.predict(train[~learn])
            errors.append(((told - y) ** 2).sum())
        assert penalties[column] == GRID[int(np.argmin(errors))]
        fit = make_pipeline(StandardScaler(), Ridge(penalties[column] * 240)).fit(train, y)
        np.testing.assert_allclose(predicted[:, column], fit.predict(queries), rtol=1e-8, atol=1e-8)
    assert penalties[0] < penalties[1] < penalties[2]
    # And where every inner side has as many samples, scikit-learn's own walk over folds says the same.
    alpha = penalties[0] * 160
    walked = cross_val_predict(
        make_pipeline(StandardScaler(), Ridge(alpha)), train, targets[:, 0], cv=PredefinedSplit(np.arange(240) // 80)
    )
    assert np.corrcoef(walked, targets[:, 0])[0, 1] > 0.99


def test_a_targets_answer_does_not_depend_on_its_unit_or_its_company():
    train, targets, queries, groups = draw(1)
    together, penalties = chosen_ridge(queries, train, targets, groups, seed=0)
    for column in range(3):
        alone, penalty = chosen_ridge(queries, train, 1000 * targets[:, [column]] + 5, groups, seed=0)
        assert penalty == penalties[column]
        np.testing.assert_allclose(alone[:, 0], 1000 * together[:, column] + 5, rtol=1e-6)


def test_sums_are_the_same_in_chunks_and_parts(monkeypatch):
    train, targets, _, _ = draw(2)
    monkeypatch.setattr("eosin.eval.ridge.CHUNK", 30 * 7)
    found = Moments.of(train[:101], targets[:101]) + Moments.of(train[101:], targets[101:])
    x, y = train - train.mean(axis=0), targets - targets.mean(axis=0)
    xx, xy, yy = found.about(train.mean(axis=0), train.std(axis=0), targets.mean(axis=0))
    z = x / train.std(axis=0)
    for sums, expected in ((xx, z.T @ z), (xy, z.T @ y), (yy, (y**2).sum(axis=0))):
        np.testing.assert_allclose(sums, expected, atol=1e-8 * np.abs(expected).max())
    assert found.count == 240


def test_features_that_never_vary_and_more_features_than_samples():
    train, targets, queries, groups = draw(3, samples=24, dimension=60)
    plain, _ = chosen_ridge(queries, train, targets, groups, seed=0)
    flat = [
        np.concatenate([x.astype(np.float32), np.full((len(x), 1), 0.1, np.float32)], axis=1) for x in (queries, train)
    ]
    found, _ = chosen_ridge(flat[0], flat[1], targets, groups, seed=0)
    np.testing.assert_allclose(found, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def test_one_group_cannot_choose():
    train, targets, queries, _ = draw(4)
    with pytest.raises(UserError, match="1 group, too few to choose a penalty"):
        chosen_ridge(queries, train, targets, np.zeros(240), seed=0)
