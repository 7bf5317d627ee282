"""Curves: what becomes of a probe's accuracy as tiles are made worse, or labels fewer.

A probe is fitted on clean tiles and scored on degraded ones, which asks how robust the features are; or fitted on tiles
degraded alike, which asks how much is left in them. Both sides are those of the same grouped folds throughout, and a
tile is degraded before the encoder's own stain normalization and resizing, as a worse slide would be. Few labels
are whole groups of the side that is learned from (:func:`~eosin.eval.fewshot.label_share`), scored on clean tiles.

Features are kept in a folder beside the results, a file an encoder and degradation, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eosin.data_tools.draws import hash32, permute, purpose
from eosin.data_tools.embeddings import Embeddings, read_embeddings, write_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.results import write_results
from eosin.data_tools.shards import ShardSet
from eosin.eval import contamination, scores, statistics
from eosin.eval.curves_frame import curves_of, predictions_of, verdict_of
from eosin.eval.degrade import Degradation
from eosin.eval.dense_data import decoded
from eosin.eval.describe import PRIMARY
from eosin.eval.embed import BAD_ALWAYS_ALLOWED, BAD_BOUND, features_of
from eosin.eval.encoders import Encoder
from eosin.eval.fewshot import label_share
from eosin.eval.frame import clusters_of, leaks_and_reason, refuse_foreign
from eosin.eval.question import Answer, Question, each_fold, prepare
from eosin.eval.splits import Split
from eosin.eval.task import Task
from eosin.ssl.stain.normalizer import make_normalizer

CLEAN = Degradation()
# (queries [Q, D], features [T, D], labels [T], groups [T]) -> probabilities [Q, K].
Probe = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """What the curves run through.

    Attributes:
        degradations: of all kinds, from mild to strong within each.
        shares: of the labels, in (0, 1).
        probe: "knn" (votes weighted by similarity) or "linear".
        k: neighbors; all samples where there are fewer.
        fit: "clean" or "degraded" tiles are learned from.
        max_tiles: as many tiles are drawn evenly from the shard set; None takes all.
    """

    degradations: tuple[Degradation, ...]
    shares: tuple[float, ...] = ()
    probe: str = "knn"
    k: int = 20
    fit: str = "clean"
    max_tiles: int | None = None


def run_curves(
    encoders: Sequence[Encoder],
    shards: ShardSet,
    question: Question,
    plan: Plan,
    device: str = "cpu",
    batch_size: int = 64,
) -> dict[str, Any]:
    """Embed, probe and score every point; write and return the results.

    Args:
        question: its embeddings are made here.

    Raises:
        UserError: as :func:`~eosin.eval.question.prepare`; also for names of encoders or points that are alike, shares
            or numbers of tiles out of range, fewer samples to learn from than ``k``, or more than 1 % of the tiles (and
            more than 3) unusable.
    """
    refuse_foreign(question.out)
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise UserError(f"two encoders go by the name '{next(n for n in names if names.count(n) > 1)}'; give each once")
    for share in plan.shares:
        if not 0 < share < 1:
            raise UserError(f"--share {share:g} is out of range; give 0.1 for 10 %, and at most 0.99")
    points = [*(d.name for d in plan.degradations), *(share_name(share) for share in plan.shares)]
    if len(set(points)) < len(points):
        raise UserError(f"'{next(p for p in points if points.count(p) > 1)}' is asked for twice; give each point once")
    if plan.max_tiles is not None and plan.max_tiles < 1:
        raise UserError(f"--max-tiles {plan.max_tiles} is not a number of tiles; give 1 or more")
    tiles = _drawn(len(shards), plan.max_tiles, question.seed)
    folder = cache_folder(question.out)
    folder.mkdir(parents=True, exist_ok=True)
    made = {CLEAN: _embedded(encoders, shards, tiles, CLEAN, folder, batch_size)}
    question = replace(question, embeddings=made[CLEAN])
    task, split, leaks = prepare(question)  # refuses before the other passes
    smallest = min(int(learned.sum()) for learned, _ in split)
    if plan.probe == "knn" and not 1 <= plan.k <= smallest:
        raise UserError(f"k = {plan.k} must lie between 1 and the {smallest} samples to vote")
    for degradation in plan.degradations:
        made[degradation] = _embedded(encoders, shards, tiles, degradation, folder, batch_size)
    files = [[made[d][number] for d in made] for number in range(len(encoders))]
    answers = [a for i, f in enumerate(files) for a in _answers(task, split, i, f, plan, question.seed, device)]
    return _conclude(question, task, split, leaks, answers, plan)


def cache_folder(out: Path) -> Path:
    """The folder that keeps the features of the results at ``out``."""
    return out.with_suffix(".cache")


def picture_path(out: Path) -> Path:
    """Path of the picture that belongs to the results at ``out``."""
    return out.with_suffix(".png")


def _drawn(count: int, most: int | None, seed: int) -> np.ndarray:
    """Numbers of the tiles, ascending; a smaller draw is part of a larger one."""
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(permute(np.arange(most), count, seed, purpose("curves tiles"))).astype(np.int64)


def _embedded(
    encoders: Sequence[Encoder],
    shards: ShardSet,
    tiles: np.ndarray,
    degradation: Degradation,
    folder: Path,
    batch_size: int,
) -> list[Path]:
    """Embeddings files of degraded tiles, one an encoder; those that are there are left as they are."""
    slides = hashlib.sha256(shards.store.read_all("slides.parquet")).hexdigest()
    data = {"shards": shards.identity, "slides": slides, "tiles": hashlib.sha256(tiles.tobytes()).hexdigest()}
    marks = [encoder.fingerprint | data | {"degradation": degradation.name} for encoder in encoders]
    paths = [
        folder / f"{hashlib.sha256(json.dumps(m, sort_keys=True).encode()).hexdigest()}.safetensors" for m in marks
    ]
    left = [number for number, path in enumerate(paths) if not path.is_file()]
    if not left:
        return paths
    normalizers = [make_normalizer(encoder.stain, shards) for encoder in encoders]
    kept: list[np.ndarray] = []
    features: dict[int, list[np.ndarray]] = {number: [] for number in left}
    for places, images in decoded(shards, tiles, batch_size, degradation.name):
        pixels = degradation(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())  # [B, 3, T, T]
        worse = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        numbers = shards.rows(tiles[places])["slide"].astype(np.int64)
        kept.append(tiles[places])
        for number in left:
            features[number].append(features_of(encoders[number], normalizers[number], worse, numbers)[0])
    good = np.concatenate([np.empty(0, np.int64), *kept])
    bad = len(tiles) - len(good)
    if not len(good) or bad > max(BAD_ALWAYS_ALLOWED, BAD_BOUND * len(tiles)):
        raise UserError(
            f"{bad} of {len(tiles)} tiles of {shards.name} cannot be used; run 'eosin verify {shards.name}'"
        )
    table = shards.table().iloc[good].reset_index(drop=True)
    for name in ("crc32", "size"):  # by which the same image under another name is known
        table[name] = shards.column(name)[good].astype(np.int64)
    for number in left:
        encoder, own = encoders[number], table.copy()
        contamination.mark(own, encoder.seen)
        write_embeddings(paths[number], Embeddings(np.concatenate(features[number]), own, marks[number]))
    return paths


def _answers(
    task: Task, split: Split, number: int, paths: list[Path], plan: Plan, seed: int, device: str
) -> list[Answer]:
    """What the probe says on one encoder's features: clean, of each degradation, and of fewer labels."""
    read = [read_embeddings(path) for path in paths]
    clean, encoder = read[0], task.encoders[number]
    at = clean.table.reset_index().set_index("key")["index"].loc[list(task.keys)].to_numpy()
    features = [embeddings.features for embeddings in read]
    names = [CLEAN.name, *(d.name for d in plan.degradations), *(share_name(share) for share in plan.shares)]
    found = np.empty((len(names), len(split.rows), len(task.classes)), dtype=np.float32)
    details: list[dict[str, Any]] = [{} for _ in names]
    for fold, (rows, learned, scored) in enumerate(each_fold(split, f"curves, {encoder.name}")):
        probe = _probe(plan, len(task.classes), hash32(seed, purpose("linear fold"), fold), device)
        labels, groups, train, asked = task.labels[learned], task.groups[learned], at[learned], at[scored]
        if plan.fit == "clean":
            queries = np.concatenate([values[asked] for values in features])
            said = probe(queries, features[0][train], labels, groups)
            found[: len(features), rows] = said.reshape(len(features), len(asked), -1)
        else:
            for point, values in enumerate(features):
                found[point, rows] = probe(values[asked], values[train], labels, groups)
        for point, share in enumerate(plan.shares, start=len(features)):
            used = label_share(labels, groups, share, seed)
            found[point, rows] = probe(features[0][asked], features[0][train[used]], labels[used], groups[used])
            details[point].setdefault("learned_from", []).append(len(used))
            details[point].setdefault("share", []).append(len(used) / len(labels))
    fingerprint = {key: value for key, value in encoder.encoder.items() if key != "degradation"}
    return [Answer(encoder.name, n, fingerprint, f, d) for n, f, d in zip(names, found, details)]


