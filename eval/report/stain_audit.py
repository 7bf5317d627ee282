"""The audit of a shard set's stain: fits and outliers, before and after, color variance between slides, failures.

One page, made from the slides table, a sample of each slide's tiles, and a synthetic experiment with known truth.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet
from eosin.eval.report import page, pictures, plots
from eosin.eval.report.page import Block, Gallery, Listing, Picture, Section, Table, Words, chart, photo
from eosin.eval.report.stain_outliers import OUTLIER, Deviation, Figure, find_outliers, variances
from eosin.eval.report.stain_truth import known_truth
from eosin.eval.task import text
from eosin.ssl.stain import lab
from eosin.ssl.stain.fits import sample_tiles, slide_fits
from eosin.ssl.stain.normalizer import REASONS, Normalizer, make_normalizer
from eosin.ssl.stain.reference import BUILT_IN, Reference

SEED = 0
COLOR_TILES = 16  # of a slide, in which its mean color is measured
SHEET_SLIDES, SHEET_TILES, SHEET_PIXELS, GAP = 12, 3, 150, 4
LEAST_SLIDES = 8  # fitted ones, below which nothing can be called unusual
MOST_OUTLIERS = 24
EXAMPLES = 3
QUALITY = {
    "stain_angle": ("angle between the two stains, degrees", ".1f"),
    "stain_residual": ("density outside the two stains, share", ".3f"),
    "stain_pixels": ("tissue pixels used", ",.0f"),
    "stain_tiles": ("tiles used", ",.0f"),
}
STAINS = ("hematoxylin", "eosin")
CHANNELS = {"L": "lightness (L)", "a": "green to red (a)", "b": "blue to yellow (b)"}
SHEET = purpose("stain audit sheet")

Row = list[str | list[Picture]]


@dataclass
class Audit:
    """What the sections look at.

    Attributes:
        table: the slides table.
        normalizer: by slide.
        fits: of each slide; None where there is none.
    """

    shards: ShardSet
    table: pd.DataFrame
    normalizer: Normalizer
    fits: list[dict[str, Any] | None]

    @cached_property
    def fitted(self) -> np.ndarray:
        """Numbers of the H&E slides with a fit."""
        return np.flatnonzero(self.normalizer.reason.numpy() == 0)

    @cached_property
    def vectors(self) -> np.ndarray:
        """Of the fitted slides, [fitted, 2, 3]."""
        return np.array([self._fit(n)["vectors"] for n in self.fitted])

    @cached_property
    def maxima(self) -> np.ndarray:
        """Of the fitted slides, [fitted, 2]."""
        return np.array([self._fit(n)["maxima"] for n in self.fitted])

    @cached_property
    def colors(self) -> np.ndarray:
        """:func:`slide_colors` of the fitted slides, [2, fitted, 3]."""
        return slide_colors(self.shards, self.normalizer, self.fitted)

    @cached_property
    def spreads(self) -> tuple[np.ndarray, np.ndarray]:
        """:func:`variances` before and after, [3] each."""
        return variances(self.colors[0]), variances(self.colors[1])

    @cached_property
    def outliers(self) -> dict[int, list[Deviation]]:
        """What stands out, by place among the fitted slides, the furthest first."""
        return find_outliers(self.figures) if len(self.fitted) >= LEAST_SLIDES else {}

    @cached_property
    def figures(self) -> list[Figure]:
        """What slides are compared by."""
        found = [Figure(f"{s} intensity", m, np.log(m)) for s, m in zip(STAINS, self.maxima.T)]
        for i, stain in enumerate(STAINS):
            for k, channel in enumerate(("red", "green", "blue")):
                found.append(Figure(f"{channel} part of {stain}", *[self.vectors[:, i, k]] * 2))
        found.append(Figure("density outside the two stains", *[self.numbers("stain_residual")] * 2))
        return found

    @property
    def reference(self) -> Reference:
        """What is normalized to."""
        return self.normalizer.reference

    @property
    def ratio(self) -> float:
        """Total variance after over that before; NaN where there is none."""
        before, after = (float(s.sum()) for s in self.spreads)
        return after / before if before > 0 else float("nan")

    def column(self, name: str) -> np.ndarray:
        """A column of the slides table as text, [slides]; empty where the table does not know."""
        return text(self.table[name]) if name in self.table else np.full(len(self.table), "", dtype=np.str_)

    def numbers(self, name: str) -> np.ndarray:
        """A column of the slides table over fitted slides, [fitted]; NaN where the table does not know."""
        if name not in self.table:
            return np.full(len(self.fitted), np.nan)
        return pd.to_numeric(self.table[name], errors="coerce").to_numpy(dtype=float)[self.fitted]

    def caption(self, slide: int) -> str:
        """A slide's name and site."""
        return " · ".join(t for t in (str(self.column("slide")[slide]), str(self.column("site")[slide])) if t)

    def _fit(self, slide: int) -> dict[str, Any]:
        found = self.fits[slide]
        assert found is not None
        return found


