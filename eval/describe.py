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
# Of results that have them: of more than two classes, of ordered ones, and of other questions than classes.
MORE_TITLES = {
    ONE_VS_ONE: "AUROC one-vs-one",
    KAPPA: "quadratic kappa",
    "pearson": "Pearson r",
    "pearson_within": "Pearson r within",
    "r2": "R²",
    "mae": "MAE in deviations",
    "map": "mAP",
    "ari": "ARI",
    "nmi": "NMI",
    "matched_accuracy": "matched accuracy",
    "dice": "Dice",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
}
MOST_CLASSES = 20  # a terminal shows one by one
MOST_ROWS = 8  # encoders and variants that it shows side by side


def describe(results: dict[str, Any]) -> str:
    """Results as text for a terminal: a row a probe, chance, classes, subgroups, paired differences, the verdict."""
    lines = [
        f"{results['protocol']} · {_asked(results)} · "
        f"{results['n']} {results['unit']}s in {results['groups']} groups of '{results['group']}' · "
        f"{_split(results)}seed {results['parameters']['seed']}"
    ]
    lines += [f"left out: {count} with {reason}" for reason, count in results["left_out"].items()]
    lines += [f"not as published: {said}" for said in [results["parameters"].get("differs")] if said]
    more = _more_columns(results["encoders"])
    table = [["", *(f"{title(m)} [95 %]" for m in results["chance"]), *more]]
    for number, e in enumerate(results["encoders"]):
        cells = [column[number] for column in more.values()]
        table.append([e["name"], *(_interval(e["metrics"][m]) for m in results["chance"]), *cells])
    levels = ["–" if level is None else f"{level:.3f}" for level in results["chance"].values()]
    table.append(["chance", *levels, *("" for _ in more)])
    lines += ["", *_aligned(table)]
    few = len(results["encoders"]) <= MOST_ROWS
    if 2 < len(results["classes"]) <= MOST_CLASSES and "classes" in results["encoders"][0] and few:
        lines += ["", *_aligned(class_table(results))]
    if 1 < len(results.get("targets", [])) <= MOST_CLASSES:
        lines += ["", *_aligned(target_table(results))]
    for column in results.get("by", {}):
        lines += ["", *_aligned(subgroup_table(results, column))]
    primary = results.get("primary", PRIMARY)
    pairs = [c for c in results["comparisons"] if c["metric"] == primary]
    if pairs:
        tests = {(c["a"], c["b"]): c["delong"]["p"] for c in results["comparisons"] if "delong" in c}
        table = [["paired difference", f"{title(primary)} [95 %]", "", "AUROC, DeLong" if tests else ""]]
        variants = {e["name"]: e["variant"] for e in results["encoders"]}
        between = [p for p in pairs if variants[p["a"]] == variants[p["b"]]]
        shown = between if len(pairs) > MOST_CLASSES else pairs
        for pair in shown:
            zero = "excludes zero" if pair["excludes_zero"] else "does not exclude zero"
            p = tests.get((pair["a"], pair["b"]))
            tested = "" if p is None else "p < .001" if p < 0.001 else f"p = {p:.3f}"
            table.append([f"{pair['a']} - {pair['b']}", _interval(pair, "+"), zero, tested])
        lines += ["", *_aligned(table)]
        if len(shown) < len(pairs):
            lines.append(f"and {len(pairs) - len(shown)} between variants of one encoder, in the results")
    return "\n".join([*lines, "", *results["verdict"], *results["notes"]])


def title(metric: str) -> str:
    """What a metric is called: "balanced accuracy", "top-5"."""
    return (TITLES | MORE_TITLES).get(metric) or metric.replace("_", "-")


def _more_columns(encoders: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What stands beside the metrics: what a share of labels held, deviations over runs or episodes, calibration."""
    details, columns = [e.get("details", {}) for e in encoders], {}
    if all("share" in d for d in details):
        shares = [d["share"] for d in details]
        columns["samples learned from"] = [_range(share["samples"]) for share in shares]
        columns["groups"] = [_range(share["groups"]) for share in shares]
    if all(f"{PRIMARY}_deviation" in d for d in details):
        columns["SD over runs"] = [f"{d[f'{PRIMARY}_deviation']:.3f}" for d in details]
    if all("over_episodes" in d for d in details):
        columns["SD over episodes"] = [f"{d['over_episodes'][PRIMARY]['deviation']:.3f}" for d in details]
    if "calibration" in encoders[0]:
        columns["ECE"] = [f"{e['calibration']['ece']:.3f}" for e in encoders]
    return columns


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def class_table(results: dict[str, Any]) -> list[list[str]]:
    """Recall, or where there is none the primary metric, of each class by each encoder: a head, and a row a class."""
    recalled = "recall" in results["encoders"][0]["classes"][results["classes"][0]]
    shown = "recall" if recalled else results["primary"]
    table = [["class", "n", "clusters", *(f"{title(shown)}, {e['name']}" for e in results["encoders"])]]
    for name in results["classes"]:
        found = [e["classes"][name] for e in results["encoders"]]
        table.append([name, str(found[0]["n"]), str(found[0]["clusters"]), *(_interval(f[shown]) for f in found)])
    return table


def target_table(results: dict[str, Any]) -> list[list[str]]:
    """The primary metric of each target by each encoder: a head, and a row a target."""
    primary = results["primary"]
    table = [["target", *(f"{title(primary)}, {e['name']}" for e in results["encoders"])]]
    for target in results["targets"]:
        table.append([target["name"], *(_interval(e["targets"][target["name"]][primary]) for e in results["encoders"])])
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
    primary = results.get("primary", PRIMARY)
    level = results["chance"][primary]
    for variant in dict.fromkeys(e["variant"] for e in results["encoders"]):
        rows = [e for e in results["encoders"] if e["variant"] == variant]
        best = max(rows, key=lambda e: e["metrics"][primary]["value"])
        reached = f"{best['name']} ({title(primary)} {best['metrics'][primary]['value']:.3f})"
        names = {e["name"] for e in rows}
        pairs = [c for c in results["comparisons"] if c["metric"] == primary and {c["a"], c["b"]} <= names]
        level_with = [
            c["b"] if c["a"] == best["name"] else c["a"]
            for c in pairs
            if best["name"] in (c["a"], c["b"]) and not c["excludes_zero"]
        ]
        if best["metrics"][primary]["low"] <= level:
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


def _asked(results: dict[str, Any]) -> str:
    if "targets" in results:
        return f"{results['label']}, {len(results['targets'])} target{'s' * (len(results['targets']) > 1)}"
    return f"label '{results['label']}', {len(results['classes'])} classes"


def _split(results: dict[str, Any]) -> str:
    if "split" not in results:
        return ""
    split = results["split"]
    if split["kind"] == "kfold":
        runs = f", mean of {split['passes']} runs" if split["passes"] > 1 else ""
        return f"{len(split['folds']) // split['passes']} grouped folds{runs}, "
    if split["kind"] == "monte-carlo":
        return f"Monte Carlo, mean of {split['passes']} passes, "
    if split["kind"] == "fixed":
        return f"fixed split, {split['folds'][0]['train']} to learn from, "
    return f"one of {len(split['folds'])} groups left out at a time, "


def _interval(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "undefined"
    if found["low"] is None:
        return f"{found['value']:{sign}.3f} [one cluster]"
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
