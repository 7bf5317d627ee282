"""What a tiling will cost, said before it starts: a few slides are looked at and a few of their tiles encoded.

Nothing is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.pool import cores
from eosin.data_tools.progress import progress
from eosin.data_tools.slide import Slide
from eosin.data_tools.sources import Summary, shorten
from eosin.data_tools.tile import check_work, find_jobs
from eosin.data_tools.tile_slide import Job, Settings, choose, encode, see

SLIDES, TILES = 12, 48
# Two members of a tar have a header each and are padded to blocks of 512 bytes; the JSON is below a block.
TAR_BYTES = 512 + 256 + 512 + 512


@dataclass
class Look:
    """What one slide will give: tiles, bytes in the shards, and seconds of a core."""

    tiles: float
    nbytes: float
    seconds: float


def plan_tiles(
    sources: Sequence[Path | str],
    *,
    mpp: Sequence[float] = (0.5,),
    tile_size: int = 256,
    mpp_override: float | None = None,
    workers: int | None = None,
    slides_csv: Path | str | None = None,
    frozen: bool = False,
    pseudonyms: Path | str | None = None,
    coords: Path | str | None = None,
    masks: Path | str | None = None,
    share: str | None = None,
    **settings: Any,
) -> Summary:
    """Estimate tiles, bytes and CPU hours of :func:`~eosin.data_tools.tile.tile_slides` with the same arguments.

    From :data:`SLIDES` slides drawn by the seed; the interval is of the mean of a slide, at 95 %.
    """
    chosen = Settings(mpp=tuple(sorted(map(float, mpp))), tile_size=tile_size, **settings)
    chosen.check()
    check_work(workers, mpp_override)
    jobs, notices, _ = find_jobs(sources, slides_csv, frozen, pseudonyms, coords, masks, share)
    there = [job for job in jobs if not job.source.refused]
    if not there:
        listed = shorten([f"{job.source.listed}: {job.source.refused}" for job in jobs], limit=3)
        raise UserError(f"no slide can be opened, so there is nothing to plan; {listed}")
    drawn = permute(np.arange(min(SLIDES, len(there))), len(there), chosen.seed, purpose("plan"))
    refused: list[tuple[str, str]] = []
    looks = []
    for job in progress([there[i] for i in drawn.tolist()], total=len(drawn), desc="plan", unit="slides"):
        try:
            looks.append(look(job, chosen, mpp_override))
        except Refusal as refusal:
            refused.append((job.source.listed, str(refusal)))
            looks.append(Look(0, 0, 0))
    tiles, nbytes, seconds = (np.array([getattr(found, name) for found in looks]) for name in Look.__annotations__)
    n, spread = len(there), 1.96 * tiles.std(ddof=1) / np.sqrt(len(tiles)) if len(tiles) > 1 else 0.0
    processes = workers or cores()
    hours = seconds.mean() * n / 3600
    lines = [
        f"slides: {n}, of which {len(looks)} were looked at",
        f"tiles: about {n * tiles.mean():,.0f} ({n * max(tiles.mean() - spread, 0):,.0f} to "
        f"{n * (tiles.mean() + spread):,.0f}), {tiles.mean():,.0f} a slide",
        f"disk: about {n * nbytes.mean() / 1e9:.3g} GB",
        f"time: about {hours:.2g} CPU hours; {hours / processes:.2g} hours in {processes} processes",
    ]
    if refused:
        listed = shorten([f"{name}: {reason}" for name, reason in refused], limit=3)
        lines.append(f"would be refused: {len(refused)} of {len(looks)}: {listed}")
    return Summary(lines, notices=notices)


def look(job: Job, settings: Settings, mpp_override: float | None) -> Look:
    """Find a slide's tissue and places, and encode some tiles, to tell what all of them take."""
    assert job.source.path is not None
    began = time.process_time()
    with Slide(job.source.path, mpp_override if job.source.mpp is None else job.source.mpp) as slide:
        slide.require(max(settings.mpp))
        seen = see(slide, job, settings)
        if seen is None:
            raise Refusal("dark background with light from the specimen, as in fluorescence")
        chosen = []
        for mpp in settings.mpp:
            try:
                chosen.append(choose(slide, settings, seen, mpp, Counter()))
            except Refusal:
                continue
        seconds = time.process_time() - began
        tiles = nbytes = 0.0
        for places in chosen:
            n = len(places.corners)
            # Neighbors, as the work itself reads them.
            rows = np.arange(n)[max(0, (n - TILES) // 2) :][:TILES]
            began = time.process_time()
            images = [len(data) for _, data in encode(slide, places, rows, settings, Counter(), seen.coords is None)]
            spent = time.process_time() - began
            kept = len(images) / max(len(rows), 1) * n
            of_all = min(kept, settings.max_tiles or kept) / max(len(images), 1)
            tiles += of_all * len(images)
            nbytes += of_all * (sum(images) + TAR_BYTES * len(images))
            seconds += of_all * spent
    return Look(tiles, nbytes, seconds)
