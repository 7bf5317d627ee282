"""One slide to a tar of its tiles: find the tissue, choose the places, read, judge, encode, write.

What a slide gives depends on its file, the settings and the seed alone. A slide that cannot be used is refused with a
reason, and what was learned of it before is kept. This module never looks at another slide.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from eosin.data_tools.coords import Coords, read_coords
from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import atomic_path, write_json
from eosin.data_tools.given_masks import read_mask
from eosin.data_tools.grids import (
    Extent,
    box_labels,
    box_means,
    box_shares,
    drawn,
    grid,
    island_places,
    snapped,
    whole,
)
from eosin.data_tools.qc import PICTURE_PIXELS, picture, write_png
from eosin.data_tools.shards import TarWriter, slide_key, tile_key
from eosin.data_tools.slide import MPP_RANGE, Slide
from eosin.data_tools.sources import Source
from eosin.data_tools.tissue import THUMBNAIL_MPP, Thresholds, Tissue, find_tissue, is_dark, sections
from eosin.data_tools.tma import Cores, dearray

SUBSAMPLING = "444"
# A slide of which more tiles than this cannot be decoded is damaged, and is refused as a whole.
MAX_UNREADABLE = 0.05
# Small slides get a finer thumbnail, so that their outline is as good; finer than cells it gains nothing more.
THUMBNAIL_PIXELS, FINEST_THUMBNAIL_MPP = 512, 2.0
JUDGED = ("blank", "blur", "unreadable")
DROP_REASONS = ("background", "pen", "edge", "debris", *JUDGED, "outside", "limit")
DARK = "dark background with light from the specimen, as in fluorescence; brightfield slides are tiled"
# What a tile's JSON holds of its own; a column of --coords with such a name is kept as given_<name>.
OWN = ("key", "slide", "x", "y", "mpp", "tissue", "section", "core")


@dataclass(frozen=True)
class Settings:
    """What decides which tiles a slide gives, and their bytes.

    Attributes:
        mpp: µm/px of the tiles, one or several.
        tile_size: their side, px.
        overlap: px that neighbors share.
        region: side, px, of the region around a tile that is stored in its place, for extended-context augmentation.
        min_tissue: smallest share of a tile that is tissue.
        max_tiles: at most so many a slide and µm/px.
        sample: how these are drawn: "random", or "stratified" for an even spread over the tissue.
        tma: the slide is a microarray: tiles of its cores only, with the cores' names.
        format: "jpg" with full color resolution (4:4:4), or "png".
        quality: of the JPEGs.
        seed: of the draws.
        thresholds: of the search for tissue.
    """

    mpp: tuple[float, ...]
    tile_size: int
    overlap: int = 0
    region: int | None = None
    min_tissue: float = 0.5
    max_tiles: int | None = None
    sample: str = "random"
    tma: bool = False
    format: str = "jpg"
    quality: int = 90
    seed: int = 0
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def stored_size(self) -> int:
        """Side of what is stored, px."""
        return self.region or self.tile_size

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        low, high = MPP_RANGE
        names = [round(1000 * mpp) for mpp in self.mpp if math.isfinite(mpp)]
        for name, value, good, valid in (
            ("mpp", list(self.mpp), all(low <= mpp <= high for mpp in self.mpp), f"{low:g} to {high:g} µm/px"),
            ("mpp", list(self.mpp), 0 < len(names) == len(set(names)), "one or several that differ"),
            ("tile-size", self.tile_size, 16 <= self.tile_size <= 4096, "16 to 4096 px"),
            ("overlap", self.overlap, 0 <= self.overlap < self.tile_size, f"0 to {self.tile_size - 1} px"),
            ("region", self.region, self.tile_size <= self.stored_size <= 8192, f"{self.tile_size} to 8192 px"),
            ("min-tissue", self.min_tissue, 0 < self.min_tissue <= 1, "a share above 0 and up to 1"),
            ("max-tiles", self.max_tiles, self.max_tiles is None or self.max_tiles > 0, "1 or more"),
            ("sample", self.sample, self.sample in ("random", "stratified"), "random, stratified"),
            ("format", self.format, self.format in ("jpg", "png"), "jpg, png"),
            ("quality", self.quality, 1 <= self.quality <= 100, "1 to 100"),
        ):
            if not good:
                shown = " ".join(f"{v:g}" for v in value) if isinstance(value, list) else value
                raise UserError(f"--{name} {shown} is out of range; valid: {valid}")


@dataclass(frozen=True)
class Job:
    """A slide to be tiled: its row in the slides table, and what is given of it beside its file."""

    row: int
    source: Source
    mask: Path | None = None
    coords: Coords | Path | None = None


class Seen(NamedTuple):
    """A slide as its thumbnail shows it, and its given places; masks and labels are [H, W] at ``mpp`` µm/px."""

    tissue: Tissue
    mpp: float
    sections: np.ndarray
    cores: Cores | None
    coords: Coords | None


@dataclass
class Places:
    """Tiles to be read at one µm/px, a row each.

    Attributes:
        corners: left and upper edge of what is stored, int64 [n, 2], pixels of the finest level.
        tissue: share of tissue, [n].
        facts: what is given of each place, [] where nothing is.
    """

    mpp: float
    extent: Extent
    corners: np.ndarray
    tissue: np.ndarray
    facts: list[dict[str, str]] = field(default_factory=list)

    def boxes(self, scale: float) -> np.ndarray:
        """Left, top, right, bottom of the tiles, [n, 4], where a pixel of the finest level has ``scale`` pixels."""
        corners = self.corners + self.extent.margin
        return np.concatenate([corners, corners + self.extent.inner], axis=1) * scale


def tile_source(
    job: Job, settings: Settings, mpp_override: float | None, folder: Path
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Tile a slide, or bring what an earlier process made of it.

    Args:
        folder: has ``parts/``, ``attempts/`` and ``qc/``. The tar is ``parts/<slide>.tar``, its index ``.npy`` and the
            facts ``.json``, written in this order: where the facts are, all is.

    Returns:
        The slide's facts, and the tar's index, None where the slide is refused.
    """
    tar = part(folder, job.source)
    state, index_file = tar.with_suffix(".json"), tar.with_suffix(".npy")
    if not state.exists():
        attempts = folder / "attempts" / tar.stem
        with attempts.open("ab") as file:
            file.write(b".")
        facts, index = _tiled(job, settings, mpp_override, folder, tar)
        if index is not None:
            with atomic_path(index_file) as temporary:
                np.save(temporary, index, allow_pickle=False)
        write_json(state, facts)
        attempts.unlink()
    facts = json.loads(state.read_bytes())
    return facts, np.load(index_file, allow_pickle=False) if facts["state"] == "done" else None