def write_audit(shards: ShardSet, out: Path, description: dict[str, Any]) -> None:
    """Write the audit of a shard set as one HTML file that needs no network, no script and no other file.

    Args:
        shards: with stain fits.
        out: the page; written aside and renamed.
        description: what :func:`~eosin.ssl.stain.normalizer.describe` returns, mode "slide".

    Raises:
        UserError: no fits were made, none could be, they follow another convention, or ``out`` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of an HTML file")
    audit = gather(shards, description)
    sections = [part(audit) for part in (verdict, fits, sheets, spread)]
    sections += [known_truth(audit.reference), failures(audit), how(audit, out)]
    subtitle = f"{shards.folder.resolve().name}: {len(shards):,} tiles of {_count(len(audit.table), 'slide')}"
    with atomic_path(out) as temporary:
        temporary.write_text(page.render("Stain audit", subtitle, _badges(audit), sections), encoding="utf-8")


def gather(shards: ShardSet, description: dict[str, Any]) -> Audit:
    """Read the fits. Raises UserError where there are none, or of another convention."""
    table = shards.slides().reset_index(drop=True)
    found = slide_fits(shards, description["reference"]["convention"])
    normalizer = make_normalizer(description | {"mode": "slide"}, shards)
    assert normalizer is not None
    audit = Audit(shards, table, normalizer, found)
    if not len(audit.fitted):
        raise UserError(
            f"no slide of {shards.folder} has a stain fit ({_tally(audit) or 'it has no slides'}); an audit needs H&E "
            f"slides that have one"
        )
    return audit


def slide_colors(shards: ShardSet, normalizer: Normalizer, slides: np.ndarray) -> np.ndarray:
    """Mean L, a, b over the tissue of slides before and after normalization, [2, n, 3]; NaN where there is no tissue.

    The tissue is that of the tiles as they are stored, so that the same pixels are measured before and after.
    """
    by_slide = _tiles_by_slide(shards)
    colors = np.full((2, len(slides), 3), np.nan)
    for place, slide in enumerate(progress(slides, total=len(slides), desc="slide colors", unit="slides")):
        sums, count = np.zeros((2, 3)), 0
        for tile in sample_tiles(shards, by_slide[slide], COLOR_TILES, SEED, int(slide)):
            raw = _batch([tile])
            before, after = (lab.from_rgb(i.float() / 255)[0] for i in (raw, _normalized(normalizer, raw, int(slide))))
            tissue = before[0] < lab.TISSUE_L
            sums += np.stack([c[:, tissue].double().sum(dim=1).numpy() for c in (before, after)])
            count += int(tissue.sum())
        if count:
            colors[:, place] = sums / count
    return colors


def verdict(a: Audit) -> Section:
    """Whether normalization brings the slides together, and what it does not reach."""
    before, after = (float(s.sum()) for s in a.spreads)
    judged = len(a.fitted) >= LEAST_SLIDES
    if np.isfinite(a.ratio):
        change = "lowers" if a.ratio < 1 else "does not lower"
        left = f"{_percent(a.ratio)} of it {'is left' if a.ratio < 1 else 'is there afterwards'}"
        said = (
            f"Normalization {change} the color variance between slides: {left} ({before:.1f}\u00a0→\u00a0{after:.1f})."
        )
    else:
        said = "There is no color variance between slides: that takes two slides with different colors."
    rows = [
        ("slides", f"{len(a.table):,}"),
        ("with a stain fit", f"{len(a.fitted):,}"),
        ("without, left as they are", f"{len(a.table) - len(a.fitted):,}"),
        ("color variance between slides, before", _fixed(before)),
        ("color variance between slides, after", _fixed(after)),
        ("after over before", f"{a.ratio:.2f}" if np.isfinite(a.ratio) else "–"),
        ("slides that stand out", f"{len(a.outliers):,}" if judged else "not judged"),
    ]
    out = f"{len(a.outliers) or 'none'} of them stand{'s' * (len(a.outliers) == 1)} out"
    counts = [
        f"{len(a.fitted):,} of {_count(len(a.table), 'slide')} {'has' if len(a.fitted) == 1 else 'have'} a stain fit; "
        f"{out if judged else 'too few to say which stand out'}."
    ]
    if tally := _tally(a):
        counts.append(f"Left as they are: {tally}.")
    lead = f"Does {a.normalizer.method} normalization to '{a.reference.name}' bring these slides to one color?"
    return Section("verdict", "Verdict", lead, [Words([said], "verdict"), Words(counts), Table([], rows)])


def fits(a: Audit) -> Section:
    """The stains found in each slide, how good the fits are, and the slides that stand out."""
    lead = "Each slide's two stains, as found in its tiles: their colors, how strong they are, and how well they fit."
    target = (np.array(a.reference.vectors), np.array(a.reference.maxima))
    sites = [str(s) for s in a.column("site")[a.fitted]]
    drawn = plots.stains(a.vectors, a.maxima, sites, target)
    ringed = np.isin(np.arange(len(a.fitted)), list(a.outliers))
    panels = [
        plots.Cloud(
            "Intensities", "hematoxylin", "eosin", a.maxima[:, 0], a.maxima[:, 1], (target[1][0], target[1][1])
        ),
        plots.Cloud(
            "Quality of the fit",
            "angle between the stains, degrees",
            "share of density outside them",
            a.numbers("stain_angle"),
            a.numbers("stain_residual"),
        ),
        plots.Cloud(
            "What the fit rests on",
            "tiles",
            "tissue pixels, thousands",
            a.numbers("stain_tiles"),
            a.numbers("stain_pixels") / 1000,
        ),
    ]
    quality = plots.clouds(panels, sites, target="reference", ringed=ringed, shared=False)
    rows = []
    for name, (meaning, form) in QUALITY.items():
        known = a.numbers(name)[np.isfinite(a.numbers(name))]
        cells = [f"{f(known):{form}}" if len(known) else "–" for f in (np.min, np.median, np.max)]
        rows.append([meaning, *cells])
    blocks: list[Block] = [
        Gallery([chart(drawn, "stain vectors and colors of each slide, by site")], 2000),
        Gallery([chart(quality, "intensities and quality of the fits, a dot a slide, by site")], 2000),
        Table(["", "least", "median", "most"], rows, f"Over {_count(len(a.fitted), 'slide')} with a fit."),
        *_outliers(a),
    ]
    return Section("fits", "Fits and outliers", lead, blocks)


def _outliers(a: Audit) -> list[Block]:
    if len(a.fitted) < LEAST_SLIDES:
        few = f"Outliers are not judged: that takes {LEAST_SLIDES} fitted slides, and there are {len(a.fitted)}."
        return [Words([few])]
    if not a.outliers:
        return [Words([f"No slide stands out: every figure lies within {OUTLIER} robust deviations of the median."])]
    rows: list[Row] = []
    for place, deviations in list(a.outliers.items())[:MOST_OUTLIERS]:
        slide = int(a.fitted[place])
        rows.append([_example(a, [slide]), a.caption(slide), "; ".join(str(d) for d in deviations)])
    shown = f" The furthest {len(rows)} are shown." if len(rows) < len(a.outliers) else ""
    caption = (
        f"{_count(len(a.outliers), 'slide')} of {len(a.fitted)} with an intensity, a part of a stain's color or a "
        f"residual more than {OUTLIER} robust deviations (z) from the median slide, as scanned. A laboratory with few "
        f"slides here may stand out as a whole.{shown}"
    )
    return [Table(["Tile", "Slide", "What stands out"], rows, caption)]


def sheets(a: Audit) -> Section:
    """Tiles of a few slides before and after normalization."""
    by_slide = _tiles_by_slide(a.shards)
    chosen = take_turns(a.fitted, a.column("site"), SHEET_SLIDES)
    found = []
    for slide in chosen:
        tiles = sample_tiles(a.shards, by_slide[slide], SHEET_TILES, SEED, slide)
        if tiles:
            after = [_image(_normalized(a.normalizer, _batch([t]), slide)) for t in tiles]
            sheet = np.concatenate([_strip(tiles), _strip(after)])
            found.append(photo(sheet, "tiles before and after normalization", a.caption(slide)))
    lead = "Above: as scanned. Below: normalized. The same tissue should look as if one laboratory had stained it all."
    blocks: list[Block] = [Gallery(found, 300)]
    if not found:
        blocks = [Words([f"No tile can be read: run 'eosin verify {a.shards.folder}'."])]
    return Section("sheets", "Before and after", lead, blocks)


def take_turns(slides: np.ndarray, sites: np.ndarray, count: int) -> list[int]:
    """Up to ``count`` of the slides, drawn so that sites take turns; those of a site are beside each other."""
    shuffled = slides[np.argsort(uniform(slides, SEED, SHEET), kind="stable")]
    turn = pd.Series(sites[shuffled]).groupby(sites[shuffled]).cumcount()
    chosen = shuffled[np.argsort(turn, kind="stable")][:count]
    return sorted((int(n) for n in chosen), key=lambda n: (sites[n], n))


def spread(a: Audit) -> Section:
    """How far apart the slides' mean colors lie, before and after."""
    before, after = a.spreads
    names = ["all three", *CHANNELS.values()]
    pairs = zip([before.sum(), *before], [after.sum(), *after])
    rows = [
        [name, _fixed(b), _fixed(c), _percent(c / b) if b > 0 else "–"]
        for name, (b, c) in zip(names, pairs, strict=True)
    ]
    measured = np.isfinite(a.colors).all(axis=(0, 2))
    caption = (
        f"Variance of the mean color of tissue over {_count(int(measured.sum()), 'slide')}, up to {COLOR_TILES} tiles "
        f"of each, in CIE L*a*b*; tissue is what is darker than L = {lab.TISSUE_L}, the same pixels before and after."
    )
    sites = [str(s) for s in a.column("site")[a.fitted]]
    aim = (a.reference.lab_mean[1], a.reference.lab_mean[2])
    panels = [
        plots.Cloud(title, "a: green to red", "b: blue to yellow", colors[:, 1], colors[:, 2], aim)
        for title, colors in zip(("As scanned", "Normalized"), a.colors)
    ]
    drawn = plots.clouds(panels, sites, target="reference", shared=True)
    blocks: list[Block] = [
        Gallery([chart(drawn, "mean colors of slides before and after normalization, by site")], 2000),
        Table(["", "before", "after", "left"], rows, caption),
    ]
    notes = ["Slides also differ in what tissue they hold, so that a variance of 0 is not to be expected."]
    if missing := int((~measured).sum()):
        notes.append(f"{_count(missing, 'fitted slide')} without a readable tile that holds tissue: left out here.")
    lead = "A dot is the mean color of a slide's tissue. Dots of different sites should come to lie on each other."
    return Section("variance", "Color variance between slides", lead, [*blocks, Words(notes)])


