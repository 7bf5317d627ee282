"""Which tile stands at a position of the endless stream: arithmetic over counts, with no state and no file.

A source is a shard set. Its draws of an epoch are points on a line along which every tile has a length, its mass: the
expected number of its draws an epoch. Where all tiles are equal, the line is the tile's number; else points of even
spacing are laid along the tiles' masses from an offset of the epoch's own (systematic sampling), so that a tile of mass
m is drawn ⌊m⌋ or ⌈m⌉ times an epoch. A keyed permutation says in which order the points come. Several sources take
turns in rounds, in each of which every source has its share exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eosin.data_tools.draws import hash32, permute, purpose, uniform

TILES, BLOCKS, TURNS = purpose("stream order"), purpose("stream blocks"), purpose("stream turns")
OFFSET, ROTATION = purpose("stream offset"), purpose("stream rotation")
ROUND = 1 << 12  # positions after which every source has had its share exactly


class Runs(NamedTuple):
    """Runs of consecutive tiles of equal mass, in the order of the line; they take memory, tiles take none.

    Attributes:
        first: [R] int64, number of a run's first tile in its source.
        mass: [R] float64, of each of its tiles.
        ends: [R] float64, where the run ends on the line.
    """

    first: np.ndarray
    mass: np.ndarray
    ends: np.ndarray

    def tiles_at(self, points: np.ndarray) -> np.ndarray:
        """Numbers, [n] int64, of the tiles at ``points`` on the line, [n] float64."""
        run = np.minimum(np.searchsorted(self.ends, points, side="right"), len(self.ends) - 1)
        begins = np.where(run > 0, self.ends[run - 1], 0.0)
        length = np.rint((self.ends[run] - begins) / self.mass[run]).astype(np.int64)
        inside = ((points - begins) / self.mass[run]).astype(np.int64)
        return self.first[run] + np.clip(inside, 0, length - 1)  # a rounding error may point just outside


@dataclass(frozen=True)
class Source:
    """One shard set of a stream.

    Attributes:
        first: number of its first tile in the stream's numbering.
        tiles: how many it has.
        runs: where tiles are not equal.
    """

    first: int
    tiles: int
    runs: Runs | None = None

    @property
    def draws(self) -> int:
        """Draws an epoch: the tiles, or the whole part of their masses."""
        return self.tiles if self.runs is None else max(1, int(self.runs.ends[-1] + 1e-6))


@dataclass(frozen=True)
class Order:
    """The order of a stream; call it with positions.

    Attributes:
        sources: the shard sets.
        shares: what fraction of the positions each has; any positive numbers.
        seed: of the run.
        block: neighboring tiles that stay together, for reading from afar; 1 is a full shuffle.
        window: tiles among which those of some blocks are shuffled.
    """

    sources: Sequence[Source]
    shares: Sequence[float]
    seed: int
    block: int = 1
    window: int = 1

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Tile numbers, [n] int64, at ``positions``, [n] int64, of the endless stream."""
        positions = np.asarray(positions, dtype=np.int64)
        source, draw = self.draws(positions)
        tiles = np.empty_like(positions)
        for number, at in enumerate(self.sources):
            mine = source == number
            if mine.any():
                tiles[mine] = at.first + self._tiles(number, draw[mine])
        return tiles

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each position draws from, and which draw of that source it is; both [n] int64."""
        if len(self.sources) == 1:
            return np.zeros_like(positions), positions
        quotas = round_quotas(self.shares)
        source, draw = np.empty_like(positions), np.empty_like(positions)
        rounds = positions // ROUND
        for number in np.unique(rounds):
            # Sources are shuffled over a round's places, and each source's draws stay in their order.
            turn = np.searchsorted(
                np.cumsum(quotas), permute(np.arange(ROUND), ROUND, TURNS, self.seed, int(number)), side="right"
            )
            place = np.empty(ROUND, dtype=np.int64)
            place[np.argsort(turn, kind="stable")] = np.arange(ROUND) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            now = rounds == number
            at = positions[now] % ROUND
            source[now] = turn[at]
            draw[now] = number * quotas[turn[at]] + place[at]
        return source, draw

    def _tiles(self, number: int, draws: np.ndarray) -> np.ndarray:
        source = self.sources[number]
        epochs, places = np.divmod(draws, source.draws)
        # Nearly always it is one epoch; a key of integers is made once, one of arrays for each position.
        epoch = int(epochs[0]) if len(epochs) and epochs.min() == epochs.max() else epochs
        places = shuffled(places, source.draws, self.block, self.window, self.seed, number, epoch)
        if source.runs is None:
            return places
        offset = uniform(OFFSET, self.seed, number, epoch)
        return source.runs.tiles_at((places + offset) * (source.runs.ends[-1] / source.draws))


def shuffled(places: np.ndarray, size: int, block: int, window: int, *key: Any) -> np.ndarray:
    """Where ``places``, [n] int64 below ``size``, go in a keyed permutation that keeps blocks of neighbors in a window.

    Blocks of ``block`` numbers are shuffled; then all numbers of as many blocks as fill ``window`` are shuffled among
    each other. The tail that fills no block stays last; since numbers are rotated by an offset of the key's own, it
    holds other numbers for every key, whose parts are integers or arrays [n].
    """
    if block == 1:
        return permute(places, size, TILES, *key)
    key = tuple(np.broadcast_to(part, places.shape) for part in key)
    span = max(min(window, size) // block, 1) * block
    number, inside = np.divmod(places, span)
    within = np.empty_like(places)
    last = number == size // span  # the last window holds fewer
    for now, held in ((~last, span), (last, size % span)):
        if now.any():
            within[now] = permute(inside[now], held, TILES, number[now], *(part[now] for part in key))
    slot, inside = np.divmod(number * span + within, block)
    whole = slot < size // block
    if whole.any():
        slot[whole] = permute(slot[whole], size // block, BLOCKS, *(part[whole] for part in key))
    return (slot * block + inside + hash32(ROTATION, *key) % size) % size


def round_quotas(shares: Sequence[float]) -> np.ndarray:
    """Positions of a round that each source has, [sources] int64, by largest remainders; at least one each."""
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * ROUND
    quotas = np.maximum(exact.astype(np.int64), 1)
    while (left := ROUND - int(quotas.sum())) > 0:
        quotas[np.argmax(exact - quotas)] += 1
    while left < 0:
        quotas[np.argmax(np.where(quotas > 1, quotas - exact, -np.inf))] -= 1
        left += 1
    return quotas


def make_runs(
    columns: Iterable[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]],
    groups: np.ndarray | None,
    cluster_level: int | None,
    cap: int | None,
) -> Runs:
    """Lay tiles of unequal mass along the line, slide by slide.

    Args:
        columns: for one shard after the other, of its tiles: slide [n], cluster [n] and weight [n] (None: all one).
        groups: [slides, levels] int64, the group of each slide on each level from coarse to fine; every group of a
            level has the same mass as the others of its parent. None: all tiles are in one.
        cluster_level: before which of the levels the tile's cluster is one; None: it is none.
        cap: draws of a slide an epoch at most.

    Raises:
        ValueError: a weight is negative or not finite, or none is above zero.
    """
    first, length, slide, cluster, weight = _runs_of(columns)
    kept = weight > 0
    if not kept.any():
        raise ValueError("no tile has a weight above 0")
    first, length, slide, cluster, weight = (x[kept] for x in (first, length, slide, cluster, weight))
    weight = weight / weight.max()  # so that no sum is too large for a float, nor all of them too small
    mass = weight.copy()
    if groups is not None:
        levels = [groups[slide, level] for level in range(groups.shape[1])]
        if cluster_level is not None:
            levels.insert(cluster_level, cluster)
        share, parent = np.ones(len(mass)), np.zeros(len(mass), dtype=np.int64)
        for level in levels:
            child = _numbered(parent, level)
            _, one_each = np.unique(child, return_index=True)
            siblings = np.bincount(parent[one_each])  # children of each parent
            share /= siblings[parent]
            parent = child
        mass *= share / np.bincount(parent, length * weight)[parent]
    mass *= length.sum() / (length * mass).sum()
    if cap is not None:
        of_slide = np.bincount(slide, length * mass)
        mass *= np.minimum(1, cap / of_slide[slide])
    line = np.argsort(slide, kind="stable")
    return Runs(first[line], mass[line], np.cumsum((length * mass)[line]))


def _runs_of(columns: Iterable[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]) -> tuple[np.ndarray, ...]:
    """First tile, length, slide, cluster and weight of each run of tiles that have the last three in common."""
    parts, start = [], 0
    for slide, cluster, weight in columns:
        n = len(slide)
        cluster = np.zeros(n, dtype=np.int64) if cluster is None else cluster.astype(np.int64)
        weight = np.ones(n) if weight is None else weight.astype(np.float64)
        if not (np.isfinite(weight) & (weight >= 0)).all():
            raise ValueError("a weight is negative or not finite")
        changes = (np.diff(slide) != 0) | (np.diff(cluster) != 0) | (np.diff(weight) != 0)
        begin = np.concatenate([[0], np.flatnonzero(changes) + 1]) if n else np.zeros(0, dtype=np.int64)
        length = np.diff(np.append(begin, n))
        parts.append((begin + start, length, slide[begin].astype(np.int64), cluster[begin], weight[begin]))
        start += n
    return tuple(np.concatenate(part) for part in zip(*parts))


def _numbered(parent: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Number the distinct pairs of two columns from 0."""
    _, level = np.unique(level, return_inverse=True)
    _, pair = np.unique(parent * (level.max() + 1) + level, return_inverse=True)
    return pair
