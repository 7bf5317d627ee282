import numpy as np
import pytest

from eosin.data_tools.errors import UserError
from eosin.eval.splits import grouped_folds


def cohort(seed, n=400, groups=37, classes=3):
    """Groups of uneven size, each of one class, and a rare class in two groups."""
    rng = np.random.default_rng(seed)
    of_group = np.r_[np.arange(classes), np.arange(classes), rng.integers(0, classes - 1, groups - 2 * classes)]
    members = np.r_[np.arange(groups), rng.choice(groups, n - groups, p=rng.dirichlet(np.ones(groups)))]
    return of_group[members], members


@pytest.mark.parametrize("seed", range(8))
def test_no_group_on_both_sides_and_every_class_to_learn_from(seed):
    labels, groups = cohort(seed)
    folds = grouped_folds(labels, groups, 5, seed)
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    for fold in range(5):
        scored = folds == fold
        assert not set(groups[scored]) & set(groups[~scored])
        assert set(labels[~scored]) == {0, 1, 2}


def test_the_seed_alone_decides():
    labels, groups = cohort(0)
    first = grouped_folds(labels, groups, 5, 1)
    np.testing.assert_array_equal(first, grouped_folds(labels, groups, 5, 1))
    assert (first != grouped_folds(labels, groups, 5, 2)).any()
    np.testing.assert_array_equal(first, grouped_folds(np.array(list("abc"))[labels], groups, 5, 1))


def test_classes_are_spread_evenly():
    labels = np.tile([0, 0, 0, 1], 100)
    groups = np.arange(400) // 4
    folds = grouped_folds(labels, groups, 5, 0)
    for fold in range(5):
        assert (labels[folds == fold] == 1).mean() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "said"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3], 2, "one class only"),
        ([0, 1, 0, 1], [0, 0, 1, 1], 5, "2 groups cannot fill 5 folds"),
        (["a", "a", "b", "b"], [0, 1, 2, 2], 2, "class 'b' occurs in 1 group only"),
        ([0, 1, 0, 1], [0, 1, 2, 3], 1, "--folds 2 or more"),
    ],
)
def test_impossible_splits_are_refused_with_the_reason(labels, groups, folds, said):
    with pytest.raises(UserError, match=said):
        grouped_folds(np.array(labels), np.array(groups), folds, 0)