def failures(a: Audit) -> Section:
    """Slides without a fit, by reason, and how many tiles stay raw with them."""
    reasons = _reasons(a)
    tiles = np.bincount(a.shards.column("slide"), minlength=len(a.table))
    lead = "Slides that could not be fitted, or must not be, are left as they are; nothing is dropped or forced."
    off = np.setdiff1d(np.arange(len(a.table)), a.fitted)
    if not len(off):
        return Section("failures", "Failures", lead, [Words(["Every slide has a fit: no tile stays raw."])])
    rows: list[Row] = []
    for reason, count in sorted(Counter(reasons[off].tolist()).items(), key=lambda item: (-item[1], item[0])):
        of_it = off[reasons[off] == reason]
        names = [str(n) for n in a.column("slide")[of_it[:EXAMPLES]]]
        more = [f"and {count - len(names)} more"] if count > len(names) else []
        examples = _example(a, [int(n) for n in of_it[tiles[of_it] > 0]])
        rows.append([reason, f"{count:,}", f"{tiles[of_it].sum():,}", examples, ", ".join(names + more)])
    total = f"{tiles[off].sum():,} of {len(a.shards):,} tiles stay raw, those of {_count(len(off), 'slide')}."
    table = Table(["Reason", "Slides", "Tiles left raw", "Examples", "Names"], rows)
    return Section("failures", "Failures", lead, [Words([total]), table])


