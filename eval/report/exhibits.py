"""Sections of pictures: tissue masks, stain, crops, curves, patch tokens and attention."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from eosin.data_tools import qc
from eosin.data_tools.errors import Refusal
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import slide_key
from eosin.data_tools.slide import read_image
from eosin.eval.probe import attention_path
from eosin.eval.report import pictures, plots
from eosin.eval.report.findings import Results, role_of
from eosin.eval.report.material import Material
from eosin.eval.report.page import Block, Gallery, Legend, Picture, Section, Table, Words, chart, photo
from eosin.ssl.config import Stain, patch_size
from eosin.ssl.crops_sheet import views
from eosin.ssl.feed import Phase
from eosin.ssl.health import Monitors
from eosin.ssl.stain.augment import make_augmenter
from eosin.ssl.stain.fits import read_fit
from eosin.ssl.stain.normalizer import Normalizer, describe, make_normalizer
from eosin.ssl.stain.reference import BUILT_IN

QC_PICTURES = 8
QC_PIXELS = 480
STAIN_SLIDES = 8
STAIN_PIXELS = 200
CROP_TILES = 6
CROP_PIXELS = 160  # so that crops of any size are equally sharp on the page
LOCAL_CROPS = 4
OFF_SLIDES = 12
FULL_COLOR = 4.0  # even shares; where attention is nearly even, the map shall look so


def masks(m: Material) -> Section:
    """What was taken for tissue on a few slides."""
    title = "Tissue masks"
    lead = "Where tissue was seen and which tiles were kept; look for tissue that was missed and dirt that was not."
    folder = Path(m.shards.name) / "qc"
    names = m.column("slide")
    with_picture = [n for n in m.used.index if (folder / f"{slide_key(str(names[n]))}.png").is_file()]
    if not with_picture:
        missing = "This shard set holds no pictures of masks: 'eosin tile SLIDES --out SHARDS' makes them."
        return Section("masks", title, lead, [Words([missing])])
    found = []
    for slide in m.spread(pd.Index(with_picture), QC_PICTURES, ("site", "scanner", m.label)):
        try:
            image = read_image(folder / f"{slide_key(str(names[slide]))}.png")
        except Refusal:
            continue  # a broken picture is no reason to go without the others
        kept = f"{m.tiles_of_slide[slide]:,} tiles"
        found.append(photo(_fit(image, QC_PIXELS), f"mask of {names[slide]}", f"{m.caption(slide)} · {kept}"))
    colors = {"tissue": qc.OUTLINE, "kept tile": qc.GRID} | {r.replace("_", " "): c for r, c in qc.COLORS.items()}
    legend = Legend([("#{:02x}{:02x}{:02x}".format(*color), name) for name, color in colors.items()])
    return Section("masks", title, lead, [legend, Gallery(found, 230)])


def stain(m: Material) -> Section:
    """Tiles before and after normalization, the stains found, and where stain operations are off."""
    lead = "Laboratories stain differently; normalization moves each slide to one reference so that color tells less."
    fitted = _fits(m)
    mode = m.config.stain.normalize
    shown = m.normalizer or _would_be(m)
    blocks: list[Block] = []
    if mode == "off":
        blocks.append(Words(["Training used the tiles as they are (stain.normalize=off)."]))
    broken = _readable(m)[1]
    if broken:
        first = next(iter(broken))
        said = f"Broken stain fits: {len(broken)}, the first of slide '{m.column('slide')[first]}' ({broken[first]})"
        blocks.append(Words([f"{said}; 'eosin stain fit {m.shards.name}' makes them anew."], "warning"))
    if shown is not None:
        chosen = m.spread(
            pd.Index(fitted["slide"] if len(fitted) else m.used.index), STAIN_SLIDES, ("site", "scanner", m.label)
        )
        below = "what normalization would do" if mode == "off" else "as the model sees it"
        blocks += [Words([f"Above: as scanned. Below: {below}."]), Gallery(_pairs(m, shown, chosen), 106)]
    if len(fitted):
        vectors, maxima = np.stack(fitted["vectors"].to_list()), np.stack(fitted["maxima"].to_list())
        sites = [str(s) for s in m.column("site")[fitted["slide"]]]
        target = shown.reference if shown else BUILT_IN["eosin"]
        drawn = plots.stains(vectors, maxima, sites, (np.array(target.vectors), np.array(target.maxima)))
        blocks.append(Gallery([chart(drawn, "stain vectors and colors of each slide, by site")], 2000))
    elif not broken:
        blocks.append(Words([f"No slide has a stain fit yet: 'eosin stain fit {m.shards.name}' adds them."]))
    blocks += _switched_off(m)
    for other in m.beside:
        aside = replace(m, shards=other, slides=other.slides().reset_index(drop=True), beside=())
        blocks += [Words([f"Tiled beside it and not trained on: {other.folder.name}."]), *_switched_off(aside)]
    return Section("stain", "Stain", lead, blocks)


def crops(m: Material) -> Section:
    """The views of a few tiles that the objective compared."""
    verb = "made" if m.same_tiles else "would make"
    lead = (
        f"The crops that training {verb} of these tiles: the student must say the same of every crop of a tile, and "
        "guess what is under the gray patches."
    )
    rows: list[list[str | list[Picture]]] = []
    shards = Mixture({m.shards.name: 1.0})
    augmenter = make_augmenter(m.config.stain, shards, m.normalizer)
    phase = Phase(range(m.config.run.steps), m.config, shards, m.normalizer, augmenter)
    for view in views(phase, CROP_TILES):
        first = [_crop(view.raw, "tile as stored")]
        if m.normalizer:
            first.append(_crop(view.normalized, "tile normalized"))
        global_crops = [_crop(c, "global crop with its mask") for c in view.global_crops]
        local_crops = [_crop(c, "local crop") for c in view.local_crops[:LOCAL_CROPS]]
        rows.append([first, global_crops, local_crops])
    size = m.config.crops
    head = [
        "Tile: as stored" + (", normalized" if m.normalizer else ""),
        f"2 global crops, {size.global_size} px",
        f"{size.local_count} local crops, {size.local_size} px"
        + (f" ({LOCAL_CROPS} shown)" if size.local_count > LOCAL_CROPS else ""),
    ]
    share = f"{100 * m.config.objective.mask_probability:.0f} % of global crops"
    caption = f"About {share} have patches hidden from the student, drawn in gray here."
    return Section("crops", "Crops as the model sees them", lead, [Table(head, rows, caption)])


def curves(m: Material) -> Section:
    """Metrics of the run over its steps, and warnings in words."""
    lead = (
        "A healthy run keeps its effective rank and its entropies up while the loss falls; neighbors that share a "
        "slide far more often than by chance mean that it learns the slide instead of the tissue."
    )
    if not m.records:
        missing = "Nothing is logged yet: 'eosin train' writes metrics.jsonl."
        return Section("curves", "Curves", lead, [Words([missing])])
    drawn = plots.curves(m.records, m.config.objective.prototypes)
    blocks: list[Block] = [Gallery([chart(drawn, "curves of the run's metrics over its steps")], 2000)]
    said = _health(m)
    blocks.append(Words(said, "warning") if said else Words(["The monitors found nothing to warn of."]))
    return Section("curves", "Curves", lead, blocks)


def tokens(m: Material) -> Section:
    """The teacher's patch tokens over two slides in one basis."""
    title = "What it tells apart"
    lead = (
        "Each patch is colored by the three strongest directions of its features: patches of one color look alike to "
        "the model. It has learned tissue where colors follow glands, stroma and nuclei rather than the edges of tiles."
    )
    if m.teacher is None:
        return Section("tokens", title, lead, [Words(["No checkpoint yet: let 'eosin train' reach one."])])
    chosen = m.spread(m.used.index, 2, (m.label, "site"))
    laid = [(slide, _mosaic(m, slide)) for slide in chosen]
    there = [(slide, mosaic) for slide, mosaic in laid if mosaic is not None]
    if not there:
        return Section("tokens", title, lead, [Words([f"No tile can be read: run 'eosin verify {m.shards.name}'."])])
    painted, share = pictures.token_pictures(m.teacher, m.config, m.normalizer, there)
    found = []
    for (slide, mosaic), image in zip(there, painted):
        where = _extent(mosaic)
        found.append(photo(mosaic.paint(mosaic.images), "mosaic of tiles", f"{m.caption(slide)}{where}"))
        found.append(photo(image, "its patch tokens in false color", "patch tokens, same color = alike to the model"))
    patch = patch_size(m.config.model)
    note = (
        f"Teacher after {m.step:,} steps; {patch}-px patches of tiles resized to {m.config.crops.global_size} px; both "
        f"slides share one basis, whose three components hold {100 * share:.0f} % of the variance; background is gray."
    )
    return Section("tokens", title, lead, [Gallery(found, 400), Words([note])])


