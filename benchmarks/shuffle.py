"""Measure how well streams shuffle the tiles of a set of slides, from their orders alone: no image is read.

    python benchmarks/shuffle.py
    python benchmarks/shuffle.py --slides 1000 --tiles 2000

Tiles lie slide by slide in shards of 1,000, as they do after tiling. Each system's own code gives the order in which
one process receives them. Printed per system:

    slides a batch      distinct slides among 256 consecutive tiles; a full shuffle's is as high as it gets
    neighbors           how often two consecutive tiles are of one slide, over the rate by chance
    epochs              largest rank correlation (Spearman) of a tile's places in two epochs, without its sign
    shards a batch      distinct shards among those tiles: what a batch costs where shards lie far away

Peers (left out where not installed): pip install litdata mosaicml-streaming
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

BATCH, SHARD, EPOCHS = 256, 1000, 3


class Shuffle(NamedTuple):
    """A system's name and its order: epoch -> tile numbers, [N]."""

    name: str
    order: Callable[[int], np.ndarray]


def main() -> None:
    """Print a row a system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--tiles", type=int, default=500, help="a slide, on average (default: 500)")
    args = parser.parse_args()
    # Slides differ in size as tissue does: by a factor of about two.
    sizes = np.random.default_rng(0).lognormal(np.log(args.tiles), 0.7, args.slides).astype(int) + 1
    slide = np.repeat(np.arange(args.slides), sizes)
    chance = (sizes * (sizes - 1)).sum() / (len(slide) * (len(slide) - 1))
    print(f"{args.slides} slides, {len(slide):,} tiles; neighbors of one slide by chance: {chance:.4f}\n")
    print("| order | slides a batch | neighbors / chance | epochs | shards a batch |\n|---|---|---|---|---|")
    for shuffle in shuffles(len(slide)):
        orders = [shuffle.order(epoch) for epoch in range(EPOCHS)]
        for order in orders:
            assert np.array_equal(np.sort(order), np.arange(len(slide))), f"{shuffle.name} is no permutation"
        cells = [
            f"{np.mean([distinct_in_batches(slide[order]) for order in orders]):.1f}",
            f"{np.mean([np.mean(np.diff(slide[order]) == 0) for order in orders]) / chance:.2f}",
            f"{max(abs(correlation(a, b)) for a, b in itertools.combinations(orders, 2)):.3f}",
            f"{np.mean([distinct_in_batches(order // SHARD) for order in orders]):.1f}",
        ]
        print(f"| {' | '.join([shuffle.name, *cells])} |", flush=True)


def distinct_in_batches(labels: np.ndarray) -> float:
    """Mean number of distinct values in consecutive batches of labels, [N]."""
    whole = labels[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    return float((np.diff(np.sort(whole, axis=1), axis=1) != 0).sum(axis=1).mean()) + 1


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of the places that two orders, [N], give to the tiles."""
    return float(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1])


def shuffles(tiles: int) -> Iterator[Shuffle]:
    """Every order that can be had here."""
    from eosin.data_tools.order import Order, Source

    yield Shuffle("full shuffle (NumPy)", lambda epoch: np.random.default_rng(epoch).permutation(tiles))
    for block, window in ((1, 1), (8, 16384), (32, 16384), (128, 16384), (1000, 16384)):
        order = Order([Source(0, tiles)], [1.0], seed=0, block=block, window=window)
        what = "full shuffle" if block == 1 else f"blocks of {block} in a window of {window:,}"
        yield Shuffle(f"Eosin, {what}", lambda e, order=order: order(np.arange(e * tiles, (e + 1) * tiles)))
    sizes = np.diff([*range(0, tiles, SHARD), tiles])
    if find_spec("webdataset"):
        yield Shuffle(f"webdataset {version('webdataset')}, all shards + shuffle(1000)", _webdataset(sizes))
    if find_spec("streaming"):
        # Its defaults for one node, and a window as large as Eosin's.
        for algorithm, nodes, block in (("py1e", 1, 4_000_000), ("py1e", 1, 16384), ("py2s", 64, 1 << 18)):
            name = f"mosaicml-streaming {version('mosaicml-streaming')}, {algorithm}, blocks of {block:,}"
            yield Shuffle(name, _mosaic(sizes, algorithm, nodes, block))
    if find_spec("litdata"):
        from litdata.streaming.elastic import canonical_item_stream

        ends = np.cumsum(sizes)
        chunks = [(begin, begin, end, end) for begin, end in zip(ends - sizes, ends)]
        yield Shuffle(
            f"litdata {version('litdata')}, shuffle=True",
            lambda epoch: np.array([i for _, i in canonical_item_stream(chunks, seed=42, epoch=epoch, shuffle=True)]),
        )


def _webdataset(sizes: np.ndarray) -> Callable[[int], np.ndarray]:
    import webdataset as wds

    begins = np.cumsum(sizes) - sizes

    def order(epoch: int) -> np.ndarray:
        shards = wds.shuffle(len(sizes), initial=len(sizes), seed=epoch)(iter(range(len(sizes))))
        samples = itertools.chain.from_iterable(range(begins[s], begins[s] + sizes[s]) for s in shards)
        return np.fromiter(wds.shuffle(1000, seed=epoch)(samples), dtype=np.int64)

    return order


def _mosaic(sizes: np.ndarray, algorithm: str, nodes: int, block: int) -> Callable[[int], np.ndarray]:
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    def order(epoch: int) -> np.ndarray:
        places = get_partitions("relaxed", int(sizes.sum()), nodes, 1, 1, 1, BATCH).reshape(-1)
        drawn = get_shuffle(algorithm, sizes, nodes, 0, epoch, block)[places[places >= 0]]
        _, first = np.unique(drawn, return_index=True)  # canonical nodes are filled up by repeating samples
        return drawn[np.sort(first)]

    return order


if __name__ == "__main__":
    main()
