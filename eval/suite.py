"""Suites: many tasks × encoders × probes, into one folder that a killed run goes on from.

    RESULTS/shards/DATA              public sets, packed
    RESULTS/embeddings/DATA/ENCODER.safetensors
    RESULTS/results/TASK/PROBE.json  what 'eosin eval PROBE' writes, and PROBE.asked.json: what it answers
    RESULTS/suite.yaml, suite.json   the suite as it was run, and what came of it
    RESULTS/index.html               the page that compares

Embeddings are shared between the tasks of the same data. A result is kept as long as it answers the same question of
the same encoders; a mistake in one task is listed, and the others go on. Nothing is chosen here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import atomic_path, read_json, sha256, write_json
from eosin.data_tools.results import SCHEMA, read_results
from eosin.data_tools.shards import ShardSet
from eosin.eval.datasets import DATASETS, prepare
from eosin.eval.describe import title
from eosin.eval.embed import embed
from eosin.eval.embed_parts import refused_path
from eosin.eval.encoders import Encoder, load_encoder
from eosin.eval.probe import run_preset
from eosin.eval.question import Question
from eosin.eval.report.comparison import TaskDone, write_comparison
from eosin.eval.suite_dense import files_of, sight_of
from eosin.eval.suite_file import DENSE, PROBES, Suite, Task, as_keys, function_of, name_of

DESCRIPTION = "dataset.json"  # what a shard set has
SUITE, LOCK = "suite.yaml", ".lock"
COMPARED, WATCHED = "suite.json", "watch.jsonl"


@dataclass
class Outcome:
    """What came of a suite.

    Attributes:
        skipped: (task, how to get its data) of those whose data has no path.
        left_out: embeddings file -> number of tiles that could not be used.
    """

    tasks: list[TaskDone] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[Path, int] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether anything that was asked could not be answered."""
        return bool(self.left_out) or any(task.refused or task.without for task in self.tasks)


def run_suite(
    suite: Suite,
    encoders: Sequence[str],
    data: Mapping[str, Path],
    out: Path,
    device: str = "cpu",
    batch_size: int | None = None,
) -> Outcome:
    """Embed, probe and compare; what ``out`` holds of an earlier run is kept where it answers the same.

    Args:
        encoders: forms of :func:`~eosin.eval.encoders.load_encoder`.
        data: name of a task's data -> the folder where it lies.

    Raises:
        UserError: an encoder or a shard set that does not exist, no data for any task, or ``out`` is something else.
    """
    needed = [task for task in suite.tasks.values() if task.data]
    if needed and not encoders:
        raise UserError(
            f"suite '{suite.name}' embeds shard sets; give --encoders, e.g. --encoders RUN random:RUN color"
        )
    options = suite.embedding.model_dump()
    loaded = {given: load_encoder(given, device=device, **options).name for given in dict.fromkeys(encoders)}
    with held(out, suite, other=WATCHED):
        return _run(suite, loaded, find_data(suite, data, out), out, device, batch_size)


def _run(
    suite: Suite, loaded: Mapping[str, str], places: Mapping[str, Path], out: Path, device: str, batch_size: int | None
) -> Outcome:
    outcome, options = Outcome(), suite.embedding.model_dump()
    made: dict[str, list[Path]] = {name: [] for name in places}
    failed: dict[str, list[tuple[str, str]]] = {name: [] for name in places}
    folders, titles = slugs({name: name for name in places}), slugs(loaded)
    read = {task.data for task in suite.tasks.values() if task.embedded} & places.keys()
    for given in loaded if read else ():
        encoder = load_encoder(given, device=device, **options)
        for name, place in places.items():
            if name not in read:
                continue
            path = out / "embeddings" / folders[name] / f"{titles[given]}.safetensors"
            try:
                embedded(encoder, ShardSet(place), path, batch_size)
            except UserError as error:
                failed[name].append((encoder.name, str(error)))
                continue
            made[name].append(path)
            if refused_path(path).exists():
                outcome.left_out[path] = len(refused_path(path).read_text(encoding="utf-8").splitlines()) - 1

    def load() -> list[Encoder]:
        return [load_encoder(given, device=device, **options) for given in loaded]

    for number, (name, task) in enumerate(suite.tasks.items(), start=1):
        if task.data and task.data not in places:
            outcome.skipped.append((name, DATASETS[task.data].get))
            said = "skipped, since its data has no path"
        else:
            known = task.data or ""
            without = list(failed.get(known, []))
            done = TaskDone(name, task.about, places.get(known), made.get(known, []), [], [], without)
            run_task(task, done, out, device, load, batch_size)
            outcome.tasks.append(done)
            said = "; ".join([f"{len(done.results)} result{'s' * (len(done.results) != 1)}", *done.refusals])
        print(f"task {number}/{len(suite.tasks)} {name}: {said}", file=sys.stderr, flush=True)
    write_json(out / COMPARED, _described(suite, list(loaded), outcome, out))
    write_comparison(out / "index.html", suite.name, outcome.tasks)
    return outcome


