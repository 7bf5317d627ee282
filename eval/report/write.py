"""The report's table of contents: which sections, in which order, and the file they go into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.eval.report import exhibits, limits, sections
from eosin.eval.report.material import Material, gather
from eosin.eval.report.page import render

ROAD = (
    sections.verdict,
    sections.inputs,
    exhibits.masks,
    exhibits.stain,
    exhibits.crops,
    exhibits.curves,
    exhibits.tokens,
    sections.probes,
    exhibits.attention,
    limits.limits,
    sections.reproduction,
)


def write_report(
    run: Path,
    out: Path,
    *,
    results: list[Path],
    shards: Path | None,
    release: Path | None,
    title: str,
    beside: Sequence[Path] = (),
) -> None:
    """Write the report of a run as one HTML file that needs no network, no script and no other file.

    Args:
        run: folder of a run, finished or not.
        out: the page; written aside and renamed.
        results: of ``eosin eval``; none leaves the probes out and says so.
        shards: the run's shard set where it is no longer at ``data.shards``.
        release: folder of ``eosin export``, for how to load it.
        beside: shard sets that were tiled and not trained on, such as other stains.

    Raises:
        UserError: no run, no shard set, results of another schema, or ``out`` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of an HTML file")
    material = gather(run, results, shards, release, beside)
    page = render(title, _subtitle(material), _badges(material), [section(material) for section in ROAD])
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _subtitle(m: Material) -> str:
    config = m.config
    return (
        f"{config.model.architecture}, {m.step:,} of {config.run.steps:,} steps of {config.data.batch} tiles; "
        f"{len(m.shards):,} tiles of {len(m.used)} slides"
    )


def _badges(m: Material) -> list[str]:
    synthetic = m.synthetic[m.tiles_of_slide > 0]
    if synthetic.all():
        return ["Synthetic slides: no tissue of any patient"]
    return [f"{synthetic.sum()} of {len(synthetic)} slides are synthetic"] if synthetic.any() else []
