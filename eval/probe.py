"""Probes from files to results: grouped folds, one answer an encoder, metrics and comparisons.

A probe is fitted on all folds but one and scored on that one, so every sample is scored once by a probe that never
saw its group. A number never stands alone: beside it stand its interval, chance, and the other encoders.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.embeddings import Embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path, read_json
from eosin.data_tools.progress import progress
from eosin.data_tools.results import write_results
from eosin.eval import statistics
from eosin.eval.describe import PRIMARY, verdict
from eosin.eval.splits import grouped_folds
from eosin.eval.task import Task, load_task, pool_task

# Below this many groups a percentile interval is too narrow to be taken at its word.
FEW_GROUPS = 20


@dataclass(frozen=True)
class Question:
    """What is asked of the embeddings, the same for every probe; see :func:`~eosin.eval.task.load_task`."""

    embeddings: list[Path]
    label: str
    group: str
    out: Path
    labels: Path | None = None
    key: str = "slide"
    folds: int = 5
    seed: int = 0


@dataclass
class Answer:
    """What one probe on one encoder says of every sample, each scored out of fold.

    Attributes:
        encoder: the encoder's name.
        variant: what else tells rows apart (k, aggregator), empty where the encoder alone does.
        probabilities: [N, C].
        details: what was chosen on the way, such as C in each fold; goes into the results.
    """

    encoder: str
    variant: str
    fingerprint: dict[str, Any]
    probabilities: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the row in tables and plots."""
        return f"{self.encoder} + {self.variant}" if self.variant else self.encoder


def run_knn(question: Question, ks: Sequence[int] = (20,), device: str = "cpu") -> dict[str, Any]:
    """Probe by k nearest neighbors, every k in one pass; write and return the results.

    See :func:`~eosin.ssl.metrics.knn_probabilities`.
    """
    from eosin.ssl.metrics import TEMPERATURE, knn_probabilities

    task, folds = _prepare(question)
    smallest = len(folds) - int(np.bincount(folds).max())
    if min(ks) < 1 or max(ks) > smallest:
        raise UserError(f"k = {', '.join(map(str, ks))} must lie between 1 and the {smallest} samples to vote")
    answers = []
    for encoder in task.encoders:
        votes = np.empty((len(ks), len(folds), len(task.classes)), dtype=np.float32)
        for scored in _scored(folds, f"knn, {encoder.name}"):
            votes[:, scored] = knn_probabilities(
                encoder.features[scored],
                encoder.features[~scored],
                task.labels[~scored],
                len(task.classes),
                ks,
                device=device,
            )
        for k, probabilities in zip(ks, votes):
            variant = f"k = {k}" if len(ks) > 1 else ""
            answers.append(Answer(encoder.name, variant, encoder.encoder, probabilities, {"k": k}))
    parameters = {"k": list(ks), "temperature": TEMPERATURE, "similarity": "cosine"}
    return _conclude(question, task, folds, answers, "dinov2-knn", parameters, "tile")


def run_linear(question: Question) -> dict[str, Any]:
    """Probe by logistic regression; see :mod:`eosin.eval.linear`. Write and return the results."""
    task, folds = _prepare(question)
    answers = [_linear(question, task, folds, encoder, "", encoder.features) for encoder in task.encoders]
    return _conclude(question, task, folds, answers, "linear", _linear_parameters(), "tile")


def run_mil(question: Question, bag: str = "slide", device: str = "cpu") -> dict[str, Any]:
    """Probe bags of tiles by mean pooling and by gated attention; see :mod:`eosin.eval.mil`.

    Writes and returns the results; the attention that each tile got from the model that did not see its group is
    written beside them.
    """
    import pandas as pd

    from eosin.eval.mil import AttentionProtocol, attention_probabilities, mean_pool

    tiles = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    task, bags = pool_task(tiles, bag)
    folds = _folds(question, task)
    protocol = AttentionProtocol()
    answers, attentions = [], []
    for encoder in task.encoders:
        pooled = mean_pool(encoder.features, bags, len(folds))
        answers.append(_linear(question, task, folds, encoder, "mean", pooled))
        probabilities = np.empty((protocol.repeats, len(folds), len(task.classes)), dtype=np.float32)
        attention = np.empty(len(bags), dtype=np.float32)
        for fold, scored in enumerate(_scored(folds, f"attention, {encoder.name}")):
            probabilities[:, scored], attention[scored[bags]] = attention_probabilities(
                encoder.features,
                bags,
                task.labels,
                scored,
                len(task.classes),
                hash32(question.seed, purpose("mil fold"), fold),
                protocol,
                device,
            )
        spread = [float(_values(task, p, np.ones((1, len(task.group_names))))[PRIMARY][0]) for p in probabilities]
        answers.append(
            Answer(
                encoder.name, "attention", encoder.encoder, probabilities.mean(axis=0), {f"{PRIMARY}_by_repeat": spread}
            )
        )
        attentions.append(
            pd.DataFrame({"encoder": encoder.name, "key": tiles.keys, "slide": task.keys[bags], "attention": attention})
        )
    parameters = {
        "bag": bag,
        "mean": _linear_parameters(),
        "attention": asdict(protocol),
        "tiles": len(bags),
    }
    with atomic_path(attention_path(question.out)) as temporary:
        pd.concat(attentions).to_parquet(temporary, index=False)
    return _conclude(question, task, folds, answers, "mil", parameters, bag)