def how(a: Audit, out: Path) -> Section:
    """Reference, method and the command that makes this page."""
    given = a.reference.name if a.reference == BUILT_IN.get(a.reference.name) else "reference.json"
    words = ["eosin", "stain", "audit", str(a.shards.folder), "--out", out.name, "--to", given]
    words += ["--method", a.normalizer.method, "--convention", a.reference.convention]
    rows = [
        ("method", f"{a.normalizer.method}, by the fit of each slide"),
        ("reference", a.reference.name),
        ("convention", a.reference.convention),
    ]
    rows += [(stain, _vector(row)) for stain, row in zip(STAINS, a.reference.vectors)]
    rows.append(("intensities, hematoxylin and eosin", _vector(a.reference.maxima)))
    rows.append(("mean L, a, b of tissue", _vector(a.reference.lab_mean, ".1f")))
    rows.append(("choice of tiles", f"seed {SEED}, {COLOR_TILES} a slide for its color"))
    lead = "Stains are directions of optical density in red, green and blue; intensities are its 99th percentiles."
    told = Listing(json.dumps(a.reference.model_dump(), indent=2), "The reference, to be saved as reference.json")
    return Section("how", "How", lead, [Table([], rows), Listing(shlex.join(words)), told])


def _reasons(a: Audit) -> np.ndarray:
    """Why each slide stays raw, [slides]; "" where it does not."""
    said = a.column("stain_reason")
    known = [REASONS[r] for r in a.normalizer.reason.tolist()]
    return np.array([(s or k) if k else "" for s, k in zip(said.tolist(), known)], dtype=np.str_)


