"""The appearance that tiles are normalized to: plain numbers in a small JSON file that travels with a model.

A reference is named or made from an image, a slide, a shard set, or several of these (their median).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from eosin.data_tools.errors import Refusal, UserError, nearest
from eosin.data_tools.files import read_json, write_json
from eosin.ssl.stain import macenko

SCHEMA = 1
LONGEST_NAME = 300
KINDS = "an image, a slide, a folder with a shard set, a JSON of 'eosin stain reference', or a name"
SLIDE_TILES = 32  # of a slide that is made a reference
SLIDE_TILE = 256
SLIDE_MPP = 0.5
THUMBNAIL_MPP = 8.0
MIN_SHARE = 0.6  # of a slide's tile that is tissue
PATCH = 1024  # pixels a side of the parts in which an image is fitted


class Reference(BaseModel):
    """Stains and color statistics of an appearance.

    Attributes:
        schema_version: 1.
        name: where it comes from, for people.
        convention: of the stain vectors, a name of :data:`~eosin.ssl.stain.macenko.CONVENTIONS`.
        vectors: [2, 3], unit vectors of hematoxylin and eosin in optical density (RGB).
        maxima: [2], 99th-percentile concentrations.
        lab_mean, lab_std: [3], of L, a and b over tissue pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = SCHEMA
    name: str
    convention: str
    vectors: list[list[float]]
    maxima: list[float]
    lab_mean: list[float]
    lab_std: list[float]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """Vectors [2, 3], maxima [2], lab_mean [3] and lab_std [3]."""
        return tuple(
            torch.tensor(value, device=device) for value in (self.vectors, self.maxima, self.lab_mean, self.lab_std)
        )

    def check(self, where: str) -> Reference:
        """Return itself; raise UserError where the numbers are no stains."""
        wrong = stain_error(self.model_dump())
        if self.schema_version != SCHEMA:
            wrong = f"schema {self.schema_version} is not {SCHEMA}, the one this version of Eosin reads"
        elif not self.name.isprintable() or len(self.name) > LONGEST_NAME:
            wrong = f"its name is longer than {LONGEST_NAME} characters or not printable"
        if wrong:
            raise UserError(f"{where} is no reference: {wrong}; make one with 'eosin stain reference'")
        return self


def stain_error(found: dict[str, Any]) -> str:
    """What is wrong with the numbers of a fit or reference, "" where they are H&E.

    Args:
        found: convention, vectors, maxima, lab_mean, lab_std, and of a slide's fit white, as read from JSON.
    """
    shapes = {"vectors": (2, 3), "maxima": (2,), "lab_mean": (3,), "lab_std": (3,), "white": (3,)}
    try:
        arrays = {key: np.array(found[key], dtype=np.float64) for key in shapes if key != "white" or "white" in found}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return f"it has no {error}" if isinstance(error, KeyError) else "some of its values are no lists of numbers"
    if found.get("convention") not in macenko.CONVENTIONS:
        return f"there is no convention '{found.get('convention')}'; valid: {', '.join(macenko.CONVENTIONS)}"
    if any(a.shape != shapes[key] or not np.isfinite(a).all() for key, a in arrays.items()):
        return "vectors must be 2 × 3, maxima 2, lab_mean, lab_std and white 3 finite numbers"
    vectors, white = arrays["vectors"], arrays.get("white", np.full(3, 256.0))
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2) or vectors.min() < -0.1:
        return "stain vectors must have length 1 and no negative parts"
    if vectors[0] @ vectors[1] > np.cos(np.radians(macenko.MIN_ANGLE)) or vectors[0, 0] <= vectors[1, 0]:
        return f"hematoxylin must absorb more red than eosin, and lie {macenko.MIN_ANGLE:g}° from it"
    if not (arrays["maxima"].min() >= 0.01 and arrays["maxima"].max() <= 2 * macenko.MOST):
        return f"maxima must be from 0.01 to {2 * macenko.MOST:g}"
    if np.abs(arrays["lab_mean"]).max() > 130 or not (arrays["lab_std"].min() > 0 and arrays["lab_std"].max() < 100):
        return "lab_mean must be within ±130, and lab_std above 0 and below 100"
    return "" if white.min() >= 100 and white.max() <= 256 else "white must be from 100 to 256"


def _built_in(name: str, vectors: list[list[float]], maxima: list[float], mean: list[float], std: list[float]) -> Any:
    unit = [[v / math.hypot(*row) for v in row] for row in vectors]
    return Reference(name=name, convention=name, vectors=unit, maxima=maxima, lab_mean=mean, lab_std=std)


# Each belongs to its convention. "eosin" is our choice: blue-purple nuclei on pink, a well-stained section in daylight.
# "torchstain" has the vectors and maxima of Macenko's first public implementation (mitkovetta/staining-normalization).
# Their color statistics are those of phantom tissue normalized to them.
BUILT_IN = {
    r.name: r
    for r in (
        _built_in("eosin", [[0.61, 0.73, 0.31], [0.17, 0.88, 0.44]], [1.7, 1.0], [60.7, 29.2, -20.6], [14.9, 6.4, 9.5]),
        _built_in(
            "torchstain",
            [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]],
            [1.9705, 1.0308],
            [58.7, 23.9, -11.6],
            [16.5, 5.0, 7.2],
        ),
    )
}


def save_reference(path: Path | str, reference: Reference) -> None:
    """Write a reference as JSON."""
    write_json(path, reference.model_dump())