def run_task(
    task: Task, done: TaskDone, out: Path, device: str, load: Callable[[], list[Encoder]], batch_size: int | None
) -> None:
    """Run a task's probes that are not answered yet, and add what came of them to ``done``.

    Args:
        load: gives the encoders, for a dense probe.
    """
    given = [Path(path) for path in task.embeddings or ()]
    done.embeddings.extend(given)
    for probe in task.probes:
        path = out / "results" / done.name / f"{name_of(probe)}.json"
        if DENSE not in probe and not done.embeddings:
            continue
        try:
            more: dict[str, Any] = {"device": device}
            if DENSE in probe:
                assert done.shards is not None
                sight = sight_of(task, done.shards, load())
                done.without.extend((f"{DENSE} of {encoder}", why) for encoder, why in sight.blind)
                question = question_of(task, [], path, sight.masks)
                fingerprints, files = sight.fingerprints, files_of(sight.masks)
                more |= sight.given | ({"batch_size": batch_size} if batch_size else {})
            else:
                question = question_of(task, done.embeddings, path)
                fingerprints = [read_embeddings(path).encoder for path in done.embeddings]
                files = [{"sha256": sha256(path)} for path in given]
            asked = _asked(probe, question, fingerprints, files)
            if not _answered(path, asked) and _answered(_earlier(path), asked):
                _move(_earlier(path), path)
            if not _answered(path, asked):
                _move(path, _earlier(path))
                ask(probe, question, **more)
                write_json(_asked_path(path), asked)
            done.results.append(path)
        except UserError as error:
            _move(path, _earlier(path))
            done.refused.append((name_of(probe), as_keys(str(error))))