def attention(m: Material) -> Section:
    """Where the attention probe looked on slides it was not trained on."""
    title = "Attention"
    lead = "How much each tile counted in the slide probe's answer, from a probe that never saw the slide's group."
    found: list[Picture] = []
    for result in m.results:
        if attention_path(result.path).is_file() and not found:
            found = _attended(m, result)
    if not found:
        missing = (
            "No attention was found for these tiles: 'eosin eval mil E... --label L --group G --out R.json' adds it."
        )
        return Section("attention", title, lead, [Words([missing])])
    caution = (
        "Attention is not an explanation: it shows what was weighed, not why, and a wrong answer comes with a "
        "convincing map just as well."
    )
    return Section("attention", title, lead, [Gallery(found, 400), Words([caution], "warning")])


def _fits(m: Material) -> pd.DataFrame:
    """Slides with a stain fit: slide, vectors [2, 3], maxima [2]."""
    rows = [(n, fit) for n, fit in _readable(m)[0].items() if n in m.used.index]
    return pd.DataFrame(
        [(n, np.array(f["vectors"]), np.array(f["maxima"])) for n, f in rows], columns=["slide", "vectors", "maxima"]
    )


def _readable(m: Material) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """The fits of slides by number, and what is wrong with those that are broken."""
    fits: dict[int, dict[str, Any]] = {}
    broken: dict[int, str] = {}
    for slide, text in enumerate(m.column("stain_fit")):
        try:
            if text:
                fits[slide] = read_fit(str(text))
        except ValueError as error:
            broken[slide] = str(error)
    return fits, broken


