from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.eval import sgd
from eosin.eval.fewshot import draw_episodes, simpleshot
from eosin.eval.presets import PRESETS, preset, preset_probabilities
from eosin.eval.ridge import ridge_predictions
from eosin.eval.sgd import Recipe, inner_fold


def draw(seed=0, train=400, queries=80, dimension=30, classes=4):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dimension))
    sides = []
    for count in (train, queries):
        labels = np.r_[np.arange(classes), rng.choice(classes, count - classes, p=np.arange(1, classes + 1) / 10)]
        sides.append((centers[labels] + 1.5 * rng.normal(size=(count, dimension)) + 2, labels))
    return sides


def test_unis_knn_votes_after_centering_and_normalizing():
    (train, labels), (queries, _) = draw()
    mean = train.mean(axis=0)
    oracle = KNeighborsClassifier(20).fit(normalize(train - mean), labels)
    ((found,), (made,)) = preset_probabilities("uni-knn", queries, train, labels, 4, groups=labels)
    np.testing.assert_allclose(found, oracle.predict_proba(normalize(queries - mean)), atol=1e-6)
    assert made == {"k": 20}


def test_dinov2s_knn_weighs_by_softmax_of_the_cosine():
    (train, labels), (queries, _) = draw(1)
    found, made = preset_probabilities("dinov2-knn", queries, train, labels, 4, groups=labels)
    cosine = normalize(queries) @ normalize(train).T
    assert [m["k"] for m in made] == [10, 20, 100, 200]
    for row, k in enumerate((10, 20, 100, 200)):
        for query in range(0, 80, 9):
            near = np.argsort(-cosine[query])[:k]
            weights = np.exp(cosine[query][near] / 0.07)
            expected = [weights[labels[near] == c].sum() / weights.sum() for c in range(4)]
            np.testing.assert_allclose(found[row, query], expected, atol=1e-5)


def test_unis_linear_probe_is_scikit_learns_at_its_equal_c():
    (train, labels), (queries, _) = draw(2)
    ((found,), (made,)) = preset_probabilities("uni-linear", queries, train, labels, 4, groups=labels)
    assert made["C"] == 30 * 4 / 100
    oracle = LogisticRegression(C=made["scikit-learn's C"], tol=1e-8, max_iter=50_000).fit(train, labels)
    np.testing.assert_allclose(found, oracle.predict_proba(queries), atol=2e-3)
    # The identity the other way round: C_eff = 2 C ‖W‖ / N with scikit-learn's own weights.
    assert made["scikit-learn's C"] == pytest.approx(2 * 1.2 * np.linalg.norm(oracle.coef_) / 400, rel=1e-2)


@pytest.mark.parametrize("classes", [2, 4])
def test_pathobenchs_linear_probe_is_scikit_learns(classes):
    (train, labels), (queries, _) = draw(3)
    labels = labels % classes
    oracle = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-8, max_iter=50_000).fit(train, labels)
    ((found,), _) = preset_probabilities("pathobench-linear", queries, train, labels, classes + 1, groups=labels)
    np.testing.assert_allclose(found[:, :classes], oracle.predict_proba(queries), atol=1e-3)
    assert (found[:, classes] == 0).all()  # a class that the training side lacks


@pytest.mark.parametrize(("samples", "dimension"), [(500, 300), (120, 300), (500, 40)])
def test_hests_ridge_is_scikit_learns_pipeline(samples, dimension):
    rng = np.random.default_rng(4)
    train, queries = (rng.normal(size=(n, dimension)) * np.logspace(1, -1, dimension) + 3 for n in (samples, 50))
    targets = train[:, :7] @ rng.normal(size=(7, 5)) + rng.normal(size=(samples, 5))
    given = preset("hest-ridge").parameters
    kept = min(given["components"], samples, dimension)
    oracle = make_pipeline(StandardScaler(), PCA(kept, svd_solver="full"))
    ridge = Ridge(100 / (kept * 5), fit_intercept=False).fit(oracle.fit_transform(train), targets)
    found = ridge_predictions(queries, train, targets, **given)
    expected = ridge.predict(oracle.transform(queries))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_forms_of_simpleshot_are_those_of_their_names():
    (train, labels), (queries, _) = draw(6)
    episodes = draw_episodes(labels, 4, 3, preset("uni-simpleshot").parameters["episodes"], seed=0)
    assert len(episodes) == 1000
    rows = episodes[0]
    mean = train[rows].mean(axis=(0, 1))
    means = np.stack([normalize(train[r] - mean).mean(axis=0) for r in rows])
    near = np.linalg.norm(normalize(queries - mean)[:, None] - means, axis=2).argmin(axis=1)
    said = {
        n: simpleshot(queries, train, episodes[:1], preset(n).parameters["form"])[0] for n in PRESETS if "shot" in n
    }
    np.testing.assert_array_equal(said["uni-simpleshot"], near)
    cosine = normalize(queries - mean) @ normalize(train[rows].mean(axis=1) - mean).T
    np.testing.assert_array_equal(said["thunder-simpleshot"], cosine.argmax(axis=1))


