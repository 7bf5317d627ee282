from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.eval import sgd
from eosin.eval.linear import linear_probabilities
from eosin.eval.mlp import RECIPE, hidden_layer
from eosin.eval.probe import run_mlp
from eosin.eval.question import Question
from eosin.eval.sgd import Recipe, head_probabilities, inner_fold, train_heads
from eosin.launch.cli import main


def exclusive_or(seed, samples=600):
    """Two classes that no straight line tells apart: the signs of two features agree or not; groups of 6."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(samples, 5)).astype(np.float32)
    return features, (features[:, 0] * features[:, 1] > 0).astype(np.int64), np.arange(samples) // 6


def test_hidden_heads_trained_together_are_those_trained_alone():
    features, labels, groups = exclusive_or(0, 120)
    features = features.astype(np.float64)
    held = inner_fold(labels, groups, 1)
    recipe = Recipe("adamw", (1e-2, 1e-3), (0.0, 0.5), batch=32, choose="cross_entropy", epochs=5)
    kept, kind = [], hidden_layer(7)

    def forward(parameters, x):
        kept[:] = parameters
        return kind.forward(parameters, x)

    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    train_heads(x, y, held, 2, recipe, 1, sgd.Kind(kind.start, forward))
    starts = kind.start(5, 2, recipe, torch.Generator().manual_seed(sgd.hash32(1, sgd.purpose("heads"))))
    for head, (rate, decay) in enumerate(recipe.grid):
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2)).double()
        own = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
        with torch.no_grad():
            for parameter, start in zip(own, starts):
                assert parameter.shape == start[..., head, :].numpy().T.shape
                parameter.copy_(torch.from_numpy(start[..., head, :].numpy().T))
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
        order = sgd._batches(int((~held).sum()), 32, 1, across=False)
        for _, (rows, _) in zip(range(15), order):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(x[~held][rows]), y[~held][rows]).backward()
            optimizer.step()
        for parameter, together in zip(own, kept):
            np.testing.assert_allclose(
                together[..., head, :].detach().numpy().T, parameter.detach(), rtol=1e-8, atol=1e-10
            )


@pytest.fixture
def short(monkeypatch):
    """The same with fewer steps."""
    recipe = replace(RECIPE, steps=150)
    monkeypatch.setattr("eosin.eval.mlp.RECIPE", recipe)
    return recipe


def test_a_hidden_layer_tells_what_no_line_does(short):
    (train, labels, groups), (queries, truth, _) = exclusive_or(1), exclusive_or(2)
    found, made = head_probabilities(queries, train, labels, groups, 2, short, 0, kind=hidden_layer(64))
    straight, _ = linear_probabilities(queries, train, labels, groups, 2, 0)
    assert balanced_accuracy_score(truth, found.argmax(axis=1)) > 0.9
    assert balanced_accuracy_score(truth, straight.argmax(axis=1)) < 0.6
    assert made["step"] <= made["steps"] <= 150
    # Features of any unit say the same: they are standardized.
    scaled, _ = head_probabilities(queries * 64 + 3, train * 64 + 3, labels, groups, 2, short, 0, kind=hidden_layer(64))
    np.testing.assert_allclose(scaled, found, atol=1e-3)


def test_the_verb_declares_what_it_did_and_scores_out_of_fold(short, write, cohort, tmp_path, capsys):
    told, columns = cohort(6.0)
    blind, _ = cohort(0.0, seed=1)
    files = [write("good", told, **columns), write("blind", blind, **columns)]
    out = tmp_path / "r.json"
    common = ["--label", "label", "--group", "patient", "--device", "cpu", "--out", str(out)]
    assert main(["eval", "mlp", *map(str, files), *common, "--width", "16"]) == 0
    assert "good" in capsys.readouterr().out
    results, predictions = read_results(out)
    assert results["protocol"] == "mlp"
    assert results["parameters"]["width"] == 16
    assert results["parameters"]["optimizer"] == "adamw"
    assert results["parameters"]["learning_rates"] == list(RECIPE.learning_rates)
    assert results["parameters"]["steps"] == 150
    reached = [e["metrics"]["balanced_accuracy"]["value"] for e in results["encoders"]]
    assert reached[0] > 0.9
    assert reached[1] < 0.75
    for e, rows in zip(results["encoders"], (predictions[predictions["encoder"] == n] for n in ("good", "blind"))):
        assert len(e["details"]["learning_rate"]) == rows["fold"].nunique() == 5
        assert (rows.groupby("group")["fold"].nunique() == 1).all()
    with pytest.raises(UserError, match="--width 0 makes no hidden layer"):
        run_mlp(Question(files, "label", "patient", out), 0)
    with pytest.raises(UserError, match="give 1 to 65536"):
        run_mlp(Question(files, "label", "patient", out), 10**9)


def test_nothing_is_chosen_on_the_scored_side(short, write, cohort, tmp_path):
    """What is learned stays when labels and features that are scored turn into something else."""
    features, columns = cohort(1.0)
    scored = np.array([int(p[1:]) >= 25 for p in columns["patient"]])
    sides = np.where(scored, "test", "train")
    flipped = np.where(scored, np.where(columns["label"] == "tumor", "normal", "tumor"), columns["label"])
    found = []
    for name, label in (("e", columns["label"]), ("f", flipped)):
        path = write(name, features, split=sides, **(columns | {"label": label}))
        results = run_mlp(Question([path], "label", "patient", tmp_path / "r.json", split="fixed"), 8)
        predictions = read_results(tmp_path / "r.json")[1]
        found.append((results["encoders"][0]["details"], predictions["probability_tumor"].to_numpy()))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