def _would_be(m: Material) -> Normalizer | None:
    """What normalization to the built-in reference would do; None without fits that it can use."""
    fits, broken = _readable(m)
    conventions = {fit["convention"] for fit in fits.values()}
    if broken or len(conventions) != 1 or not conventions <= set(BUILT_IN):
        return None
    (convention,) = conventions
    return make_normalizer(describe(Stain(normalize="slide", convention=convention, reference=convention)), m.shards)


def _pairs(m: Material, normalizer: Normalizer, slides: list[int]) -> list[Picture]:
    found = []
    for slide in slides:
        tile = pictures.pick_tile(m.shards, slide, m.config.run.seed)
        if tile is not None:
            after = pictures.normalized(normalizer, tile[None], [slide])[0]
            pair = np.concatenate([_square(tile, STAIN_PIXELS), _square(after, STAIN_PIXELS)])
            found.append(photo(pair, "a tile before and after normalization", m.caption(slide)))
    return found


def _switched_off(m: Material) -> list[Block]:
    """Slides whose tiles stay as they are, and why."""
    texts, reasons = m.column("stain_fit"), m.column("stain_reason")
    off = [n for n in m.used.index if not texts[n] and reasons[n]]
    if not off:
        return []
    counts = Counter(str(reasons[n]) for n in off)
    rows: list[list[str | list[Picture]]] = []
    for n in off[:OFF_SLIDES]:
        tile = pictures.pick_tile(m.shards, n, m.config.run.seed)
        shown = [photo(_square(tile, STAIN_PIXELS), "a tile of the slide")] if tile is not None else []
        rows.append([shown, m.caption(n), str(m.column("stain")[n]), str(reasons[n])])
    total = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    caption = f"H&E operations are off for {len(off)} slides: {total}."
    return [Table(["Tile", "Slide", "Stain", "Why off"], rows, caption)]