def find_data(suite: Suite, data: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Data of the tasks -> folder of its shard set; public sets are packed where they are not yet.

    Left out are public sets without a path. Raises UserError when nothing is left, or a path holds something else.
    """
    names = list(dict.fromkeys(task.data for task in suite.tasks.values() if task.data))
    for name in data:
        if name not in names:
            raise UserError(f"--data {name}: no task of suite '{suite.name}' has this data; {nearest(name, names)}")
    packed = {name: out / "shards" / name for name in names if (out / "shards" / name / DESCRIPTION).is_file()}
    missing = [name for name in names if name in DATASETS and name not in (data.keys() | packed.keys())]
    if all(task.data in missing for task in suite.tasks.values()):
        how = "; ".join(f"{name}: {DATASETS[name].get}" for name in missing)
        raise UserError(f"no task of suite '{suite.name}' has its data; give --data {missing[0]}=PATH ... - {how}")
    found = {}
    for name in (name for name in names if name not in missing):
        place = data.get(name) or packed.get(name) or Path(name)
        if name in DATASETS and not (place / DESCRIPTION).is_file():
            place = prepare(name, place, out / "shards" / name)
        elif not place.exists() and name not in data:
            raise UserError(f"there is no folder '{name}', nor a public set; {nearest(name, list(DATASETS))}")
        ShardSet(place)
        found[name] = place
    return found


def embedded(encoder: Encoder, shards: ShardSet, path: Path, batch_size: int | None) -> None:
    """Embeddings at ``path``, made anew where what is there, whole or unfinished, is of other weights or tiles.

    Only for a path that this process alone writes to; see :func:`held`.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    there = path.exists() or unfinished.exists()
    try:
        embed(encoder, shards, path, batch_size)
    except UserError:
        if not there:
            raise
        path.unlink(missing_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        embed(encoder, shards, path, batch_size)


def question_of(task: Task, embeddings: list[Path], out: Path, masks: Path | None = None) -> Question:
    """The question of a task; a public set says what the task leaves open. Raises UserError where nobody says it.

    Args:
        masks: in place of a label, for a dense probe.
    """
    known = DATASETS.get(task.data or "")
    label = masks.stem if masks else task.label or (known and known.label)
    group = task.group or (known and known.group)
    if not label or not group:
        raise UserError(f"{'group' if label else 'label'} is not set; name a column")
    return Question(
        embeddings,
        label,
        group,
        out,
        labels=Path(task.labels) if task.labels else None,
        key=task.key,
        folds=task.folds,
        seed=task.seed,
        split=task.split,
        repeats=task.repeats,
        side=task.side or (known and known.side) or "split",
        by=tuple(dict.fromkeys(task.by)),
        allow_leak=task.allow_leak,
        cluster=task.cluster,
    )


def ask(probe: Mapping[str, Mapping[str, Any]], question: Question, **more: Any) -> dict[str, Any]:
    """Run a probe of a task; write and return its results.

    Args:
        more: passed on where the probe's function takes it, such as ``device``.
    """
    ((name, options),) = probe.items()
    about, function = PROBES[name], function_of(name)
    given = {about.spelled.get(option, option): value for option, value in options.items()}
    if given.get("preset"):  # of which the probe's own function knows nothing
        function, given = run_preset, given | {"name": given["preset"], "family": about.family}
        del given["preset"]
    given |= {name: value for name, value in more.items() if name in inspect.signature(function).parameters}
    results: dict[str, Any] = function(question, **given)
    return results


def table(tasks: Sequence[TaskDone]) -> list[list[str]]:
    """Task × encoder: the metric that each probe compares, with its interval; a head, and a row a probe and variant."""
    found: list[tuple[str, dict[str, str]]] = []
    for task in tasks:
        for path in task.results:
            results = read_json(path, "results")
            primary = results["primary"]
            for variant in dict.fromkeys(e.get("variant", "") for e in results["encoders"]):
                rows = [e for e in results["encoders"] if e.get("variant", "") == variant]
                leak = "(leak allowed)" if results.get("leaks", {}).get("found") else ""
                asked = " ".join(filter(None, (task.name, path.stem, variant, leak)))
                cells = {e["encoder"]: _interval(e["metrics"][primary]) for e in rows}
                chance = results["chance"].get(primary)
                of = {"chance": "" if chance is None else f"{chance:.3f}"}
                found.append((asked, {"metric": title(primary)} | cells | of))
    encoders = list(dict.fromkeys(c for _, cells in found for c in cells if c not in ("metric", "chance")))
    columns = ["metric", *encoders, "chance"]
    return [["", *columns], *([asked, *(cells.get(c, "") for c in columns)] for asked, cells in found)]


@contextlib.contextmanager
def held(out: Path, suite: Suite, other: str) -> Iterator[None]:
    """Hold the folder of results, with the suite written into it, so that no other process works there.

    Args:
        other: a file of what else a suite may be run for, COMPARED or WATCHED; its folder is another.

    Raises UserError where ``out`` is a file or holds something else, and where another process holds it.
    """
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if other in there:
        what = "what a run was watched for" if other == WATCHED else "a comparison of encoders"
        raise UserError(f"{out} holds {what} ({other}); give another --out")
    if out.is_file() or (there - {LOCK} and SUITE not in there):
        raise UserError(f"{out} exists and holds no suite's results; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works on {out}; wait for it, or give another --out") from None
        with atomic_path(out / SUITE) as temporary:
            temporary.write_text(yaml.safe_dump(suite.model_dump(), sort_keys=False), encoding="utf-8")
        yield


def slugs(named: Mapping[str, str]) -> dict[str, str]:
    """Key -> its name as the name of a file, with a hash of the key where two would be the same."""
    plain = {key: re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "data" for key, name in named.items()}
    counts = Counter(plain.values())
    hashed = {key: hashlib.blake2b(key.encode(), digest_size=3).hexdigest() for key in plain}
    return {key: slug if counts[slug] == 1 else f"{slug}-{hashed[key]}" for key, slug in plain.items()}


def _asked(
    probe: Mapping[str, Any], question: Question, encoders: list[dict[str, Any]], files: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """All that an answer depends on, as plain data."""
    known = {
        "schema": SCHEMA,
        "probe": probe,
        "question": {k: v for k, v in vars(question).items() if k not in ("embeddings", "out", "labels")},
        "labels": sha256(question.labels) if question.labels and question.labels.is_file() else None,
        "encoders": encoders,
        "files": files,
    }
    plain: dict[str, Any] = json.loads(json.dumps(known))
    return plain


def _answered(path: Path, asked: dict[str, Any]) -> bool:
    try:
        if read_json(_asked_path(path), "a question") != asked:
            return False
        read_results(path)
    except UserError:
        return False
    return True


def _asked_path(path: Path) -> Path:
    return path.with_suffix(".asked.json")


def _earlier(path: Path) -> Path:
    """Where the answer before is kept, out of sight: masks on a disk that was away for a day cost nothing anew."""
    return path.parent / ".earlier" / path.name


def _move(path: Path, to: Path) -> None:
    """Move results and what lies beside them. Without their question meanwhile, so that a kill leaves nothing whole."""
    try:
        asked = read_json(_asked_path(path), "a question")
    except UserError:
        _remove(path)
        return
    _remove(to)
    to.parent.mkdir(exist_ok=True)
    _asked_path(path).unlink()
    for file in path.parent.glob(f"{path.stem}.*"):
        file.replace(to.parent / file.name)
    write_json(_asked_path(to), asked)


def _remove(path: Path) -> None:
    """Remove results and what lies beside them; the question first, so that a kill leaves nothing that looks kept."""
    _asked_path(path).unlink(missing_ok=True)
    for old in path.parent.glob(f"{path.stem}.*"):
        old.unlink()


def _described(suite: Suite, encoders: list[str], outcome: Outcome, out: Path) -> dict[str, Any]:
    return {
        "name": suite.name,
        "encoders": encoders,
        "tasks": [
            {
                "name": task.name,
                "results": [path.relative_to(out).as_posix() for path in task.results],
                "refused": [{"probe": probe, "why": why} for probe, why in task.refused],
                "without": [{"encoder": encoder, "why": why} for encoder, why in task.without],
            }
            for task in outcome.tasks
        ],
        "skipped": [{"task": task, "get": get} for task, get in outcome.skipped],
        "left_out": {path.relative_to(out).as_posix(): count for path, count in outcome.left_out.items()},
    }


def _interval(found: Mapping[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return "undefined"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