def attention_path(path: Path) -> Path:
    """Path of the tiles' attention that belongs to the results of :func:`run_mil` at ``path``.

    Its columns are encoder, key (of the tile), slide (of the bag) and attention, which sums to 1 over a bag.
    """
    return path.with_suffix(".attention.parquet")


def _prepare(question: Question) -> tuple[Task, np.ndarray]:
    task = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    return task, _folds(question, task)


def _folds(question: Question, task: Task) -> np.ndarray:
    """The fold of each sample, [N]; all refusals happen before the first fit."""
    if question.out.exists() and not _is_results(question.out):
        raise UserError(f"{question.out} exists and holds no results; give another --out")
    if len(task.classes) < 2:
        raise UserError(f"label '{question.label}' has one class only ('{task.classes[0]}'); a probe needs two or more")
    names = np.array(task.classes)[task.labels], np.array(task.group_names)[task.groups]
    return grouped_folds(*names, question.folds, question.seed)


def _scored(folds: np.ndarray, desc: str) -> Iterator[np.ndarray]:
    """The scored side of each fold in turn, [N] bool, with progress."""
    count = int(folds.max()) + 1
    for fold in progress(range(count), total=count, desc=desc, unit="folds"):
        yield folds == fold


def _is_results(path: Path) -> bool:
    try:
        return read_json(path, "results").get("kind") == "eosin results"
    except UserError:
        return False


def _linear(
    question: Question,
    task: Task,
    folds: np.ndarray,
    encoder: Embeddings,
    variant: str,
    features: np.ndarray,
) -> Answer:
    from eosin.eval.linear import linear_probabilities

    probabilities = np.empty((len(folds), len(task.classes)))
    chosen: list[float] = []
    for scored in _scored(folds, f"linear, {encoder.name}"):
        probabilities[scored], strength = linear_probabilities(
            features[scored],
            features[~scored],
            task.labels[~scored],
            task.groups[~scored],
            len(task.classes),
            hash32(question.seed, purpose("linear fold"), len(chosen)),
        )
        chosen.append(strength)
    return Answer(encoder.name, variant, encoder.encoder, probabilities, {"C": chosen})


def _linear_parameters() -> dict[str, Any]:
    from eosin.eval import linear

    return {
        "objective": "C * sum of cross-entropy + 0.5 * ||W||^2, free intercept, features standardized",
        "C": list(linear.GRID),
        "inner_folds": linear.INNER_FOLDS,
        "tolerance": linear.TOLERANCE,
    }


def _conclude(
    question: Question,
    task: Task,
    folds: np.ndarray,
    answers: list[Answer],
    protocol: str,
    parameters: dict[str, Any],
    unit: str,
) -> dict[str, Any]:
    """Score the answers, compare them pairwise, and write results and predictions."""
    weights = statistics.bootstrap_weights(len(task.group_names), statistics.DRAWS, question.seed)
    values = [_values(task, a.probabilities, weights) for a in answers]
    comparisons = [
        {"a": a.name, "b": b.name, "metric": metric} | statistics.difference(va[metric], vb[metric])
        for (a, va), (b, vb) in itertools.combinations(zip(answers, values), 2)
        # Only pairs that differ in one thing say what made the difference.
        if (a.variant == b.variant) != (a.encoder == b.encoder)
        for metric in statistics.METRICS
    ]
    encoders = [
        {
            "name": a.name,
            "encoder": a.encoder,
            "variant": a.variant,
            "fingerprint": a.fingerprint,
            "metrics": {metric: statistics.interval(v[metric]) for metric in statistics.METRICS},
            "details": a.details,
        }
        for a, v in zip(answers, values)
    ]
    results = {
        "protocol": protocol,
        "parameters": parameters
        | {
            "folds": question.folds,
            "seed": question.seed,
            "bootstrap_draws": statistics.DRAWS,
            "level": statistics.LEVEL,
        },
        "label": question.label,
        "group": question.group,
        "unit": unit,
        "n": len(folds),
        "groups": len(task.group_names),
        "classes": task.classes,
        "class_counts": np.bincount(task.labels, minlength=len(task.classes)).tolist(),
        "left_out": task.left_out,
        "chance": statistics.chance(task.labels, len(task.classes)),
        "encoders": encoders,
        "comparisons": comparisons,
    }
    results["verdict"] = verdict(results)
    results["notes"] = _notes(task)
    write_results(question.out, results, _predictions(task, folds, answers))
    return results


def _values(task: Task, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    return statistics.evaluate(task.labels, probabilities, task.groups, weights)


def _predictions(task: Task, folds: np.ndarray, answers: list[Answer]) -> Any:
    import pandas as pd

    classes, groups = np.array(task.classes, dtype=object), np.array(task.group_names, dtype=object)
    frames = []
    for answer in answers:
        known = {
            "encoder": answer.name,
            "key": task.keys,
            "group": groups[task.groups],
            "fold": folds,
            "label": classes[task.labels],
            "predicted": classes[answer.probabilities.argmax(axis=1)],
        }
        scores = {f"probability_{c}": answer.probabilities[:, i] for i, c in enumerate(task.classes)}
        frames.append(pd.DataFrame(known | scores))
    return pd.concat(frames, ignore_index=True)


def _notes(task: Task) -> list[str]:
    notes = []
    if len(task.group_names) < FEW_GROUPS:
        notes.append(f"Only {len(task.group_names)} groups: intervals from so few are too narrow.")
    if len(task.encoders) == 1:
        notes.append("A number alone says little: embed 'color' and 'random:RUN' too and give all files at once.")
    return notes
