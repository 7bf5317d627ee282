"""The section of one task on the comparison page: who is ahead, drawn and in numbers, and what to distrust."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.eval.dense_sheet import sheet_path
from eosin.eval.describe import subgroup_table
from eosin.eval.report import comparison_plots, findings, sections
from eosin.eval.report.comparison_pictures import Room, disputed_sheet, neighbor_sheet
from eosin.eval.report.comparison_samples import (
    MOST_VALUES,
    NEIGHBOR_ROWS,
    NEIGHBORS,
    PCA_ROWS,
    Tiles,
    alike,
    disputed,
    drawn_rows,
    explained,
    gather_tiles,
    has_opinions,
    nearest,
    origins,
    principal,
    told_by,
)
from eosin.eval.report.findings import AHEAD, Probe, Results, interval, number, title_of
from eosin.eval.report.page import Block, Cell, Gallery, Heading, Picture, Section, Table, Words, chart, photo

if TYPE_CHECKING:
    from eosin.eval.report.comparison import TaskDone

NUMBER = re.compile(r"\d+(?:\.\d+)?")
UNEVEN = 3.0  # times the smallest class, from which on the page speaks of imbalance
MOST_CLASSES = 12  # in a confusion matrix
MOST_CONFUSIONS = 12


@dataclass(frozen=True)
class Task:
    """A task with its results read.

    Attributes:
        done: what the suite left.
        results: its files.
    """

    done: TaskDone
    results: list[Results]

    @cached_property
    def probes(self) -> list[tuple[Probe, Results]]:
        """All probes, each with its file."""
        return [(probe, result) for result in self.results for probe in findings.probes([result])]

    @cached_property
    def shown(self) -> list[tuple[Probe, Results]]:
        """The probes of the table: of those that differ in a number only, such as shots, the last."""
        last = {id(result): found[-1] for result, found in self.series}
        return [(p, r) for p, r in self.probes if id(r) not in last or p.variant == last[id(r)].variant]

    @cached_property
    def series(self) -> list[tuple[Results, list[Probe]]]:
        """Files of several probes whose variants differ in a number only, in the order of the number."""
        found = []
        for result in self.results:
            probes = findings.probes([result])
            stems = {NUMBER.sub("#", p.variant).rstrip("s") for p in probes}  # 1 shot, 4 shots
            if len(probes) > 1 and len(stems) == 1 and all(len(NUMBER.findall(p.variant)) == 1 for p in probes):
                found.append((result, sorted(probes, key=lambda p: variant_number(p.variant))))
        return found


def variant_number(variant: str) -> float:
    """The number that a variant such as "shots = 4" names."""
    return float(NUMBER.findall(variant)[0])


def said_of(probe: Probe) -> str:
    """Who is ahead, who cannot be told from it, and what that means where it is color or random weights."""
    best = probe.best()
    reached = f"{probe.title}: {best['encoder']} has the highest {title_of(probe.primary)}, "
    reached += interval(best["metrics"][probe.primary])
    if not probe.above_chance(best):
        return f"{reached}, which is not above chance ({number(probe.chance)}): nothing is shown."
    others = [r for r in probe.rows if r is not best]
    level = [r for r in others if probe.against(best, r) and probe.outcome(best, r) != AHEAD]
    if level:
        reached += f", and cannot be told from {' and '.join(str(r['encoder']) for r in level)}."
    elif any(probe.against(best, r) for r in others):
        reached += ", and its difference to every other excludes zero."
    else:
        reached += "; nothing stands beside it, so this says little."
    ahead = {findings.role_of(r) for r in (best, *level)}
    if "color" in ahead:
        reached += " Color alone does as well as anything here: stain or scanner may be all that is told apart."
    if "random" in ahead:
        reached += " Random weights do as well as anything here: no training is shown to have helped."
    return reached


def section(task: Task, anchor: str, room: Room, colors: dict[str, str]) -> tuple[Section, list[str]]:
    """Everything there is to say of a task, and sentences on what makes its numbers doubtful.

    Its pictures have to fit into ``room``.
    """
    blocks: list[Block] = []
    doubts: list[str] = []
    warned = [*task.done.refusals, *_leaks(task)]
    blocks += [Words(warned, "warning")] if warned else []
    blocks += [Words([said_of(probe) for probe, _ in task.shown], "list")] if task.shown else []
    asked = dict.fromkeys(f"{p.conditions}; {p.data['groups']} groups." for p, _ in task.shown)
    blocks += [Words([f"{a[0].upper()}{a[1:]}" for a in asked])] if asked else []
    if task.results:
        drawn = sections.forests([p for p, _ in task.shown])
        blocks += _gallery(room.keep(*[chart(comparison_plots.compact(d), a) for d, a in drawn]))
        blocks += _series(task, room, colors)
        blocks += _metrics(task)
        blocks += _parts(task, room, colors, doubts)
        blocks += _classes(task, room, colors, doubts)
        blocks += _subgroups(task)
        blocks += _tiles(task, room, doubts)
        notes = dict.fromkeys(note for r in task.results for note in r.data.get("notes", []))
        blocks += [Heading("Notes"), Words(list(notes), "list")] if notes else []
    else:
        blocks.append(Words(["No result: every probe was refused." if task.done.refused else "No result."]))
    if room.refused:
        blocks.append(Words([f"{room.refused} pictures are left out, since the page has a bound on its size."]))
    return Section(anchor, task.done.name, task.done.about, blocks), doubts


def _leaks(task: Task) -> list[str]:
    said = []
    for result in task.results:
        leaks = result.data.get("leaks", {})
        what = " and ".join(f"{leak['count']} of '{leak['what']}'" for leak in leaks.get("found", []))
        if what:
            said.append(
                f"{_called(result)} was scored in spite of a leak: {what} stand on both sides of a split, so "
                f"recognition counts too. Reason given: {leaks['reason']}"
            )
    return said


def _called(result: Results) -> str:
    return findings.PROTOCOLS.get(result.data["protocol"], str(result.data["protocol"]))


def _series(task: Task, room: Room, colors: dict[str, str]) -> list[Block]:
    panels = []
    for result, probes in task.series:
        xlabel = NUMBER.sub("", probes[-1].variant).strip(" =")
        numbers = {p.variant: variant_number(p.variant) for p in probes}
        panels.append(comparison_plots.curve_of(_called(result), numbers, xlabel, probes))
    if not panels:
        return []
    drawn = chart(comparison_plots.curves(panels, colors), "the compared metric against the number that varies")
    return [Heading("Against the number that varies"), *_gallery(room.keep(drawn))]


def _metrics(task: Task) -> list[Block]:
    blocks: list[Block] = [Heading("All metrics")]
    whole = {id(result): Probe(result.data, "", result.data["encoders"]) for result, _ in task.series}
    shown = {id(r) if id(r) in whole else id(p): whole.get(id(r), p) for p, r in task.probes}
    for probe in shown.values():
        rows = findings.metric_rows(probe)
        errors = [r.get("calibration", {}).get("ece") for r in probe.rows]
        calibrated = any(e is not None for e in errors)
        if calibrated:
            rows = [[*row, number(e)] for row, e in zip(rows, [*errors, None])]
        head = ["Encoder", *map(title_of, probe.metrics), *(["calibration error"] if calibrated else [])]
        blocks.append(Table(head, rows, probe.title, frozenset([len(rows) - 1])))
    return blocks


def _parts(task: Task, room: Room, colors: dict[str, str], doubts: list[str]) -> list[Block]:
    """What is compared, for each class of pixels or each target by itself, and the picture of a dense probe."""
    blocks: list[Block] = []
    for probe, result in task.shown:
        dense = findings.verb_of(probe.data) == "dense"
        targets = [target["name"] for target in probe.data.get("targets", [])]
        if not dense and len(targets) < 2:
            continue
        of, each = ("targets", "target") if targets else ("classes", "class")
        names = targets or probe.data["classes"]
        said = f"{title_of(probe.primary)} of each {each} by each encoder"
        drawn = chart(comparison_plots.of_each([probe], colors, names, probe.primary, of), said)
        blocks += [Heading(f"{probe.title}: each {each}"), *_gallery(room.keep(drawn))]
        blocks += _counts(probe, doubts, "pixel") if not targets else []
        if dense and (image := cv2.imread(str(sheet_path(result.path)))) is not None:
            alt = "tiles, what is true of them, and what the probe of each encoder tells"
            blocks += _gallery(room.keep(photo(image[..., ::-1], alt, alt.capitalize())))
    return blocks


def _classes(task: Task, room: Room, colors: dict[str, str], doubts: list[str]) -> list[Block]:
    """Counts, recall, confusion and calibration, of results about classes."""
    found = [(p, r) for p, r in task.shown if p.data.get("classes") and "predicted" in r.predictions]
    if not found:
        return []
    blocks: list[Block] = [Heading("Classes"), *_counts(found[0][0], doubts, found[0][0].data.get("unit", "sample"))]
    detailed = [
        p for p, _ in found if all("recall" in c for row in p.rows for c in row.get("classes", {"": {}}).values())
    ]
    if detailed:
        names = detailed[0].data["classes"]
        drawn = chart(
            comparison_plots.of_each(detailed, colors, names, "recall"), "recall of each class by each encoder"
        )
        blocks += _gallery(room.keep(drawn))
    blocks.append(Heading("What is taken for what"))
    for probe, result in found:
        blocks += _confusions(probe, result)
    calibrated = [p for p, _ in found if all("calibration" in row for row in p.rows)]
    if calibrated:
        drawn = chart(comparison_plots.reliabilities(calibrated, colors), "accuracy against confidence of each encoder")
        blocks += [Heading("Whether probabilities mean what they say"), *_gallery(room.keep(drawn))]
    return blocks


def _counts(probe: Probe, doubts: list[str], unit: str) -> list[Block]:
    """How many of each class there are, and a warning where that is uneven."""
    counts = dict(zip(probe.data["classes"], probe.data.get("class_counts", [])))
    if not counts:
        return []
    total = sum(counts.values())
    rows = [[str(c), f"{n:,}", f"{100 * n / max(total, 1):.1f} %"] for c, n in counts.items()]
    blocks: list[Block] = [Table(["Class", f"{unit}s", "share"], rows)]
    most, least = max(counts, key=lambda c: counts[c]), min(counts, key=lambda c: counts[c])
    if counts[most] > UNEVEN * counts[least]:
        how = f"{counts[most] / counts[least]:.1f} times as many as" if counts[least] else "many, and none of"
        doubts.append(f"classes are uneven: '{most}' has {how} '{least}'.")
        best = probe.best()["metrics"]
        shares = ("accuracy", "pixel_accuracy", probe.primary)
        both = [f"{title_of(m)} {interval(best[m])}" for m in shares if best.get(m)]
        said = (
            f"Classes are uneven: '{most}' has {how} '{least}'. Accuracy rewards naming the large ones "
            f"({number(counts[most] / total)} by naming '{most}' always), so {title_of(probe.primary)} is what to read"
        )
        blocks.append(Words([f"{said}; the highest row has {' and '.join(both)}." if both else f"{said}."], "warning"))
    return blocks


def _confusions(probe: Probe, result: Results) -> list[Block]:
    classes = [str(c) for c in probe.data["classes"]]
    blocks: list[Block] = []
    for row in probe.rows:
        said = result.predictions[result.predictions["encoder"] == row["name"]]
        true = pd.Categorical(said["label"].astype(str), classes)
        taken = pd.Categorical(said["predicted"].astype(str), classes)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (true.codes, taken.codes), 1)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        caption = f"{probe.title}, {row['encoder']}"
        table = _matrix if len(classes) <= MOST_CLASSES else _worst
        blocks.append(table(classes, counts, shares, caption))
    return blocks


def _matrix(classes: list[str], counts: np.ndarray, shares: np.ndarray, caption: str) -> Table:
    """A row a true class, a column a predicted one, by number; cells are shares of the row."""
    rows: list[list[str | Cell | list[Picture]]] = []
    for i, name in enumerate(classes):
        cells = [
            Cell(
                number(float(shares[i, j])),
                title=f"{counts[i, j]:,} of {counts[i].sum():,} '{name}' taken for '{other}'",
                shade=float(shares[i, j]),
            )
            for j, other in enumerate(classes)
        ]
        rows.append([f"{i + 1} {name}", *cells])
    return Table(["true \\ taken for", *(f"\u2002{i + 1}" for i in range(len(classes)))], rows, caption)


def _worst(classes: list[str], counts: np.ndarray, shares: np.ndarray, caption: str) -> Table:
    """Of many classes the pairs that are confused most."""
    wrong = shares * (1 - np.eye(len(classes)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    rows = [
        [classes[i], classes[j], f"{counts[i, j]:,} of {counts[i].sum():,}", number(float(shares[i, j]))]
        for i, j in zip(*np.unravel_index(order, wrong.shape))
        if counts[i, j]
    ]
    return Table(["True", "Taken for", "Samples", "Share"], rows, f"{caption}: the pairs confused most.")


def _subgroups(task: Task) -> list[Block]:
    blocks: list[Block] = []
    for result in task.results:
        for column in result.data.get("by", {}):
            head, *rows = subgroup_table(result.data, column)
            unbroken = [[cell.replace(" ", "\u00a0") for cell in row] for row in rows]
            blocks.append(Table(head, unbroken, _called(result)))
    return [Heading("By subgroup"), *blocks] if blocks else []


def _tiles(task: Task, room: Room, doubts: list[str]) -> list[Block]:
    """What embeddings and pictures say: origin of the tiles, neighbors, components, disputed labels, pretraining."""
    blocks = _pretraining(task)
    tiles = gather_tiles(task.done.embeddings, task.results)
    try:
        shards = ShardSet(task.done.shards) if task.done.shards else None
    except UserError as error:
        blocks.append(Words([f"No pictures of tiles: {error}"], "warning"))
        shards = None
    if tiles is not None:
        more = [c for r in task.results for c in (*r.data.get("by", {}), r.data.get("cluster", ""))]
        places = origins(tiles, more)
        blocks += _origins(tiles, places, task, doubts)
        blocks += _components(tiles, places, room)
        blocks += _neighbors(tiles, places)
        blocks += neighbor_sheet(tiles, shards, room) if shards else []
    asked = [(p, r) for p, r in task.shown if has_opinions(r)]
    if asked:
        found = disputed([p for p, _ in asked], [r for _, r in asked])
        lead = (
            f"{len(found):,} of {asked[0][0].data['n']:,} tiles are confidently called another class than their label "
            "says, by the best encoder of every probe and all that cannot be told from it, none of which was fitted on "
            "the tile's group. Labels may be wrong there, or the tiles hard: look at them."
        )
        blocks += [
            Heading("The labels that probes dispute"),
            Words([lead]),
            *disputed_sheet(found, tiles, shards, room),
        ]
    return blocks


def _pretraining(task: Task) -> list[Block]:
    """How much of what was scored each encoder had seen before."""
    found: dict[str, dict[str, Any]] = {}
    for result in task.results:
        found |= {r["encoder"]: r["contamination"] for r in result.data["encoders"] if "contamination" in r}
    rows: list[list[str | Cell | list[Picture]]] = []
    for name, seen in found.items():
        if seen["samples"] is None:
            rows.append([name, *["not known"] * 3])
            continue
        least = "" if seen["known"] else "at least "
        texts = (f"{seen['samples']:,} ({100 * seen['share']:.1f} %)", str(seen["slides"]), str(seen["patients"]))
        rows.append([name, *(Cell(least + t, "bad" if seen["samples"] else "") for t in texts)])
    head = ["Encoder", "samples seen in pretraining", "of slides", "of patients"]
    return [Heading("Overlap with pretraining"), Table(head, rows)] if rows else []


def _origins(tiles: Tiles, places: Sequence[str], task: Task, doubts: list[str]) -> list[Block]:
    """How much of the class the origin of a tile gives away."""
    lines, given_away = [], []
    chance = 1 / len(np.unique(tiles.labels))
    for column in places:
        if column == task.results[0].data["label"]:
            continue
        reached = told_by(tiles.column(column), tiles.labels)
        said = f"who knows nothing of a tile but its '{column}' names its class with a balanced accuracy of "
        said += f"{number(reached)} (chance {number(chance)})."
        lines.append(said[:1].upper() + said[1:])
        given_away += [said] if reached > (1 + chance) / 2 else []
    doubts += given_away
    return [Heading("Where tiles come from"), Words(lines, "warning" if given_away else "plain")] if lines else []


def _components(tiles: Tiles, places: Sequence[str], room: Room) -> list[Block]:
    rows = drawn_rows(len(tiles.keys), PCA_ROWS)
    values = {"class": np.array(tiles.classes)[tiles.labels[rows]]}
    values |= {c: tiles.column(c)[rows] for c in places} if places else {"group": tiles.groups[rows]}
    panels, table = [], []
    drawn = [what for what, found in values.items() if len(np.unique(found)) <= MOST_VALUES][:2]
    for name, features in tiles.encoders:
        points, shares = principal(features[rows])
        told = {what: explained(points, v) for what, v in values.items()}
        panels += [
            comparison_plots.Scatter(f"{comparison_plots.short(name, 20)}, by {what}", points, values[what])
            for what in drawn
        ]
        table.append([name, number(float(shares.sum())), *(number(t) for t in told.values())])
    head = ["Encoder", "Variance in the plane", *(f"of it between values of {w}" for w in values)]
    caption = (
        f"A plane that lies more between values of {' or '.join(places)} than between classes tells these apart in "
        "place of classes, unless they lie within classes."
        if places
        else "Groups that lie within classes hold their share too: what theirs has beyond it tells groups apart."
    )
    planes = chart(comparison_plots.components(panels, 4), "the first two principal components of each encoder")
    lead = f"The first two principal components of {len(rows):,} tiles."
    return [
        Heading("What spreads the features"),
        Words([lead]),
        *_gallery(room.keep(planes)),
        Table(head, table, caption),
    ]


def _neighbors(tiles: Tiles, places: Sequence[str]) -> list[Block]:
    rows = drawn_rows(len(tiles.keys), NEIGHBOR_ROWS)
    values = {"class": tiles.labels[rows].astype(str)} | {c: tiles.column(c)[rows] for c in places}
    table = []
    for name, features in tiles.encoders:
        near = nearest(features[rows], tiles.groups[rows], np.arange(len(rows)))
        found = [alike(v, near, tiles.groups[rows]) for v in values.values()]
        table.append([name, *(f"{number(same)} (chance {number(chance)})" for same, chance in found)])
    head = ["Encoder", *(f"same {what}" for what in values)]
    caption = f"The {NEIGHBORS} nearest tiles of other groups, among {len(rows):,} tiles: how many are alike."
    return [Heading("Nearest neighbors"), Table(head, table, caption)]


def _gallery(pictures: list[Picture]) -> list[Block]:
    return [Gallery(pictures, 2000)] if pictures else []
