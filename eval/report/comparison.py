"""The comparison page: every encoder on every task of a suite, in one self-contained file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.eval.report import comparison_plots, findings, sections
from eosin.eval.report.comparison_pictures import Room
from eosin.eval.report.comparison_tasks import Task, said_of, section
from eosin.eval.report.findings import AHEAD, Probe, interval, number, title_of
from eosin.eval.report.page import Block, Cell, Legend, Listing, Picture, Section, Table, Words, render

PICTURE_BYTES = 7_000_000  # of pictures on the page, which words and tables add to
TASK_BYTES = 2_500_000
ASIDE = ("random", "color")


@dataclass(frozen=True)
class TaskDone:
    """What a suite leaves of one task.

    Attributes:
        name: the task's own, unique in the suite.
        about: a sentence.
        shards: the tiles, None where there are none to show.
        embeddings: one an encoder.
        results: one a probe.
        refused: (probe, the one-line reason), such as a leak.
        without: (encoder, the one-line reason) of those that could not be probed.
    """

    name: str
    about: str
    shards: Path | None
    embeddings: list[Path]
    results: list[Path]
    refused: list[tuple[str, str]]
    without: list[tuple[str, str]] = field(default_factory=list)

    @property
    def refusals(self) -> list[str]:
        """A sentence a reason: which probes were refused or encoders left out, and why."""
        reasons: dict[str, list[str]] = {}
        for probe, why in self.refused:
            reasons.setdefault(why, []).append(probe)
        said = [f"{', '.join(p)} {'was' if len(p) == 1 else 'were'} refused: {why}" for why, p in reasons.items()]
        return [*said, *(f"{encoder} was left out: {why}" for encoder, why in self.without)]


def write_comparison(out: Path, title: str, tasks: Sequence[TaskDone]) -> None:
    """Write one HTML file that needs no network, no script and no other file: all tasks, all encoders.

    Args:
        out: the page; written aside and renamed.

    Raises:
        UserError: results or embeddings are missing or of another schema, or ``out`` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of an HTML file")
    read = [Task(done, findings.load(done.results)) for done in tasks]
    roles = _roles(read)
    colors = comparison_plots.colors_of(roles)
    share = min(TASK_BYTES, PICTURE_BYTES // max(len(read), 1))
    parts = [section(task, f"task-{n}", Room(share), colors) for n, task in enumerate(read, start=1)]
    doubts = [f"{task.done.name}: {doubt}" for task, (_, doubted) in zip(read, parts) for doubt in doubted]
    found = [_top(read, roles, doubts), *(part for part, _ in parts), _reproduction(read)]
    count = sum(len(task.results) for task in read)
    subtitle = f"{len(read)} task{'s' * (len(read) != 1)}, {len(roles)} encoders, {count} results"
    with atomic_path(out) as temporary:
        temporary.write_text(render(title, subtitle, [], found), encoding="utf-8")


def _roles(tasks: Sequence[Task]) -> dict[str, str]:
    """All encoders with their roles, random weights and color last."""
    rows = [row for task in tasks for result in task.results for row in result.data["encoders"]]
    roles = {str(row.get("encoder", row["name"])): findings.role_of(row) for row in rows}
    return dict(sorted(roles.items(), key=lambda item: ASIDE.index(item[1]) + 1 if item[1] in ASIDE else 0))


def _top(tasks: Sequence[Task], roles: dict[str, str], doubts: list[str]) -> Section:
    """A table a task, what was refused or is to be doubted, and a verdict a probe."""
    lead = "Frozen features, the same splits for all: which encoder tells more, and is the difference more than chance?"
    blocks: list[Block] = []
    refused = [f"{t.done.name}: {said}" for t in tasks for said in t.done.refusals]
    leaks = dict.fromkeys(t.done.name for t in tasks for p, _ in t.shown if p.leaks)
    allowed = [f"{name}: a leak was allowed; its numbers measure recognition too." for name in leaks]
    warned = [*refused, *allowed, *doubts]
    blocks += [Words(warned, "warning")] if warned else []
    if roles:
        marks = [("#24222c", "bold: the highest of its column"), ("#c9527d", "≈: cannot be told from it")]
        blocks += [Legend(marks), *(_table(task, roles) for task in tasks)]
    blocks += [Words([f"{t.done.name}. {said_of(p)}" for t in tasks for p, _ in t.shown], "list")]
    return Section("comparison", "All tasks", lead, blocks)


def _table(task: Task, roles: dict[str, str]) -> Table:
    there = {str(row.get("encoder", row["name"])) for probe, _ in task.shown for row in probe.rows}
    names = [name for name in roles if name in there] or list(roles)
    head, columns = ["Encoder"], []
    for probe, _ in task.shown:
        head.append(f"{probe.title}: {title_of(probe.primary)}" + (" (leak allowed)" if probe.leaks else ""))
        columns.append([*_column(probe, names), number(probe.chance)])
    for name, _ in task.done.refused:
        head.append(name)
        columns.append([*[Cell("refused", "bad")] * len(names), "–"])
    rows: list[list[str | Cell | list[Picture]]] = [list(row) for row in zip([*names, "chance"], *columns)]
    quiet = [n for n, name in enumerate(names) if roles[name] in ASIDE]
    return Table(head, rows, f"{task.done.name}, with 95 % intervals", frozenset([*quiet, len(names)]))


def _column(probe: Probe, names: Sequence[str]) -> list[str | Cell]:
    best = probe.best()
    mine = {str(row.get("encoder", row["name"])): row for row in probe.rows}
    cells: list[str | Cell] = []
    for name in names:
        row = mine.get(name)
        if row is None:
            cells.append("–")
            continue
        level = row is not best and probe.against(best, row) is not None and probe.outcome(best, row) != AHEAD
        style = "best" if row is best else "level" if level else ""
        cells.append(Cell(interval(row["metrics"][probe.primary]), style))
    return cells


def _reproduction(tasks: Sequence[Task]) -> Section:
    """Versions, commands, fingerprints and where the results lie."""
    results = [result for task in tasks for result in task.results]
    blocks: list[Block] = [Table([], [("versions", sections.versions())])]
    commands = ["# all of these at once: eosin eval suite SUITE.yaml --encoders ENCODER..."]
    for task in tasks:
        embeddings = " ".join(shlex.quote(str(path)) for path in task.done.embeddings)
        tiles = f"ENCODER... {shlex.quote(str(task.done.shards))}"  # what a dense probe looks at
        commands += [
            sections.eval_command(r, tiles if findings.verb_of(r.data) == "dense" else embeddings) for r in task.results
        ]
    if results:
        rows = [[task.done.name, str(r.path)] for task in tasks for r in task.results]
        blocks += [Listing("\n".join(commands)), sections.fingerprints(results), Table(["Task", "Results"], rows)]
    return Section("reproduction", "How to do it again", "Everything that decides the numbers above.", blocks)
