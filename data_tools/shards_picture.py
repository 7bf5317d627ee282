"""The picture of :mod:`eosin.data_tools.shards_sheet`: charts over tiles to look at. This module measures nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from eosin.data_tools.files import atomic_path
from eosin.data_tools.qc import write_png
from eosin.data_tools.shards_sheet import GROUPS, SHOWN, Content, clean, cut_of_circle, headline

INK, SOFT, LINE, PURPLE, ORANGE = "#24222c", "#6a6675", "#e2dfe8", "#4a3f8c", "#d55e00"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.parse_math": False,  # names come from files, and a dollar sign in one is no formula
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}
DPI = 160
COLUMNS, GAP, MARGIN, CAPTION = 8, 9, 40, 22  # tiles in a row; pixels
WIDTH = 2 * MARGIN + COLUMNS * SHOWN + (COLUMNS - 1) * GAP
ACROSS, CHART_HEIGHT = 4, 300  # charts in a row; pixels
TITLE_HEIGHT, BAR_HEIGHT = 70, 34  # of charts that are a bar for each category
CATEGORIES, BINS = 7, 24  # bars of a chart
LONGEST = 24  # letters of a category


@dataclass(frozen=True)
class Panel:
    """A chart: its title, how it is drawn, and how many bars it has, 0 for a histogram."""

    title: str
    chart: Callable[[Axes], None]
    bars: int = 0


def draw(content: Content, out: Path) -> None:
    """Write the picture as a PNG, atomically."""
    parts = [_head(content), _charts(panels(content)), _tiles(content)]
    with atomic_path(out) as temporary:
        write_png(temporary, np.concatenate(parts))


def panels(content: Content) -> list[Panel]:
    """The charts; what the set does not know has none."""
    sample, table = content.sample, content.table
    has_tiles = content.tiles_of_slide > 0
    counts = content.tiles_of_slide[has_tiles]
    found: list[Panel] = []
    if counts.min() < counts.max():
        found.append(Panel("Tiles a slide", partial(_histogram, counts, "slides")))
    known = ~np.isnan(sample.tissue)
    if known.any():
        share = partial(_histogram, 100 * sample.tissue[known], "tiles", unit=" %", span=(0.0, 100.0))
        found.append(Panel("Tissue in a tile", share))
    colored = ~np.isnan(content.hue)
    if colored.mean() > 0.5:
        cut = cut_of_circle(content.hue)
        turned = (content.hue[colored] - cut) % 360 + cut
        hue = partial(_histogram, turned, "tiles", unit="°", colors=sample.colors[colored])
        found.append(Panel("Mean hue of a tile", hue))
    density = partial(_histogram, sample.density, "tiles", colors=sample.colors, digits=2)
    found.append(Panel("Mean optical density of a tile", density))
    if "mpp_source" in table:
        scanned = pd.to_numeric(table["mpp"][has_tiles], errors="coerce").dropna().to_numpy(np.float64)
        if len(np.unique(scanned)) > 1:
            found.append(Panel("Finest µm/px of a slide", partial(_histogram, scanned, "slides", digits=3)))
    bars = [("Tiles by µm/px", {f"{mpp:g}": n for mpp, n in content.mpps.items()}, PURPLE)]
    bars += [("Tiles dropped", content.dropped, ORANGE)]
    bars += [(f"Slides by {column}", content.groups(column), PURPLE) for column in GROUPS]
    for title, named, color in bars:
        if named:
            some = _largest(list(named.items()))
            found.append(Panel(title, partial(_bars, some, color=color), len(some)))
    return found


def _largest(named: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The first categories; of many, the last are one."""
    if len(named) <= CATEGORIES:
        return named
    rest = named[CATEGORIES - 1 :]
    return [*named[: CATEGORIES - 1], (f"{len(rest)} others", sum(n for _, n in rest))]


