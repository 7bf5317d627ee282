"""Results of a probe in words: the table that the command line prints, and the verdict that the results carry."""

from __future__ import annotations

from typing import Any

from eosin.eval.statistics import METRICS

PRIMARY = "balanced_accuracy"
TITLES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
}


def describe(results: dict[str, Any]) -> str:
    """Results as text for a terminal: a row a probe, chance, the paired differences, and the verdict."""
    lines = [
        f"{results['protocol']} · label '{results['label']}', {len(results['classes'])} classes · "
        f"{results['n']} {results['unit']}s in {results['groups']} groups of '{results['group']}' · "
        f"{results['parameters']['folds']} grouped folds, seed {results['parameters']['seed']}"
    ]
    lines += [f"left out: {count} with {reason}" for reason, count in results["left_out"].items()]
    table = [["", *(f"{TITLES[m]} [95 %]" for m in METRICS)]]
    table += [[e["name"], *(_interval(e["metrics"][m]) for m in METRICS)] for e in results["encoders"]]
    table.append(["chance", *(f"{results['chance'][m]:.3f}" for m in METRICS)])
    lines += ["", *_aligned(table)]
    pairs = [c for c in results["comparisons"] if c["metric"] == PRIMARY]
    if pairs:
        table = [["paired difference", f"{TITLES[PRIMARY]} [95 %]", ""]]
        for pair in pairs:
            zero = "excludes zero" if pair["excludes_zero"] else "does not exclude zero"
            table.append([f"{pair['a']} - {pair['b']}", _interval(pair, "+"), zero])
        lines += ["", *_aligned(table)]
    return "\n".join([*lines, "", *results["verdict"], *results["notes"]])


def verdict(results: dict[str, Any]) -> list[str]:
    """Say, one line a variant, which encoder won, or that no difference excludes zero."""
    lines = []
    level = results["chance"][PRIMARY]
    for variant in dict.fromkeys(e["variant"] for e in results["encoders"]):
        rows = [e for e in results["encoders"] if e["variant"] == variant]
        best = max(rows, key=lambda e: e["metrics"][PRIMARY]["value"])
        reached = f"{best['name']} ({TITLES[PRIMARY]} {best['metrics'][PRIMARY]['value']:.3f})"
        names = {e["name"] for e in rows}
        pairs = [c for c in results["comparisons"] if c["metric"] == PRIMARY and {c["a"], c["b"]} <= names]
        level_with = [
            c["b"] if c["a"] == best["name"] else c["a"]
            for c in pairs
            if best["name"] in (c["a"], c["b"]) and not c["excludes_zero"]
        ]
        if best["metrics"][PRIMARY]["low"] <= level:
            lines.append(f"The best, {reached}, is not distinguishable from chance ({level:.3f}).")
        elif not pairs:
            lines.append(f"{reached} is above chance ({level:.3f}).")
        elif not any(c["excludes_zero"] for c in pairs):
            lines.append(f"No difference excludes zero; the highest is {reached}.")
        elif not level_with:
            lines.append(f"{reached} won: its difference to every other encoder excludes zero.")
        else:
            lines.append(
                f"{reached} is the highest, but its difference to {' and '.join(level_with)} does not exclude zero."
            )
    return lines


def _interval(found: dict[str, Any], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
