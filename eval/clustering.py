"""Clustering: whether k-means finds the classes without having been told of them. Nothing is learned from labels.

Features are scaled to unit length, so that distances are those of cosine. k-means starts several times from its own
seeds; each start gives a clustering of its own, and values are means over them. Where groups are drawn the clusters
stay as they were found, and only the tiles that are counted change.

- ``ari``: adjusted Rand index (Hubert and Arabie 1985), 0 for clusters that know nothing. A group that is drawn twice
  agrees with itself, so pairs of a group and its copy are not counted; with them two in three encoders that know
  nothing would stand above 0.
- ``nmi``: mutual information over the mean of both entropies;
- ``matched_accuracy``: share of tiles that are right when each class is given one cluster, in the best way there is
  (Kuhn 1955). Of these two, the draws are moved by as much as their mean lies beside the value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.eval import statistics
from eosin.eval.frame import Row, clusters_of, refuse_foreign, write_frame
from eosin.eval.metrics import mean_defined
from eosin.eval.question import Question
from eosin.eval.task import Task, load_task

if TYPE_CHECKING:
    import pandas as pd


def run_cluster(question: Question, k: int | None = None, starts: int = 5) -> dict[str, Any]:
    """Cluster tiles by k-means; write and return the results.

    Args:
        question: its ``group`` is what the bootstrap draws as a whole.
        k: number of clusters; that of the classes where not given.
        starts: of k-means.

    Raises UserError for one class, and for k or starts out of range.
    """
    refuse_foreign(question.out)
    task = load_task(question.embeddings, question.label, question.group, question.labels, question.key)
    if len(task.classes) < 2:
        raise UserError(f"label '{question.label}' has one class only ('{task.classes[0]}'); there is nothing to find")
    k = len(task.classes) if k is None else k
    if not 2 <= k <= len(task.labels):
        raise UserError(f"--k {k} must lie between 2 and the {len(task.labels)} tiles")
    if starts < 1:
        raise UserError(f"--starts {starts} clusters nothing; give 1 or more")
    groups, names = clusters_of(question, task)
    weights = statistics.bootstrap_weights(len(names), statistics.DRAWS, question.seed)
    rows, frames = [], []
    for encoder in task.encoders:
        seeds = [hash32(question.seed, purpose("k-means"), number) for number in range(starts)]
        steps = progress(seeds, total=starts, desc=f"k-means, {encoder.name}", unit="starts")
        found = np.stack([kmeans(encoder.features, k, seed) for seed in steps])  # [starts, N]
        counted = [tables(clusters, task.labels, groups, weights, k, len(task.classes)) for clusters in found]
        each = {
            "ari": np.stack([adjusted_rand(clusters, task.labels, groups, weights) for clusters in found], axis=-1),
            "nmi": np.stack([centered(mutual_information(c)) for c in counted], axis=-1),
            "matched_accuracy": np.stack([centered(matched_share(c)) for c in counted], axis=-1),
        }  # each [R, starts]
        details = {"by_start": {m: [float(v) for v in values[0]] for m, values in each.items()}}
        details |= {"clusters": counted[0][0].astype(int).tolist()}
        values = {m: mean_defined(v) for m, v in each.items()}
        rows.append(Row(encoder.name, encoder.encoder, values, {"details": details}))
        frames.append(_predictions(task, encoder.name, found, counted[0][0]))
    import pandas as pd

    counts = np.bincount(task.labels)
    spread = [
        f"{row.encoder}: ARI from {min(v):.3f} to {max(v):.3f} over {starts} starts."
        for row in rows
        if len(v := row.more["details"]["by_start"]["ari"]) > 1
    ]
    return write_frame(
        question,
        task,
        rows,
        pd.concat(frames, ignore_index=True),
        protocol="k-means",
        parameters={
            "k": k,
            "starts": starts,
            "features": "scaled to unit length",
            "interval": "over groups, for the clusters as they were found",
        },
        primary="ari",
        chance={"ari": 0.0, "nmi": None, "matched_accuracy": float(counts.max() / counts.sum())},
        clusters=len(names),
        own={"classes": task.classes, "class_counts": counts.tolist()},
        notes=spread,
    )


def kmeans(features: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Clusters of [N, D], scaled to unit length, from one start of k-means++: [N] numbers in [0, k)."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows = features.astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    with warnings.catch_warnings():
        # Of fewer distinct rows than clusters, which then stay empty: the metrics show it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(KMeans(k, n_init=1, random_state=seed).fit_predict(rows), dtype=np.int64)


def tables(
    clusters: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: np.ndarray, k: int, n_classes: int
) -> np.ndarray:
    """Tiles of each cluster and class under every draw of groups, [R, k, C]."""
    from scipy.sparse import csr_matrix

    cells = csr_matrix(
        (np.ones(len(labels)), (clusters * n_classes + labels, groups)), shape=(k * n_classes, weights.shape[1])
    )
    return (cells @ weights.T).T.reshape(-1, k, n_classes)


def adjusted_rand(clusters: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Adjusted Rand index under every draw of groups, [R]; NaN where clusters and labels hold one part each.

    Args:
        clusters: [N], numbers from 0.
        labels: [N], numbers from 0.
        groups: [N], numbers in [0, G).
        weights: [R, G], how often each group counts.
    """
    cells = clusters * (int(labels.max()) + 1) + labels
    parts = (cells, clusters, labels, np.zeros_like(labels))
    both, a, b, all_pairs = (pairs_together(part, groups, weights) for part in parts)
    return _ratio(both - a * b / all_pairs, (a + b) / 2 - a * b / all_pairs)