def _histogram(
    values: np.ndarray,
    of: str,
    axes: Axes,
    *,
    unit: str = "",
    digits: int = 0,
    span: tuple[float, float] | None = None,
    colors: np.ndarray | None = None,
) -> None:
    """A histogram with its median; with ``colors``, [n, 3], each bar has the mean of its values'."""
    low, high = span or (float(values.min()), float(values.max()))
    whole = values.dtype.kind in "iu"
    logarithmic = whole and high > 100 * low
    edges: np.ndarray
    if logarithmic:
        edges = np.geomspace(low, high + 1, BINS + 1)
    elif whole:
        step = max(1, -(-int(high - low + 1) // BINS))
        edges = low - 0.5 + step * np.arange(-(-int(high - low + 1) // step) + 1)
    else:
        least = max((high - low) / 2, 5 * 10.0**-digits)  # equal values are one bar, not an axis without an extent
        edges = np.linspace((low + high) / 2 - least, (low + high) / 2 + least, BINS + 1)
    bar = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    heights = np.bincount(bar, minlength=len(edges) - 1)
    paint: Any = PURPLE
    if colors is not None:
        sums = np.stack([np.bincount(bar, colors[:, c], len(heights)) for c in range(3)], axis=1)
        paint = np.clip(sums / np.maximum(heights, 1)[:, None], 0, 1)
    edge = INK if colors is not None else "white"  # pale tissue is seen on white paper too
    axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=paint, edgecolor=edge, linewidth=0.4)
    if logarithmic:
        axes.set_xscale("log")
    median = float(np.median(values))
    shown = median % 360 if unit == "°" else median
    axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.text(0, 1.03, f"median {shown:,.{digits}f}{unit}", color=SOFT, transform=axes.transAxes)
    axes.set_ylabel(of)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if not logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    turn = 360 if unit == "°" else np.inf
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value % turn:,.{digits}f}{unit}"))


def _bars(named: list[tuple[str, int]], axes: Axes, *, color: str) -> None:
    """A bar with its count for each category."""
    most = max(n for _, n in named)
    places = np.arange(len(named))
    axes.barh(places, [n for _, n in named], 0.7, color=color)
    for place, (_, n) in zip(places.tolist(), named):
        axes.text(n + 0.02 * most, place, f"{n:,}", va="center", fontsize=7.5)
    axes.set_yticks(places, [_shortened(clean(name), LONGEST) for name, _ in named], color=INK)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_xlim(0, 1.25 * most)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def _charts(found: list[Panel]) -> np.ndarray:
    """All charts, uint8 [H, WIDTH, 3]."""
    kinds = [p for p in found if not p.bars], [p for p in found if p.bars]
    rows = [kind[i : i + ACROSS] for kind in kinds for i in range(0, len(kind), ACROSS)]
    bars = [max(panel.bars for panel in row) for row in rows]
    heights = [TITLE_HEIGHT + BAR_HEIGHT * most if most else CHART_HEIGHT for most in bars]
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        size = ((WIDTH - MARGIN) / DPI, sum(heights) / DPI)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.02)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(len(rows), ACROSS, squeeze=False, gridspec_kw={"height_ratios": heights})
        for of_row, row, most in zip(grid, rows, bars):
            for axes, panel in zip(of_row, row):
                panel.chart(axes)
                axes.set_title(panel.title, pad=8 if panel.bars else 20)
                if panel.bars:
                    axes.set_ylim(most - 0.5, -0.5)  # bars of a row are equally thick
            for axes in of_row[len(row) :]:
                axes.set_visible(False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = np.asarray(canvas.buffer_rgba())[..., :3]
    page = np.full((image.shape[0] + MARGIN // 2, WIDTH, 3), 255, np.uint8)
    left = (WIDTH - image.shape[1]) // 2
    page[: image.shape[0], left : left + image.shape[1]] = image
    return page


def _head(content: Content) -> np.ndarray:
    page = Image.new("RGB", (WIDTH, 130), "white")
    pen = ImageDraw.Draw(page)
    large, small = _font(30), _font(19)
    name = _fitting(clean(content.shards.name), large, WIDTH - 2 * MARGIN)
    pen.text((MARGIN, 28), name, INK, large)
    pen.text((MARGIN, 76), headline(content), SOFT, small)
    return np.asarray(page)


def _tiles(content: Content) -> np.ndarray:
    """Tiles in rows, those of a slide side by side, with their slides' names."""
    sample, names = content.sample, content.table["slide"].astype(str).tolist()
    order = np.argsort(sample.slides[: len(sample.images)], kind="stable").tolist()
    rows = -(-len(order) // COLUMNS)
    top = 46
    page = Image.new("RGB", (WIDTH, top + rows * (SHOWN + CAPTION + GAP) + MARGIN - GAP), "white")
    pen = ImageDraw.Draw(page)
    large, small = _font(19), _font(13)
    slides = len(set(sample.slides[: len(order)].tolist()))
    pen.text((MARGIN, 6), f"{len(order)} tiles of {slides} slides, drawn at random", INK, large)
    for place, number in enumerate(order):
        left = MARGIN + place % COLUMNS * (SHOWN + GAP)
        upper = top + place // COLUMNS * (SHOWN + CAPTION + GAP)
        page.paste(Image.fromarray(sample.images[number]), (left, upper))
        pen.rectangle((left, upper, left + SHOWN - 1, upper + SHOWN - 1), outline=LINE)
        name = _fitting(clean(names[sample.slides[number]]), small, SHOWN)
        pen.text((left, upper + SHOWN + 3), name, SOFT, small)
    return np.asarray(page)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which knows most alphabets."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Text shortened in its middle until it is as wide as ``width`` pixels, since names often differ at their ends."""
    kept = len(text)
    while kept > 1 and font.getlength(_shortened(text, kept)) > width:
        kept -= 1
    return _shortened(text, kept)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
