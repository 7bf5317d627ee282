import math

import pytest
import torch

from eosin.ssl.health import warnings
from eosin.ssl.metrics import effective_rank, mean_cosine, same_group_rate


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
    assert same_group_rate(apart, groups, 5) == (pytest.approx(1.0), pytest.approx(9 / 79))
    rate, chance = same_group_rate(torch.randn(80, 8), groups, 5)
    assert abs(rate - chance) < 0.12


def healthy(**changes):
    top = math.log(64)
    return {
        "step": 300, "warmup": 10, "dino": 0.7 * top, "teacher_entropy": 0.5 * top, "prototype_entropy": 0.9 * top,
        "mean_cosine": 0.2, "effective_rank": 20, "skipped": 0,
    } | changes  # fmt: skip


def test_monitors_speak_only_when_something_is_wrong():
    top = math.log(64)
    assert warnings(healthy(), 64) == []
    assert "one answer" in warnings(healthy(prototype_entropy=0.01), 64)[0]
    assert "teaches nothing yet" in warnings(healthy(dino=top, teacher_entropy=top), 64)[0]
    assert "same way" in warnings(healthy(mean_cosine=0.999), 64)[0]
    assert "directions" in warnings(healthy(effective_rank=1.5), 64)[0]
    assert "2 steps were skipped" in warnings(healthy(skipped=2), 64)[0]
    assert warnings(healthy(step=5, effective_rank=1.5), 64) == []
