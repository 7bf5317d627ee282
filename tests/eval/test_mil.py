import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from eosin.eval.mil import (
    AttentionProtocol,
    GatedAttention,
    attention_probabilities,
    fit_attention,
    mean_pool,
    segment_softmax,
)
from eosin.eval.probe import run_mil
from eosin.eval.question import Question

SHORT = AttentionProtocol(repeats=1, epochs=10)


def witnesses(seed=0, bags=40, tiles=12, dimension=16):
    """Bags of noise in which a quarter of the tiles of positive bags carry a sign; tiles of all bags interleaved."""
    rng = np.random.default_rng(seed)
    bag = np.arange(bags * tiles) % bags
    labels = np.arange(bags) % 2
    features = rng.normal(size=(len(bag), dimension))
    signed = (labels[bag] == 1) & (np.arange(len(bag)) // bags < tiles // 4)
    features[signed, :3] += 3
    return features.astype(np.float32), bag, labels, signed


def test_packed_bags_equal_a_loop_over_bags():
    torch.manual_seed(0)
    model = GatedAttention(16, 3, AttentionProtocol()).double().eval()
    features, _, _, _ = witnesses()
    tiles = torch.from_numpy(features[:60]).double()
    bags = torch.randint(0, 5, (60,))
    bags[:5] = torch.arange(5)
    logits, attention = model(tiles, bags, 5)
    for bag in range(5):
        hidden = model.embed(tiles[bags == bag])
        # Equation 9, one bag at a time.
        scores = (torch.tanh(model.value(hidden)) * torch.sigmoid(model.gate(hidden))) @ model.score.weight[0]
        alone = torch.softmax(scores, dim=0)
        torch.testing.assert_close(attention[bags == bag], alone)
        torch.testing.assert_close(logits[bag], model.classify(alone @ hidden))


def test_softmax_within_segments():
    scores = torch.tensor([1e4, 0.0, -1e4, 1e4 + 1, 3.0, 3.0], dtype=torch.double, requires_grad=True)
    segments = torch.tensor([0, 1, 1, 0, 2, 2])
    found = segment_softmax(scores, segments, 3)
    expected = torch.tensor([1 / (1 + np.e), 1.0, 0.0, np.e / (1 + np.e), 0.5, 0.5], dtype=torch.double)
    torch.testing.assert_close(found, expected)
    small = torch.randn(6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: segment_softmax(s, segments, 3), small)


def test_mean_pool_is_a_mean_by_bag():
    features, bag, _, _ = witnesses()
    expected = pd.DataFrame(features.astype(np.float64)).groupby(bag).mean().to_numpy()
    np.testing.assert_allclose(mean_pool(features, bag, 40), expected, atol=1e-6)


def test_attention_finds_the_witnesses():
    features, bag, labels, signed = witnesses()
    scored = np.arange(40) >= 28
    probabilities, attention = attention_probabilities(features, bag, labels, scored, 2, 0, AttentionProtocol())
    assert probabilities.shape == (3, 12, 2)
    assert (probabilities.mean(axis=0).argmax(axis=1) == labels[scored]).mean() >= 11 / 12
    tile_bag, tile_signed = bag[scored[bag]], signed[scored[bag]]
    np.testing.assert_allclose(pd.Series(attention).groupby(tile_bag).sum(), 1, atol=1e-5)
    positive = labels[tile_bag] == 1
    assert attention[positive & tile_signed].mean() > 2 * attention[positive & ~tile_signed].mean()


def test_the_scored_side_is_never_looked_at():
    features, bag, labels, _ = witnesses()
    scored = np.arange(40) % 4 == 0
    before, _ = attention_probabilities(features, bag, labels, scored, 2, 0, SHORT)
    flipped, moved = labels.copy(), features.copy()
    flipped[scored] = 1 - flipped[scored]
    moved[bag == 4] += 100  # one scored bag: the others' answers must not move
    after, _ = attention_probabilities(moved, bag, flipped, scored, 2, 0, SHORT)
    others = np.flatnonzero(scored) != 4
    np.testing.assert_allclose(after[:, others], before[:, others], atol=1e-6)
    assert not np.allclose(after[:, ~others], before[:, ~others])


def test_training_follows_its_seed_and_leaves_torchs_generator_alone():
    features, bag, labels, _ = witnesses()
    arguments = torch.from_numpy(features), torch.from_numpy(bag), torch.from_numpy(labels), 2
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (fit_attention(*arguments, seed, SHORT) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert not first.training
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(first.score.weight, other.score.weight)
    longer = fit_attention(*arguments, 7, replace(SHORT, epochs=11))
    assert not torch.equal(first.score.weight, longer.score.weight)


@pytest.mark.slow
def test_musk1(real_data, write, tmp_path):
    """Ilse et al. 2018, table 1: gated attention .900 ± .050 accuracy on Musk1 (92 bags, 10-fold)."""
    with (real_data / "mil_classic" / "musk1.csv").open(newline="") as file:
        rows = np.array([[float(v) for v in row] for row in csv.reader(file)])
    bags = [f"m{int(b)}" for b in rows[:, 1]]
    path = write("musk", rows[:, 2:], slide=bags, label=(rows[:, 0] > 0).astype(int))
    results = run_mil(Question([path], "label", "slide", tmp_path / "r.json", folds=5))
    assert results["n"] == 92
    found = {e["variant"]: e["metrics"]["auroc"]["value"] for e in results["encoders"]}
    assert found["attention"] > 0.8
    predictions = pd.read_parquet(tmp_path / "r.predictions.parquet").query("encoder == 'musk + attention'")
    assert roc_auc_score(predictions["label"] == "1", predictions["probability_1"]) == pytest.approx(found["attention"])