def part(folder: Path, source: Source) -> Path:
    """The tar of a slide's tiles in a working folder."""
    return folder / "parts" / f"{slide_key(source.slide)}.tar"


def refused(reason: str) -> dict[str, Any]:
    """The facts of a slide that cannot be used."""
    return {"tiles": 0, "state": "refused", "reason": reason}


def judge(tile: np.ndarray, thresholds: Thresholds) -> str | None:
    """Why a tile, uint8 [N, N, 3], is not worth keeping: "blank", "blur" or None."""
    gray = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    contrast = float(cv2.meanStdDev(gray)[1][0, 0])
    if contrast < thresholds.min_contrast:
        return "blank"
    fine = cv2.subtract(gray, cv2.GaussianBlur(gray, (5, 5), 1.0), dtype=cv2.CV_16S)
    return "blur" if float(cv2.meanStdDev(fine)[1][0, 0]) < thresholds.min_sharpness * contrast else None


def see(slide: Slide, job: Job, settings: Settings) -> Seen | None:
    """Look at a slide's thumbnail for its tissue; None where its light is its own, as in fluorescence."""
    assert slide.mpp is not None
    fitting = max(max(slide.size) * slide.mpp / THUMBNAIL_PIXELS, FINEST_THUMBNAIL_MPP)
    mpp = max(min(THUMBNAIL_MPP, fitting), slide.mpp)
    thumbnail = slide.thumbnail(mpp)
    if job.mask is not None:
        tissue = Tissue(read_mask(job.mask, slide.size, thumbnail.shape[:2]), {})
    elif is_dark(thumbnail):
        return None
    else:
        tissue = find_tissue(thumbnail, mpp, settings.thresholds)
    cores = dearray(tissue.mask, mpp) if settings.tma else None
    if settings.tma and cores is None:
        raise Refusal("no regular array of round cores was found; tile it without --tma")
    coords = read_coords(job.coords) if job.coords is not None else None
    return Seen(tissue, mpp, sections(tissue.mask, mpp, settings.thresholds), cores, coords)