def _tally(a: Audit) -> str:
    """How many slides stay raw, by reason, on one line."""
    counts = Counter(" ".join(r.split()) for r in _reasons(a).tolist() if r)
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _badges(a: Audit) -> list[str]:
    used = np.bincount(a.shards.column("slide"), minlength=len(a.table)) > 0
    synthetic = np.isin(np.char.lower(a.column("synthetic")), ("true", "1", "yes"))[used]
    if len(synthetic) and synthetic.all():
        return ["Synthetic slides: no tissue of any patient"]
    return [f"{synthetic.sum()} of {len(synthetic)} slides are synthetic"] if synthetic.any() else []


def _tiles_by_slide(shards: ShardSet) -> list[np.ndarray]:
    """Numbers of the tiles of each slide."""
    slide_of = shards.column("slide")
    by_slide = np.argsort(slide_of, kind="stable")
    return np.split(by_slide, np.searchsorted(slide_of[by_slide], np.arange(1, len(shards.slides()))))


def _example(a: Audit, slides: Sequence[int]) -> list[Picture]:
    """A tile each of the first few slides, as scanned."""
    tiles = [pictures.pick_tile(a.shards, slide, SEED) for slide in slides[:EXAMPLES]]
    return [photo(_square(tile, SHEET_PIXELS), "a tile of the slide") for tile in tiles if tile is not None]


def _normalized(normalizer: Normalizer, images: torch.Tensor, slide: int) -> torch.Tensor:
    return normalizer(images, torch.full((len(images),), slide)).images


def _batch(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images [n] of [H, W, 3] as [n, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _image(images: torch.Tensor) -> np.ndarray:
    """The first of images [n, 3, H, W] as [H, W, 3]."""
    return np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())


def _strip(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles side by side on white, always as wide as SHEET_TILES of them."""
    step = SHEET_PIXELS + GAP
    strip = np.full((step, SHEET_TILES * step, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        strip[:SHEET_PIXELS, i * step : i * step + SHEET_PIXELS] = _square(tile, SHEET_PIXELS)
    return strip


def _square(image: np.ndarray, side: int) -> np.ndarray:
    method = cv2.INTER_AREA if image.shape[0] > side else cv2.INTER_CUBIC
    return cv2.resize(image, (side, side), interpolation=method)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _fixed(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def _vector(values: Sequence[float], form: str = ".3f") -> str:
    return ", ".join(f"{v:{form}}" for v in values).replace("-", "−")
