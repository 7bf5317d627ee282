import numpy as np
import pytest

from eosin.data_tools.errors import UserError
from eosin.eval import splits
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
        ([0, 1, 0, 1], [0, 1, 2, 3], 3, "every class has fewer than 3 samples"),
    ],
)
def test_impossible_splits_are_refused_with_the_reason(labels, groups, folds, said):
    with pytest.raises(UserError, match=said):
        grouped_folds(np.array(labels), np.array(groups), folds, 0)


SPLITS = {
    "kfold": lambda labels, groups, seed: splits.kfold(labels, groups, 5, seed),
    "leave-one-group-out": lambda labels, groups, seed: splits.leave_one_group_out(labels, groups),
    "monte-carlo": lambda labels, groups, seed: splits.monte_carlo(labels, groups, 4, 6, seed),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_sides_of_every_split_share_no_group_and_answers_are_in_order(kind):
    labels, groups = cohort(3)
    split = SPLITS[kind](labels, groups, 0)
    assert split.kind == kind
    seen = []
    for fold, (learned, scored) in enumerate(split):
        assert (learned ^ scored).all()
        assert not set(groups[learned]) & set(groups[scored])
        np.testing.assert_array_equal(split.rows[split.folds == fold], np.flatnonzero(scored))
        seen.append(int(scored.sum()))
    assert len(split) == len(seen) == {"kfold": 5, "leave-one-group-out": 37, "monte-carlo": 6}[kind]
    if kind == "monte-carlo":
        assert list(np.bincount(split.passes)) == seen
        assert len({tuple(p) for p in split.assigned}) == 6
    else:
        np.testing.assert_array_equal(split.rows, np.arange(400))


def test_monte_carlo_draws_every_group_alike():
    """Groups are of equal size here but one, which is dealt first and must not always be scored."""
    groups = np.r_[np.arange(40), np.zeros(60, dtype=int)]
    labels = groups % 2
    passes = splits.monte_carlo(labels, groups, 4, 100, seed=0).assigned
    often = (passes[:, :40] == 0).mean(axis=0)
    assert often[0] == pytest.approx(0.25, abs=0.13)
    assert often[1:].mean() == pytest.approx(0.25, abs=0.03)
    assert often[1:].min() > 0.08


def test_a_fixed_split_reads_its_column():
    sides = np.array(["train", "Training", "train", "test", "TEST", "validation", "", "val"])
    labels = np.array([0, 1, 0, 0, 1, 1, 1, 0])
    split = splits.fixed(sides, labels, "split")
    ((learned, scored),) = split
    assert list(np.flatnonzero(learned)) == [0, 1, 2]
    assert list(np.flatnonzero(scored)) == [3, 4] == list(split.rows)
    for at, word, said in [
        (0, "holdout", "says 'holdout'; the sides are train, val and test"),
        ([3, 4], "val", "names no labeled sample 'test'"),
        (1, "val", "train side of 'split' has one class only"),
        (4, "val", "test side of 'split' has one class only"),
    ]:
        wrong = sides.copy().astype(object)
        wrong[at] = word
        with pytest.raises(UserError, match=said):
            splits.fixed(wrong, labels, "split")


def test_splits_that_score_nothing_are_refused():
    groups = np.array([0, 0, 1, 1])
    with pytest.raises(UserError, match="1 group only"):
        splits.leave_one_group_out(np.array([0, 1, 0, 1]), np.zeros(4, dtype=int))
    with pytest.raises(UserError, match="without group '1' one class only is left"):
        splits.leave_one_group_out(np.array([0, 0, 0, 1]), groups)
    with pytest.raises(UserError, match="--repeats 0"):
        splits.monte_carlo(np.array([0, 1, 0, 1]), groups, 2, 0, 0)
    with pytest.raises(UserError, match="one class only in every pass"):
        splits.monte_carlo(np.repeat([0, 1], 4), np.repeat(np.arange(4), 2), 4, 5, 0)


def test_a_class_that_a_side_lacks_is_named():
    labels, groups = np.array([0, 1, 0, 1, 2, 0]), np.array([0, 0, 1, 1, 1, 1])
    folds = splits.leave_one_group_out(labels, groups).describe(labels, groups, ["a", "b", "c"])["folds"]
    assert [f["scored_lacks"] for f in folds] == [["c"], []]
    assert [f["train_lacks"] for f in folds] == [[], ["c"]]
    assert [(f["train"], f["scored"], f["train_groups"]) for f in folds] == [(4, 2, 1), (2, 4, 1)]


def test_planted_leaks_are_found_and_clean_splits_are_not_accused():
    labels = np.tile([0, 1], 20)
    slides = np.array([f"s{i // 2}" for i in range(40)])
    patients = np.array([f"p{i // 4}" for i in range(40)])
    images = np.array([f"i{i}" for i in range(40)])
    by_patient, by_slide = splits.kfold(labels, patients, 5, 0), splits.kfold(labels, slides, 5, 0)
    known = {"patient": patients, "slide": slides, "image": images}
    assert splits.find_leaks(by_patient, known) == []
    (leak,) = splits.find_leaks(by_slide, known)
    assert leak["what"] == "patient"
    folds = by_slide.assigned[0]
    torn = [p for p in sorted(set(patients)) if len(set(folds[patients == p])) > 1]
    assert (leak["count"], leak["example"]) == (len(torn), torn[0])
    assert leak["samples"] == np.isin(patients, torn).sum()
    # One image copied into a patient of another fold; copies within a fold harm nobody.
    other = int(np.flatnonzero(by_patient.assigned[0] != by_patient.assigned[0][0])[0])
    copied = images.copy()
    copied[other] = copied[0]
    assert [x["what"] for x in splits.find_leaks(by_patient, {"image": copied})] == ["image"]
    copied = images.copy()
    copied[1] = copied[0]
    assert splits.find_leaks(by_patient, {"image": copied}) == []
    # What is not known is no leak, nor is what is left aside by a fixed split.
    assert splits.find_leaks(by_patient, {"patient": np.full(40, "")}) == []
    sides = np.array(["train"] * 20 + ["test"] * 18 + ["val"] * 2)
    fixed = splits.fixed(sides, labels, "split")
    assert splits.find_leaks(fixed, {"patient": patients}) == []
    patients[39] = "p0"
    assert splits.find_leaks(fixed, {"patient": patients}) == []
    patients[37] = "p0"
    assert splits.find_leaks(fixed, {"patient": patients})[0] == {
        "what": "patient",
        "count": 1,
        "example": "p0",
        "samples": 1,
    }