def load_reference(path: Path | str) -> Reference:
    """Read a reference's JSON. Raises UserError when it is none."""
    values = read_json(path, "a stain reference")
    try:
        return Reference.model_validate(values).check(str(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no stain reference: {key}: {first['msg'].lower()}") from None


def find_reference(given: str, convention: str) -> Reference:
    """The reference that a recipe or a command names.

    Args:
        given: a built-in name, or the path of a JSON, an image, a slide or a shard set.
        convention: of the fits, where the reference is made here.

    Raises:
        UserError: there is none, it cannot be fitted, or it follows another convention.
    """
    path = Path(given)
    if path.suffix.lower() == ".json":
        found = load_reference(path)
    elif path.exists():
        return make_reference([given], convention)
    elif given in BUILT_IN:
        found = BUILT_IN[given]
    else:
        raise UserError(f"there is no stain reference '{given}'; {nearest(given, [*BUILT_IN])}; or give {KINDS}")
    if found.convention != convention:
        raise UserError(
            f"the stain reference '{given}' follows the convention '{found.convention}', not '{convention}'; "
            f"set convention to {found.convention}, or give an image, a slide or a shard set"
        )
    return found


def make_reference(sources: Sequence[str], convention: str, name: str = "") -> Reference:
    """Make a reference from images, slides or shard sets: the median of their fits.

    Raises UserError when a source is missing, or has no stain that can be fitted.
    """
    made = [_from_source(source, convention) for source in sources]
    vectors, maxima = macenko.pooled([m[0] for m in made])
    mean, std = (torch.stack([m[1][i] for m in made]).quantile(0.5, dim=0) for i in (0, 1))
    title = name or ", ".join(Path(source).name for source in sources)
    rounded = [[[round(v, 6) for v in row] for row in vectors.tolist()]]
    flat = [[round(v, 6) for v in t.tolist()] for t in (maxima, mean, std)]
    return Reference(
        name=title,
        convention=convention,
        vectors=rounded[0],
        maxima=flat[0],
        lab_mean=flat[1],
        lab_std=flat[2],
    ).check(title)


Made = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _from_source(source: str, convention: str) -> Made:
    from eosin.data_tools.shards import ShardSet
    from eosin.ssl.stain.fits import fit_tiles, sample_tiles, slide_fits

    path = Path(source)
    if source in BUILT_IN or path.suffix.lower() == ".json":
        vectors, maxima, mean, std = find_reference(source, convention).tensors()
        return (vectors, maxima), (mean, std)
    if not path.exists():
        raise UserError(f"{path} does not exist; give {KINDS}")
    if path.is_dir() and not (path / "dataset.json").is_file():
        raise UserError(f"{path} is a folder without a shard set; give {KINDS}")
    if path.is_dir():
        shards = ShardSet(path)
        if "stain_fit" in shards.slides():
            fits = [fit for fit in slide_fits(shards, convention) if fit]
            if fits:
                return _median_of_slides(fits)
        tiles = sample_tiles(shards, np.arange(len(shards)), 4 * SLIDE_TILES, seed=0)
    else:
        tiles = _tiles_of_file(path)
    fitted = fit_tiles(tiles, convention) if tiles else "it holds no tissue"
    if isinstance(fitted, str):
        raise UserError(f"{path} cannot be a stain reference: {fitted}; give an image of H&E tissue")
    return (fitted.vectors, fitted.maxima), (fitted.lab_mean, fitted.lab_std)


def _median_of_slides(fits: list[dict[str, Any]]) -> Made:
    pooled = macenko.pooled([(torch.tensor(f["vectors"]), torch.tensor(f["maxima"])) for f in fits])
    mean, std = (torch.tensor([f[key] for f in fits]).quantile(0.5, dim=0) for key in ("lab_mean", "lab_std"))
    return pooled, (mean, std)


def _tiles_of_file(path: Path) -> list[np.ndarray]:
    """An image in parts, or tissue tiles of a slide, [n] of [h, w, 3]."""
    from eosin.data_tools.slide import SLIDE_SUFFIXES, Slide, read_image

    try:
        if path.suffix.lower() in SLIDE_SUFFIXES:
            with Slide(path) as slide:
                known = slide.mpp
            # Stains do not depend on the resolution, so that a file that does not say it will do.
            with Slide(path, None if known else SLIDE_MPP) as slide:
                return _tissue_tiles(slide)
        image = read_image(path)
    except Refusal as error:
        raise UserError(f"{path} cannot be a stain reference: {error}") from None
    corners = [(y, x) for y in range(0, image.shape[0], PATCH) for x in range(0, image.shape[1], PATCH)]
    return [image[y : y + PATCH, x : x + PATCH] for y, x in corners]


def _tissue_tiles(slide: Any) -> list[np.ndarray]:
    from eosin.data_tools.grids import box_means, grid
    from eosin.data_tools.tissue import find_tissue

    mpp = max(SLIDE_MPP, slide.mpp)
    step = SLIDE_TILE * mpp / slide.mpp
    mask = find_tissue(slide.thumbnail(max(THUMBNAIL_MPP, slide.mpp)), max(THUMBNAIL_MPP, slide.mpp)).mask
    scale = slide.mpp / max(THUMBNAIL_MPP, slide.mpp)
    lefts, tops = (grid(side, step, slide.downsamples[slide.level(mpp / slide.mpp)]) for side in slide.size)
    share = box_means(mask, lefts * scale, tops * scale, step * scale)  # [rows, columns]
    rows, columns = np.nonzero(share >= MIN_SHARE)
    every = max(1, len(rows) // SLIDE_TILES)
    spots = zip(lefts[columns[::every]], tops[rows[::every]])
    return [slide.read(int(x), int(y), SLIDE_TILE, mpp) for x, y in spots]
