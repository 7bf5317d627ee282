"""Embedding extraction straight from slides: the tiles that ``eosin tile`` would make, never written as images.

Processes read slides while the model runs. A slide is a part of the work (:mod:`eosin.eval.embed_parts`): done ones are
kept when the process is killed, and one that cannot be used is refused with its reason while the others go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.pool import cores, run_each
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import tile_key
from eosin.data_tools.sources import shorten
from eosin.data_tools.tile import check_work, find_jobs, slide_row
from eosin.data_tools.tile_slide import Job, Settings, count_kept, refused, tile_facts
from eosin.eval import contamination
from eosin.eval.embed import features_of, fitting_batch
from eosin.eval.embed_parts import Part, Summary, in_parts, made_already
from eosin.eval.encoders import Encoder
from eosin.eval.slide_tiles import Look, Piece, Read, look, pieces, read, stain_of
from eosin.ssl.stain.fits import HE
from eosin.ssl.stain.normalizer import NO_FIT, NOT_HE, Normalizer, make_normalizer, stacked

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 64  # slides that are looked at before their tiles are read
AHEAD = 2  # pieces that a worker may be ahead: what bounds memory

Encode = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Counter[str]]]


def embed_slides(
    encoder: Encoder,
    sources: Sequence[Path | str],
    out: Path,
    *,
    mpp: Sequence[float] = (0.5,),
    tile_size: int = 256,
    min_tissue: float = 0.5,
    slides_csv: Path | None = None,
    mpp_override: float | None = None,
    coords: Path | None = None,
    frozen: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
) -> Summary:
    """Embed the tiles of slides and write ``out``, in the order of slides and within a slide row by row.

    Tiles are found, judged and read as :func:`~eosin.data_tools.tile.tile_slides` does, which says what the arguments
    mean. Where the encoder wants a slide's stains fitted, they are, from 32 of its tiles. Killed, the same call goes
    on after the last finished slide. Ranks of a process group share the slides.

    Args:
        workers: processes that read; one a core by default.
        batch_size: tiles at once; see :func:`~eosin.eval.embed.embed`.

    Raises:
        UserError: bad arguments, ``out`` holds something else, no slide gave a tile, or features are not finite.
    """
    settings = Settings(mpp=tuple(sorted(map(float, mpp))), tile_size=tile_size, min_tissue=min_tissue)
    settings.check()
    check_work(workers, mpp_override)
    jobs, notices, given = find_jobs(sources, slides_csv, frozen, None, coords, None, None)
    fingerprint = encoder.fingerprint | _data_fingerprint(settings, mpp_override, given)
    fingerprint |= contamination.fingerprint(encoder.seen)
    if there := made_already(out, fingerprint):
        return there
    normalizer = make_normalizer(encoder.stain, None)
    convention = normalizer.reference.convention if normalizer and normalizer.mode == "slide" else None
    size = batch_size or fitting_batch(encoder.device, partial(features_of, encoder, normalizer), tile_size)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def make(numbers: list[int], done: list[Path]) -> Generator[tuple[int, Part], None, None]:
        mine = [jobs[number] for number in numbers]
        total = len(numbers) + len(done)
        with closing(_slides(mine, settings, mpp_override, convention, workers or max(1, cores() // here))) as slides:
            shown = progress(slides, total=total, start=len(done), desc=f"embed {encoder.name}", unit="slides")
            for job, found, reads in shown:
                encode = partial(features_of, encoder, _of_slide(normalizer, job, found.fit))
                yield job.row, _part(job, found, reads, settings, size, encode)

    def join(parts: list[Part]) -> pd.DataFrame:
        return _table(jobs, parts, encoder, settings.tile_size)

    summary = in_parts(out, fingerprint, len(jobs), make, join)
    summary.notices = notices
    return summary


def _data_fingerprint(settings: Settings, mpp_override: float | None, given: dict[str, Any]) -> dict[str, Any]:
    tiling = json.loads(json.dumps(asdict(settings) | {"mpp_override": mpp_override} | given))
    digest = hashlib.sha256(json.dumps(tiling, sort_keys=True).encode()).hexdigest()
    return {"shards": digest, "slides": given["slides_csv"] or "", "tiling": tiling}


def _slides(
    jobs: list[Job], settings: Settings, mpp_override: float | None, convention: str | None, workers: int
) -> Generator[tuple[Job, Look, Iterator[tuple[Piece, Read | str]]], None, None]:
    """Each slide as its thumbnail shows it, and its tiles piece by piece, which must all be taken."""
    looking = partial(look, settings=settings, mpp_override=mpp_override, convention=convention)
    reading = partial(read, settings=settings, mpp_override=mpp_override)
    for first in range(0, len(jobs), BLOCK):
        block = jobs[first : first + BLOCK]
        with closing(run_each(looking, block, workers)) as results:
            looks = [Look(refused(found)) if isinstance(found, str) else found for found in results]
        cut = [list(pieces(job, found, settings)) for job, found in zip(block, looks)]
        with closing(run_each(reading, [piece for own in cut for piece in own], workers, AHEAD)) as reads:
            for job, found, own in zip(block, looks, cut):
                yield job, found, zip(own, reads)


def _part(
    job: Job,
    found: Look,
    reads: Iterator[tuple[Piece, Read | str]],
    settings: Settings,
    batch_size: int,
    encode: Encode,
) -> Part:
    """A slide's features and what is known of its tiles, or why there are none."""
    part = Part(np.empty((0, 0), dtype=np.float32))
    facts, dropped = found.facts, Counter(found.dropped)
    known: list[dict[str, Any]] = []
    rows = []
    try:
        if facts.get("state") == "refused":
            raise Refusal(facts["reason"])
        for images in _batches(_pixels(job, found, reads, known, dropped), batch_size):
            features, raw = encode(images, np.zeros(len(images), dtype=np.int64))
            rows.append(features)
            part.raw += raw
        count_kept(len(known), found.places, settings, facts, dropped, found.given)
    except Refusal as refusal:
        for _ in reads:
            pass  # what follows them is another slide's
        return Part(
            part.features,
            refused=[(job.source.listed, str(refusal))],
            facts=facts | refused(str(refusal)),
        )
    part.features = np.concatenate(rows)
    part.columns = {name: [one[name] for one in known] for name in known[0]}
    part.facts = facts | {"state": "done", "reason": ""}
    return part


