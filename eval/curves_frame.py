"""Curves as results, words and a picture: which points each has, what falls and from where on, a panel a curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.files import atomic_path
from eosin.eval.degrade import KINDS, Degradation
from eosin.eval.describe import PRIMARY, TITLES

if TYPE_CHECKING:
    import pandas as pd

    from eosin.eval.question import Answer
    from eosin.eval.splits import Split
    from eosin.eval.task import Task


FALLING = ("jpeg", "labels")  # the smaller the amount, the worse


def curves_of(
    degradations: Sequence[Degradation], shares: Sequence[tuple[str, float]], mpp: pd.Series | None
) -> list[dict[str, Any]]:
    """The curves, each with its points from mild to strong: variant and amount, in µm too where tiles have one scale.

    Args:
        shares: variant and share of the labels.
        mpp: of the tiles, None where unknown.
    """
    import pandas as pd

    scales = [] if mpp is None else pd.to_numeric(mpp, errors="coerce").unique().tolist()
    scale = scales[0] if len(scales) == 1 and scales[0] == scales[0] else None
    curves: dict[str, dict[str, Any]] = {}
    for d in degradations:
        curve = curves.setdefault(d.kind, {"kind": d.kind, "title": KINDS[d.kind].title, "points": []})
        point: dict[str, Any] = {"variant": d.name, "amount": d.amount}
        if scale and d.kind == "blur":
            point["um"] = d.amount * scale
        elif scale and d.kind in ("downsample", "magnification"):
            point["mpp"] = scale * d.amount if d.kind == "downsample" else scale / d.amount
        curve["points"].append(point)
    if shares:
        points = [{"variant": name, "amount": share} for name, share in shares]
        curves["labels"] = {"kind": "labels", "title": "share of the labels", "points": points}
    for kind, curve in curves.items():
        curve["points"].sort(key=lambda point: point["amount"], reverse=kind in FALLING)
    return list(curves.values())


def verdict_of(results: dict[str, Any]) -> list[str]:
    """For each encoder and curve: from what to what, and from which point on the fall excludes zero."""
    values = {e["name"]: e["metrics"][PRIMARY]["value"] for e in results["encoders"]}
    falls = {(c["a"], c["b"]): c for c in results["comparisons"] if c["metric"] == PRIMARY}
    lines = []
    for encoder in _names(results):
        clean = _row(encoder, "clean")
        lines.append(f"{encoder}: {TITLES[PRIMARY]} {values[clean]:.3f} on clean tiles with all labels.")
        for curve in results["curves"]:
            variants = [point["variant"] for point in curve["points"]]
            found = [falls[clean, _row(encoder, variant)] for variant in variants]
            fallen = [v for v, fall in zip(variants, found) if fall["excludes_zero"] and fall["value"] > 0]
            said = f"the fall excludes zero at {', '.join(fallen)}" if fallen else "no fall excludes zero"
            lines.append(f"  {variants[-1]}: {values[_row(encoder, variants[-1])]:.3f}; {said}.")
    return lines


def curve_lines(results: dict[str, Any]) -> list[str]:
    """Results as text for a terminal: a row a point, a column an encoder; then the verdict and notes."""
    encoders = _names(results)
    rows = {e["name"]: e["metrics"][PRIMARY] for e in results["encoders"]}
    variants = ["clean", *(p["variant"] for curve in results["curves"] for p in curve["points"])]
    table = [[f"{TITLES[PRIMARY]} [95 %]", *encoders]]
    for variant in variants:
        found = [rows[_row(encoder, variant)] for encoder in encoders]
        table.append([variant, *(f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for m in found)])
    table.append(["chance", *(f"{results['chance'][PRIMARY]:.3f}" for _ in encoders)])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    probe = results["parameters"]["probe"]
    asked = f"curves, {probe} fitted on {results['parameters']['fit']} tiles · label '{results['label']}'"
    counts = f"{results['n']} tiles in {results['groups']} groups of '{results['group']}'"
    return [f"{asked} · {counts}", "", *lines, "", *results["verdict"], *results["notes"]]


def draw(results: dict[str, Any], out: Path) -> None:
    """Write the picture: a panel a curve, a line an encoder with its interval, chance dashed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from eosin.eval.report.plots import CATEGORIES, DPI, SOFT, STYLE

    encoders, curves = _names(results), results["curves"]
    rows = {e["name"]: e["metrics"][PRIMARY] for e in results["encoders"]}
    columns = min(3, len(curves))
    height = -(-len(curves) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 0.6, 2.9 * height + 0.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(height, columns, sharey=True)).ravel()
        for axis, curve in zip(axes, curves):
            variants = ["clean", *(point["variant"] for point in curve["points"])]
            place = np.arange(len(variants))
            for number, encoder in enumerate(encoders):
                found = [rows[_row(encoder, variant)] for variant in variants]
                color = CATEGORIES[number % len(CATEGORIES)]
                value, low, high = ([point[key] for point in found] for key in ("value", "low", "high"))
                axis.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)
                axis.plot(place, value, color=color, marker="o", markersize=3.5, label=encoder)
            axis.axhline(results["chance"][PRIMARY], color=SOFT, linestyle=(0, (4, 3)), linewidth=1, label="chance")
            axis.set_xticks(place, [CLEAN_TICKS.get(curve["kind"], "0"), *map(_tick, curve["points"])])
            axis.set_title(curve["title"])
        for axis in axes[len(curves) :]:
            axis.remove()
        for axis in axes[::columns]:
            axis.set_ylabel(TITLES[PRIMARY])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(encoders) + 1)
        with atomic_path(out) as temporary:
            figure.savefig(temporary, dpi=DPI)


# What a clean tile, or all labels, are called on each axis.
CLEAN_TICKS = {"magnification": "1", "downsample": "1", "jpeg": "as is", "blur": "0", "labels": "all"}


def _tick(point: dict[str, Any]) -> str:
    amount = f"{point['amount']:g}"
    if "um" in point:
        return f"{amount}\n{point['um']:.2g} µm"
    if "mpp" in point:
        return f"{amount}\n{point['mpp']:.2g} µm/px"
    return f"{100 * point['amount']:g} %" if point["variant"].startswith("labels") else amount


def predictions_of(task: Task, split: Split, answers: Sequence[Answer]) -> pd.DataFrame:
    """A row a scored sample and point, as :func:`~eosin.data_tools.results.write_results` wants them."""
    import pandas as pd

    classes, groups = np.array(task.classes, dtype=object), np.array(task.group_names, dtype=object)
    rows, folds = split.rows, split.folds
    known = {
        "key": task.keys[rows],
        "group": groups[task.groups[rows]],
        "fold": folds,
        "label": classes[task.labels[rows]],
    }
    frames = [
        pd.DataFrame(
            {"encoder": answer.name}
            | known
            | {"predicted": classes[answer.probabilities.argmax(axis=1)]}
            | {f"probability_{c}": answer.probabilities[:, i] for i, c in enumerate(task.classes)}
        )
        for answer in answers
    ]
    return pd.concat(frames, ignore_index=True)


def _names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(e["encoder"] for e in results["encoders"]))


def _row(encoder: str, variant: str) -> str:
    return f"{encoder} + {variant}"