def by_hand(name, train, labels, groups, seed, **changed):
    """A preset of heads as its authors train it: one torch.nn.Linear a head, torch.optim, the first best on the fold.

    Returns logits of all samples by the chosen head, and which one that was.
    """
    recipe = Recipe(**(dict(preset(name).parameters) | changed))
    held = inner_fold(labels, groups, seed)
    draw = torch.Generator().manual_seed(sgd.hash32(seed, sgd.purpose("heads")))
    weights, intercepts = sgd.start_linear(train.shape[1], 4, recipe, draw)
    heads = [nn.Linear(train.shape[1], 4) for _ in recipe.grid]
    for number, head in enumerate(heads):
        head.load_state_dict({"weight": weights[:, number].T, "bias": intercepts[number]})
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    given = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
    grid = zip(heads, recipe.grid)
    optimizer = make([{"params": h.parameters(), "lr": r, "weight_decay": w} for h, (r, w) in grid], **given)
    x, y = torch.from_numpy(train.astype(np.float32)), torch.from_numpy(labels)
    an_epoch = -(-int((~held).sum()) // recipe.batch)
    steps = recipe.steps or recipe.epochs * an_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if recipe.cosine else None
    judge = {
        "macro_f1": lambda y, p: f1_score(y, p, average="macro"),
        "balanced_accuracy": balanced_accuracy_score,
        "accuracy": accuracy_score,
    }[recipe.choose]
    best, chosen, waited = -1.0, None, 0
    order = sgd._batches(int((~held).sum()), recipe.batch, seed, recipe.across)
    for number, (rows, ended) in zip(range(1, steps + 1), order):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(head(x[~held][rows]), y[~held][rows]) for head in heads).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        if (ended and recipe.every_epoch) or number == steps:
            waited += 1
            for which, head in enumerate(heads):
                logits = head(x).detach()
                if (value := judge(labels[held], logits[held].argmax(dim=1).numpy())) > best:
                    best, chosen, waited = value, (logits, which, number), 0
            if recipe.patience and waited >= recipe.patience * steps / an_epoch:
                break
    return chosen


@pytest.mark.parametrize(
    ("name", "changed"),
    [("thunder-linear", {"epochs": 12}), ("eva-linear", {"steps": 60}), ("dinov2-linear", {"steps": 40})],
)
def test_presets_of_heads_are_torchs_loops(name, changed, monkeypatch):
    """Fewer steps, the rest as published."""
    (train, labels), _ = draw(7, train=70, queries=4, dimension=12)
    groups = np.arange(70) // 2
    given = dict(preset(name).parameters) | changed
    monkeypatch.setattr("eosin.eval.presets.PRESETS", {name: replace(preset(name), parameters=given)})
    ((found,), (made,)) = preset_probabilities(name, train, train, labels, 4, groups=groups, seed=3)
    logits, head, step = by_hand(name, train, labels, groups, 3, **changed)
    assert (made["learning_rate"], made["weight_decay"]) == Recipe(**given).grid[head]
    assert made["step"] == step
    np.testing.assert_allclose(found, logits.softmax(dim=1), atol=1e-4)


def test_heads_have_the_numbers_that_were_published():
    thunder, eva, dino = (preset(n).parameters for n in ("thunder-linear", "eva-linear", "dinov2-linear"))
    assert (thunder["optimizer"], thunder["batch"], thunder["epochs"]) == ("adam", 64, 200)
    assert Recipe(**thunder).grid == [(r, w) for r in (1e-3, 1e-4, 1e-5) for w in (0, 1e-3, 1e-4)]
    assert Recipe(**eva).grid == [(3e-4, torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"])]
    assert (eva["optimizer"], eva["batch"], eva["steps"], eva["runs"]) == ("adamw", 256, 12_500, 5)
    assert len(dino["learning_rates"]) == 13
    assert (min(dino["learning_rates"]), max(dino["learning_rates"])) == pytest.approx((4e-5, 0.4))
    assert (dino["optimizer"], dino["steps"], dino["cosine"], dino["weight_decays"]) == ("sgd", 12_500, True, (0.0,))
    assert all(preset(n).differs for n in ("thunder-linear", "eva-linear", "dinov2-linear"))


def test_unknown_and_unfit_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'uni-linear'"):
        preset("uni-liner")
    with pytest.raises(UserError, match="no probabilities of classes"):
        preset_probabilities("hest-ridge", np.ones((1, 2)), np.ones((1, 2)), np.zeros(1, int), 2, groups=np.zeros(1))