def _health(m: Material) -> list[str]:
    """Each warning once, with the step that first gave rise to it."""
    first: dict[str, tuple[int, str]] = {}
    monitors = Monitors(m.config)
    for record in m.records:
        for name, sentence in monitors.look(record).items():
            first[name] = (first.get(name, (record["step"], ""))[0], sentence)
    return [f"From step {step:,}: {sentence}." for step, sentence in first.values()]


def _mosaic(m: Material, slide: int) -> pictures.Mosaic | None:
    mpp = pd.to_numeric(m.slides["mpp"], errors="coerce")[slide] if "mpp" in m.slides else math.nan
    return pictures.mosaic(m.shards, slide, float(mpp))


def _extent(mosaic: pictures.Mosaic) -> str:
    if not mosaic.placed:
        return " · tiles in a row, their places are unknown"
    return "" if mosaic.whole else " · the window with most tissue"


def _attended(m: Material, result: Results) -> list[Picture]:
    """Mosaics and heat maps of one or two bags: one answered rightly and one wrongly where there are such."""
    table = pd.read_parquet(attention_path(result.path))
    rows = [r for r in result.data["encoders"] if r.get("variant") == "attention"]
    row = next((r for r in rows if role_of(r) == "trained"), rows[0] if rows else None)
    if row is None:
        return []
    table = table[table["encoder"] == row["encoder"]]
    answers = result.predictions[result.predictions["encoder"] == row["name"]]
    right = answers["label"] == answers["predicted"]
    order = pd.concat([answers[right].head(1), answers[~right].head(1), answers[right].iloc[1:2]])
    bag_column = m.column(str(result.data["parameters"].get("bag", "slide")))
    found: list[Picture] = []
    for answer in order.itertuples():
        slides = [n for n in m.used.index if bag_column[n] == str(answer.key)]
        if not slides or len(found) == 4:
            continue
        slide = max(slides, key=lambda n: m.tiles_of_slide[n])
        mosaic = _mosaic(m, slide)
        weights = table[table["slide"] == answer.key].set_index("key")["attention"]
        if mosaic is None:
            continue
        keys = [m.shards.meta(int(t))["key"] for t in mosaic.tiles]
        if not set(keys) <= set(weights.index):
            continue
        shown = weights[keys].to_numpy() * len(weights)
        full = max(FULL_COLOR, float(shown.max()))
        verdict = "right" if answer.label == answer.predicted else "wrong"
        caption = (
            f"{row['encoder']}: true '{answer.label}', predicted '{answer.predicted}' ({verdict}). "
            f"Full color: {full:.1f} times an even share; the most here is {shown.max():.1f}."
        )
        found.append(photo(mosaic.paint(mosaic.images), "mosaic of tiles", m.caption(slide) + _extent(mosaic)))
        found.append(photo(pictures.heat(mosaic, shown, full), "attention of each tile", caption))
    return found


def _crop(image: np.ndarray, alt: str) -> Picture:
    return photo(_square(image, CROP_PIXELS), alt)


def _square(image: np.ndarray, side: int) -> np.ndarray:
    method = cv2.INTER_AREA if image.shape[0] > side else cv2.INTER_CUBIC
    return cv2.resize(image, (side, side), interpolation=method)


def _fit(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
