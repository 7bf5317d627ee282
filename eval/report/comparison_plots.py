"""Charts of the comparison page as PNG bytes: recall by class, reliability, principal components, curves over a number.

In the style of :mod:`eosin.eval.report.plots`; few colors, so that pages stay small.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eosin.eval.report.findings import Probe, title_of
from eosin.eval.report.plots import CATEGORIES, GRAY, ORANGE, PURPLE, SOFT, STYLE, png, short

PALETTE_SIZE, SMALL_DPI = 96, 125
UNTRAINED = (GRAY, "#4d4a55", "#bab6c2")
OTHERS = (PURPLE, "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b3294", "#1b7837")
MANY = "turbo"  # of more values than there are categories: neighbors in it need not be told apart


@dataclass(frozen=True)
class Scatter:
    """A panel of principal components: title, places [n, 2], the value of each point [n]."""

    title: str
    points: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A panel of curves: encoder -> (number, value, low, high) of each point."""

    title: str
    xlabel: str
    ylabel: str
    chance: float | None
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]]


def colors_of(encoders: Mapping[str, str]) -> dict[str, str]:
    """A color for each encoder, given its role: grays for random weights, orange for color, others in turn."""
    palettes = {"random": itertools.cycle(UNTRAINED), "color": itertools.repeat(ORANGE)}
    others = itertools.cycle(OTHERS)
    return {name: next(palettes.get(role, others)) for name, role in encoders.items()}


def of_each(
    probes: Sequence[Probe], colors: Mapping[str, str], names: Sequence[str], metric: str, of: str = "classes"
) -> bytes:
    """A metric of each class by each encoder, with intervals; a panel a probe.

    Args:
        names: of the classes.
        of: where a row holds them; "targets" for what is measured.
    """
    classes = len(names)
    encoders = max(len(p.rows) for p in probes)
    height = max(1.6, classes * (0.16 * encoders + 0.16)) + 0.8
    with mpl.rc_context(STYLE):
        figure, grid = _grid(len(probes), min(2, len(probes)), height)
        for axes, probe in zip(grid, probes):
            least = 0.0
            for place, name in enumerate(names):
                for number, row in enumerate(probe.rows):
                    found = row[of].get(name, {}).get(metric)
                    if found is None:
                        continue
                    y = place + 0.76 * ((number + 0.5) / len(probe.rows) - 0.5)
                    color = colors[row["encoder"]]
                    if found["low"] is not None:
                        axes.plot([found["low"], found["high"]], [y, y], color=color, linewidth=2)
                    axes.plot(found["value"], y, "o", color=color, markersize=4.5)
                    least = min(least, found["value"], least if found["low"] is None else found["low"])
            axes.set_yticks(range(classes), [short(str(c), 24) for c in names])
            axes.set_ylim(classes - 0.5, -0.5)
            axes.set_xlim(least - 0.02, 1.02)
            axes.set(title=short(probe.title, 60), xlabel=title_of(metric))
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            axes.hlines(np.arange(classes - 1) + 0.5, least, 1, color=SOFT, linewidth=0.4)
        _encoders(figure, [r["encoder"] for r in probes[0].rows], colors)
        return compact(png(figure, SMALL_DPI))


