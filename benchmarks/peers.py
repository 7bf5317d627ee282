"""Streams that can be stopped and continued, Eosin's and its peers', over the same tiles behind one interface.

Each peer's own format is written from a shard set, and its loader is set up as its documentation says for an exact
resume. Nothing is judged here: that is done by benchmarks/elastic.py, and benchmarks/run.py times the same formats.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet


class Run(NamedTuple):
    """What one rank of a run is told.

    Attributes:
        data: the folder that the system's ``write`` filled.
        batch: samples in a global batch, over all ranks.
        step: global batches consumed before, by the runs that this one continues.
        epoch: epochs completed before.
        epochs: at the end of which epoch to stop, counted from the first run's start.
        state: folder of the state to continue from, or None.
        touched: file that grows by a byte for each sample that is read.
    """

    data: Path
    rank: int
    ranks: int
    workers: int
    batch: int
    step: int
    epoch: int
    epochs: int
    state: Path | None
    touched: Path

    @property
    def share(self) -> int:
        """Samples of a global batch that this rank gets."""
        return self.batch // self.ranks

    def touch(self, sample: Any = None) -> Any:
        """Count a sample as read and hand it on; may be called in any process."""
        with self.touched.open("ab") as file:
            file.write(b".")
        return sample


class Stream(NamedTuple):
    """A rank's part of the batches, as (epoch, ids of the samples), and how to save the state into a folder."""

    batches: Iterator[tuple[int, list[int]]]
    save: Callable[[Path], None]


class System(NamedTuple):
    """One way to stream tiles.

    Attributes:
        package: name of its distribution, for its version.
        needs: modules without which it cannot run.
        write: write a shard set's tiles in its format into a folder.
        stream: open the stream.
        redistribute: its tool that rewrites a state for another number of ranks, if it has one: (state, new, ranks).
        note: what to say of its settings, behind its version.
    """

    package: str
    needs: tuple[str, ...]
    write: Callable[[ShardSet, Path], None]
    stream: Callable[[Run], Stream]
    redistribute: Callable[[Path, Path, int], None] | None = None
    note: str = ""

    def missing(self) -> str | None:
        """The first module that is not installed."""
        for name in self.needs:
            parents = [name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)]
            if any(find_spec(module) is None for module in [*parents, name]):
                return name
        return None

    @property
    def versions(self) -> str:
        """Names and versions of what it is made of."""
        return " + ".join(f"{name} {version(name)}" for name in self.package.split(" + ")) + self.note


class NotOfferedError(Exception):
    """The system's documentation has no way to do this."""


def link_tars(shards: ShardSet, folder: Path) -> None:
    """Lay the shard set's own tars into ``folder``, for systems that read WebDataset tars."""
    folder.mkdir(parents=True)
    for tar in shards.tars:
        (folder / tar.name).hardlink_to(tar)


