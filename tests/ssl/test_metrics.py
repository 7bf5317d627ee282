import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from eosin.ssl.metrics import (
    balanced_accuracy,
    effective_rank,
    expected_usage,
    mean_cosine,
    peak_flops,
    same_group_rate,
)


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(200, 9)).Q
    basis = basis - basis.mean(0)
    q = torch.linalg.qr(basis).Q
    assert effective_rank(q[:, :5] @ torch.linalg.qr(torch.randn(16, 5)).Q.T) == pytest.approx(5, rel=1e-3)
    assert effective_rank(torch.ones(50, 8) + torch.outer(torch.randn(50), torch.randn(8))) == pytest.approx(
        1, rel=1e-2
    )


def test_mean_cosine_is_the_brute_force_mean():
    x = torch.randn(20, 6)
    pairs = [torch.cosine_similarity(x[i], x[j], dim=0) for i in range(20) for j in range(20) if i != j]
    assert mean_cosine(x) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_same_group_rate_of_separate_and_of_random_features():
    groups = torch.arange(8).repeat_interleave(10)
    apart = torch.eye(8)[groups] + 0.01 * torch.randn(80, 8)
    assert same_group_rate(apart, groups, 5) == pytest.approx((1, 9 / 79, 1))
    rate, chance, _ = same_group_rate(torch.randn(80, 8), groups, 5)
    assert abs(rate - chance) < 0.12


def test_the_most_that_neighbors_can_share_a_group():
    # Of 10 rows, 4 are of one group and 2 of another, and 4 are alone. Each looks at its 2 nearest.
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 5])
    features = torch.eye(6)[groups] + 0.001 * torch.randn(10, 6)
    rate, chance, most = same_group_rate(features, groups, 2)
    assert most == pytest.approx((4 * 2 + 2 * 1) / 20)
    assert rate == pytest.approx(most)
    assert chance == pytest.approx((4 * 3 + 2 * 1) / 90)


def test_rank_of_a_known_spectrum():
    # Singular values 1, 1/2, 1/4: shares 4/7, 2/7, 1/7, whose entropy is written out.
    left = torch.linalg.qr(torch.randn(40, 4) - torch.randn(40, 4).mean(0)).Q
    left = torch.linalg.qr(left - left.mean(0)).Q[:, :3]
    features = left @ torch.diag(torch.tensor([1.0, 0.5, 0.25])) @ torch.linalg.qr(torch.randn(9, 9)).Q[:3]
    entropy = math.log(7) - (4 * math.log(4) + 2 * math.log(2)) / 7
    assert effective_rank(features - features.mean(0)) == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize(("draws", "prototypes"), [(1, 10), (10, 10), (300, 64), (5000, 4096)])
def test_expected_usage_is_the_mean_of_draws(draws, prototypes):
    rng = np.random.default_rng(0)
    seen = [len(np.unique(rng.integers(0, prototypes, draws))) / prototypes for _ in range(200)]
    assert expected_usage(draws, prototypes) == pytest.approx(np.mean(seen), abs=0.01)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_balanced_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    labels[:150] = 0
    found, _ = balanced_accuracy(labels, said, rng.integers(0, 20, 300))
    assert found == pytest.approx(balanced_accuracy_score(labels, said))


def test_its_error_is_that_of_groups_not_of_rows():
    # 60 groups of 30 rows that are all right or all wrong, at even odds: one coin a group.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 30)
    right = rng.integers(0, 2, 60)[groups].astype(bool)
    labels = np.tile([0, 1], 900)
    found, error = balanced_accuracy(labels, np.where(right, labels, 1 - labels), groups)
    assert error == pytest.approx(math.sqrt(found * (1 - found) / 60), rel=0.15)
