"""What results of probes say, in words and tables: who won, by how much, and how sure that is.

Sentences are made from numbers alone, so they read the same whether the trained encoder won or lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eosin.data_tools.results import read_results
from eosin.eval.describe import PRIMARY, TITLES
from eosin.eval.describe import title as title_of
from eosin.eval.presets import PRESETS

PROTOCOLS = {
    "dinov2-knn": "kNN",
    "linear": "Linear probe",
    "mil": "Slide probe (MIL)",
    "mlp": "MLP probe",
    "uni-simpleshot": "SimpleShot (UNI)",
    "thunder-simpleshot": "SimpleShot (THUNDER)",
    "ridge": "Ridge regression",
    "retrieval": "Retrieval",
    "k-means": "Clustering",
    "dense-linear": "Dense probe",
    "dense-ridge": "Dense regression",
}
# Verbs of 'eosin eval' that are not called as their protocol, and of families of presets.
VERBS = {
    "dinov2-knn": "knn",
    "logistic": "linear",
    "simpleshot": "fewshot",
    "ridge": "regress",
    "k-means": "cluster",
    "dense-linear": "dense",
    "dense-ridge": "dense",
}
WORDS = {"trained": "trained", "random": "random weights", "color": "color alone"}
RIVALS = ("random", "color")
AHEAD, BEHIND, LEVEL, NOTHING = "wins", "loses", "is undecided", "is not above chance, like its rival,"


@dataclass(frozen=True)
class Results:
    """One results file."""

    path: Path
    data: dict[str, Any]
    predictions: pd.DataFrame


@dataclass(frozen=True)
class Probe:
    """One comparison of encoders: the rows of a results file that share a variant, such as k or the aggregator."""

    data: dict[str, Any]
    variant: str
    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """Protocol and what tells it from others of the same file."""
        name = PROTOCOLS.get(self.data["protocol"], self.data["protocol"])
        return f"{name}, {self.variant}" if self.variant else name

    @property
    def primary(self) -> str:
        """The metric that is compared."""
        return primary_of(self.data)

    @property
    def chance(self) -> float | None:
        """What guessing reaches in it; None where that is not known."""
        return self.data["chance"].get(self.primary)

    @property
    def metrics(self) -> list[str]:
        """All metrics of the rows: those of classes in their usual order, then what else there is."""
        there = dict.fromkeys(m for r in self.rows for m in r["metrics"])
        return [m for m in TITLES if m in there] + [m for m in there if m not in TITLES]

    @property
    def leaks(self) -> list[dict[str, Any]]:
        """What stands on both sides of a split, which was allowed for a reason."""
        return self.data.get("leaks", {}).get("found", [])

    @property
    def conditions(self) -> str:
        """What was asked, of how many, and what was kept apart."""
        leaking = ", ".join(f"{leak['count']} of '{leak['what']}'" for leak in self.leaks)
        apart = f"no {self.data['group']} on both sides of a split"
        return f"label '{self.data['label']}', {self.data['n']} {self.data.get('unit', 'sample')}s, " + (
            f"a leak was allowed: {leaking} on both sides of a split" if leaking else apart
        )

    def row(self, role: str) -> dict[str, Any] | None:
        """The first encoder in this role."""
        return next((r for r in self.rows if role_of(r) == role), None)

    def against(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any] | None:
        """The paired difference ``a - b`` in the primary metric, whichever way it was stored."""
        for pair in self.data["comparisons"]:
            if pair["metric"] == self.primary and {pair["a"], pair["b"]} == {a["name"], b["name"]}:
                if pair["a"] == a["name"]:
                    return pair
                return pair | {"value": -pair["value"], "low": -pair["high"], "high": -pair["low"]}
        return None

    def outcome(self, a: dict[str, Any], b: dict[str, Any]) -> str | None:
        """How ``a`` did against ``b``; None where they were not compared. Who is not above chance has not won."""
        pair = self.against(a, b)
        if pair is None:
            return None
        if not (self.above_chance(a) or self.above_chance(b)):
            return NOTHING
        return LEVEL if not pair["excludes_zero"] else AHEAD if pair["value"] > 0 else BEHIND

    def above_chance(self, row: dict[str, Any]) -> bool:
        """Whether the interval of a row lies above chance; what has no interval, or no chance to beat, does."""
        found = row["metrics"][self.primary]
        low = found["low"] if found else None
        return low is None or self.chance is None or bool(low > self.chance)

    def value(self, row: dict[str, Any]) -> float:
        """A row's value of the primary metric, minus infinity where it is undefined."""
        found = row["metrics"][self.primary]
        return found["value"] if found else -math.inf

    def best(self) -> dict[str, Any]:
        """The row with the highest value."""
        return max(self.rows, key=self.value)

    def called(self, row: dict[str, Any]) -> str:
        """What a row is called in a sentence: by its role where no other row has it."""
        role = role_of(row)
        alone = sum(role_of(r) == role for r in self.rows) == 1
        return WORDS[role] if role in WORDS and alone else str(row.get("encoder", row["name"]))