def choose(slide: Slide, settings: Settings, seen: Seen, mpp: float, dropped: Counter[str]) -> Places:
    """The places of a slide's tiles at one µm/px; what is left out is counted in ``dropped`` by reason.

    Raises Refusal where the slide cannot give tiles of this µm/px.
    """
    assert slide.mpp is not None
    slide.require(mpp)
    side, stride = (px * mpp / slide.mpp for px in (settings.tile_size, settings.tile_size - settings.overlap))
    stored = settings.stored_size * mpp / slide.mpp
    if min(slide.size) * (1 + 1e-9) < stored:
        raise Refusal(f"{slide.size[0]} x {slide.size[1]} px, smaller than a tile ({math.ceil(stored)} px)")
    extent = Extent(stored, side, stride, slide.downsamples[slide.level(mpp / slide.mpp)])
    scale = slide.mpp / seen.mpp
    if seen.coords is not None:
        return _given(slide, seen.coords, mpp, extent, seen, scale, dropped)
    xs, ys = (grid(length, stored, extent.downsample, stride) for length in slide.size)
    lefts, tops = ((axis + extent.margin) * scale for axis in (xs, ys))
    share = box_means(seen.tissue.mask, lefts, tops, side * scale)  # [rows, columns]
    others = {name: box_means(mask, lefts, tops, side * scale) for name, mask in _rejected(seen.tissue).items()}
    pen = others.get("pen", np.zeros_like(share))
    wanted = (share >= settings.min_tissue) & (pen <= settings.thresholds.max_pen)
    rows, columns = np.nonzero(wanted)
    corners = np.stack([xs[columns], ys[rows]], axis=1)
    more = island_places(seen.tissue.mask, corners, extent, scale, slide.size)
    boxes = Places(mpp, extent, more, np.zeros(0)).boxes(scale)
    shares = box_shares(seen.tissue.mask, boxes)
    fit = (shares >= settings.min_tissue) & (box_shares(seen.tissue.pen, boxes) <= settings.thresholds.max_pen)
    _count_dropped(~wanted, share, others, settings.min_tissue, dropped)
    corners = np.concatenate([corners, more[fit]])
    in_rows = np.lexsort(corners.T)
    return Places(mpp, extent, corners[in_rows], np.concatenate([share[rows, columns], shares[fit]])[in_rows])


def encode(
    slide: Slide, places: Places, rows: np.ndarray, settings: Settings, dropped: Counter[str], judged: bool
) -> Iterator[tuple[int, bytes]]:
    """Row and bytes of the tiles of :func:`read_tiles`."""
    import simplejpeg

    for row, tile in read_tiles(slide, places, rows, settings, dropped, judged):
        if settings.format == "png":
            yield row, cv2.imencode(".png", tile[..., ::-1])[1].tobytes()
        else:
            yield row, simplejpeg.encode_jpeg(np.ascontiguousarray(tile), settings.quality, "RGB", SUBSAMPLING)


