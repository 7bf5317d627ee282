"""Retrieval: each tile asks for its like among the tiles of all other groups, ranked by cosine. Nothing is fitted.

Tiles of the query's own group (patient, slide) are never ranked: they share stain and section, and finding them again
is recognition. Every metric is the mean over the queries of a class and then over classes, so a large class counts no
more than a small one. The gallery stays as it is when groups of queries are drawn.

- ``map``: mean of the average precision over the whole ranking. Tied tiles stand together: each counts at the end of
  its tie, as in scikit-learn.
- ``top_k``: whether any of the first k is of the query's class; ties count against it.
- ``vote_k``: whether the first k vote for the query's class; equal votes go to the class of the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.eval import statistics
from eosin.eval.frame import Row, clusters_of, interval, leaks_and_reason, refuse_foreign, write_frame
from eosin.eval.metrics import mean_defined
from eosin.eval.question import Question, leaks_of
from eosin.eval.splits import Split
from eosin.eval.task import Task, load_task

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 1 << 24  # similarities held at a time


def run_retrieval(question: Question, tops: Sequence[int] = (1, 3, 5)) -> dict[str, Any]:
    """Rank all tiles of other groups for each tile; write and return the results.

    Raises UserError for a value of ``tops`` that is out of range, one class, a class of one group, and where a patient,
    slide or image stands in two groups.
    """
    refuse_foreign(question.out)
    task = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    _refuse(task, question.label, tops)
    leaks, notes = leaks_and_reason(question, leaks_of(question, Split("retrieval", task.groups[None]), task))
    clusters, names = clusters_of(question, task)
    weights = statistics.bootstrap_weights(len(names), statistics.DRAWS, question.seed)
    votes = [k for k in sorted(set(tops)) if k > 1]
    rows, frames = [], []
    for encoder in task.encoders:
        precision, first, near = rank(
            encoder.features, task.labels, task.groups, max(votes, default=1), f"retrieval, {encoder.name}"
        )
        voted = {k: vote(task.labels[near[:, :k]], len(task.classes)) for k in votes}
        found = {"map": precision}
        found |= {f"top_{k}": (first <= k).astype(float) for k in sorted(set(tops))}
        found |= {f"vote_{k}": (voted[k] == task.labels).astype(float) for k in votes}
        by_class = class_means(np.stack(list(found.values()), axis=1), task.labels, clusters, weights)
        values = {m: mean_defined(by_class[:, :, i]) for i, m in enumerate(found)}
        classes = {
            name: {"n": int((task.labels == c).sum()), "clusters": len(np.unique(clusters[task.labels == c]))}
            | {m: interval(by_class[:, c, i]) for i, m in enumerate(found)}
            for c, name in enumerate(task.classes)
        }
        rows.append(Row(encoder.name, encoder.encoder, values, {"classes": classes, "details": {}}))
        frames.append(_predictions(task, encoder.name, precision, first, near, voted))
    import pandas as pd

    return write_frame(
        question,
        task,
        rows,
        pd.concat(frames, ignore_index=True),
        protocol="retrieval",
        parameters={
            "similarity": "cosine",
            "gallery": f"every tile of another '{question.group}'",
            "top": sorted(set(tops)),
            "average": "over the queries of a class, then over classes",
        },
        primary="map",
        chance=chance(task.labels, task.groups, len(task.classes), sorted(set(tops)), votes),
        clusters=len(names),
        own={
            "classes": task.classes,
            "class_counts": np.bincount(task.labels, minlength=len(task.classes)).tolist(),
            "leaks": leaks,
        },
        notes=notes,
    )


def rank(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, nearest: int, desc: str = "retrieval"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank all tiles of other groups for each tile, by cosine; a tile of zeros is equally far from all.

    Args:
        features: [N, D].
        labels: [N], class numbers; each class occurs in two groups at least.
        groups: [N].
        nearest: how many of the first are wanted.

    Returns:
        Average precision, [N]; the rank of the first tile of the query's class, [N], from 1; and the first tiles,
        [N, nearest].
    """
    import torch

    rows = features.astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    count, size = len(rows), max(1, CHUNK // len(rows))
    precision, first = np.empty(count), np.empty(count, dtype=np.int64)
    near = np.empty((count, nearest), dtype=np.int64)
    starts = range(0, count, size)
    for start in progress(starts, total=len(starts), desc=desc, unit="chunks"):
        part = slice(start, start + size)
        similar = rows[part] @ rows.T  # [q, N]
        similar[groups[part, None] == groups] = -np.inf
        near[part] = torch.topk(torch.from_numpy(similar), nearest, dim=1).indices.numpy()
        for query, row in enumerate(similar, start):
            like = np.sort(row[(labels == labels[query]) & (groups != groups[query])])
            row.sort()
            # Of each like tile, how many tiles and how many like ones rank as high or higher.
            above = count - np.searchsorted(row, like, side="left")
            like_above = len(like) - np.searchsorted(like, like, side="left")
            precision[query] = np.mean(like_above / above)
            first[query] = above[-1] - like_above[-1] + 1
    return precision, first, near


def vote(neighbors: np.ndarray, n_classes: int) -> np.ndarray:
    """The class that most of the neighbors' labels, [N, k], nearest first, name: [N]."""
    counts = np.zeros((len(neighbors), n_classes), dtype=np.int64)
    for column in neighbors.T:
        counts[np.arange(len(neighbors)), column] += 1
    # Equal votes go to the class of the nearest neighbor among them.
    leading = np.take_along_axis(counts, neighbors, axis=1) == counts.max(axis=1, keepdims=True)
    return np.take_along_axis(neighbors, leading.argmax(axis=1)[:, None], axis=1)[:, 0]


def class_means(values: np.ndarray, labels: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of [N, M] over the samples of each class under every draw, [R, C, M]; NaN where a draw lacks the class."""
    n_classes, n_clusters = int(labels.max()) + 1, weights.shape[1]
    cells = labels * n_clusters + clusters

    def summed(column: np.ndarray) -> np.ndarray:
        return weights @ np.bincount(cells, column, n_classes * n_clusters).reshape(n_classes, n_clusters).T  # [R, C]

    counts = summed(np.ones(len(labels)))
    with np.errstate(invalid="ignore"):
        return np.stack([summed(column) / counts for column in values.T], axis=2)


def chance(
    labels: np.ndarray, groups: np.ndarray, n_classes: int, tops: Sequence[int], votes: Sequence[int]
) -> dict[str, float | None]:
    """What rankings in random order are expected to reach, exactly but for votes, which are taken to reach 1 / C.

    Of N tiles of which R are alike, a random order has an average precision of (H + (R - 1) / (N - 1) · (N - H)) / N
    with H = 1 + 1/2 + ... + 1/N, and misses among its first k with the probability C(N - R, k) / C(N, k).
    """
    cells = np.zeros((n_classes, int(groups.max()) + 1))
    np.add.at(cells, (labels, groups), 1)
    harmonic = np.cumsum(1 / np.arange(1, len(labels) + 1))
    others = len(labels) - cells.sum(axis=0)[None]  # [1, G]
    like = cells.sum(axis=1, keepdims=True) - cells  # [C, G]
    sums = harmonic[others.astype(int) - 1]
    means = {"map": (sums + (like - 1) / np.maximum(others - 1, 1) * (others - sums)) / others}
    for k in tops:
        places = np.arange(k)[:, None, None]
        means[f"top_{k}"] = 1 - np.prod(np.maximum(others - like - places, 0) / (others - places), axis=0)
    shares = cells / cells.sum(axis=1, keepdims=True)
    known: dict[str, float | None] = {m: float((v * shares).sum(axis=1).mean()) for m, v in means.items()}
    return known | {f"vote_{k}": 1 / n_classes for k in votes}


def _refuse(task: Task, label: str, tops: Sequence[int]) -> None:
    if len(task.classes) < 2:
        raise UserError(f"label '{label}' has one class only ('{task.classes[0]}'); every tile would be a right answer")
    pairs = np.unique(np.stack([task.labels, task.groups]), axis=1)
    spread = np.bincount(pairs[0])
    if (spread < 2).any():
        lonely = int(spread.argmin())
        where = task.group_names[pairs[1][pairs[0] == lonely][0]]
        raise UserError(
            f"class '{task.classes[lonely]}' occurs in 1 group only ('{where}'), so no other group holds its like; "
            "leave the class out of the labels or group by something finer"
        )
    smallest = len(task.labels) - int(np.bincount(task.groups).max())
    if min(tops) < 1 or max(tops) > smallest:
        raise UserError(
            f"--top {' '.join(map(str, tops))} must lie between 1 and the {smallest} tiles outside the largest group"
        )


def _predictions(
    task: Task,
    encoder: str,
    precision: np.ndarray,
    first: np.ndarray,
    near: np.ndarray,
    voted: dict[int, np.ndarray],
) -> pd.DataFrame:
    import pandas as pd

    classes, groups = np.array(task.classes, dtype=object), np.array(task.group_names, dtype=object)
    known = {
        "encoder": encoder,
        "key": task.keys,
        "group": groups[task.groups],
        "label": classes[task.labels],
        "predicted": classes[task.labels[near[:, 0]]],
        "nearest": task.keys[near[:, 0]],
        "average_precision": precision,
        "first_rank": first,
    }
    return pd.DataFrame(known | {f"vote_{k}": classes[v] for k, v in voted.items()})
