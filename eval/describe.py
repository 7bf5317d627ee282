"""Results of a probe in words: the table that the command line prints, and the verdict that the results carry."""

from __future__ import annotations

from typing import Any

from eosin.eval.metrics import KAPPA, ONE_VS_ONE

PRIMARY = "balanced_accuracy"
TITLES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
}
# Of results that have them: of more than two classes, and of ordered ones.
MORE_TITLES = {ONE_VS_ONE: "AUROC one-vs-one", KAPPA: "quadratic kappa"}
MOST_CLASSES = 20  # a terminal shows one by one


def describe(results: dict[str, Any]) -> str:
    """Results as text for a terminal: a row a probe, chance, classes, subgroups, paired differences, the verdict."""
    lines = [
        f"{results['protocol']} · label '{results['label']}', {len(results['classes'])} classes · "
        f"{results['n']} {results['unit']}s in {results['groups']} groups of '{results['group']}' · "
        f"{_split(results)}, seed {results['parameters']['seed']}"
    ]
    lines += [f"left out: {count} with {reason}" for reason, count in results["left_out"].items()]
    titles = {m: t for m, t in (TITLES | MORE_TITLES).items() if m in results["chance"]}
    table = [["", *(f"{title} [95 %]" for title in titles.values()), "ECE"]]
    table += [
        [e["name"], *(_interval(e["metrics"][m]) for m in titles), f"{e['calibration']['ece']:.3f}"]
        for e in results["encoders"]
    ]
    table.append(["chance", *(f"{results['chance'][m]:.3f}" for m in titles), ""])
    lines += ["", *_aligned(table)]
    if 2 < len(results["classes"]) <= MOST_CLASSES:
        lines += ["", *_aligned(class_table(results))]
    for column in results["by"]:
        lines += ["", *_aligned(subgroup_table(results, column))]
    pairs = [c for c in results["comparisons"] if c["metric"] == PRIMARY]
    if pairs:
        tests = {(c["a"], c["b"]): c["delong"]["p"] for c in results["comparisons"] if "delong" in c}
        table = [["paired difference", f"{TITLES[PRIMARY]} [95 %]", "", "AUROC, DeLong" if tests else ""]]
        for pair in pairs:
            zero = "excludes zero" if pair["excludes_zero"] else "does not exclude zero"
            p = tests.get((pair["a"], pair["b"]))
            tested = "" if p is None else "p < .001" if p < 0.001 else f"p = {p:.3f}"
            table.append([f"{pair['a']} - {pair['b']}", _interval(pair, "+"), zero, tested])
        lines += ["", *_aligned(table)]
    return "\n".join([*lines, "", *results["verdict"], *results["notes"]])


def class_table(results: dict[str, Any]) -> list[list[str]]:
    """Recall of each class by each encoder: a head, and a row a class."""
    table = [["class", "n", "clusters", *(f"recall, {e['name']}" for e in results["encoders"])]]
    for name in results["classes"]:
        found = [e["classes"][name] for e in results["encoders"]]
        table.append([name, str(found[0]["n"]), str(found[0]["clusters"]), *(_interval(f["recall"]) for f in found)])
    return table


def subgroup_table(results: dict[str, Any], column: str) -> list[list[str]]:
    """The primary metric of each encoder by the values of a column: a head, and a row a value."""
    names = [e["name"] for e in results["encoders"]]
    table = [[f"by {column}", "n", "clusters", *(f"{TITLES[PRIMARY]}, {name}" for name in names), ""]]
    for row in results["by"][column]:
        found = [_interval(row["encoders"][name][PRIMARY]) for name in names]
        few = "few clusters" if row["few_clusters"] else ""
        table.append([row["value"] or "not given", str(row["n"]), str(row["clusters"]), *found, few])
    return table


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


def _split(results: dict[str, Any]) -> str:
    split = results["split"]
    if split["kind"] == "kfold":
        return f"{len(split['folds'])} grouped folds"
    if split["kind"] == "monte-carlo":
        return f"Monte Carlo, mean of {split['passes']} passes"
    if split["kind"] == "fixed":
        return f"fixed split, {split['folds'][0]['train']} to learn from"
    return f"one of {len(split['folds'])} groups left out at a time"


def _interval(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "undefined"
    if found["low"] is None:
        return f"{found['value']:{sign}.3f} [one cluster]"
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