def primary_of(data: dict[str, Any]) -> str:
    """The metric that results compare."""
    return str(data.get("primary", PRIMARY))


def verb_of(data: dict[str, Any]) -> str:
    """The verb of 'eosin eval' that makes such results."""
    name = str(data["protocol"])
    if name in PRESETS and "paper" in data["parameters"]:
        name = PRESETS[name].protocol
    return VERBS.get(name, name)


def load(paths: Iterable[Path]) -> list[Results]:
    """Read results files. Raises UserError for one that is missing or of another schema."""
    return [Results(Path(path), *read_results(path)) for path in paths]


def role_of(row: dict[str, Any]) -> str:
    """What an encoder stands for: "trained", "random", "color", or "other" for a model from elsewhere."""
    name = str(row.get("encoder", row["name"]))
    if name == "color" or "statistics" in row["fingerprint"]:
        return "color"
    if name.startswith("random:"):
        return "random"
    return "other" if name.startswith("timm:") else "trained"


def probes(results: Iterable[Results]) -> list[Probe]:
    """All comparisons, in the order of the files."""
    found = []
    for result in results:
        rows = result.data["encoders"]
        for variant in dict.fromkeys(r.get("variant", "") for r in rows):
            found.append(Probe(result.data, variant, [r for r in rows if r.get("variant", "") == variant]))
    return found


def headline(found: list[Probe]) -> list[str]:
    """How the trained encoder did against each rival over all probes, one sentence each, good news or bad."""
    lines = []
    for rival in RIVALS:
        tally: Counter[str] = Counter()
        for probe in found:
            ours, theirs = probe.row("trained"), probe.row(rival)
            outcome = probe.outcome(ours, theirs) if ours and theirs else None
            tally.update([outcome] if outcome else [])
        if tally:
            lines.append(f"Against {WORDS[rival]} the trained encoder {_tally(tally)}.")
    return lines or ["The results do not hold a trained encoder beside random weights or color, so nobody won."]


def sentence(probe: Probe) -> str:
    """One probe in words: the trained encoder against each other one, with intervals and chance."""
    ours = probe.row("trained") or probe.rows[0]
    parts = []
    for other in probe.rows:
        if other is ours:
            continue
        theirs = f"{probe.called(other)} {interval(other['metrics'][probe.primary])}"
        pair, outcome = probe.against(ours, other), probe.outcome(ours, other)
        if pair is None or outcome is None:
            parts.append(f"was not compared with {theirs}")
            continue
        sure = "excludes zero" if pair["excludes_zero"] else "does not exclude zero"
        verb = "cannot be told from" if outcome == LEVEL else "beats" if pair["value"] > 0 else "loses to"
        if outcome == NOTHING:
            verb = "is not above chance, nor is"
        parts.append(f"{verb} {theirs} (difference {interval(pair, signed=True)}, {sure})")
    said = "; it ".join(parts) or "stands alone, so this says little"
    return (
        f"{probe.title} ({title_of(probe.primary)}; {probe.conditions}): {probe.called(ours)} "
        f"{interval(ours['metrics'][probe.primary])} {said}."
        + (f" Chance is {number(probe.chance)}." if probe.chance is not None else "")
    )


