import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, spearmanr

from eosin.data_tools.order import ROUND, Order, Source, make_runs, round_quotas, shuffled

SLIDE = np.repeat(np.arange(4), [5, 40, 12, 43])


def runs(**more):
    """Runs of 100 tiles of four slides in two shards."""
    given = {"slide": SLIDE, "cluster": None, "weight": None, "groups": None, "cluster_level": None, "cap": None} | more
    columns = [given.pop(name) for name in ("slide", "cluster", "weight")]
    parts = [tuple(None if c is None else c[part] for c in columns) for part in (slice(30), slice(30, None))]
    return make_runs(parts, **given)


@given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 200), st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_a_shuffle_is_a_permutation_of_any_size(size, block, window, key):
    assert sorted(shuffled(np.arange(size), size, block, window, key).tolist()) == list(range(size))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_any_position_is_that_of_the_whole_and_an_epoch_holds_every_tile_once(tiles, block, seed, data):
    order = Order([Source(0, tiles)], [1.0], seed, block, 3 * block)
    whole = order(np.arange(3 * tiles))
    assert all(sorted(epoch) == list(range(tiles)) for epoch in whole.reshape(3, tiles).tolist())
    some = np.array(data.draw(st.lists(st.integers(0, 3 * tiles - 1), min_size=1, max_size=20)))
    assert order(some).tolist() == whole[some].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [Order([Source(0, 500)], [1.0], seed)(np.arange(1500)).reshape(3, 500) for seed in (0, 1)]
    flat = [epoch for order in orders for epoch in order]
    for i, one in enumerate(flat):
        for other in flat[i + 1 :]:
            assert abs(spearmanr(one, other).statistic) < 4 / np.sqrt(500)


def test_a_full_shuffle_is_even_over_places():
    """Over many epochs every tile stands at every place equally often."""
    seen = Order([Source(0, 12)], [1.0], 3)(np.arange(12 * 2000)).reshape(2000, 12)
    for place in range(12):
        assert chisquare(np.bincount(seen[:, place], minlength=12)).pvalue > 1e-4


def test_a_block_shuffle_reads_a_window_from_few_blocks_and_mixes_within():
    size, block, window = 10_000, 16, 512
    seen = shuffled(np.arange(size), size, block, window, 5)
    for start in range(0, 9 * window, window):
        part = seen[start : start + window]
        neighbors = np.diff(np.sort(part)) == 1
        assert neighbors.sum() >= window - window // block - 1  # whole blocks
        assert abs(spearmanr(np.arange(window), part).statistic) < 4 / np.sqrt(window)
    plain = np.diff(seen[: 9 * window])
    assert (np.abs(plain) < block).mean() < 0.1  # neighbors in the file are no neighbors in the stream


def test_shares_are_exact_in_every_round():
    order = Order([Source(0, 50), Source(50, 7), Source(57, 1000)], [5.0, 1.0, 2.0], 0)
    source, draw = order.draws(np.arange(3 * ROUND))
    for rounds in range(3):
        part = source[rounds * ROUND : (rounds + 1) * ROUND]
        assert np.bincount(part) / ROUND == pytest.approx([5 / 8, 1 / 8, 2 / 8], abs=1e-12)
    for number in range(3):  # each source's draws come one after the other, none left out
        assert draw[source == number].tolist() == list(range((source == number).sum()))
    tiles = order(np.arange(ROUND))
    assert tiles[(tiles >= 50) & (tiles < 57)].min() == 50
    # Within a round the turns are even: a fifth of the round has its share but for chance.
    for part in np.array_split(source[:ROUND], 5):
        assert abs((part == 1).mean() - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / len(part))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_quotas_fill_a_round_and_leave_none_out(shares):
    quotas = round_quotas(shares)
    assert quotas.sum() == ROUND
    assert quotas.min() >= 1


@given(st.lists(st.floats(0.01, 5), min_size=100, max_size=100), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_epoch_draws_each_tile_its_mass_rounded_down_or_up(weights, seed):
    weights = np.array(weights)
    source = Source(0, 100, runs(weight=weights))
    mass = weights / weights.sum() * source.draws
    for epoch in range(3):
        drawn = Order([source], [1.0], seed)(np.arange(epoch * source.draws, (epoch + 1) * source.draws))
        counts = np.bincount(drawn, minlength=100)
        assert (counts >= np.floor(mass - 1e-9)).all()
        assert (counts <= np.ceil(mass + 1e-9)).all()


def test_drawn_frequencies_meet_their_targets():
    """Chi-square over epochs: slides equally often, and tiles of a slide equally often."""
    source = Source(0, 100, runs(groups=np.arange(4)[:, None]))
    assert source.draws == 100
    drawn = Order([source], [1.0], 1)(np.arange(100 * 300))
    assert np.bincount(SLIDE[drawn]).tolist() == [7500] * 4  # systematic: exact
    tiles = np.bincount(drawn, minlength=100)
    expected = 7500 / np.bincount(SLIDE)[SLIDE]
    assert chisquare(tiles, expected).pvalue > 1e-3


def test_hierarchy_by_hand():
    # Two groups; group 0 holds slides 0, 1, group 1 slides 2, 3; clusters of tiles between group and slide.
    cluster = np.array([0] * 3 + [1] * 2 + [0] * 40 + [1] * 12 + [0] * 43)
    groups = np.stack([[0, 0, 1, 1], np.arange(4)], axis=1)
    made = runs(cluster=cluster, groups=groups, cluster_level=1)
    share = np.zeros(100)
    length = np.rint(np.diff(np.concatenate([[0], made.ends])) / made.mass).astype(int)
    for first, mass, count in zip(made.first, made.mass, length):
        share[first : first + count] = mass / 100
    # group 0: cluster 0 (slides 0 and 1), cluster 1 (slide 0); group 1: cluster 1 (slide 2), cluster 0 (slide 3)
    by_hand = np.empty(100)
    by_hand[:3] = 1 / 2 / 2 / 2 / 3
    by_hand[3:5] = 1 / 2 / 2 / 2
    by_hand[5:45] = 1 / 2 / 2 / 2 / 40
    by_hand[45:57] = 1 / 2 / 2 / 12
    by_hand[57:] = 1 / 2 / 2 / 43
    np.testing.assert_allclose(share, by_hand, rtol=1e-12)


def test_a_cap_holds_where_tiles_of_a_slide_are_scattered():
    slide = np.arange(100) % 4  # no two neighbors of one slide
    source = Source(0, 100, runs(slide=slide, cap=10))
    assert source.draws == 40
    for epoch in range(20):
        drawn = Order([source], [1.0], 0)(np.arange(40 * epoch, 40 * epoch + 40))
        assert np.bincount(slide[drawn]).tolist() == [10] * 4
        assert len(set(drawn.tolist())) == 40


def test_equal_tiles_need_no_memory_and_equal_ones_in_runs_little():
    assert Source(0, 10**8).draws == 10**8
    assert len(runs(groups=np.arange(4)[:, None]).first) == 5  # four slides, one cut by the border of two shards
