import numpy as np
import pytest
from scipy.stats import norm

from eosin.eval.delong import delong, delong_test

# Albumin, total protein, K-G score and outcome of the 43 patients without a gap in DeLong et al. 1988.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1"""


def test_the_published_example():
    """Areas, standard errors and tests as printed for these data (SAS/STAT, PROC LOGISTIC, example of ROC curves)."""
    rows = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4)
    positive, scores = rows[:, 3] == 1, np.stack([rows[:, 0], rows[:, 1], 10 - rows[:, 2]])
    areas, covariance = delong(positive, scores)
    np.testing.assert_allclose(areas, [0.7366, 0.6478, 0.7258], atol=5e-5)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [0.0927, 0.1000, 0.1028], atol=5e-5)
    protein = delong_test(positive, scores[1], scores[2])
    assert protein["value"] == pytest.approx(-0.0780, abs=5e-5)
    assert protein["se"] == pytest.approx(0.1046, abs=5e-5)
    assert protein["z"] ** 2 == pytest.approx(0.5554, abs=5e-5)
    assert protein["p"] == pytest.approx(0.4561, abs=5e-5)
    assert delong_test(positive, scores[0], scores[2])["p"] == pytest.approx(0.9102, abs=5e-5)
    contrast = np.array([[1, 0, -1], [0, 1, -1]])
    apart = contrast @ areas
    assert apart @ np.linalg.solve(contrast @ covariance @ contrast.T, apart) == pytest.approx(2.5340, abs=5e-5)


def test_an_example_by_hand():
    """Positives 3 and 1, negatives 2 and 0: V10 = (1, .5), V01 = (.5, 1), so variance .125 / 2 + .125 / 2."""
    areas, covariance = delong(np.array([True, True, False, False]), np.array([[3.0, 1.0, 2.0, 0.0]]))
    assert areas[0] == 0.75
    assert covariance[0, 0] == pytest.approx(0.125)


def test_the_formula_by_brute_force_with_ties():
    rng = np.random.default_rng(0)
    positive = rng.random(90) < 0.4
    scores = np.round(rng.normal(size=(3, 90)) + positive, 1)
    kernel = [(s[positive][:, None] > s[~positive]) + 0.5 * (s[positive][:, None] == s[~positive]) for s in scores]
    areas, covariance = delong(positive, scores)
    np.testing.assert_allclose(areas, [k.mean() for k in kernel], atol=1e-12)
    expected = np.cov([k.mean(axis=1) for k in kernel]) / positive.sum()
    expected += np.cov([k.mean(axis=0) for k in kernel]) / (~positive).sum()
    np.testing.assert_allclose(covariance, expected, atol=1e-12)


def test_groups_by_brute_force():
    """Obuchowski's sums written out over groups; and a sample that occurs twice counts once."""
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 15, 80)
    positive = rng.random(80) < 0.5
    score = rng.normal(size=80) + positive + rng.normal(size=15)[groups]
    kernel = score[positive][:, None] > score[~positive]
    area, m, n = kernel.mean(), positive.sum(), (~positive).sum()
    up = np.array([(kernel.mean(axis=1) - area)[groups[positive] == g].sum() for g in range(15)])
    down = np.array([(kernel.mean(axis=0) - area)[groups[~positive] == g].sum() for g in range(15)])
    i10, i01 = len(set(groups[positive])), len(set(groups[~positive]))
    s10, s01 = i10 / (i10 - 1) * (up**2).sum() / m, i01 / (i01 - 1) * (down**2).sum() / n
    s11 = 15 / 14 * (up * down).sum()
    assert delong(positive, score[None], groups)[1][0, 0] == pytest.approx(s10 / m + s01 / n + 2 * s11 / (m * n))
    twice = delong(np.tile(positive, 2), np.tile(score, 2)[None], np.tile(np.arange(80), 2))[1]
    assert twice[0, 0] == pytest.approx(delong(positive, score[None])[1][0, 0])


def test_the_standard_error_is_that_of_repeated_studies():
    rng = np.random.default_rng(2)
    areas, errors, positive = [], [], np.arange(200) < 80
    for _ in range(1500):
        area, covariance = delong(positive, (rng.normal(size=200) + 1.2 * positive)[None])
        areas.append(area[0])
        errors.append(covariance[0, 0] ** 0.5)
    assert np.mean(areas) == pytest.approx(norm.cdf(1.2 / 2**0.5), abs=0.003)
    assert np.std(areas) == pytest.approx(np.mean(errors), rel=0.05)


def test_what_cannot_be_tested():
    positive = np.array([True, False, False])
    same = np.array([1.0, 2.0, 0.0])
    assert np.isnan(delong_test(positive, same, same)["p"])  # one positive has no variance
    assert np.isnan(delong(np.ones(3, dtype=bool), same[None])[0][0])
    positive = np.arange(20) < 10
    equal = delong_test(positive, np.arange(20.0), np.arange(20.0))
    assert (equal["value"], equal["p"]) == (0.0, 1.0)
    assert delong(positive, np.arange(20.0)[None])[0][0] == 0.0  # below a half it stays