def winner(probe: Probe) -> str:
    """Who has the highest value, and who cannot be told from it."""
    best = probe.best()
    if not probe.above_chance(best):
        return "nobody: not above chance"
    level = [probe.called(r) for r in probe.rows if r is not best and probe.outcome(best, r) != AHEAD]
    return f"undecided: {', '.join([probe.called(best), *level])}" if level else probe.called(best)


def below_chance(found: list[Probe]) -> list[str]:
    """A sentence about the probes in which an encoder lies below chance beyond doubt, none where there is none."""

    def below(probe: Probe, row: dict[str, Any]) -> bool:
        high = (row["metrics"][probe.primary] or {}).get("high")
        return high is not None and probe.chance is not None and bool(high < probe.chance)

    there = [p.title for p in found if any(below(p, r) for r in p.rows)]
    if not there:
        return []
    return [
        f"Below chance in {'; '.join(there)}: groups that were held out resemble another class more than their own, as "
        "happens when groups are few or matched across classes. No encoder is better for it."
    ]


def verdict_rows(found: list[Probe]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table at the top: a row a probe, a column a role."""
    head = ["Probe", *(WORDS[r].capitalize() for r in WORDS), "Chance", "Won by"]
    rows = []
    for probe in found:
        cells = [probe.row(role) for role in WORDS]
        values = [interval(c["metrics"][probe.primary]) if c else "–" for c in cells]
        rows.append([probe.title, *values, number(probe.chance), winner(probe)])
    return head, rows


def metric_rows(probe: Probe) -> list[list[str]]:
    """Every encoder of a probe with all metrics, and chance as the last row."""
    rows = [[r["name"], *(interval(r["metrics"].get(m)) for m in probe.metrics)] for r in probe.rows]
    chance = [number(probe.data["chance"].get(m)) for m in probe.metrics]
    return [*rows, ["chance", *chance]]


def difference_rows(result: Results) -> list[list[str]]:
    """The paired differences of a file in the primary metric."""
    return [
        [f"{p['a']} − {p['b']}", interval(p, signed=True), "excludes zero" if p["excludes_zero"] else "undecided"]
        for p in result.data["comparisons"]
        if p["metric"] == primary_of(result.data)
    ]


def number(value: float | None, signed: bool = False) -> str:
    """A share in the field's way, without the leading zero: .81, 1.00, −.04; a dash where there is none."""
    if value is None:
        return "–"
    digits = f"{abs(value):.2f}".removeprefix("0")
    sign = "−" if value < 0 and float(f"{value:.2f}") != 0 else "+" if signed and float(f"{value:.2f}") > 0 else ""
    return sign + digits


def interval(found: dict[str, Any] | None, signed: bool = False) -> str:
    """A value with its interval, .81 [.76, .85], that no line break tears apart; a dash where it is undefined."""
    if found is None or found["low"] is None:
        return number(found["value"] if found else None, signed)
    value, low, high = (number(found[k], signed) for k in ("value", "low", "high"))
    return f"{value}\u00a0[{low},\u00a0{high}]"


def _tally(tally: Counter[str]) -> str:
    total = sum(tally.values())
    if len(tally) == 1:
        (only,) = tally
        return f"{only} in the one probe" if total == 1 else f"{only} in all {total} probes"
    parts = [f"{outcome} in {tally[outcome]}" for outcome in (AHEAD, BEHIND, LEVEL, NOTHING) if tally[outcome]]
    return f"{', '.join(parts[:-1])} and {parts[-1]} of {total} probes"
