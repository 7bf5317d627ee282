"""Stain fits of slides: the median over a sample of a slide's tiles, kept in the slides table of a shard set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet, write_slides
from eosin.data_tools.stream import decode
from eosin.ssl.stain import lab, macenko
from eosin.ssl.stain.density import WHITE
from eosin.ssl.stain.reference import stain_error

if TYPE_CHECKING:
    import pandas as pd

HE = ("H&E", "HE", "H & E")
SAMPLE = purpose("stain fit sample")
COLUMNS = ("stain_fit", "stain_reason", "stain_tiles", "stain_pixels", "stain_angle", "stain_residual")
GLASS_PIXELS = 1 << 13  # of a tile that are looked at
ENOUGH_TILES, BRIGHTEST, LEAST_WHITE = 8, 0.99, 160


@dataclass
class SlideFit:
    """The fit of one slide.

    Attributes:
        vectors, maxima: [2, 3] and [2]; see :class:`~eosin.ssl.stain.macenko.Fit`.
        white: [3], level + 1 of empty glass; 256 where there is none.
        lab_mean, lab_std: [3], of L, a and b over tissue pixels.
        tiles: good tiles used.
        pixels: tissue pixels used.
        angle: degrees between the two stains.
        residual: share of the tissue's density outside the two stains, median over tiles.
    """

    vectors: torch.Tensor
    maxima: torch.Tensor
    white: torch.Tensor
    lab_mean: torch.Tensor
    lab_std: torch.Tensor
    tiles: int
    pixels: int
    angle: float
    residual: float


def is_he(slides: pd.DataFrame) -> np.ndarray:
    """Which slides are H&E, [slides] bool; H&E-only operations are off for the others."""
    if "stain" not in slides:
        return np.ones(len(slides), dtype=bool)
    return slides["stain"].isin(HE).to_numpy()


def fit_slides(
    shards: ShardSet, *, tiles_per_slide: int = 32, seed: int = 0, convention: str = "eosin"
) -> pd.DataFrame:
    """Fit every H&E slide from a sample of its tiles and write the fits into the slides table.

    Slides that are not H&E, or without a good tile, get none and a reason: their tiles stay raw.

    Returns:
        The slides table, with the columns ``stain_fit`` (JSON: convention, vectors, maxima, white, lab_mean, lab_std;
        "" where there is none), ``stain_reason``, ``stain_tiles`` and ``stain_pixels`` (used), ``stain_angle``
        (degrees between the stains) and ``stain_residual`` (share of density outside them).
    """
    table = shards.slides().drop(columns=list(COLUMNS), errors="ignore")
    slide_of = shards.column("slide")
    by_slide = np.argsort(slide_of, kind="stable")
    bounds = np.searchsorted(slide_of[by_slide], np.arange(len(table) + 1))
    he = is_he(table)
    rows = []
    for slide in progress(range(len(table)), total=len(table), desc="stain fit", unit="slides"):
        tiles = by_slide[bounds[slide] : bounds[slide + 1]]
        if not he[slide]:
            rows.append(_row("not H&E: left as it is"))
        elif not len(tiles):
            rows.append(_row("no tiles"))
        else:
            sample = sample_tiles(shards, tiles, tiles_per_slide, seed, slide)
            rows.append(_row(fit_tiles(sample, convention) if sample else "no tile can be decoded", convention))
    for name, values in zip(COLUMNS, zip(*rows)):
        table[name] = values
    write_slides(shards.folder, table)
    return table


def slide_fits(shards: ShardSet | Mixture, convention: str) -> list[dict[str, Any] | None]:
    """The slides' fits, None where there is none.

    Raises UserError when no fit was tried, one is broken, or they follow another convention.
    """
    sets = shards.sets if isinstance(shards, Mixture) else [shards]
    return [fit for one in sets for fit in _fits_of(one, convention)]


def read_fit(text: str) -> dict[str, Any]:
    """A slide's fit from its JSON in the slides table. Raises ValueError, which says what is wrong with it."""
    try:
        fit = json.loads(text)
        wrong = stain_error(fit)
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError("it is no JSON of a fit") from None
    if wrong:
        raise ValueError(wrong)
    return fit


