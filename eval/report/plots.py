"""Charts of the report as PNG bytes: curves of a run, stain vectors, and probes with their intervals.

One restrained style, colors that color-blind readers tell apart (Okabe and Ito 2008), and no global state: figures
are made without pyplot.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from eosin.eval.report.findings import number

INK, SOFT, LINE = "#24222c", "#6a6675", "#e2dfe8"
PURPLE, ORANGE, BLUE, GREEN, GRAY = "#4a3f8c", "#d55e00", "#0072b2", "#009e73", "#8c8894"
# Okabe and Ito's palette without yellow, which white paper swallows.
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", GRAY)
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # names come from files, and a dollar sign in one is no formula
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
DPI = 170
LONGEST_NAME = 40
NORM = "Norm of the gradient"
COLORS = {"trained": PURPLE, "random": GRAY, "color": ORANGE, "other": BLUE}


@dataclass(frozen=True)
class Panel:
    """A probe in the forest plot: rows of (name, role, value, low, high), NaN where undefined, and where chance is."""

    title: str
    chance: float | None
    rows: Sequence[tuple[str, str, float, float, float]]


@dataclass(frozen=True)
class Cloud:
    """One panel of points: what its axes say, places [n] each, and the place that a cross marks."""

    title: str
    xlabel: str
    ylabel: str
    x: np.ndarray
    y: np.ndarray
    target: tuple[float, float] | None = None


def curves(records: list[dict[str, Any]], prototypes: int) -> bytes:
    """A run's metrics against its steps, as small multiples; ln K is what a student without an answer pays.

    What is looked at now and then only is drawn as dots; a panel without a number is left out.
    """
    top = math.log(prototypes)
    panels: list[tuple[str, list[tuple[str, str, str]], dict[str, float]]] = [
        (
            "Loss",
            [
                ("dino", "DINO", PURPLE),
                ("ibot", "iBOT", ORANGE),
                ("held_out_dino", "DINO, held out", PURPLE),
                ("held_out_ibot", "iBOT, held out", ORANGE),
            ],
            {f"ln K = {top:.2f}": top},
        ),
        (
            "Accuracy of the online probe",
            [
                ("probe_accuracy", "balanced", PURPLE),
                ("probe_start", "of the first weights", GREEN),
                ("probe_chance", "by chance", GRAY),
            ],
            {},
        ),
        ("Spread of class tokens", [("koleo", "KoLeo", PURPLE), ("kde", "KDE", ORANGE)], {}),
        ("Effective rank of class tokens", [("effective_rank", "", PURPLE)], {}),
        (
            "Entropy of the teacher",
            [("teacher_entropy", "of a crop", PURPLE), ("prototype_entropy", "of all crops", ORANGE)],
            {f"ln K = {top:.2f}": top},
        ),
        (
            "Prototypes in use",
            [("prototypes_used", "observed", PURPLE), ("prototypes_even", "by even use", GRAY)],
            {},
        ),
        (
            "Neighbors from the same slide",
            [
                ("same_slide_rate", "observed", PURPLE),
                ("same_slide_chance", "by chance", GRAY),
                ("same_slide_most", "at most", GREEN),
            ],
            {},
        ),
        (NORM, [("grad_norm", "", PURPLE)], {}),
        ("Share of time and peak", [("data_wait", "waiting for tiles", ORANGE), ("mfu", "MFU", PURPLE)], {}),
        ("Learning rate", [("lr", "", PURPLE)], {}),
        ("Momentum of the teacher", [("momentum", "", PURPLE)], {}),
        ("Temperature of the teacher", [("teacher_temperature", "", PURPLE)], {}),
    ]
    known = {key for r in records for key, value in r.items() if value is not None}
    panels = [panel for panel in panels if any(key in known for key, *_ in panel[1])]
    rows = -(-len(panels) // 4)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 2.7 * rows), layout="constrained")
        grid = figure.subplots(rows, 4, squeeze=False).flatten()
        for axes, (title, lines, levels) in zip(grid, panels):
            drawn = [line for line in lines if line[0] in known]
            for key, label, color in drawn:
                looked = [r for r in records if key in r]
                values = [math.nan if r[key] is None else r[key] for r in looked]
                few = len(looked) < 4 or len(looked) < len(records)
                axes.plot(
                    [r["step"] for r in looked],
                    values,
                    color=color,
                    label=label or None,
                    marker="o" if few else "",
                    markersize=4,
                    linewidth=0.8 if few else None,
                )
            for label, level in levels.items():
                axes.axhline(level, color=SOFT, linestyle=(0, (4, 3)), linewidth=1, label=label)
            axes.set_title(title)
            axes.locator_params(axis="x", nbins=5)
            if title == NORM:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.locator_params(axis="y", nbins=5)
                axes.ticklabel_format(useOffset=False, style="plain" if title != "Learning rate" else "sci")
            if len(lines) + len(levels) > 1:
                axes.legend()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("training step", fontsize=10, color=SOFT)
        return png(figure)


def forest(panels: Sequence[Panel], xlabel: str) -> bytes:
    """Every encoder of every probe as a dot with its interval, beside the dashed line of chance."""
    columns = min(2, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(p.rows) for p in line) + 1.6 for line in lines]
    ends = [e for p in panels for r in p.rows for e in r[2:] if math.isfinite(e)]
    ends += [p.chance for p in panels if p.chance is not None]
    low, high = min(ends, default=0), max(ends, default=1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 0.36 * sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, height_ratios=heights)
        for line, row in zip(lines, grid):
            for panel, axes in zip(line, row):
                _forest_panel(axes, panel)
            for axes in row[len(line) :]:
                axes.set_axis_off()
            row[0].set_xlim(max(low - 0.04, -0.02) if low >= 0 else 1.1 * low, 1.02 if high <= 1 else 1.05 * high)
        figure.supxlabel(xlabel, fontsize=10, color=SOFT)
        return png(figure)


def _forest_panel(axes: Axes, panel: Panel) -> None:
    places = np.arange(len(panel.rows))[::-1]
    for place, (_, role, value, low, high) in zip(places, panel.rows):
        axes.plot([low, high], [place, place], color=COLORS[role], linewidth=2.2, solid_capstyle="butt")
        if not math.isfinite(value):
            continue
        axes.plot(value, place, "o", color=COLORS[role], markersize=7)
        axes.annotate(number(value), (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
    if panel.chance is not None:
        axes.axvline(panel.chance, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            "chance", (panel.chance, -0.72), (3, 0), textcoords="offset points", fontsize=8, color=SOFT, va="center"
        )
    axes.set_yticks(places, [short(r[0]) for r in panel.rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(False, axis="y")
    axes.set_ylim(-1, len(panel.rows) - 0.3)
    axes.set_title(short(panel.title, 80))
    axes.spines["left"].set_visible(False)


def stains(
    vectors: np.ndarray, maxima: np.ndarray, sites: Sequence[str], reference: tuple[np.ndarray, np.ndarray]
) -> bytes:
    """Stain fits of slides: where the vectors point, by site, and what color each stain has.

    Args:
        vectors: [slides, 2, 3] unit vectors of hematoxylin and eosin.
        maxima: [slides, 2].
        sites: [slides].
        reference: vectors [2, 3] and maxima [2] of the reference.
    """
    order = np.argsort(np.asarray(sites), kind="stable")
    vectors, maxima, sites = vectors[order], maxima[order], [sites[i] for i in order]
    names = list(dict.fromkeys(sites))
    # The last color stands for all further sites.
    color = {name: CATEGORIES[min(i, len(CATEGORIES) - 1)] for i, name in enumerate(names)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
        for stain, marker in enumerate("o^"):
            for name in names:
                rows = vectors[[s == name for s in sites], stain]
                left.scatter(rows[:, 0], rows[:, 2], s=34, marker=marker, color=color[name], alpha=0.75, linewidths=0)
            target = reference[0][stain]
            left.scatter(target[0], target[2], s=150, marker="+", color=INK, linewidths=1.8)
            left.annotate(
                ("hematoxylin", "eosin")[stain], (target[0], target[2]), (9, 7), textcoords="offset points", fontsize=9
            )
        left.margins(0.14)
        left.set(xlabel="red part of the stain's density", ylabel="blue part", title="Stain vectors of each slide")
        for name in names[: len(CATEGORIES)]:
            last = name == names[len(CATEGORIES) - 1 :][0] if len(names) > len(CATEGORIES) else False
            label = "further sites" if last else short(name or "no site given", 24)
            left.scatter([], [], s=34, color=color[name], label=label)
        left.scatter([], [], s=90, marker="+", color=INK, label="reference")
        left.legend(loc="best")
        _swatches(right, vectors, maxima, [color[s] for s in sites], reference)
        return png(figure)


def clouds(
    panels: Sequence[Cloud], sites: Sequence[str], *, target: str = "", ringed: np.ndarray | None = None, shared: bool
) -> bytes:
    """The same points in several panels, colored by site.

    Args:
        sites: [n], "" where a point has none.
        target: what the cross is.
        ringed: [n] bool, points that stand out.
        shared: all panels have the same axes.
    """
    names = sorted(set(sites))
    # The last color stands for all further sites.
    color = {name: CATEGORIES[min(i, len(CATEGORIES) - 1)] for i, name in enumerate(names)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False, sharex=shared, sharey=shared)[0]
        for axes, panel in zip(row, panels):
            axes.scatter(panel.x, panel.y, s=40, c=[color[s] for s in sites], alpha=0.75, linewidths=0)
            if ringed is not None:
                axes.scatter(panel.x[ringed], panel.y[ringed], s=130, facecolors="none", edgecolors=INK, linewidths=1.2)
            if panel.target is not None:
                axes.scatter(*panel.target, s=150, marker="+", color=INK, linewidths=1.8)
            axes.margins(0.1)
            axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
        for i, name in enumerate(names[: len(CATEGORIES)]):
            last = i == len(CATEGORIES) - 1 and len(names) > len(CATEGORIES)
            label = "further sites" if last else short(name or "no site given", 24)
            row[0].scatter([], [], s=40, color=color[name], label=label)
        if target:
            row[0].scatter([], [], s=90, marker="+", color=INK, label=target)
        if ringed is not None and ringed.any():
            row[0].scatter([], [], s=110, facecolors="none", edgecolors=INK, linewidths=1.2, label="stands out")
        figure.legend(loc="outside lower center", ncols=5)
        return png(figure)


def _swatches(
    axes: Axes, vectors: np.ndarray, maxima: np.ndarray, colors: list[str], reference: tuple[np.ndarray, np.ndarray]
) -> None:
    """A column a slide: its hematoxylin over its eosin at three quarters of their maxima, under its site's color."""
    band = [[mpl.colors.to_rgb(c) for c in colors]]
    stained = [np.exp(-0.75 * maxima[:, i, None] * vectors[:, i]) for i in (0, 1)]  # [slides, 3] each
    target = [np.exp(-0.75 * reference[1][i] * reference[0][i]) for i in (0, 1)]
    n = len(colors)
    for place, (row, aim) in enumerate(zip(stained, target)):
        axes.imshow(row[None], extent=(0, n, 1.6 - place, 2.5 - place), aspect="auto", interpolation="nearest")
        box = (n * 1.03, n * 1.09, 1.6 - place, 2.5 - place)
        axes.imshow(aim[None, None], extent=box, aspect="auto", interpolation="nearest")
    axes.imshow(band, extent=(0, n, 0.38, 0.5), aspect="auto", interpolation="nearest")
    axes.set_xlim(0, n * 1.1)
    axes.set_ylim(0.3, 2.6)
    axes.set_yticks([2.05, 1.05, 0.44], ["hematoxylin", "eosin", "site"])
    axes.set_xticks([n / 2, n * 1.06], [f"{n} slides, sorted by site", "reference"])
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Their colors")


def short(name: str, limit: int = LONGEST_NAME) -> str:
    """A name cut to what a chart has room for."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as PNG bytes, the same each time."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The page beside the chart shows a name in any script; the chart's font may lack it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
