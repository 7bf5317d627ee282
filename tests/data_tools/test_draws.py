import numpy as np
import pytest
import torch
from scipy import stats

from eosin.data_tools.draws import hash32, permute, purpose, uniform


def test_python_numpy_and_torch_agree():
    words = [0, 1, 2**31, 2**40 + 7, 123456789]
    for word in words:
        expected = hash32(5, word, 3)
        assert int(hash32(5, np.array([word]), 3)[0]) == expected
        assert int(hash32(5, torch.tensor([word]), 3)[0]) == expected


def test_uniform_is_uniform_and_independent_of_its_neighbors():
    drawn = uniform(np.arange(20_000), purpose("a"))
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert drawn.min() >= 0
    assert drawn.max() < 1
    other = uniform(np.arange(20_000), purpose("b"))
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


def test_words_are_not_interchangeable():
    assert len({hash32(1, 2), hash32(2, 1), hash32(1), hash32(1, 2, 0), hash32(1 << 32)}) == 5


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size):
    moved = permute(np.arange(size), size, 3, 1)
    assert sorted(moved.tolist()) == list(range(size))


def test_permute_mixes_and_depends_on_its_key():
    size = 5000
    first, second = permute(np.arange(size), size, 0), permute(np.arange(size), size, 1)
    assert (first == second).mean() < 0.01
    assert abs(stats.spearmanr(np.arange(size), first).statistic) < 0.05
    assert abs(stats.spearmanr(first, second).statistic) < 0.05


def test_permute_of_one_position_is_the_permutation_at_that_position():
    whole = permute(np.arange(1000), 1000, 9)
    assert permute(np.array([437]), 1000, 9)[0] == whole[437]
