"""Evaluation of a training run's checkpoints beside it, and the choice among them, on validation only.

    RESULTS/watch.jsonl   a row a checkpoint, task, probe and variant; those of the baselines first
    RESULTS/watch.png     the curves
    RESULTS/best.json     the checkpoint that was picked, and why

With a fixed split the ``val`` side is scored, and rows of the test side are taken away before any probe sees them. With
any other split every sample of the task serves to choose, which is said beside the choice. Color and the run's network
with random weights are evaluated once, so that no curve stands alone. The run is only read.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.embeddings import Embeddings, write_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path, sha256, write_json
from eosin.data_tools.shards import ShardSet
from eosin.eval.describe import title
from eosin.eval.embed import data_fingerprint
from eosin.eval.encoders import load_encoder
from eosin.eval.question import Question
from eosin.eval.splits import SYNONYMS
from eosin.eval.suite import COMPARED, WATCHED, ask, embedded, find_data, held, question_of, slugs
from eosin.eval.suite_dense import files_of, masks_folder, sight_of
from eosin.eval.suite_file import DENSE, Suite, Task, as_keys, name_of
from eosin.eval.task import column_of, load_task
from eosin.ssl import checkpoint
from eosin.ssl.config import read_run_config

CURVES, BEST = "watch.png", "best.json"
BASELINES = {"color": "color alone", "random": "random weights"}  # rows of no step
STYLES = {"color": "-.", "random": "--"}
Row = dict[str, Any]


def watch(
    suite: Suite,
    run: Path,
    data: Mapping[str, Path],
    out: Path,
    device: str = "cpu",
    batch_size: int | None = None,
    every: float = 30.0,
    once: bool = False,
) -> Row | None:
    """Evaluate each checkpoint of ``run`` that is not in ``out`` yet, until the run's last step; return the pick.

    A checkpoint that training removes meanwhile is passed over.

    Args:
        every: seconds between looks.
        once: end when all that is there is evaluated.

    Raises:
        UserError: ``run`` is no run, a task has no shard set, or its fixed split has no validation side.
    """
    config = read_run_config(run)
    for name, task in suite.tasks.items():
        if not task.data:
            raise UserError(f"task '{name}' is of embeddings that exist; a run is watched on data: name a shard set")
        if task.dense and task.split == "fixed":
            raise UserError(
                f"task '{name}' has a dense probe and a fixed split, whose side 'val' such a probe cannot score; "
                "give it split: kfold, on data that serves for nothing else"
            )
    with held(out, suite, other=COMPARED):
        places = find_data(suite, data, out)
        asked = _asked(suite, places)
        rows = [row for row in read_rows(out) if row["asked"] == asked]
        for baseline in BASELINES:
            if not any(row["teacher"] == baseline for row in rows):
                given = f"random:{run}" if baseline == "random" else baseline
                new = _evaluate(suite, given, places, out, device, batch_size)
                rows = [*rows, *({"step": None, "teacher": baseline, "asked": asked} | row for row in new)]
                _write(out, rows, run)
                print(f"{BASELINES[baseline]}: {_said(new)}", file=sys.stderr, flush=True)
        while True:
            found = checkpoint.steps(run)
            for folder in found:
                rows = _with_checkpoint(rows, folder, suite, run, places, asked, out, device, batch_size)
            if once or (found and checkpoint.step_of(found[-1]) >= config.run.steps):
                return pick(rows)
            time.sleep(every)


def _with_checkpoint(
    rows: list[Row],
    folder: Path,
    suite: Suite,
    run: Path,
    places: Mapping[str, Path],
    asked: str,
    out: Path,
    device: str,
    batch_size: int | None,
) -> list[Row]:
    """``rows`` with those of a checkpoint, which are written too, unless they are there or training removed it."""
    step = checkpoint.step_of(folder)
    try:
        teacher = checkpoint.describe(folder)["files"][checkpoint.TEACHER]
        if any(row["step"] == step and row["teacher"] == teacher for row in rows):
            return rows
        new = _evaluate(suite, f"{run}@{step}", places, out, device, batch_size)
    except (UserError, OSError):
        if folder.exists():
            raise
        print(f"step {step}: removed by the training before it was evaluated", file=sys.stderr, flush=True)
        return rows
    if any(row["step"] == step for row in rows):
        # Its weights are others: it was trained again after a rewind, and so is all that follows.
        rows = [row for row in rows if row["step"] is None or row["step"] < step]
    rows = [*rows, *({"step": step, "teacher": teacher, "asked": asked} | row for row in new)]
    _write(out, rows, run)
    print(f"step {step}: {_said(new)}", file=sys.stderr, flush=True)
    return rows


def pick(rows: Sequence[Row]) -> Row | None:
    """The step whose primary metrics are highest: the mean over tasks, of means over probes, of means over variants.

    Only steps of which everything was answered that was answered of any are compared; of equal ones the earliest wins.
    None where there is none. What the baselines reach stands beside it.
    """
    answered = [row for row in rows if row["value"] is not None]
    everything = {(row["task"], row["probe"], row["variant"]) for row in answered if row["step"] is not None}

    def means_of(column: str, asked: Iterable[Any]) -> dict[Any, float]:
        found = {}
        for one in asked:
            mine = {(r["task"], r["probe"], r["variant"]): r["value"] for r in answered if r[column] == one}
            if mine.keys() == everything:
                found[one] = _mean_of_means(mine)
        return found

    means = means_of("step", sorted({row["step"] for row in answered} - {None}))
    if not means:
        return None
    best = max(means, key=lambda step: means[step])  # the first of equal ones
    baselines = means_of("teacher", BASELINES)
    scored: dict[str, dict[str, None]] = {}  # what was scored -> the tasks
    for row in answered:
        scored.setdefault(row["scored"], {})[row["task"]] = None
    why = [f"highest mean of the primary metrics on validation, {means[best]:.4f}, of {len(means)} checkpoints"]
    why += [
        f"{BASELINES[name]} {mean:.4f}" + ", above every checkpoint" * (mean > means[best])
        for name, mean in baselines.items()
    ]
    why += [f"not answered, and not in the mean: {', '.join(missing)}"] if (missing := unanswered(rows)) else []
    why += [f"{', '.join(tasks)}: {what}" for what, tasks in scored.items()]
    known = {"means": {str(s): m for s, m in means.items()}, "baselines": baselines}
    return {"step": best, "value": means[best], "why": "; ".join(why)} | known


def unanswered(rows: Sequence[Row]) -> list[str]:
    """The probes, with their tasks, that some checkpoint or baseline could not answer."""
    return list(dict.fromkeys(f"{row['task']} {row['probe']}" for row in rows if row["value"] is None))


def read_rows(out: Path) -> list[Row]:
    """The rows of ``watch.jsonl``, [] before the first. Raises UserError where one is no row of it."""
    path = out / WATCHED
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        rows = [{}]
    if not all(isinstance(row, dict) and row.keys() >= {"step", "teacher", "asked", "value"} for row in rows):
        raise UserError(f"{path} is not readable as lines of JSON; remove it to evaluate again")
    return rows


def validation(task: Task, question: Question, folder: Path) -> tuple[Question, str]:
    """The question as it may be asked to choose by, and what it scores, in words.

    Of a fixed split the rows of the test side are left out, and those of ``val`` stand in their place; the embeddings
    without them are written to ``folder``.

    Raises UserError where a fixed split has no validation side.
    """
    if task.split != "fixed":
        return question, of_all(task)
    loaded = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    given = column_of(loaded, question.side, "--side")
    sides = np.array([SYNONYMS.get(side.lower(), side.lower()) for side in given], dtype=object)
    if not (sides == "val").any():
        raise UserError(
            f"column '{question.side}' names no labeled sample 'val'; checkpoints are picked on validation only, so "
            "name a validation side, or split: kfold on data that serves for nothing else"
        )
    kept = sides != "test"
    table = loaded.table[kept].reset_index(drop=True)
    table[question.side] = np.where(sides == "val", "test", sides)[kept]
    path = folder / "validation.safetensors"
    write_embeddings(path, Embeddings(loaded.encoders[0].features[kept], table, loaded.encoders[0].encoder))
    return replace(question, embeddings=[path], labels=None), f"the val side of '{question.side}' was scored"


def of_all(task: Task) -> str:
    """What a split that is not fixed scores, in words."""
    return (
        f"every sample was scored ({task.split}), so all data of it counts as validation: a figure on it is "
        "not independent of this choice"
    )


def _evaluate(
    suite: Suite, given: str, places: Mapping[str, Path], out: Path, device: str, batch_size: int | None
) -> list[Row]:
    """The rows of a checkpoint or baseline; what lies in ``out`` meanwhile is removed."""
    encoder = load_encoder(given, device=device, **suite.embedding.model_dump())
    working, names = out / "working", slugs({name: name for name in places})
    rows: list[Row] = []
    for data, place in places.items():
        path = working / f"{names[data]}.safetensors"
        tasks = {name: task for name, task in suite.tasks.items() if task.data == data}
        why = None
        try:
            if any(task.embedded for task in tasks.values()):
                embedded(encoder, ShardSet(place), path, batch_size)
        except UserError as error:
            why = str(error)
        for name, task in tasks.items():
            question = None
            if task.embedded and why is None:
                question, scored = validation(task, question_of(task, [path], working / "answer.json"), working)
            for probe in task.probes:
                try:
                    if DENSE in probe:
                        sight = sight_of(task, place, [encoder])
                        dense, scored = question_of(task, [], working / "answer.json", sight.masks), of_all(task)
                        results = ask(probe, dense, **sight.given)
                    elif question is None:
                        raise UserError(str(why))
                    else:
                        results = ask(probe, question, device=device)
                except UserError as error:
                    rows.append(_row(name, probe, refused=as_keys(str(error))))
                    continue
                primary = results["primary"]
                for found in results["encoders"]:
                    known = {"variant": found.get("variant", ""), "metric": primary, "scored": scored}
                    known |= found["metrics"][primary] or {}
                    rows.append(_row(name, probe, **known, chance=results["chance"].get(primary)))
    shutil.rmtree(working, ignore_errors=True)
    return rows


def _row(task: str, probe: Mapping[str, Any], **known: Any) -> Row:
    empty = dict.fromkeys(("variant", "metric", "value", "low", "high", "chance", "scored", "refused"))
    return {"task": task, "probe": name_of(probe)} | empty | known


def _asked(suite: Suite, places: Mapping[str, Path]) -> str:
    """A mark of all that is asked of a checkpoint: rows of another suite, data or labels are not kept."""
    labels = {task.labels for task in suite.tasks.values() if task.labels and Path(task.labels).is_file()}
    files = {path: sha256(Path(path)) for path in sorted(labels)}
    shards = {name: data_fingerprint(ShardSet(place)) for name, place in places.items()}
    masks = {
        name: files_of(masks_folder(task, places[task.data]))
        for name, task in suite.tasks.items()
        if task.data and task.dense
    }
    known = json.dumps([suite.model_dump(), files, shards, masks], sort_keys=True)
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()


def _mean_of_means(values: Mapping[tuple[str, str, str], float]) -> float:
    of_tasks = []
    for task in {task for task, _, _ in values}:
        probes = {probe for other, probe, _ in values if other == task}
        of_probes = [np.mean([v for (t, p, _), v in values.items() if (t, p) == (task, probe)]) for probe in probes]
        of_tasks.append(math.fsum(of_probes) / len(of_probes))
    return float(math.fsum(of_tasks) / len(of_tasks))


def _write(out: Path, rows: list[Row], run: Path) -> None:
    with atomic_path(out / WATCHED) as temporary:
        temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    best = pick(rows)
    if best is None:
        (out / BEST).unlink(missing_ok=True)
    else:
        kept = [str(folder) for folder in checkpoint.steps(run) if checkpoint.step_of(folder) == best["step"]]
        write_json(out / BEST, best | {"run": str(run), "checkpoint": kept[0] if kept else None})
    draw(rows, best["step"] if best else None, out / CURVES)


def _said(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        name = " ".join(filter(None, (row["task"], row["probe"], row["variant"])))
        parts.append(f"{name} refused: {row['refused']}" if row["value"] is None else f"{name} {row['value']:.3f}")
    return ", ".join(parts)


def draw(rows: Sequence[Row], best: int | None, path: Path) -> None:
    """Draw the primary metric of each task and probe against steps, with intervals, chance and the pick."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from eosin.eval.report.plots import CATEGORIES, DPI, GRAY, INK, STYLE

    answered = [row for row in rows if row["value"] is not None and row["step"] is not None]
    beside = {(r["task"], r["probe"], r["variant"], r["teacher"]): r["value"] for r in rows if r["step"] is None}
    tasks = list(dict.fromkeys(row["task"] for row in answered))
    if not tasks:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.0 * len(tasks)), layout="constrained")
        for axes, task in zip(np.atleast_1d(figure.subplots(len(tasks), sharex=True)), tasks):
            of_task = [row for row in answered if row["task"] == task]
            lines = list(dict.fromkeys((r["probe"], r["variant"], r["metric"]) for r in of_task))
            for number, (probe, variant, metric) in enumerate(lines):
                points = [r for r in of_task if (r["probe"], r["variant"], r["metric"]) == (probe, variant, metric)]
                points.sort(key=lambda r: r["step"])
                steps, color = [r["step"] for r in points], CATEGORIES[number % len(CATEGORIES)]
                values = np.array([r["value"] for r in points])
                label = f"{' '.join(filter(None, (probe, variant)))}: {title(metric)}"
                axes.plot(steps, values, marker="o", markersize=4, color=color, label=label)
                low, high = (np.array([r[k] for r in points], dtype=float) for k in ("low", "high"))
                axes.errorbar(
                    steps,
                    values,
                    np.maximum([values - low, high - values], 0),  # of few groups an interval can miss its value
                    fmt="none",
                    ecolor=color,
                    elinewidth=1,
                    capsize=2,
                )
                for baseline, style in STYLES.items():
                    if (level := beside.get((task, probe, variant, baseline))) is not None:
                        axes.axhline(level, color=color, linestyle=style, linewidth=1, alpha=0.8)
            for chance in {r["chance"] for r in of_task} - {None}:
                axes.axhline(chance, color=GRAY, linestyle=":", linewidth=1)
            if best is not None:
                axes.axvline(best, color=INK, linewidth=0.8, label=f"picked: step {best}")
            axes.set_title(f"{task}; dashed: random weights; dash-dotted: color alone; dotted: chance; 95 % intervals")
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
