"""Dense probes of suites: patch tokens of a task's own data, held against masks, where other probes read embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import sha256
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.sources import find_files
from eosin.eval import contamination
from eosin.eval.annotations import ENDINGS, LEGEND
from eosin.eval.datasets import masks_of
from eosin.eval.dense_data import tokens_of
from eosin.eval.embed import data_fingerprint
from eosin.eval.encoders import Encoder
from eosin.eval.suite_file import Task


@dataclass(frozen=True)
class Sight:
    """What a dense probe looks at.

    Attributes:
        encoders: those with patch tokens.
        blind: (encoder, why not) of those without.
    """

    encoders: list[Encoder]
    blind: list[tuple[str, str]]
    shards: ShardSet
    masks: Path

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of :func:`~eosin.eval.dense.run_dense` beside the question and its options."""
        return {"encoders": self.encoders, "shards": self.shards, "masks": self.masks}

    @property
    def fingerprints(self) -> list[dict[str, Any]]:
        """Of each encoder and the tiles, as embeddings have them."""
        data = data_fingerprint(self.shards)
        return [e.fingerprint | data | contamination.fingerprint(e.seen) for e in self.encoders]


def files_of(masks: Path) -> list[Mapping[str, str]]:
    """Name and SHA-256 of everything that says what the masks are."""
    folder = masks if masks.is_dir() else masks.parent
    paths = find_files(folder, ENDINGS) if masks.is_dir() else [masks]
    paths += [folder / LEGEND] if (folder / LEGEND).is_file() else []
    return [{"name": p.relative_to(folder).as_posix(), "sha256": sha256(p)} for p in paths if p.is_file()]


def masks_folder(task: Task, place: Path) -> Path:
    """Where the masks of a task of the shard set ``place`` lie."""
    return Path(task.masks) if task.masks else masks_of(place)


def sight_of(task: Task, place: Path, encoders: Sequence[Encoder]) -> Sight:
    """What the dense probe of a task looks at. Raises UserError where no encoder has patch tokens.

    Args:
        place: the task's shard set.
    """
    able, blind = [], []
    for encoder in encoders:
        try:
            tokens_of(encoder)
            able.append(encoder)
        except UserError as error:
            blind.append((encoder.name, str(error)))
    if not able:
        raise UserError("no encoder has patch tokens, which a dense probe looks at")
    return Sight(able, blind, ShardSet(place), masks_folder(task, place))
