"""Grids and places against exhaustive geometry, oversampled masks and the definition of a Hilbert curve."""

import numpy as np
import pytest

from eosin.data_tools.grids import (
    Extent,
    box_labels,
    box_means,
    box_shares,
    drawn,
    grid,
    hilbert,
    island_places,
    whole,
)


@pytest.mark.parametrize(
    ("side", "tile", "downsample"), [(2220, 224.449, 1.0), (99_999, 512.0, 1.99955), (256, 256, 1)]
)
def test_grid_covers_without_gap_or_overlap(side, tile, downsample):
    edges = grid(side, tile, downsample)
    assert len(edges) == int(side / tile)
    assert edges[0] == 0
    assert edges[-1] + tile < side + 1
    assert np.abs(np.diff(edges, append=edges[-1] + tile) - tile).max() <= downsample + 0.5
    assert np.abs(edges - np.arange(len(edges)) * tile).max() <= downsample + 0.5  # and it never drifts
    np.testing.assert_allclose(edges / downsample % 1 % 0.75, 0, atol=0.26)  # whole pixels of the level


@pytest.mark.parametrize(
    ("side", "tile", "stride", "count"),
    [(1000, 256, 128, 6), (1000, 256, 192.5, 4), (256, 256, 64, 1), (255, 256, 64, 0), (513, 256, 256, 2)],
)
def test_overlapping_tiles_stay_inside_and_another_would_not(side, tile, stride, count):
    edges = grid(side, tile, 1.0, stride)
    assert len(edges) == count
    assert (edges + tile <= side).all()
    assert count * stride + tile > side


def test_box_means_are_exact():
    rng = np.random.default_rng(0)
    mask = rng.random((23, 31)) < 0.5
    fine = np.kron(mask, np.ones((16, 16)))  # sixteenths of a pixel
    lefts, tops, side = np.array([0, 3.25, 17.5625]), np.array([1.125, 12.0]), 7.4375
    want = [
        [fine[int(t * 16) : int((t + side) * 16), int(x * 16) : int((x + side) * 16)].mean() for x in lefts]
        for t in tops
    ]
    np.testing.assert_allclose(box_means(mask, lefts, tops, side), want, atol=1e-12)
    boxes = np.array([[3, 1, 10, 9], [0, 0, 31, 23], [20, 12, 60, 20]])
    shares = [mask[1:9, 3:10].mean(), mask.mean(), mask[12:20, 20:].mean()]
    np.testing.assert_allclose(box_shares(mask, boxes), shares, atol=1e-12)


def test_box_means_beyond_the_edge_count_nothing():
    assert box_means(np.ones((10, 10), bool), np.array([5.0]), np.array([0.0]), 10.0)[0, 0] == pytest.approx(0.5)


def test_a_box_has_the_label_there_is_most_of():
    labels = np.zeros((20, 20), np.int32)
    labels[:10, :6], labels[:10, 6:10] = 2, 1
    assert box_labels(labels, np.array([[0, 0, 10, 10], [5, 0, 10, 10], [12, 12, 18, 18], [-3, -3, 2, 2]])) == [
        2,
        1,
        0,
        2,
    ]


def test_an_island_between_tiles_gets_one_of_its_own():
    """A disk on the corner of four tiles fills .28 of each, and .79 of one that has it in the middle."""
    y, x = np.mgrid[0:400, 0:400]
    mask = (x - 200) ** 2 + (y - 200) ** 2 < 50**2
    large = (x > 300) & (y > 300)
    extent = Extent(stored=100.0, inner=100.0, stride=100.0, downsample=1.0)
    kept = np.array([[300, 300]])
    places = island_places(mask | large, kept, extent, 1.0, (400, 400))
    np.testing.assert_allclose(places, [[150, 150]], atol=1)
    assert len(island_places(large, kept, extent, 1.0, (400, 400))) == 0
    at_the_edge = (x < 30) & (y > 180) & (y < 220)
    np.testing.assert_allclose(island_places(at_the_edge, kept, extent, 1.0, (400, 400)), [[0, 150]], atol=1)
    scaled = island_places(mask, kept[:0], Extent(400.0, 200.0, 200.0, 2.0), 0.5, (800, 800))
    np.testing.assert_allclose(scaled, [[200, 200]], atol=2)  # what is stored reaches 100 px beyond the tile


def test_neighbors_along_the_curve_are_neighbors_on_the_slide():
    side = 16
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    position = hilbert(places * 65535 // (side - 1))
    walk = places[np.argsort(position)]
    assert len(np.unique(position)) == side**2
    assert (np.abs(np.diff(walk, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("how", ["random", "stratified"])
def test_places_are_drawn_by_the_key_alone(how):
    rng = np.random.default_rng(0)
    places = rng.permutation(np.stack(np.meshgrid(np.arange(40), np.arange(50)), axis=-1).reshape(-1, 2) * 256)
    groups = drawn(places, 20, how, key=1)
    assert sorted(np.concatenate(groups)) == list(range(2000))
    first = {tuple(place) for group in groups for place in places[group][: 20 // len(groups)]}
    shuffled = rng.permutation(len(places))
    again = {
        tuple(p) for g in drawn(places[shuffled], 20, how, key=1) for p in places[shuffled][g][: 20 // len(groups)]
    }
    other = {tuple(place) for group in drawn(places, 20, how, key=2) for place in places[group][: 20 // len(groups)]}
    assert len(first) == 20
    assert first == again
    assert first != other


def test_stratified_places_are_spread_evenly():
    """Of 2,000 places in 20 strata each quarter of the slide has 5; by chance the counts spread by 1.9."""
    places = np.stack(np.meshgrid(np.arange(64), np.arange(64)), axis=-1).reshape(-1, 2) * 256
    for key in range(5):
        chosen = np.array([places[group[0]] for group in drawn(places, 64, "stratified", key)])
        counts = np.histogram2d(*chosen.T, bins=4, range=[[0, 64 * 256]] * 2)[0]
        assert (counts == 4).all()


def test_what_reaches_outside_is_known():
    places = np.array([[0, 0], [-1, 5], [744, 0], [745, 0], [0, 544]])
    assert whole(places, 256.0, (1000, 800)).tolist() == [True, False, True, False, True]