def sample_tiles(shards: ShardSet, tiles: np.ndarray, count: int, seed: int, key: int = 0) -> list[np.ndarray]:
    """Decode up to ``count`` of the numbered tiles, drawn by (seed, key), each [T, T, 3]; broken ones are left out."""
    chosen = tiles[np.argsort(uniform(np.arange(len(tiles)), key, seed, SAMPLE), kind="stable")[:count]]
    images = []
    for tile in np.sort(chosen):
        try:
            images.append(decode(shards.image(int(tile))))
        except (ValueError, EOFError):
            continue  # 'eosin verify' lists them; a fit needs only some of a slide's tiles
    return images


def fit_tiles(images: Sequence[np.ndarray], convention: str) -> SlideFit | str:
    """The fit of tiles of one slide, each uint8 [h, w, 3]: medians over those that can be fitted; else why not.

    What comes back as a fit is one that :func:`slide_fits` reads.
    """
    rules = macenko.CONVENTIONS[convention]
    tensors = [torch.tensor(i).permute(2, 0, 1).unsqueeze(0) for i in images]
    # Only our own convention has the white point of a slide; its peers have one for all.
    white = white_point(tensors) if rules.white == WHITE else torch.full((3,), rules.white)
    fits = [macenko.fit(t, rules, white[None] if rules.white == WHITE else None) for t in tensors]
    colors = [lab.statistics(t) for t in tensors]
    good = [i for i, (f, c) in enumerate(zip(fits, colors)) if f.good and c.good]
    if not good:
        reasons = [macenko.REASONS[int(f.reason)] or "too little tissue" for f in fits]
        return max(sorted(set(reasons)), key=reasons.count)
    vectors, maxima = macenko.pooled([(fits[i].vectors[0], fits[i].maxima[0]) for i in good])
    mean, std = (torch.cat([getattr(colors[i], key) for i in good]).quantile(0.5, dim=0) for key in ("mean", "std"))
    found = SlideFit(
        vectors,
        maxima,
        white,
        mean,
        std,
        tiles=len(good),
        pixels=sum(int(fits[i].pixels) for i in good),
        angle=float(torch.rad2deg(torch.acos((vectors[0] @ vectors[1]).clamp(-1, 1)))),
        residual=float(torch.cat([fits[i].residual for i in good]).quantile(0.5)),
    )
    # Tiles of two slides under one name can each be good, and their median be the stains of neither.
    wrong = stain_error(_numbers(found, convention))
    return f"its tiles have no stains in common: {wrong}" if wrong else found


def white_point(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Level + 1 of empty glass in tiles of a slide, each uint8 [1, 3, H, W]: [3].

    Where no glass is gray, as under a wrong white balance, the brightest of enough tiles counts; of few tiles, 256.
    """
    levels = torch.cat([macenko.thinned(i, GLASS_PIXELS) for i in images], dim=2)
    found = macenko.white_point(levels)[0]
    if len(images) < ENOUGH_TILES or (found < WHITE).any():
        return found
    brightest = levels[0].float().quantile(BRIGHTEST, dim=1)
    return brightest + 1 if brightest.min() >= LEAST_WHITE else found


def _fits_of(shards: ShardSet, convention: str) -> list[dict[str, Any] | None]:
    table = shards.slides()
    again = f"run 'eosin stain fit {shards.name}{'' if convention == 'eosin' else f' --convention {convention}'}'"
    if "stain_fit" not in table:
        raise UserError(f"{shards.name} has no stain fits; {again}, or set stain.normalize to tile or off")
    fits: list[dict[str, Any] | None] = []
    for slide, text in zip(table["slide"], table["stain_fit"].fillna("")):
        try:
            fits.append(read_fit(text) if text else None)
        except ValueError as error:
            raise UserError(f"slide '{slide}' of {shards.name} has a broken stain fit ({error}); {again}") from None
    other = {fit["convention"] for fit in fits if fit} - {convention}
    if other:
        raise UserError(f"the stain fits of {shards.name} follow {min(other)}, not {convention}; {again}")
    return fits


def _numbers(fit: SlideFit, convention: str) -> dict[str, Any]:
    numbers = {key: getattr(fit, key).tolist() for key in ("vectors", "maxima", "white", "lab_mean", "lab_std")}
    return {"convention": convention} | numbers


def _row(fit: SlideFit | str, convention: str = "") -> tuple[Any, ...]:
    """The values of COLUMNS."""
    if isinstance(fit, str):
        return "", fit, 0, 0, float("nan"), float("nan")
    return json.dumps(_numbers(fit, convention)), "", fit.tiles, fit.pixels, fit.angle, fit.residual