def read_tiles(
    slide: Slide, places: Places, rows: np.ndarray, settings: Settings, dropped: Counter[str], judged: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Row and pixels, uint8 [S, S, 3], of the tiles of ``places`` that can be read and, where asked, pass
    :func:`judge`, in order; the others are counted in ``dropped``."""
    margin = (settings.stored_size - settings.tile_size) // 2
    inner = slice(margin, margin + settings.tile_size)
    for row, tile in zip(rows.tolist(), slide.tiles(places.corners[rows], settings.stored_size, places.mpp)):
        if isinstance(tile, Refusal):
            dropped["unreadable"] += 1
            continue
        reason = judge(tile[inner, inner], settings.thresholds) if judged else None
        if reason:
            dropped[reason] += 1
        else:
            yield row, tile


def choose_all(
    slide: Slide, settings: Settings, seen: Seen, facts: dict[str, Any], dropped: Counter[str]
) -> list[Places]:
    """The places of a slide's tiles at each µm/px that it can give; what is learned of it goes into ``facts``."""
    facts["tissue_mm2"] = float(seen.tissue.mask.sum() * seen.mpp**2 / 1e6)
    facts["sections"] = int(seen.sections.max(initial=0))
    chosen, too_coarse = [], []
    for mpp in settings.mpp:
        try:
            chosen.append(choose(slide, settings, seen, mpp, dropped))
        except Refusal as refusal:
            too_coarse.append(refusal)
    if not chosen:
        raise too_coarse[0]
    return chosen


def tile_facts(name: str, places: Places, row: int, section: int) -> dict[str, Any]:
    """What is known of a tile of slide ``name``: what is stored with it."""
    x, y = places.corners[row].tolist()
    meta: dict[str, Any] = {"slide": name, "x": x, "y": y, "mpp": places.mpp}
    meta |= {"tissue": round(float(places.tissue[row]), 3), "section": section}
    if places.facts:
        meta |= {f"given_{k}" if k in OWN else k: v for k, v in places.facts[row].items()}
    return meta


def count_kept(
    tiles: int, chosen: list[Places], settings: Settings, facts: dict[str, Any], dropped: Counter[str], given: bool
) -> None:
    """Note in ``facts`` what became of a slide's places, of which ``tiles`` were kept; ``given``: by a table.

    Raises Refusal where that is none, or so few that the slide is damaged.
    """
    facts |= {f"dropped_{reason}": dropped[reason] for reason in DROP_REASONS}
    facts["magnifications"] = " ".join(f"{places.mpp:g}" for places in chosen)
    bad = dropped["unreadable"]
    if bad > MAX_UNREADABLE * (tiles + bad):
        raise Refusal(f"damaged: {bad} of {tiles + bad} tiles cannot be decoded")
    if not tiles:
        if given:
            raise Refusal("none of the given places is inside the slide")
        found = f"{facts['tissue_mm2']:.3g} mm² of tissue were found"
        raise Refusal(f"no tile is at least {settings.min_tissue:.0%} tissue and in order; {found}")
    facts["tiles"] = tiles


def _tiled(
    job: Job, settings: Settings, mpp_override: float | None, folder: Path, tar: Path
) -> tuple[dict[str, Any], np.ndarray | None]:
    source = job.source
    facts: dict[str, Any] = {}
    if source.refused or source.path is None:
        return refused(source.refused), None
    try:
        with Slide(source.path, mpp_override if source.mpp is None else source.mpp) as slide:
            facts |= {"vendor": slide.vendor, "width": slide.size[0], "height": slide.size[1]}
            slide.require(max(settings.mpp))
            facts |= {"mpp": slide.mpp, "mpp_source": slide.mpp_source}
            with atomic_path(tar) as temporary:
                index = _tile_slide(slide, job, settings, folder, temporary, facts)
    except Refusal as refusal:
        return facts | refused(str(refusal)), None
    return facts | {"state": "done", "reason": ""}, index


def _tile_slide(
    slide: Slide, job: Job, settings: Settings, folder: Path, tar: Path, facts: dict[str, Any]
) -> np.ndarray:
    """Write the tiles of a slide to ``tar`` and its picture; what is learned goes into ``facts`` as it is learned."""
    assert slide.mpp is not None
    seen = see(slide, job, settings)
    show_mpp = max(max(slide.size) * slide.mpp / PICTURE_PIXELS, slide.mpp)
    name = job.source.slide
    show = partial(_show, folder / "qc" / f"{slide_key(name)}.png", slide.thumbnail(show_mpp), show_mpp)
    if seen is None:
        show(None, [])
        raise Refusal(DARK)
    dropped: Counter[str] = Counter()
    chosen = choose_all(slide, settings, seen, facts, dropped)
    writer = TarWriter(tar)
    boxes = []
    for places in chosen:
        kept = _write(slide, job, settings, places, seen, writer, dropped)
        boxes.append(places.boxes(slide.mpp / show_mpp)[kept])
    index = writer.close()
    show(seen, boxes)
    count_kept(len(index), chosen, settings, facts, dropped, seen.coords is not None)
    return index


def _write(
    slide: Slide,
    job: Job,
    settings: Settings,
    places: Places,
    seen: Seen,
    writer: TarWriter,
    dropped: Counter[str],
) -> list[int]:
    """Write the tiles that are worth it at one µm/px; return their rows and count the others."""
    rows = np.arange(len(places.corners))
    boxes = places.boxes(slide.mpp / seen.mpp)  # type: ignore[operator]
    cores = box_labels(seen.cores.labels, boxes) if seen.cores else []
    if seen.cores:
        rows = rows[np.array(cores, bool)]
        dropped["background"] += len(cores) - len(rows)
    if settings.max_tiles is None:
        tiles = encode(slide, places, rows, settings, dropped, seen.coords is None)
    else:
        tiles = _sampled(slide, job, settings, places, rows, dropped, seen.coords is None)
    section_of = box_labels(seen.sections, boxes)
    name, kept = job.source.slide, []
    for row, image in tiles:
        meta = tile_facts(name, places, row, section_of[row])
        if seen.cores:
            meta["core"] = seen.cores.names[cores[row] - 1]
        writer.add(tile_key(name, meta["x"], meta["y"], places.mpp), image, settings.format, meta)
        kept.append(row)
    return kept


def _sampled(
    slide: Slide,
    job: Job,
    settings: Settings,
    places: Places,
    rows: np.ndarray,
    dropped: Counter[str],
    judged: bool,
) -> Iterator[tuple[int, bytes]]:
    """As :func:`encode`, of at most ``settings.max_tiles`` drawn places, row by row over the slide."""
    assert settings.max_tiles is not None
    before = sum(dropped[reason] for reason in JUDGED)
    key = hash32(settings.seed, purpose("tiles of a slide"), purpose(job.source.slide), round(1000 * places.mpp))
    groups = drawn(places.corners[rows], settings.max_tiles, settings.sample, key)
    tiles: list[tuple[int, bytes]] = []
    for group in groups:
        some = encode(slide, places, rows[group], settings, dropped, judged)
        wanted = settings.max_tiles if len(groups) == 1 else 1
        tiles += (tile for _, tile in zip(range(wanted), some))
    dropped["limit"] += len(rows) - len(tiles) - (sum(dropped[reason] for reason in JUDGED) - before)
    yield from sorted(tiles)


def _given(
    slide: Slide, coords: Coords, mpp: float, extent: Extent, seen: Seen, scale: float, dropped: Counter[str]
) -> Places:
    """The places that a table gives, as far as they lie in the slide."""
    if coords.size is not None and abs(coords.size / extent.inner - 1) > 0.01:
        fitting = mpp * coords.size / extent.inner
        raise Refusal(f"its places are of tiles of {coords.size} px at the finest level; give --mpp {fitting:.4g}")
    corners = coords.places.astype(np.float64) - (extent.stored / 2 if coords.centers else extent.margin)
    corners = snapped(corners, extent.downsample)
    inside = whole(corners, extent.stored, slide.size)
    dropped["outside"] += int((~inside).sum())
    kept = np.flatnonzero(inside)
    places = Places(
        mpp, extent, corners[kept], np.zeros(len(kept)), [coords.facts[i] for i in kept.tolist() if coords.facts]
    )
    if len(np.unique(places.corners, axis=0)) != len(kept):
        raise Refusal("two of its given places are one and the same tile")
    places.tissue = box_shares(seen.tissue.mask, places.boxes(scale))
    return places


def _rejected(tissue: Tissue) -> dict[str, np.ndarray]:
    """What is neither tissue nor glass, bool [H, W], by the reason for which a tile is dropped."""
    pens = {"pen": tissue.pen} if tissue.pen.any() else {}
    return pens | {reason: mask for reason, mask in tissue.rejected.items() if not reason.startswith("pen")}


def _count_dropped(
    unwanted: np.ndarray, share: np.ndarray, others: dict[str, np.ndarray], least: float, dropped: Counter[str]
) -> None:
    """Count tiles by what they would need to be tissue: the largest of what is rejected there, else glass."""
    names = list(others)
    areas = np.stack([*others.values(), np.zeros_like(share)])  # [reasons + 1, rows, columns]
    largest = areas.argmax(0)
    because = unwanted & (share + areas.max(0) >= least) & (areas.max(0) > 0)
    for number, name in enumerate(names):
        dropped[name] += int((because & (largest == number)).sum())
    dropped["background"] += int((unwanted & ~because).sum())


def _show(path: Path, image: np.ndarray, mpp: float, seen: Seen | None, boxes: list[np.ndarray]) -> None:
    """Draw what became of a slide over ``image``, its thumbnail at ``mpp`` µm/px."""
    if seen is None:
        write_png(path, picture(image, None, np.zeros((0, 4))))
        return
    names = {}
    if seen.cores:
        for label, name in enumerate(seen.cores.names, start=1):
            rows, columns = np.nonzero(seen.cores.labels == label)
            names[name] = (columns.mean() * seen.mpp / mpp, rows.min() * seen.mpp / mpp)
    write_png(path, picture(image, seen.tissue, np.concatenate(boxes), names))
