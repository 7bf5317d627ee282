"""Steps that left no trace since their gradient was not finite: counted, listed, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.ssl import distributed

LIST, LISTED = "bad_batches.jsonl", 1000  # steps that are listed, at most


class Skipped:
    """Counts skipped steps; :meth:`check` alone waits for the device."""

    def __init__(self, run: Path, bound: int) -> None:
        self.path, self.bound = run / LIST, bound
        self.count, self.in_a_row = 0, 0
        self.recent: list[tuple[int, Mixture, torch.Tensor, torch.Tensor]] = []

    def note(self, done: int, shards: Mixture, tiles: torch.Tensor, finite: torch.Tensor) -> None:
        """Keep whether step ``done`` was good, [] bool and the same on all processes, until it is checked.

        Args:
            tiles: [B] int64, this process's.
        """
        self.recent.append((done, shards, tiles, finite))
        if len(self.recent) >= self.bound:
            self.check()

    def check(self) -> None:
        """Look at the steps since the last check; list the tiles of bad ones. Every process calls this.

        Raises UserError when too many in a row were bad.
        """
        flags = torch.stack([finite for *_, finite in self.recent]).tolist() if self.recent else []
        for (done, shards, tiles, _), finite in zip(self.recent, flags):
            if finite:
                self.in_a_row = 0
                continue
            self.count += 1
            self.in_a_row += 1
            whole = distributed.all_rows(tiles)
            if distributed.rank() == 0 and self.count <= LISTED:
                self._list(done, shards, whole.tolist())
            if self.in_a_row == self.bound:
                raise UserError(
                    f"steps {done - self.bound + 1} to {done} had no finite gradient and changed nothing; their tiles "
                    f"are in {self.path}; look at them, then go on past them with --rewind STEP --skip-batches N, or "
                    "begin anew with a lower optim.lr"
                )
        self.recent.clear()

    def _list(self, done: int, shards: Mixture, tiles: list[int]) -> None:
        places: dict[str, list[int]] = {}
        for tile in tiles:
            there, number = shards.at(tile)
            places.setdefault(there.name, []).append(number)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, "tiles": places}) + "\n")
