import numpy as np
import pytest

from eosin.eval.calibration import reliability
from eosin.eval.statistics import bootstrap_weights


def answers(rows):
    """Binary answers from (confidence, right, wrong): labels, probabilities, and each sample its own group."""
    confidence = np.concatenate([np.full(r + w, c) for c, r, w in rows])
    right = np.concatenate([np.arange(r + w) < r for _, r, w in rows])
    return np.where(right, 1, 0), np.stack([1 - confidence, confidence], axis=1), np.arange(len(right))


def test_constructed_calibration_has_no_error():
    labels, probabilities, groups = answers([(0.6, 6, 4), (0.75, 15, 5), (0.9, 27, 3), (1.0, 8, 0)])
    found = reliability(labels, probabilities, groups, bootstrap_weights(len(groups), 50, 0))
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert [b["n"] for b in found["bins"]] == [10, 20, 30, 8]
    for row, accuracy in zip(found["bins"], (0.6, 0.75, 0.9, 1.0)):
        assert row["accuracy"]["value"] == pytest.approx(accuracy)
        assert row["accuracy"]["low"] <= accuracy <= row["accuracy"]["high"]
        assert row["confidence"] == pytest.approx(accuracy)


def test_the_error_by_hand():
    """30 answers 20 points too sure and 10 answers 10 points too modest: (30 x .2 + 10 x .1) / 40."""
    labels, probabilities, groups = answers([(0.9, 21, 9), (0.7, 8, 2)])
    assert reliability(labels, probabilities, groups, np.ones((2, 40)))["ece"] == pytest.approx(0.175)


def test_the_error_by_the_published_formula_and_bins_open_below():
    rng = np.random.default_rng(0)
    probabilities = np.round(rng.dirichlet(np.ones(4), 500) * 20) / 20  # many confidences on the edge of a bin
    guessed = probabilities.argmax(axis=1)
    labels = np.where(rng.random(500) < 0.6, guessed, (guessed + 1) % 4)  # too sure and too modest by turns
    groups = rng.integers(0, 20, 500)
    confidence, right = probabilities.max(axis=1), guessed == labels
    expected = 0.0
    for low in range(10):
        inside = (confidence > low / 10) & (confidence <= (low + 1) / 10)
        if inside.any():
            expected += inside.sum() / 500 * abs(right[inside].mean() - confidence[inside].mean())
    found = reliability(labels, probabilities, groups, bootstrap_weights(20, 20, 0), bins=10)
    assert found["ece"] == pytest.approx(expected, abs=1e-12)
