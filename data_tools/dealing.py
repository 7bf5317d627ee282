"""From one tar a slide to shards in which slides are mixed, so that a shard read in order is a fair sample.

Slides are finished one after another in a fixed order; when their tiles fill a few shards, these tiles are dealt among
those shards and the slides' own tars go. Which tile comes where depends on the tiles alone. This module never decodes
an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.draws import permute
from eosin.data_tools.files import atomic_path, sha256, write_json
from eosin.data_tools.shards import TarWriter, index_path


@dataclass(frozen=True)
class Part:
    """A slide's tiles in a tar of their own, and the slide's row in the slides table."""

    tar: Path
    index: np.ndarray
    row: int


def deal(folder: Path, parts: Sequence[Part], first: int, count: int, key: int | None) -> list[dict[str, Any]]:
    """Write the tiles of ``parts`` to ``count`` shards of ``folder``, numbered from ``first``.

    Args:
        key: of the permutation by which the tiles are dealt; None keeps their order.

    Returns:
        What ``dataset.json`` says of each shard.
    """
    tiles = [(part, row) for part in parts for row in range(len(part.index))]
    places = np.arange(len(tiles))
    dealt = places if key is None else np.argsort(permute(places, len(tiles), key))
    return [
        write_shard(folder / f"tiles-{first + number:06d}.tar", [tiles[place] for place in share.tolist()])
        for number, share in enumerate(np.array_split(dealt, count))
    ]


def write_shard(tar: Path, tiles: Sequence[tuple[Part, int]]) -> dict[str, Any]:
    """Write tiles, each a row of a part's index, to a shard and its index; return its line of ``dataset.json``."""
    with atomic_path(tar) as temporary:
        writer = TarWriter(temporary)
        for part, row in tiles:
            with part.tar.open("rb") as file:
                writer.copy(file.fileno(), part.index[row], part.row)
        index = writer.close()
        said = {"file": tar.name, "tiles": len(index), "bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
    with atomic_path(index_path(tar)) as temporary:
        np.save(temporary, index, allow_pickle=False)
    return said


class Journal:
    """Which batches of slides are dealt already: ``batches/000000.json`` holds a batch's shards and slides' facts.

    Attributes:
        shards: of all batches, as in ``dataset.json``.
        facts: of all slides that are dealt, in the order they were given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        self.facts: list[dict[str, Any]] = []
        (folder / "batches").mkdir(exist_ok=True)
        self._batches = 0
        while (path := self._path(self._batches)).exists():
            self._take(json.loads(path.read_bytes()))
        listed = {name for shard in self.shards for name in (shard["file"], index_path(Path(shard["file"])).name)}
        for file in folder.glob("tiles-*"):  # of a batch that was not finished
            if file.name not in listed:
                file.unlink()

    def add(self, parts: Sequence[Part], facts: list[dict[str, Any]], shard_bytes: int, key: int | None) -> None:
        """Deal a batch and note it; ``facts`` are those of all its slides, of which some have no tiles."""
        count = max(1, round(sum(part.tar.stat().st_size for part in parts) / shard_bytes))
        key = None if key is None else key + self._batches
        shards = deal(self.folder, parts, len(self.shards), count, key) if parts else []
        batch = {"shards": shards, "facts": facts}
        write_json(self._path(self._batches), batch)
        self._take(batch)

    def _path(self, number: int) -> Path:
        return self.folder / "batches" / f"{number:06d}.json"

    def _take(self, batch: dict[str, Any]) -> None:
        self.shards += batch["shards"]
        self.facts += batch["facts"]
        self._batches += 1