def _pixels(
    job: Job,
    found: Look,
    reads: Iterable[tuple[Piece, Read | str]],
    known: list[dict[str, Any]],
    dropped: Counter[str],
) -> Iterator[np.ndarray]:
    """The tiles of each piece, [k, T, T, 3]; what is known of each goes into ``known``. Raises Refusal."""
    name = job.source.slide
    for piece, one in reads:
        if isinstance(one, str):
            raise Refusal(one)
        dropped.update(one.dropped)
        places, sections = found.places[piece.number], found.sections[piece.number]
        for row, image in zip((piece.first + one.rows).tolist(), one.hashes):
            facts = tile_facts(name, places, row, int(sections[row]))
            key = tile_key(name, facts["x"], facts["y"], places.mpp)
            known.append({"key": key} | dict(sorted(facts.items())) | {"image": image})
        yield one.pixels


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Arrays [k, ...] as arrays [size, ...], the last one shorter."""
    waiting: list[np.ndarray] = []
    for some in images:
        waiting.append(some)
        if sum(map(len, waiting)) >= size:
            whole = np.concatenate(waiting)
            full = len(whole) // size * size
            yield from np.split(whole[:full], full // size)
            waiting = [whole[full:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def _of_slide(normalizer: Normalizer | None, job: Job, fit: dict[str, Any] | None) -> Normalizer | None:
    """The normalizer of the tiles of one slide, number 0."""
    if normalizer is None:
        return None
    by_slide = normalizer.mode == "slide"
    reason = NOT_HE if stain_of(job) not in HE else NO_FIT if by_slide and fit is None else 0
    raw = torch.tensor([reason], dtype=torch.uint8)
    return replace(normalizer, reason=raw, fits=stacked([fit]) if by_slide else None)


def _table(jobs: list[Job], parts: list[Part], encoder: Encoder, tile_size: int) -> pd.DataFrame:
    """A row a tile: what is known of the tile and of its slide, as those of a shard set. Raises UserError for none."""
    import pandas as pd

    good = [(job, part) for job, part in zip(jobs, parts) if part.tiles]
    if not good:
        reasons = shorten([f"{name}: {reason}" for part in parts for name, reason in part.refused], limit=3)
        raise UserError(f"no slide gave a tile, so nothing was written; {reasons}")
    tiles = pd.concat([pd.DataFrame(part.columns) for _, part in good], ignore_index=True)
    slides = pd.DataFrame([slide_row(job, part.facts, stain_of(job)) for job, part in good])
    of_slide = slides.loc[np.repeat(np.arange(len(good)), [part.tiles for _, part in good])].reset_index(drop=True)
    table = pd.concat([tiles, of_slide[[c for c in slides.columns if c not in tiles.columns]]], axis=1)
    table["extent"] = tile_size * tiles["mpp"].astype(np.float64) / of_slide["mpp"].astype(np.float64)
    contamination.mark(table, encoder.seen)
    return table
