"""Stain normalization of tiles to a reference, by their slide's fit or their own: the policy that a recipe states.

Tiles that cannot be fitted come back as they are, with the reason; nothing is dropped and nothing is forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import ValidationError

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json, write_json
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet
from eosin.ssl.stain import lab, macenko
from eosin.ssl.stain.density import WHITE, mix
from eosin.ssl.stain.fits import is_he, slide_fits
from eosin.ssl.stain.reference import Reference, find_reference

if TYPE_CHECKING:
    from eosin.ssl.config import Stain

STAIN_FILE = "stain.json"  # of a run: the normalization with its reference, as it was when the run began
METHODS = ("macenko", "reinhard", "reinhard-modified")
MODES = ("tile", "slide")
# Why a tile stays raw, by number.
REASONS = (*macenko.REASONS, "its slide has no fit", "its slide is not H&E")
NO_FIT, NOT_HE = len(macenko.REASONS), len(macenko.REASONS) + 1


class Normalized(NamedTuple):
    """Tiles [B, 3, H, W] uint8, and why each is still raw, [B] uint8: a number of REASONS, 0 where it is not."""

    images: torch.Tensor
    reason: torch.Tensor


class SlideFits(NamedTuple):
    """The fits of all slides; ones where there is none.

    Attributes:
        vectors: [slides, 2, 3].
        maxima: [slides, 2].
        white, lab_mean, lab_std: [slides, 3].
    """

    vectors: torch.Tensor
    maxima: torch.Tensor
    white: torch.Tensor
    lab_mean: torch.Tensor
    lab_std: torch.Tensor


@dataclass
class Normalizer:
    """Normalizes tiles: the part of preprocessing that travels with a model.

    Attributes:
        method: of METHODS.
        mode: "tile" fits every tile, "slide" uses the fit of the tile's slide.
        reference: what tiles are brought to.
        reason: [slides], why a slide's tiles stay raw, a number of REASONS; empty where all are H&E.
        fits: the slides' fits, for mode "slide".
    """

    method: str
    mode: str
    reference: Reference
    reason: torch.Tensor
    fits: SlideFits | None = None

    def __call__(self, images: torch.Tensor, slides: torch.Tensor) -> Normalized:
        """Normalize ``images``, [B, 3, H, W] uint8, of slide numbers ``slides``, [B]."""
        reason = torch.zeros(len(images), dtype=torch.uint8, device=images.device)
        if len(self.reason):
            reason = self.reason.to(images.device)[slides]
        fits = None
        if self.fits is not None:
            fits = SlideFits(*(t[slides.to(t.device)].to(images.device) for t in self.fits))
        normalize = self._by_stain if self.method == "macenko" else self._by_color
        return normalize(images, reason, fits)

    def _by_stain(self, images: torch.Tensor, reason: torch.Tensor, of_slides: SlideFits | None) -> Normalized:
        convention = macenko.CONVENTIONS[self.reference.convention]
        ours = convention.white == WHITE  # the peers have one white for all, and lose what lies outside the stains
        if of_slides is None:
            white = macenko.white_point(macenko.thinned(images, convention.pixels)) if ours else None
            fits = macenko.fit(images, convention, white)
            vectors, maxima = fits.vectors, fits.maxima
            reason = torch.where(reason > 0, reason, fits.reason)
        else:
            vectors, maxima, white, *_ = of_slides
        to_vectors, to_maxima, *_ = self.reference.tensors(images.device)
        good = reason == 0
        matrices = macenko.transform(vectors, maxima, to_vectors, to_maxima, keep_rest=ours)
        if ours:
            return Normalized(mix(images, matrices, white, good), reason)
        return Normalized(macenko.render(images, matrices, good, convention), reason)

    def _by_color(self, images: torch.Tensor, reason: torch.Tensor, of_slides: SlideFits | None) -> Normalized:
        if of_slides is None:
            found = lab.statistics(images)
            reason = torch.where((reason == 0) & ~found.good, 1, reason)
            # Colors alone do not tell pen from tissue; stains do.
            white = macenko.white_point(macenko.thinned(images, macenko.CONVENTIONS["eosin"].pixels))
            reason = torch.where(reason > 0, reason, macenko.fit(images, white=white).reason)
        else:
            found = lab.Statistics(of_slides.lab_mean, of_slides.lab_std, reason == 0)
        *_, mean, std = self.reference.tensors(images.device)
        match = lab.matching_modified if self.method == "reinhard-modified" else lab.matching
        scale, shift = match(found, mean.unsqueeze(0), std.unsqueeze(0))
        return Normalized(lab.transfer(images, scale, shift, reason == 0), reason)

    def raw_slides(self) -> dict[str, int]:
        """How many slides stay raw, by reason."""
        counts = torch.bincount(self.reason.long(), minlength=len(REASONS)).tolist()
        return {text: n for text, n in zip(REASONS[1:], counts[1:]) if n}


def describe(stain: Stain) -> dict[str, Any] | None:
    """The normalization of a recipe as plain data, with its reference, for runs, fingerprints and releases.

    None for "off". Raises UserError where the reference cannot be had.
    """
    if stain.normalize == "off":
        return None
    reference = find_reference(stain.reference, stain.convention)
    return {"method": stain.method, "mode": stain.normalize, "reference": reference.model_dump()}


def describe_run(run: Path, stain: Stain) -> dict[str, Any] | None:
    """The normalization of a run: as it was when the run began, whatever became of the reference's file since."""
    if stain.normalize == "off" or not (run / STAIN_FILE).is_file():
        return describe(stain)
    return read_normalization(read_json(run / STAIN_FILE, "a run's stain normalization"), run / STAIN_FILE)


