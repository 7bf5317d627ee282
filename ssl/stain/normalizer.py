"""Stain normalization of tiles by their slide's fit or their own, and the per-slide fits in the slides table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet, write_slides
from eosin.data_tools.stream import decode
from eosin.ssl.stain import macenko

if TYPE_CHECKING:
    import pandas as pd

HE = ("H&E", "HE", "H & E")
SAMPLE = purpose("stain fit sample")
PIXELS_A_TILE = 1 << 12  # enough where a slide's fit is a median over many tiles
COLUMNS = ("stain_fit", "stain_reason", "stain_tiles")


@dataclass
class Normalizer:
    """Normalizes tiles to a reference: the part of preprocessing that travels with a model.

    Attributes:
        mode: "tile" fits every tile, "slide" uses the fit of the tile's slide.
        vectors, maxima: the reference, [2, 3] and [2].
        slide_matrices: [slides, 3, 3] for mode "slide", identity for slides without a fit; None otherwise.
    """

    mode: Literal["tile", "slide"]
    vectors: torch.Tensor
    maxima: torch.Tensor
    slide_matrices: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor, slides: torch.Tensor) -> torch.Tensor:
        """Normalize ``images``, [B, 3, H, W] uint8, of slide numbers ``slides``, [B]; tiles without a fit stay raw."""
        if self.slide_matrices is not None:
            matrices = self.slide_matrices.to(images.device)[slides]
        else:
            fits = macenko.fit(images)
            matrices = macenko.transform(
                fits.vectors, fits.maxima, self.vectors.to(images.device), self.maxima.to(images.device)
            )
            identity = torch.eye(3, device=images.device).expand_as(matrices)
            matrices = torch.where(fits.good.view(-1, 1, 1), matrices, identity)
        return macenko.apply(images, matrices)


def describe_reference(mode: str) -> dict[str, Any] | None:
    """The normalization of ``mode`` as plain data, for fingerprints and releases; None for "off"."""
    if mode == "off":
        return None
    vectors, maxima = macenko.reference()
    return {
        "method": "macenko",
        "mode": mode,
        "vectors": [[round(v, 6) for v in row] for row in vectors.tolist()],
        "maxima": [round(v, 6) for v in maxima.tolist()],
    }


def make_normalizer(mode: str, shards: ShardSet) -> Normalizer | None:
    """The normalizer of ``mode`` ("off", "tile", "slide") for the tiles of ``shards``; None for "off".

    Raises UserError when mode is "slide" and the slides table holds no fits.
    """
    if mode == "off":
        return None
    vectors, maxima = macenko.reference()
    if mode == "tile":
        return Normalizer("tile", vectors, maxima)
    table = shards.slides()
    if "stain_fit" not in table:
        raise UserError(
            f"{shards.folder} has no stain fits; run 'eosin stain fit {shards.folder}', "
            "or set stain.normalize to tile or off"
        )
    matrices = torch.eye(3).repeat(max(len(table), 1), 1, 1)
    for row, text in enumerate(table["stain_fit"]):
        if text:
            found = json.loads(text)
            source = torch.tensor([found["vectors"]]), torch.tensor([found["maxima"]])
            matrices[row] = macenko.transform(*source, vectors, maxima)[0]
    return Normalizer("slide", vectors, maxima, matrices)


def is_he(slides: pd.DataFrame) -> np.ndarray:
    """Which slides are H&E, [slides] bool; H&E-only operations are off for the others."""
    if "stain" not in slides:
        return np.ones(len(slides), dtype=bool)
    return slides["stain"].isin(HE).to_numpy()


def fit_slides(shards: ShardSet, *, tiles_per_slide: int = 32, seed: int = 0) -> pd.DataFrame:
    """Fit every H&E slide from a sample of its tiles and write the fits into the slides table.

    A slide's fit is the median over its good tiles. Slides that are not H&E, or without a good tile, get none and a
    reason: their tiles stay raw.

    Returns:
        The slides table, with the columns ``stain_fit`` (JSON: vectors, maxima; "" where there is none),
        ``stain_reason`` and ``stain_tiles`` (good tiles used).
    """
    table = shards.slides().drop(columns=list(COLUMNS), errors="ignore")
    slide_of = shards.column("slide")
    by_slide = np.argsort(slide_of, kind="stable")
    bounds = np.searchsorted(slide_of[by_slide], np.arange(len(table) + 1))
    he = is_he(table)
    rows = []
    for slide in progress(range(len(table)), total=len(table), desc="stain fit", unit="slides"):
        tiles = by_slide[bounds[slide] : bounds[slide + 1]]
        rows.append(_fit_slide(shards, tiles, slide, he[slide], tiles_per_slide, seed))
    for name, values in zip(COLUMNS, zip(*rows)):
        table[name] = values
    write_slides(shards.folder, table)
    return table


def _fit_slide(
    shards: ShardSet, tiles: np.ndarray, slide: int, he: bool, tiles_per_slide: int, seed: int
) -> tuple[str, str, int]:
    if not he:
        return "", "not H&E: left as it is", 0
    if not len(tiles):
        return "", "no tiles", 0
    chosen = tiles[np.argsort(uniform(np.arange(len(tiles)), slide, seed, SAMPLE))[:tiles_per_slide]]
    images = []
    for tile in np.sort(chosen):
        try:
            images.append(decode(shards.image(int(tile))))
        except (ValueError, EOFError):
            continue  # 'eosin verify' lists them; a fit needs only some of a slide's tiles
    if not images:
        return "", "no tile can be decoded", 0
    fits = macenko.fit(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), PIXELS_A_TILE)
    good = fits.good
    if not good.any():
        return "", max(set(fits.reason), key=fits.reason.count), 0
    vectors = fits.vectors[good].median(dim=0).values
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    maxima = fits.maxima[good].median(dim=0).values
    text = json.dumps({"vectors": vectors.tolist(), "maxima": maxima.tolist()})
    return text, "", int(good.sum())