def reliabilities(probes: Sequence[Probe], colors: Mapping[str, str]) -> bytes:
    """Accuracy against confidence, a dot a bin, as large as it holds answers; on the diagonal both agree."""
    with mpl.rc_context(STYLE):
        figure, grid = _grid(len(probes), 3, 3.6)
        for axes, probe in zip(grid, probes):
            axes.plot([0, 1], [0, 1], color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
            for row in probe.rows:
                bins = row["calibration"]["bins"]
                color, total = colors[row["encoder"]], sum(b["n"] for b in bins)
                x, y = [b["confidence"] for b in bins], [b["accuracy"]["value"] for b in bins]
                axes.plot(x, y, color=color, linewidth=0.9, alpha=0.6)
                axes.scatter(x, y, s=[4 + 180 * b["n"] / total for b in bins], color=color, linewidths=0, alpha=0.85)
            axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
            axes.set_title(short(probe.title, 44))
        _encoders(figure, [r["encoder"] for r in probes[0].rows], colors)
        return compact(png(figure, SMALL_DPI))


def components(panels: Sequence[Scatter], columns: int) -> bytes:
    """Points in the plane of their first two components, colored by a value; ``columns`` panels in a line."""
    with mpl.rc_context(STYLE):
        figure, grid = _grid(len(panels), columns, 12 / columns * 0.95)
        legends = set()
        for number, (axes, panel) in enumerate(zip(grid, panels)):
            names = sorted(set(panel.values), key=lambda v: (v == "", v))
            color = _values_colors(names)
            x, y = panel.points.T
            axes.scatter(x, y, s=5, c=[color[v] for v in panel.values], linewidths=0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(panel.title, fontsize=9)
            axes.margins(0.06)
            if number < columns and len(names) <= len(CATEGORIES) and tuple(names) not in legends:
                legends.add(tuple(names))
                for name in names:
                    axes.scatter([], [], s=22, color=color[name], label=short(name or "not given", 18))
                axes.legend(loc="best", fontsize=7.5, frameon=True, framealpha=0.75, edgecolor="none", borderpad=0.2)
        return compact(png(figure, SMALL_DPI))


def curves(panels: Sequence[Curve], colors: Mapping[str, str]) -> bytes:
    """The primary metric of each encoder against the number that variants name, with intervals."""
    with mpl.rc_context(STYLE):
        figure, grid = _grid(len(panels), 2, 3.6)
        for axes, panel in zip(grid, panels):
            for name, points in panel.lines.items():
                x, value, low, high = np.array(sorted(points)).T
                axes.plot(x, value, "o-", color=colors[name], markersize=4.5)
                axes.fill_between(x, low, high, color=colors[name], alpha=0.14, linewidth=0)
            if panel.chance is not None:
                axes.axhline(panel.chance, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
            numbers = sorted({p[0] for points in panel.lines.values() for p in points})
            if numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]:
                axes.set_xscale("log")
            axes.set_xticks(numbers, [f"{n:g}" for n in numbers])
            axes.minorticks_off()
            axes.set(xlabel=short(panel.xlabel), ylabel=panel.ylabel, title=short(panel.title, 60))
        _encoders(figure, list(panels[0].lines), colors)
        return compact(png(figure, SMALL_DPI))


def curve_of(title: str, number_of: Mapping[str, float], xlabel: str, probes: Sequence[Probe]) -> Curve:
    """The curve of a results file whose variants name numbers."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for probe in probes:
        for row in probe.rows:
            found: dict[str, Any] | None = row["metrics"][probe.primary]
            if found is None:
                continue
            ends = [found["value"] if found[k] is None else found[k] for k in ("low", "high")]
            point = (number_of[probe.variant], found["value"], *ends)
            lines.setdefault(row["encoder"], []).append(point)
    chances = {p.chance for p in probes}
    return Curve(title, xlabel, title_of(probes[0].primary), chances.pop() if len(chances) == 1 else None, lines)


def compact(data: bytes) -> bytes:
    """A PNG of few colors, a third of its size."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.quantize(PALETTE_SIZE, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with room for ``count`` panels."""
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(12, height * lines + 0.4), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _encoders(figure: Figure, names: Sequence[str], colors: Mapping[str, str]) -> None:
    handles = [mpl.lines.Line2D([], [], color=colors[n], marker="o", label=short(n)) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def _values_colors(names: Sequence[str]) -> dict[str, Any]:
    if len(names) <= len(CATEGORIES):
        return dict(zip(names, CATEGORIES))
    shades = mpl.colormaps[MANY](np.linspace(0.03, 0.97, len(names)))
    # Names beside each other, such as patients of one hospital, get colors far apart.
    order = np.argsort(np.arange(len(names)) * 0.6180339887 % 1)
    return dict(zip(names, shades[order]))