def pairs_together(parts: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pairs of tiles that stand in one part, [N] numbers from 0, under every draw, [R].

    A group drawn twice counts its own pairs twice, but is not paired with its copy.
    """
    from scipy.sparse import csr_matrix

    held = csr_matrix((np.ones(len(parts)), (groups, parts)), shape=(weights.shape[1], int(parts.max()) + 1))
    drawn = (held.T @ weights.T).T  # [R, parts]
    copies = weights * (weights - 1) / 2
    return (drawn * (drawn - 1) / 2).sum(axis=1) - copies @ np.asarray(held.power(2).sum(axis=1)).ravel()


def centered(values: np.ndarray) -> np.ndarray:
    """Values of [1 + draws], the first of which is the value itself, with the draws moved to have it for their mean."""
    return np.concatenate([values[:1], np.minimum(values[1:] - (np.nanmean(values[1:]) - values[0]), 1)])


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of both entropies, of tables [R, k, C]: [R]; NaN where both are zero."""
    from scipy.special import entr

    shares = counts / counts.sum(axis=(1, 2), keepdims=True)
    a, b = (entr(shares.sum(axis=axis)).sum(axis=1) for axis in (2, 1))
    return _ratio(a + b - entr(shares).sum(axis=(1, 2)), (a + b) / 2)


def matched_share(counts: np.ndarray) -> np.ndarray:
    """Share of tiles on the best matching of clusters with classes, of tables [R, k, C]: [R]."""
    return np.array([table[match(table)].sum() / table.sum() for table in counts])


def match(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matching of rows with columns of [k, C] that holds the most: indices of both."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    return rows, columns


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isclose(denominator, 0, atol=1e-12), np.nan, numerator / denominator)


def _predictions(task: Task, encoder: str, found: np.ndarray, table: np.ndarray) -> pd.DataFrame:
    """Clusters of every start; ``predicted`` is the class matched with the cluster of the first, empty if none is."""
    import pandas as pd

    classes = np.array([*task.classes, ""], dtype=object)
    matched = np.full(len(table), len(task.classes))
    clusters, theirs = match(table)
    matched[clusters] = theirs
    known = {
        "encoder": encoder,
        "key": task.keys,
        "group": np.array(task.group_names, dtype=object)[task.groups],
        "label": classes[task.labels],
        "predicted": classes[matched[found[0]]],
    }
    return pd.DataFrame(known | {f"cluster_{number}": clusters for number, clusters in enumerate(found)})