def save_description(run: Path, description: dict[str, Any] | None) -> None:
    """Keep a run's normalization beside its configuration, as it was when the run began."""
    if description is not None and not (run / STAIN_FILE).is_file():
        write_json(run / STAIN_FILE, description)


def read_normalization(found: dict[str, Any], where: Path) -> dict[str, Any]:
    """Check what :func:`describe` wrote. Raises UserError where it is not that."""
    wrong = UserError(f"{where}: its stain normalizer is not one that this version of Eosin can apply")
    try:
        reference = Reference.model_validate(found["reference"]).check(str(where))
        if found["method"] not in METHODS or found["mode"] not in MODES:
            raise wrong
    except (KeyError, TypeError, ValidationError):
        raise wrong from None
    return {"method": found["method"], "mode": found["mode"], "reference": reference.model_dump()}


def make_normalizer(description: dict[str, Any] | None, shards: ShardSet | Mixture | None) -> Normalizer | None:
    """The normalizer of a description for the tiles of ``shards`` (None: of H&E images that are in none).

    Returns None for no description.

    Raises:
        UserError: mode "slide", and the slides table holds no fits of the reference's convention.
    """
    if description is None:
        return None
    reference = Reference.model_validate(description["reference"])
    method, mode = description["method"], description["mode"]
    if shards is None:
        return Normalizer(method, mode, reference, torch.zeros(0, dtype=torch.uint8))
    table = shards.slides()
    he = torch.tensor(is_he(table))
    reason = torch.where(he, 0, NOT_HE).to(torch.uint8)
    if mode == "tile":
        return Normalizer(method, mode, reference, reason)
    fits = slide_fits(shards, reference.convention)
    missing = torch.tensor([f is None for f in fits], dtype=torch.bool)
    reason = torch.where(he & missing, NO_FIT, reason).to(torch.uint8)
    return Normalizer(method, mode, reference, reason, stacked(fits))


def stacked(fits: Sequence[dict[str, Any] | None]) -> SlideFits:
    """The fits of :func:`slide_fits` as tensors."""
    shapes = dict(zip(SlideFits._fields, [(2, 3), (2,), (3,), (3,), (3,)]))
    columns = {key: torch.ones(len(fits), *shape) for key, shape in shapes.items()}
    for slide, fit in enumerate(fits):
        for key, column in columns.items():
            if fit:
                column[slide] = torch.tensor(fit[key])
    return SlideFits(**columns)
