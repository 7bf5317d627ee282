"""Probes from embeddings to results: k nearest neighbors, logistic regression, named protocols, bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.embeddings import Embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.eval.describe import PRIMARY
from eosin.eval.question import (
    Answer,
    Question,
    asked_columns,
    conclude,
    each_fold,
    leaks_of,
    make_split,
    prepare,
    primary,
)
from eosin.eval.splits import Split
from eosin.eval.task import Task, load_task, pool_task, same_in_bags


def run_knn(question: Question, ks: Sequence[int] = (20,), device: str = "cpu") -> dict[str, Any]:
    """Probe by k nearest neighbors, every k in one pass; write and return the results.

    See :func:`~eosin.ssl.metrics.knn_probabilities`.
    """
    from eosin.ssl.metrics import TEMPERATURE, knn_probabilities

    task, split, leaks = prepare(question)
    smallest = min(int(learned.sum()) for learned, _ in split)
    if min(ks) < 1 or max(ks) > smallest:
        raise UserError(f"k = {', '.join(map(str, ks))} must lie between 1 and the {smallest} samples to vote")
    answers = []
    for encoder in task.encoders:
        votes = np.empty((len(ks), len(split.rows), len(task.classes)), dtype=np.float32)
        for rows, learned, scored in each_fold(split, f"knn, {encoder.name}"):
            votes[:, rows] = knn_probabilities(
                encoder.features[scored],
                encoder.features[learned],
                task.labels[learned],
                len(task.classes),
                ks,
                device=device,
            )
        for k, probabilities in zip(ks, votes):
            variant = f"k = {k}" if len(ks) > 1 else ""
            answers.append(Answer(encoder.name, variant, encoder.encoder, probabilities, {"k": k}))
    parameters = {"k": list(ks), "temperature": TEMPERATURE, "similarity": "cosine"}
    return conclude(question, task, split, leaks, answers, "dinov2-knn", parameters, "tile")


def run_preset(question: Question, name: str, family: str, device: str = "cpu") -> dict[str, Any]:
    """Probe by a protocol under the name that a paper gave it; see :mod:`eosin.eval.presets`. Write the results.

    Raises UserError for a preset that is not of ``family``: "knn" or "logistic".
    """
    from eosin.eval.presets import PRESETS, preset, preset_probabilities

    if (chosen := preset(name)).protocol != family:
        valid = ", ".join(other for other, p in PRESETS.items() if p.protocol == family)
        raise UserError(f"preset '{name}' is of another kind; valid here: {valid}")
    task, split, leaks = prepare(question)
    smallest = min(int(learned.sum()) for learned, _ in split)
    ks = chosen.parameters.get("k", ())
    if ks and max(ks) > smallest:
        raise UserError(f"preset '{name}' asks {max(ks)} neighbors of {smallest} samples; give --k instead")
    answers = []
    for encoder in task.encoders:
        found = np.empty((max(len(ks), 1), len(split.rows), len(task.classes)))
        made = []
        for rows, learned, scored in each_fold(split, f"{name}, {encoder.name}"):
            found[:, rows], details = preset_probabilities(
                name,
                encoder.features[scored],
                encoder.features[learned],
                task.labels[learned],
                len(task.classes),
                device,
            )
            made.append(details)
        for number, probabilities in enumerate(found):
            variant = f"k = {ks[number]}" if len(ks) > 1 else ""
            by_fold = {"by_fold": [details[number] for details in made]}
            answers.append(Answer(encoder.name, variant, encoder.encoder, probabilities, by_fold))
    parameters = {**chosen.parameters, "paper": chosen.paper}
    return conclude(question, task, split, leaks, answers, name, parameters, "tile")


def run_linear(question: Question, device: str = "cpu") -> dict[str, Any]:
    """Probe by logistic regression; see :mod:`eosin.eval.linear`. Write and return the results."""
    task, split, leaks = prepare(question)
    answers = [_linear(question, task, split, encoder, "", encoder.features, device) for encoder in task.encoders]
    return conclude(question, task, split, leaks, answers, "linear", _linear_parameters(), "tile")


def run_mil(question: Question, bag: str = "slide", device: str = "cpu") -> dict[str, Any]:
    """Probe bags of tiles by mean pooling and by gated attention; see :mod:`eosin.eval.mil`.

    Writes and returns the results; the attention that each tile got from the model that did not see its group is
    written beside them.
    """
    import pandas as pd

    from eosin.eval.mil import AttentionProtocol, attention_probabilities, mean_pool

    tiles = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    task, bags = pool_task(tiles, bag)
    same_in_bags(tiles, bags, asked_columns(question))
    split = make_split(question, task)
    leaks = leaks_of(question, Split(split.kind, split.assigned[:, bags]), tiles)
    protocol = AttentionProtocol()
    answers, attentions = [], []
    for encoder in task.encoders:
        pooled = mean_pool(encoder.features, bags, len(task.labels))
        answers.append(_linear(question, task, split, encoder, "mean", pooled, device))
        probabilities = np.empty((protocol.repeats, len(split.rows), len(task.classes)), dtype=np.float32)
        attention, times = np.zeros(len(bags)), np.zeros(len(bags), dtype=np.int64)
        for fold, (rows, learned, scored) in enumerate(each_fold(split, f"attention, {encoder.name}")):
            used = learned | scored
            tile = used[bags]
            probabilities[:, rows], weights = attention_probabilities(
                encoder.features[tile],
                (np.cumsum(used) - 1)[bags[tile]],
                task.labels[used],
                scored[used],
                len(task.classes),
                hash32(question.seed, purpose("mil fold"), fold),
                protocol,
                device,
            )
            attention[scored[bags]] += weights
            times += scored[bags]
        spread = [primary(task, split, p) for p in probabilities]
        details = {f"{PRIMARY}_by_repeat": spread}
        answers.append(Answer(encoder.name, "attention", encoder.encoder, probabilities.mean(axis=0), details))
        columns = {"encoder": encoder.name, "key": tiles.keys, "slide": task.keys[bags]}
        columns["attention"] = (attention / np.maximum(times, 1)).astype(np.float32)
        attentions.append(pd.DataFrame(columns)[times > 0])
    parameters = {
        "bag": bag,
        "mean": _linear_parameters(),
        "attention": asdict(protocol),
        "tiles": len(bags),
    }
    with atomic_path(attention_path(question.out)) as temporary:
        pd.concat(attentions).to_parquet(temporary, index=False)
    return conclude(question, task, split, leaks, answers, "mil", parameters, bag)


def attention_path(path: Path) -> Path:
    """Path of the tiles' attention that belongs to the results of :func:`run_mil` at ``path``.

    Its columns are encoder, key (of the tile), slide (of the bag) and attention, which sums to 1 over a bag.
    """
    return path.with_suffix(".attention.parquet")


def _linear(
    question: Question,
    task: Task,
    split: Split,
    encoder: Embeddings,
    variant: str,
    features: np.ndarray,
    device: str,
) -> Answer:
    from eosin.eval.linear import linear_probabilities

    probabilities = np.empty((len(split.rows), len(task.classes)))
    chosen: list[float] = []
    for rows, learned, scored in each_fold(split, f"linear, {encoder.name}"):
        probabilities[rows], strength = linear_probabilities(
            features[scored],
            features[learned],
            task.labels[learned],
            task.groups[learned],
            len(task.classes),
            hash32(question.seed, purpose("linear fold"), len(chosen)),
            device=device,
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