def stream_eosin(run: Run) -> Stream:
    """Eosin's stream: the state is the step that the trainer counts anyway."""
    from eosin.data_tools.stream import batches

    shards = _CountedTiles(run)
    first = run.step if run.state is None else json.loads((run.state / "step.json").read_text())
    steps = range(first, -(-run.epochs * len(shards) // run.batch))
    done = first

    def walk() -> Iterator[tuple[int, list[int]]]:
        nonlocal done
        for batch in batches(
            shards, batch=run.batch, steps=steps, seed=0, rank=run.rank, ranks=run.ranks, workers=run.workers
        ):
            done += 1
            yield int(batch["position"][0]) // len(shards), batch["tile"].tolist()

    return Stream(walk(), lambda folder: _once(run, folder / "step.json", json.dumps(done)))


class _CountedTiles(Mixture):
    def __init__(self, run: Run) -> None:
        super().__init__({str(run.data): 1.0})
        self.run = run

    def images(self, tiles: np.ndarray, rows: np.ndarray) -> Iterator[bytes | Exception]:
        return map(self.run.touch, super().images(tiles, rows))


def copy_shards(shards: ShardSet, folder: Path) -> None:
    """Eosin reads the shard set itself."""
    shutil.copytree(shards.folder, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))


def write_litdata(shards: ShardSet, folder: Path, jpeg: bool = False) -> None:
    """Chunks with as many tiles as the first shard. The files are kept as they are; ``jpeg``: decoded when read."""
    import litdata

    litdata.optimize(
        partial(_litdata_sample, shards, jpeg),
        inputs=list(range(len(shards))),
        output_dir=str(folder),
        chunk_size=shards.dataset["shards"][0]["tiles"],
        num_workers=1,
        verbose=False,
    )


def _litdata_sample(shards: ShardSet, jpeg: bool, tile: int) -> dict[str, Any]:
    import litdata

    image = shards.image(tile)
    return {"id": tile, "image": litdata.Jpeg(bytes=image, max_quality=None) if jpeg else image}


def stream_litdata(run: Run, drop_last: bool = True) -> Stream:
    """README, "Pause, resume data streaming": one state, of rank 0; the global batch stays the same.

    ``drop_last`` is its advice for training and its default on several ranks; without, ranks may differ in batches.
    """
    import litdata
    import torch

    data = litdata.StreamingDataset(str(run.data), shuffle=True, drop_last=drop_last, seed=0, transform=run.touch)
    loader = litdata.StreamingDataLoader(data, batch_size=run.share, num_workers=run.workers)
    if run.state:
        loader.load_state_dict(torch.load(run.state / "state.pt", weights_only=False))

    def save(folder: Path) -> None:
        if run.rank == 0:
            torch.save(loader.state_dict(), folder / "state.pt")

    return Stream(_epochs(run, lambda: (batch["id"].tolist() for batch in loader)), save)


def write_mosaic(shards: ShardSet, folder: Path, jpeg: bool = False) -> None:
    """MDS shards about as large as the tars. The files are kept as they are; ``jpeg``: opened with Pillow when read."""
    from PIL import Image
    from streaming import MDSWriter

    columns = {"id": "int", "image": "jpeg" if jpeg else "bytes"}
    limit = shards.tars[0].stat().st_size
    with tempfile.NamedTemporaryFile() as file, MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for tile in range(len(shards)):
            image: Any = shards.image(tile)
            if jpeg:  # the writer takes the bytes of the file that an image was opened from
                Path(file.name).write_bytes(image)
                image = Image.open(file.name)
            writer.write({"id": tile, "image": image})


def stream_mosaic(run: Run) -> Stream:
    """Documentation, "Elastic Determinism" and "Fast Resumption": one state, of rank 0; the global batch and
    ``num_canonical_nodes`` stay the same."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Counted(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return run.touch(super().__getitem__(index))

    clean_stale_shared_memory()  # of killed runs
    data = Counted(local=str(run.data), shuffle=True, shuffle_seed=0, batch_size=run.share, num_canonical_nodes=1)
    loader = StreamingDataLoader(data, batch_size=run.share, num_workers=run.workers)
    if run.state:
        loader.load_state_dict(json.loads((run.state / "state.json").read_text()))

    def save(folder: Path) -> None:
        _once(run, folder / "state.json", json.dumps(loader.state_dict()))

    return Stream(_epochs(run, lambda: (batch["id"].tolist() for batch in loader)), save)


def write_energon(shards: ShardSet, folder: Path) -> None:
    """The same tars with the index of ``energon prepare`` beside them."""
    link_tars(shards, folder)
    _energon("prepare", folder, "--non-interactive", "--split-ratio=1,0,0", "--sample-type=CrudeWebdataset")


def stream_energon(run: Run) -> Stream:
    """Documentation, "Save and Restore" (a state a rank) and "Reproducible Scaling": the micro-batch is the global
    batch over all workers of all ranks, and a rank takes as many of them as make its share.

    There is no shuffle buffer, in which epochs would mix, so that the samples of an epoch can be counted.
    """
    import torch
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    workers = run.ranks * max(run.workers, 1)
    micro = run.batch // workers if run.batch % workers == 0 else run.share
    cook = stateless(partial(_energon_sample, run))
    encoder = type("Encoder", (DefaultTaskEncoder,), {"cookers": [Cooker(cook)]})
    data = get_train_dataset(
        run.data,
        batch_size=micro,
        shuffle_buffer_size=None,
        max_samples_per_sequence=4,
        worker_config=WorkerConfig(rank=run.rank, world_size=run.ranks, num_workers=run.workers),
        task_encoder=encoder(),
    )
    loader = get_savable_loader(data)
    if run.state:
        loader.restore_state_rank(torch.load(run.state / f"rank{run.rank}.pt", weights_only=False))
    tiles = json.loads((run.data / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    steps = range(run.step, -(-run.epochs * sum(tiles.values()) // run.batch))

    def walk() -> Iterator[tuple[int, list[int]]]:
        batches = iter(loader)
        for step in steps:
            ids = [int(text) for _ in range(run.share // micro) for text in next(batches).text]
            yield step * run.batch // sum(tiles.values()), ids

    return Stream(walk(), lambda folder: torch.save(loader.save_state_rank(), folder / f"rank{run.rank}.pt"))


def _energon_sample(run: Run, sample: dict[str, Any]) -> Any:
    from megatron.energon import TextSample, basic_sample_keys

    return TextSample(**basic_sample_keys(sample), text=str(run.touch(sample)["json"]["id"]))


def redistribute_energon(state: Path, new: Path, ranks: int) -> None:
    """``energon checkpoint redist``, which takes a folder that is there."""
    new.mkdir()
    _energon("checkpoint", "redist", f"--new-world-size={ranks}", *sorted(state.glob("rank*.pt")), new)


def _energon(*arguments: object) -> None:
    command = [sys.executable, "-m", "megatron.energon.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])


def stream_webdataset(run: Run) -> Stream:
    """webdataset with every shuffle seeded, in torchdata's StatefulDataLoader, which keeps a state a rank."""
    import torch
    import webdataset as wds
    from torchdata.stateful_dataloader import StatefulDataLoader

    tars = sorted(str(tar) for tar in run.data.glob("*.tar"))
    split = wds.split_by_node
    data = wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True, seed=0, nodesplitter=split, empty_check=False)
    data = data.compose(wds.detshuffle(24, seed=0)).decode().map(run.touch).map(_webdataset_id)
    loader = StatefulDataLoader(data, batch_size=run.share, num_workers=run.workers)
    state = run.state / f"rank{run.rank}.pt" if run.state else None
    if state:
        if len(list(state.parent.glob("rank*.pt"))) != run.ranks:
            raise NotOfferedError("a state is of one rank of as many")
        loader.load_state_dict(torch.load(state, weights_only=False))

    def save(folder: Path) -> None:
        torch.save(loader.state_dict(), folder / f"rank{run.rank}.pt")

    return Stream(_epochs(run, lambda: (batch.tolist() for batch in loader)), save)


def _webdataset_id(sample: dict[str, Any]) -> int:
    return sample["json"]["id"]


def _epochs(run: Run, epoch: Callable[[], Iterator[list[int]]]) -> Iterator[tuple[int, list[int]]]:
    """Go through a loader once an epoch; a loader with a restored state begins with what is left of one."""
    for number in range(run.epoch, run.epochs):
        for ids in epoch():
            yield number, ids


def _once(run: Run, path: Path, text: str) -> None:
    if run.rank == 0:
        path.write_text(text)


SYSTEMS = {
    "eosin": System("eosin", (), copy_shards, stream_eosin),
    "litdata": System("litdata", ("litdata",), write_litdata, stream_litdata),
    "litdata-keep": System(
        "litdata", ("litdata",), write_litdata, partial(stream_litdata, drop_last=False), note=", drop_last=False"
    ),
    "mosaic": System("mosaicml-streaming", ("streaming",), write_mosaic, stream_mosaic),
    "energon": System("megatron-energon", ("megatron.energon",), write_energon, stream_energon, redistribute_energon),
    "webdataset": System("webdataset + torchdata", ("webdataset", "torchdata"), link_tars, stream_webdataset),
}
