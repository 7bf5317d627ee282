"""Several shard sets as one: their tiles and slides are numbered on, and a stream gives each its share."""

from __future__ import annotations

import bisect
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.order import Order, Source, make_runs
from eosin.data_tools.shards import ShardSet

if TYPE_CHECKING:
    import pandas as pd

CLUSTER = "cluster"  # the level of `balance` that is a tile's, not a slide's


@dataclass(frozen=True)
class Sampling:
    """Which tiles a stream draws how often, and in which order.

    Attributes:
        block, window: of the shuffle, see :class:`~eosin.data_tools.order.Order`.
        balance: columns of the slides table, or "cluster", from coarse to fine, each of whose values has the same
            share of its parent; empty: every tile has the same share.
        cap: draws of a slide an epoch, at most.
        weights, clusters: names of files in each shard set's folder, of one number a tile: ``weights-NAME.npy``,
            ``clusters-NAME.npy``.
        leave_out: rows of the slides table whose tiles are never drawn.
    """

    block: int = 1
    window: int = 1
    balance: list[str] = field(default_factory=list)
    cap: int | None = None
    weights: str | None = None
    clusters: str | None = None
    leave_out: frozenset[int] = frozenset()


EVENLY = Sampling()


class Mixture:
    """Read several shard sets as one.

    Raises:
        UserError: none is given, or their tiles differ in size.
    """

    def __init__(self, shares: dict[str, float]) -> None:
        if not shares:
            raise UserError("data.shards: no shard set is given; give the path of one, or {PATH: SHARE, ...}")
        self.sets = [ShardSet(path) for path in shares]
        self.shares = list(shares.values())
        self.name = ", ".join(s.name for s in self.sets)
        self.tile_size = self.sets[0].tile_size
        for other in self.sets[1:]:
            if other.tile_size != self.tile_size:
                raise UserError(
                    f"data.shards: {other.name} has tiles of {other.tile_size} px and {self.sets[0].name} of "
                    f"{self.tile_size}; make them alike to mix them"
                )
        self.firsts = np.cumsum([0, *(len(s) for s in self.sets)])
        self.first_slides = np.cumsum([0, *(s.slide_count for s in self.sets)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def identity(self) -> str:
        """SHA-256 over the sets' own and their shares; for one set, its own."""
        if len(self.sets) == 1:
            return self.sets[0].identity
        text = " ".join(f"{s.identity} {share / sum(self.shares):.9g}" for s, share in zip(self.sets, self.shares))
        return hashlib.sha256(text.encode()).hexdigest()

    def marks(self, sampling: Sampling) -> str:
        """SHA-256 over what ``sampling`` reads beside the tiles: weights, clusters, columns; "" for nothing."""
        if not (sampling.weights or sampling.clusters or sampling.balance or sampling.leave_out):
            return ""
        state = hashlib.sha256(repr(sorted(sampling.leave_out)).encode())
        for shards in self.sets:
            for kind, name in (("weights", sampling.weights), ("clusters", sampling.clusters)):
                if name:
                    state.update(_numbers(shards, f"{kind}-{name}.npy", "fiu").tobytes())
            table = shards.slides()
            for column in sampling.balance:
                if column in table:
                    state.update("\0".join(table[column].astype(str)).encode())
        return state.hexdigest()

    def rows(self, tiles: np.ndarray) -> np.ndarray:
        """Index rows of ``tiles``, [n] of dtype :data:`~eosin.data_tools.shards.INDEX`, with slides numbered on."""
        if len(self.sets) == 1:
            return self.sets[0].rows(tiles)
        rows = None
        for number, mine in self._parts(tiles):
            part = self.sets[number].rows(tiles[mine] - self.firsts[number])
            rows = np.empty(len(tiles), dtype=part.dtype) if rows is None else rows
            rows[mine] = part
            rows["slide"][mine] += self.first_slides[number]
        return self.sets[0].rows(tiles) if rows is None else rows

    def images(self, tiles: np.ndarray, rows: np.ndarray) -> Iterator[bytes | Exception]:
        """The encoded images of ``tiles``, [n], with index rows ``rows``; for one out of reach, what was raised."""
        if len(self.sets) == 1:
            return self.sets[0].images(tiles, rows)
        found: list[bytes | Exception] = [b""] * len(tiles)
        for number, mine in self._parts(tiles):
            read = self.sets[number].images(tiles[mine] - self.firsts[number], rows[mine])
            for place, image in zip(np.flatnonzero(mine).tolist(), read):
                found[place] = image
        return iter(found)

    def at(self, tile: int) -> tuple[ShardSet, int]:
        """The shard set of tile number ``tile``, and the tile's number there."""
        number = bisect.bisect_right(self._firsts, tile) - 1
        return self.sets[number], tile - self._firsts[number]

    def column(self, name: str) -> np.ndarray:
        """One column of all indices, [tiles]; slides are numbered on."""
        added = self.first_slides if name == "slide" else np.zeros_like(self.first_slides)
        return np.concatenate([s.column(name) + more for s, more in zip(self.sets, added)])

    def slides(self) -> pd.DataFrame:
        """The slides tables, one after the other."""
        import pandas as pd

        return pd.concat([s.slides() for s in self.sets], ignore_index=True)

    def order(self, seed: int, sampling: Sampling) -> Order:
        """The order of a stream over the tiles.

        Raises UserError for a column, a file or a weight of ``sampling`` that is not there or makes no sense.
        """
        sources = []
        left_out = np.array(sorted(sampling.leave_out), dtype=np.int64)
        for number, (shards, first) in enumerate(zip(self.sets, self.firsts.tolist())):
            if not len(shards):
                raise UserError(f"{shards.name} holds no tiles")
            begin, end = self.first_slides[number : number + 2]
            here = left_out[(left_out >= begin) & (left_out < end)] - begin
            plain = not (sampling.balance or sampling.cap or sampling.weights or len(here))
            sources.append(Source(first, len(shards), None if plain else _runs(shards, sampling, here)))
        return Order(sources, self.shares, seed, sampling.block, sampling.window)

    def _parts(self, tiles: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        number_of = np.searchsorted(self.firsts, tiles, side="right") - 1
        for number in np.unique(number_of):
            yield int(number), number_of == number

    @cached_property
    def _firsts(self) -> list[int]:
        return self.firsts.tolist()


def _runs(shards: ShardSet, sampling: Sampling, left_out: np.ndarray) -> Any:
    slides = shards.slides()
    columns = [c for c in sampling.balance if c != CLUSTER]
    for column in columns:
        if column not in slides:
            raise UserError(
                f"data.balance: the slides table of {shards.name} has no column '{column}'; "
                f"{nearest(column, [*map(str, slides.columns), CLUSTER])}"
            )
    if CLUSTER in sampling.balance and not sampling.clusters:
        raise UserError("data.balance: 'cluster' needs data.clusters=NAME, for clusters-NAME.npy beside the shards")
    groups = np.stack([slides[c].astype(str).factorize()[0] for c in columns], axis=1) if columns else None
    if CLUSTER in sampling.balance and groups is None:
        groups = np.zeros((len(slides), 0), dtype=np.int64)
    level = sampling.balance.index(CLUSTER) if CLUSTER in sampling.balance else None
    clusters = _numbers(shards, f"clusters-{sampling.clusters}.npy", "iu") if level is not None else None
    weights = _numbers(shards, f"weights-{sampling.weights}.npy", "fiu") if sampling.weights else None

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
        for number, index in enumerate(shards.indices()):
            here = slice(int(shards.starts[number]), int(shards.starts[number + 1]))
            cluster, weight = (None if x is None else x[here] for x in (clusters, weights))
            if len(left_out):
                weight = np.where(np.isin(index["slide"], left_out), 0, 1 if weight is None else weight)
            yield index["slide"], cluster, weight

    try:
        return make_runs(parts(), groups, level, sampling.cap)
    except ValueError as error:
        what = f"weights-{sampling.weights}.npy of {shards.name}" if sampling.weights else shards.name
        raise UserError(
            f"{what}: {error}" + (" on the slides that are not held out" if len(left_out) else "")
        ) from None


def _numbers(shards: ShardSet, file: str, kinds: str) -> np.ndarray:
    """One number a tile from a file in a shard set's folder."""
    try:
        stored = io.BytesIO(shards.store.read_all(file))
        version = np.lib.format.read_magic(stored)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stored)
        stored.seek(0)
        # What the header says is checked before memory is taken for it.
        fits = shape == (len(shards),) and dtype.kind in kinds
        found = np.lib.format.read_array(stored, allow_pickle=False) if fits else None
    except FileNotFoundError:
        raise UserError(f"{shards.name}/{file} does not exist; it should hold one number a tile") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{shards.name}/{file} is not readable as an array of NumPy: {error}") from None
    if found is None:
        raise UserError(
            f"{shards.name}/{file} holds {dtype} of shape {list(shape)}; "
            f"one {'integer' if kinds == 'iu' else 'number'} for each of {len(shards)} tiles is expected"
        )
    return found
