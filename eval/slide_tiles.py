"""The tiles of slides as ``eosin tile`` has them, in memory, for :mod:`eosin.eval.embed_slides`.

One of them looks at a whole slide, and then pieces of it are read by any of them. Torch is imported only where a
slide's stains are fitted.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eosin.data_tools.draws import uniform
from eosin.data_tools.errors import Refusal
from eosin.data_tools.grids import box_labels
from eosin.data_tools.slide import Slide
from eosin.data_tools.tile_slide import DARK, Job, Places, Settings, choose_all, read_tiles, refused, see

PIECE_BYTES = 1 << 25  # of pixels that a worker brings at once
HASH_BYTES = 8
STAIN = "H&E"  # of slides of which nothing else is said
FIT_TILES = 32  # of a slide whose stains are fitted, as 'eosin stain fit' takes


@dataclass
class Look:
    """What a slide's thumbnail showed.

    Attributes:
        facts: of the slide, as its row of a slides table has them.
        places: of its tiles, at each µm/px.
        sections: of each of these tiles, the section it lies on.
        dropped: places that were left out, by reason.
        given: the places are from a table, and are not judged.
        fit: its stains, as :func:`eosin.ssl.stain.normalizer.stacked` reads them; None where there are none.
    """

    facts: dict[str, Any]
    places: list[Places] = field(default_factory=list)
    sections: list[list[int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    given: bool = False
    fit: dict[str, Any] | None = None


class Piece(NamedTuple):
    """Some of the places of a slide at one µm/px: those numbered from ``first`` on in ``Look.places[number]``."""

    job: Job
    number: int
    first: int
    places: Places
    judged: bool


class Read(NamedTuple):
    """The tiles of a piece.

    Attributes:
        rows: of the tiles that are kept, in the piece's places, [k].
        pixels: uint8 [k, T, T, 3].
        hashes: of each tile's pixels, by which the same image under another name is known.
        dropped: how many were left out, by reason.
    """

    rows: np.ndarray
    pixels: np.ndarray
    hashes: list[str]
    dropped: Counter[str]


def look(job: Job, settings: Settings, mpp_override: float | None, convention: str | None) -> Look:
    """Find the places of a slide's tiles, as :func:`~eosin.data_tools.tile_slide.tile_source` does.

    Args:
        convention: of the fit of its stains, where it is H&E; None for no fit.
    """
    source = job.source
    if source.refused or source.path is None:
        return Look(refused(source.refused))
    found = Look({})
    facts = found.facts
    try:
        with Slide(source.path, mpp_override if source.mpp is None else source.mpp) as slide:
            facts |= {"vendor": slide.vendor, "width": slide.size[0], "height": slide.size[1]}
            slide.require(max(settings.mpp))
            facts |= {"mpp": slide.mpp, "mpp_source": slide.mpp_source}
            seen = see(slide, job, settings)
            if seen is None:
                raise Refusal(DARK)
            found.places = choose_all(slide, settings, seen, facts, found.dropped)
            found.given = seen.coords is not None
            scale = slide.mpp / seen.mpp  # type: ignore[operator]
            found.sections = [box_labels(seen.sections, places.boxes(scale)) for places in found.places]
            if convention:
                found.fit = _fit(slide, job, settings, found, convention)
    except Refusal as refusal:
        found.facts = facts | refused(str(refusal))
        found.places = []
    return found


def pieces(job: Job, found: Look, settings: Settings) -> Iterator[Piece]:
    """Cut a slide's places into what is read at once."""
    most = max(1, PIECE_BYTES // (3 * settings.tile_size**2))
    for number, places in enumerate(found.places):
        for first in range(0, len(places.corners), most):
            part = replace(places, corners=places.corners[first : first + most], tissue=np.zeros(0), facts=[])
            yield Piece(job, number, first, part, not found.given)


def read(piece: Piece, settings: Settings, mpp_override: float | None) -> Read | str:
    """The tiles of a piece; a text says why the slide cannot be read any more."""
    dropped: Counter[str] = Counter()
    source = piece.job.source
    assert source.path is not None
    try:
        slide = _open(source.path, mpp_override if source.mpp is None else source.mpp)
    except Refusal as refusal:
        return str(refusal)
    every = np.arange(len(piece.places.corners))
    tiles = list(read_tiles(slide, piece.places, every, settings, dropped, piece.judged))
    size = settings.tile_size
    pixels = np.stack([tile for _, tile in tiles]) if tiles else np.empty((0, size, size, 3), dtype=np.uint8)
    hashes = [hashlib.blake2b(tile.tobytes(), digest_size=HASH_BYTES).hexdigest() for _, tile in tiles]
    return Read(np.array([row for row, _ in tiles], dtype=np.int64), pixels, hashes, dropped)


def stain_of(job: Job) -> str:
    """What a slide is stained with."""
    return job.source.facts.get("stain") or STAIN


@functools.lru_cache(maxsize=1)
def _open(path: Path, mpp: float | None) -> Slide:
    """A slide that stays open, with what it has decoded, until another one is opened."""
    return Slide(path, mpp)


def _fit(slide: Slide, job: Job, settings: Settings, found: Look, convention: str) -> dict[str, Any] | None:
    """The stains of an H&E slide from tiles drawn by its number, as 'eosin stain fit' draws among those kept."""
    import torch

    from eosin.ssl.stain.fits import HE, SAMPLE, fit_tiles
    from eosin.ssl.stain.normalizer import SlideFits

    if stain_of(job) not in HE:
        return None
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the cores are taken by the other workers
    rows = [(places, row) for places in found.places for row in range(len(places.corners))]
    tiles: list[np.ndarray] = []
    for at in np.argsort(uniform(np.arange(len(rows)), job.row, 0, SAMPLE), kind="stable").tolist():
        places, row = rows[at]
        one = read_tiles(slide, places, np.array([row]), settings, Counter(), not found.given)
        tiles += [tile for _, tile in one]
        if len(tiles) == FIT_TILES:
            break
    fit = fit_tiles(tiles, convention) if tiles else "no tiles"
    return None if isinstance(fit, str) else {key: getattr(fit, key).tolist() for key in SlideFits._fields}
