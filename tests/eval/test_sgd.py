import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.eval import sgd
from eosin.eval.sgd import Kind, Recipe, head_probabilities, inner_fold, start_linear, train_heads

GRID = Recipe("adam", (1e-1, 1e-2, 1e-3), (0.0, 1e-1, 1e-2), batch=16, choose="macro_f1", epochs=6)
JUDGES = {
    "accuracy": lambda y, p: accuracy_score(y, p.argmax(1)),
    "balanced_accuracy": lambda y, p: balanced_accuracy_score(y, p.argmax(1)),
    "macro_f1": lambda y, p: f1_score(y, p.argmax(1), average="macro"),
    "cross_entropy": lambda y, p: -log_loss(y, p, labels=[0, 1, 2]),
}


def draw(seed=0, samples=120, dimension=7, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    features = rng.normal(size=(classes, dimension))[labels] + 1.2 * rng.normal(size=(samples, dimension))
    return features, labels, np.arange(samples) // 4


def alone(features, labels, held, recipe, seed, head):
    """One head as anybody would train it: torch.nn.Linear and torch.optim; weights and held scores of each epoch."""
    start = [p.double() for p in start_linear(features.shape[1], 3, recipe, generator(seed))]
    model = nn.Linear(features.shape[1], 3).double()
    with torch.no_grad():
        model.weight.copy_(start[0][:, head].T)
        model.bias.copy_(start[1][head])
    rate, decay = recipe.grid[head]
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    optimizer = make(
        model.parameters(), rate, weight_decay=decay, **({"momentum": 0.9} if make is torch.optim.SGD else {})
    )
    x, y = torch.from_numpy(features[~held]), torch.from_numpy(labels[~held])
    steps = recipe.steps or recipe.epochs * math.ceil(len(x) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen = []
    for _, (rows, ended) in zip(range(steps), sgd._batches(len(x), recipe.batch, seed, recipe.across)):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if recipe.cosine:
            schedule.step()
        if ended:
            seen.append(model(torch.from_numpy(features[held])).softmax(1).detach().numpy())
    return torch.cat([model.weight.T, model.bias[None]]).detach().numpy(), seen


def generator(seed):
    return torch.Generator().manual_seed(sgd.hash32(seed, sgd.purpose("heads")))


def trained(features, labels, held, recipe, seed):
    """The chosen head, and weights and intercepts of all when training ended, [G, D + 1, K]."""
    kept = []

    def forward(parameters, x):
        kept[:] = parameters
        return sgd.LINEAR.forward(parameters, x)

    kind = Kind(start_linear, forward)
    chosen = train_heads(torch.from_numpy(features), torch.from_numpy(labels), held, 3, recipe, seed, kind)
    weights, intercepts = (p.detach().numpy() for p in kept)
    return chosen, np.concatenate([weights.transpose(1, 0, 2), intercepts[:, None]], axis=1)


@pytest.mark.parametrize(
    "recipe",
    [
        GRID,
        replace(GRID, optimizer="adamw", cosine=True),
        replace(GRID, optimizer="sgd", epochs=None, steps=37, across=True, cosine=True, deviation=0.01),
    ],
    ids=lambda r: r.optimizer,
)
def test_heads_trained_together_are_those_trained_alone(recipe):
    features, labels, groups = draw()
    held = inner_fold(labels, groups, seed=3)
    _, together = trained(features, labels, held, recipe, seed=3)
    for head in range(9):
        expected, _ = alone(features, labels, held, recipe, 3, head)
        np.testing.assert_allclose(together[head], expected, rtol=1e-9, atol=1e-10)
    assert np.ptp(together, axis=0).max() > 0.1  # nine different heads


@pytest.mark.parametrize("choose", JUDGES)
def test_the_first_best_head_of_all_epochs_on_the_inner_fold_is_chosen(choose):
    features, labels, groups = draw(1)
    held = inner_fold(labels, groups, seed=0)
    recipe = replace(GRID, choose=choose)
    chosen, _ = trained(features, labels, held, recipe, seed=0)
    seen = np.array([alone(features, labels, held, recipe, 0, head)[1] for head in range(9)])  # [G, epochs, n, K]
    values = np.array([[JUDGES[choose](labels[held], p) for p in of_head] for of_head in seen]).T  # [epochs, G]
    epoch, head = np.unravel_index(values.argmax(), values.shape)
    assert (chosen.head, chosen.step) == (head, (epoch + 1) * math.ceil((~held).sum() / 16))
    assert chosen.value == pytest.approx(abs(values.max()))
    assert chosen.parameters[0].shape == (7, 1, 3)
    last, _ = trained(features, labels, held, replace(recipe, every_epoch=False), seed=0)
    assert last.head == values[-1].argmax()
    assert last.step == last.steps == 36


def test_training_ends_when_no_epoch_was_better_for_long_enough():
    features, labels, groups = draw(2)
    held = inner_fold(labels, groups, seed=0)
    recipe = replace(GRID, epochs=20, learning_rates=(0.1, 0.03), choose="cross_entropy", patience=0.1)  # 2 epochs
    chosen, _ = trained(features, labels, held, recipe, seed=0)
    seen = np.array([alone(features, labels, held, recipe, 0, head)[1] for head in range(6)])
    values = [max(JUDGES["cross_entropy"](labels[held], p) for p in epoch) for epoch in seen.swapaxes(0, 1)]
    best = next(e for e in range(20) if max(values[e + 1 : e + 3]) <= values[e] == max(values[: e + 1]))
    assert (chosen.step, chosen.steps) == ((best + 1) * 6, (best + 3) * 6)
    assert chosen.steps < 120


def test_epochs_are_permutations():
    steps = [(rows, ended) for _, (rows, ended) in zip(range(9), sgd._batches(10, 4, 0, across=False))]
    assert [len(rows) for rows, _ in steps] == [4, 4, 2] * 3
    assert [ended for _, ended in steps] == [False, False, True] * 3
    epochs = [np.concatenate([rows for rows, _ in steps[i : i + 3]]) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    across = [rows for _, (rows, _) in zip(range(5), sgd._batches(10, 4, 0, across=True))]
    np.testing.assert_array_equal(np.concatenate(across), np.concatenate(epochs[:2]))
    assert {len(rows) for rows in across} == {4}
    assert len(next(sgd._batches(3, 8, 0, across=True))[0]) == 8  # fewer samples than a batch


def test_the_inner_fold_is_whole_groups_and_leaves_every_class():
    labels = np.r_[np.tile([0, 1], 50), [2] * 4]
    groups = np.r_[np.repeat(np.arange(20), 5), [20] * 4]  # class 2 in a single group
    folds = [inner_fold(labels, groups, seed) for seed in range(6)]
    for held in folds:
        assert 0 < held.sum() < 40
        assert not set(groups[held]) & set(groups[~held])
        assert set(labels[~held]) == {0, 1, 2}
    assert len({tuple(f) for f in folds}) > 1
    np.testing.assert_array_equal(inner_fold(labels, groups, 5), folds[5])
    with pytest.raises(UserError, match="1 groups, too few"):
        inner_fold(labels, np.zeros(104), 0)
    with pytest.raises(UserError, match="2 groups, too few"):
        inner_fold(np.repeat([0, 1], 5), np.repeat([0, 1], 5), 0)


def test_probabilities_are_those_of_the_chosen_head_and_come_from_the_seed():
    features, labels, groups = draw(3)
    labels = np.array([0, 2, 3])[labels]  # class 1 is not there
    queries = features[::-1].astype(np.float32)
    recipe = replace(GRID, standardize=True)
    found, made = head_probabilities(queries, features.astype(np.float32), labels, groups, 5, recipe, seed=1)
    assert (found[:, [1, 4]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    held = inner_fold(labels, groups, 1)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    codes = np.searchsorted([0, 2, 3], labels)
    head = recipe.grid.index((made["learning_rate"], made["weight_decay"]))
    _, seen = alone((features - mean) / deviation, codes, held, recipe, 1, head)
    expected = seen[made["step"] // math.ceil((~held).sum() / 16) - 1]
    np.testing.assert_allclose(found[::-1][held][:, [0, 2, 3]], expected, atol=1e-4)
    assert made["inner_macro_f1"] == pytest.approx(JUDGES["macro_f1"](codes[held], expected))
    again, _ = head_probabilities(queries, features.astype(np.float32), labels, groups, 5, recipe, seed=1)
    np.testing.assert_array_equal(again, found)
    other, _ = head_probabilities(queries, features.astype(np.float32), labels, groups, 5, recipe, seed=2)
    assert (other != found).any()


def test_a_head_that_runs_away_is_not_chosen_and_all_of_them_are_refused():
    features, labels, groups = draw(4)
    runaway = replace(GRID, optimizer="sgd", learning_rates=(1e38, 1e-2), weight_decays=(0.0,), choose="accuracy")
    _, made = head_probabilities(features, features, labels, groups, 3, runaway, seed=0)
    assert made["learning_rate"] == 1e-2
    with pytest.raises(UserError, match="no head of the grid keeps to finite numbers"):
        head_probabilities(features, features, labels, groups, 3, replace(runaway, learning_rates=(1e38,)), seed=0)


@pytest.mark.gpu
def test_the_gpu_says_the_same():
    features, labels, groups = draw(5)
    here, there = (head_probabilities(features, features, labels, groups, 3, GRID, 0, d)[0] for d in ("cpu", "cuda"))
    np.testing.assert_allclose(here, there, atol=1e-3)
