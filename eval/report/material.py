"""What a report is made of: the run, its tiles, its results. Read here once; nothing is drawn or judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from timm.models.vision_transformer import VisionTransformer

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet
from eosin.eval.report import history
from eosin.eval.report.findings import Results, load
from eosin.eval.task import text
from eosin.ssl import checkpoint
from eosin.ssl.backbone import build_backbone
from eosin.ssl.config import Config, read_run_config
from eosin.ssl.stain.normalizer import Normalizer, describe_run, make_normalizer


@dataclass
class Material:
    """Everything that sections of the report look at.

    Attributes:
        records: of ``metrics.jsonl``, [] before the first is logged.
        checkpoint: the newest one, None before the first is saved.
        normalizer: what training put tiles through, None for nothing.
        beside: shard sets that were tiled and not trained on.
    """

    run: Path
    config: Config
    shards: ShardSet
    slides: pd.DataFrame
    records: list[dict[str, Any]]
    checkpoint: Path | None
    normalizer: Normalizer | None
    results: list[Results]
    release: Path | None
    beside: Sequence[ShardSet] = ()

    @property
    def step(self) -> int:
        """Training steps that the newest checkpoint has done."""
        return int(self.about["step"]) if self.checkpoint else 0

    @cached_property
    def about(self) -> dict[str, Any]:
        """The newest checkpoint's description, {} where there is none."""
        if self.checkpoint is None:
            return {}
        return checkpoint.describe(self.checkpoint)

    @cached_property
    def teacher(self) -> VisionTransformer | None:
        """The newest checkpoint's teacher, ready to look at tiles."""
        if self.checkpoint is None:
            return None
        backbone = build_backbone(self.config)
        checkpoint.load_teacher(self.checkpoint / checkpoint.TEACHER, backbone)
        return backbone.eval().requires_grad_(False)

    @property
    def same_tiles(self) -> bool:
        """Whether the tiles shown are those the run was trained on."""
        trained_on = self.about.get("facts", {}).get("shard set")
        several = isinstance(self.config.data.shards, dict)
        return several or trained_on is None or trained_on == self.shards.identity

    @property
    def trained_on(self) -> Mixture | None:
        """The tiles shown, where the run was trained on these alone; None for several sets or others."""
        return Mixture({self.shards.name: 1.0}) if isinstance(self.config.data.shards, str) else None

    @property
    def used(self) -> pd.DataFrame:
        """The slides that gave tiles; the index is the slide number."""
        return self.slides[self.tiles_of_slide > 0]

    @cached_property
    def tiles_of_slide(self) -> np.ndarray:
        """Number of tiles of each slide, [slides]."""
        return np.bincount(self.shards.column("slide"), minlength=len(self.slides))

    @cached_property
    def synthetic(self) -> np.ndarray:
        """Which slides the table calls synthetic, [slides] bool."""
        return np.isin(np.char.lower(self.column("synthetic")), ("true", "1", "yes"))

    @property
    def label(self) -> str:
        """The column of the slides table that tells classes apart: what was probed, or "label"."""
        asked = [r.data["label"] for r in self.results]
        return next((label for label in asked if label in self.slides), "label")

    def column(self, name: str) -> np.ndarray:
        """A column of the slides table as text, [slides]; empty where the table does not know."""
        if name not in self.slides:
            return np.full(len(self.slides), "", dtype=np.str_)
        return text(self.slides[name])

    def known(self, name: str) -> list[str]:
        """The values of a column over slides that gave tiles, sorted."""
        return sorted(set(self.column(name)[self.tiles_of_slide > 0]) - {""})

    def caption(self, slide: int) -> str:
        """A slide's name and what tells it from others."""
        facts = [self.column(c)[slide] for c in (self.label, "site", "scanner")]
        return " · ".join([str(self.column("slide")[slide]), *(str(f) for f in facts if f)])

    def spread(self, slides: pd.Index, count: int, columns: tuple[str, ...]) -> list[int]:
        """Up to ``count`` of the numbered slides, taking turns over the first column's values, then the second's."""
        table = pd.DataFrame({c: self.column(c) for c in columns}).iloc[slides]
        for i in range(len(columns), 0, -1):
            turn = table.groupby(list(columns[:i]), sort=False).cumcount()
            table = table.iloc[np.argsort(turn, kind="stable")]
        return [int(n) for n in table.index[:count]]


def gather(
    run: Path, results: list[Path], shards: Path | None, release: Path | None, beside: Sequence[Path] = ()
) -> Material:
    """Read all material.

    Raises UserError when the run has no configuration, the shard set is not where the run says, or a results file is
    not one.
    """
    config = read_run_config(run)
    given = config.data.shards
    # Of several sets the one with the largest share is shown.
    name = str(shards) if shards else given if isinstance(given, str) else max(given, key=given.__getitem__)
    if "://" not in name and not Path(name).exists():
        raise UserError(f"the run's shard set {name} does not exist; give its place with --shards SHARDS")
    shard_set = ShardSet(name)
    if not len(shard_set):
        raise UserError(f"{name} holds no tiles")
    if release is not None and not (release / "config.json").is_file():
        raise UserError(f"{release} is no release: it has no config.json; make one with 'eosin export {run}'")
    found = checkpoint.steps(run)
    return Material(
        run,
        config,
        shard_set,
        shard_set.slides().reset_index(drop=True),
        history.records(run),
        found[-1] if found else None,
        make_normalizer(describe_run(run, config.stain), shard_set),
        load(results),
        release,
        [ShardSet(other) for other in beside],
    )