def share_name(share: float) -> str:
    """Such as "labels 10 %"."""
    return f"labels {100 * share:g} %"


def _probe(plan: Plan, n_classes: int, seed: int, device: str) -> Probe:
    from eosin.eval.linear import linear_probabilities
    from eosin.ssl.metrics import knn_probabilities

    def knn(queries: np.ndarray, train: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return knn_probabilities(queries, train, labels, n_classes, [min(plan.k, len(train))], device=device)[0]

    def linear(queries: np.ndarray, train: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return linear_probabilities(queries, train, labels, groups, n_classes, seed, device=device)[0]

    return knn if plan.probe == "knn" else linear


def _conclude(
    question: Question,
    task: Task,
    split: Split,
    leaks: list[dict[str, Any]],
    answers: list[Answer],
    plan: Plan,
) -> dict[str, Any]:
    """Score every point; compare each with the clean one of its encoder, and the encoders at each point."""
    rows, once = split.rows, np.unique(split.rows)
    numbers, names = clusters_of(question, task, rows)
    samples = scores.Samples.of(task, split, numbers, question.seed)
    values, pairs = scores.score(samples, answers)
    clean = {answer.name for answer in answers if answer.variant == CLEAN.name}
    alike = {answer.name: answer.variant for answer in answers}
    comparisons = [pair for pair in pairs if pair["a"] in clean or alike[pair["a"]] == alike[pair["b"]]]
    seen = contamination.of_task(task, once)
    described = split.describe(task.labels, task.groups, task.classes)
    chance = statistics.chance(task.labels[once], len(task.classes))
    leak, leak_notes = leaks_and_reason(question, leaks)
    results: dict[str, Any] = {
        "protocol": "curves",
        "parameters": {
            "probe": plan.probe,
            "fit": plan.fit,
            "max_tiles": plan.max_tiles,
            "seed": question.seed,
            "bootstrap_draws": statistics.DRAWS,
            "level": statistics.LEVEL,
        }
        | ({"k": plan.k} if plan.probe == "knn" else {})
        | ({"folds": question.folds} if question.split in ("kfold", "monte-carlo") else {}),
        "primary": PRIMARY,
        "label": question.label,
        "group": question.group,
        "unit": "tile",
        "n": len(once),
        "groups": len(np.unique(task.groups[once])),
        "cluster": question.cluster or question.group,
        "clusters": len(names),
        "classes": task.classes,
        "class_counts": np.bincount(task.labels[once], minlength=len(task.classes)).tolist(),
        "left_out": task.left_out,
        "split": described,
        "leaks": leak,
        "chance": {metric: chance[metric] for metric in samples.metrics},
        "encoders": [
            {"name": a.name, "encoder": a.encoder, "variant": a.variant, "fingerprint": a.fingerprint}
            | found
            | {"contamination": seen[a.encoder], "details": a.details}
            for a, found in zip(answers, values)
        ],
        "comparisons": comparisons,
        "by": {},
        "curves": curves_of(plan.degradations, [(share_name(s), s) for s in plan.shares], task.table.get("mpp")),
    }
    results["verdict"] = verdict_of(results)
    results["notes"] = [
        *leak_notes,
        *_too_few(answers, plan, len(task.classes)),
        *_larger(answers, plan),
        *contamination.notes(seen),
        *scores.notes(samples, described, {}),
    ]
    write_results(question.out, results, predictions_of(task, split, answers))
    return results


def _too_few(answers: list[Answer], plan: Plan, n_classes: int) -> list[str]:
    """A note on shares of the labels so small that most of the k neighbors must be of other classes."""
    counts = {a.variant: min(a.details["learned_from"]) for a in answers if "learned_from" in a.details}
    few = [variant for variant, count in counts.items() if count < plan.k * n_classes]
    if plan.probe != "knn" or not few:
        return []
    return [
        f"At {', '.join(few)} a class has fewer than k = {plan.k} samples on average, so that most votes are of other "
        "classes; a smaller --k or --probe linear asks such shares."
    ]


def _larger(answers: list[Answer], plan: Plan) -> list[str]:
    """A note on shares of the labels that whole groups of every class exceed by half and more."""
    held = {a.variant: float(np.mean(a.details["share"])) for a in answers if "share" in a.details}
    asked = {share_name(share): share for share in plan.shares}
    more = [f"{variant} holds {100 * s:.2g} %" for variant, s in held.items() if s > 1.5 * asked[variant]]
    return [f"Whole groups of every class are taken: {', '.join(more)}."] if more else []
