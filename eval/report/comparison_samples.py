"""What the comparison page computes from embeddings and predictions: neighbors, principal components, disputed labels.

Numbers only: nothing is drawn, fitted or written. Rows are drawn by their number, so a page is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.embeddings import Embeddings, read_embeddings
from eosin.eval.report.findings import Probe, Results, verb_of
from eosin.eval.task import text

NEIGHBORS = 5
PCA_ROWS, NEIGHBOR_ROWS = 5000, 2000
CHUNK = 1 << 24  # numbers held at a time
# Columns that say where a tile comes from, and how many values still can be told apart in a plot.
ORIGINS = ("site", "scanner", "vendor", "stain")
MOST_VALUES = 24
PICK = purpose("comparison page")


@dataclass(frozen=True)
class Tiles:
    """The tiles that a task scored, with what each encoder makes of them.

    Attributes:
        keys: [N].
        rows: [N], their rows in the embeddings files, in the order of their tiles.
        labels: [N], class numbers.
        classes: names.
        groups: [N], text.
        table: N rows: what the embeddings know of each.
        encoders: (name, features [N, D]).
        files: rows of an embeddings file.
    """

    keys: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray
    table: pd.DataFrame
    encoders: list[tuple[str, np.ndarray]]
    files: int

    def column(self, name: str) -> np.ndarray:
        """A column as text, [N]."""
        return text(self.table[name])


def of_tiles(result: Results) -> bool:
    """Whether results are about classes of single tiles."""
    return bool(result.data.get("classes")) and result.data.get("unit") == "tile" and "label" in result.predictions


def has_opinions(result: Results) -> bool:
    """Whether results give probabilities of single tiles by a probe that learned from more than a few labels."""
    given = of_tiles(result) and all(f"probability_{c}" in result.predictions for c in result.data["classes"])
    return given and verb_of(result.data) != "fewshot"


def gather_tiles(embeddings: Sequence[Path], results: Sequence[Results]) -> Tiles | None:
    """The tiles of the first results about classes of tiles; None where there are none, or not these embeddings."""
    asked = next((r for r in results if of_tiles(r)), None)
    if asked is None or not embeddings:
        return None
    said = asked.predictions
    said = said[said["encoder"] == asked.data["encoders"][0]["name"]].drop_duplicates("key")
    files = [read_embeddings(path) for path in embeddings]
    places = [pd.Index(e.table["key"]).get_indexer(said["key"]) for e in files]
    if any((p < 0).any() for p in places):
        return None
    classes = [str(c) for c in asked.data["classes"]]
    return Tiles(
        said["key"].to_numpy(dtype=object),
        places[0],
        pd.Index(classes).get_indexer(said["label"].astype(str)),
        classes,
        said["group"].to_numpy().astype(str),
        files[0].table.iloc[places[0]].reset_index(drop=True),
        [(_named(e, asked), _rows(e.features, p)) for e, p in zip(files, places)],
        len(files[0].table),
    )


def drawn_rows(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` rows, drawn by their number, in order."""
    order = np.argsort(uniform(np.arange(count), PICK), kind="stable")
    return np.sort(order[:most])


def queries(labels: np.ndarray, classes: int, each: int) -> np.ndarray:
    """Rows of ``each`` tiles of each class, fewer where it has fewer, by class."""
    order = np.argsort(uniform(np.arange(len(labels)), PICK), kind="stable")
    return np.concatenate([order[labels[order] == c][:each] for c in range(classes)])


def nearest(features: np.ndarray, groups: np.ndarray, asked: np.ndarray, k: int = NEIGHBORS) -> np.ndarray:
    """The ``k`` nearest rows by cosine that are of other groups than each asked row, nearest first, [Q, k].

    -1 where other groups hold fewer than ``k``.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    best = np.full((len(asked), k), -np.inf, dtype=np.float32)
    found = np.full((len(asked), k), -1, dtype=np.int64)
    wanted = _unit(features[asked])
    step = max(k, CHUNK // max(len(asked), features.shape[1], 1))
    for first in range(0, len(features), step):
        rows = np.arange(first, min(first + step, len(features)))
        close = wanted @ _unit(features[rows]).T  # [Q, chunk]
        close[numbers[asked][:, None] == numbers[rows]] = -np.inf
        both = np.concatenate([best, close], axis=1)
        places = np.concatenate([found, np.broadcast_to(rows, close.shape)], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, found = np.take_along_axis(both, order, 1), np.take_along_axis(places, order, 1)
    return np.where(np.isfinite(best), found, -1)


def alike(values: np.ndarray, near: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """How often a neighbor has the same value, and how often any row of another group has.

    Args:
        values: [N].
        near: [N, k], the neighbors of each row, -1 for none.
        groups: [N].
    """
    there = near >= 0
    same = (values[near] == values[:, None]) & there
    _, value = np.unique(values, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    cells = np.zeros((value.max() + 1, group.max() + 1))
    np.add.at(cells, (value, group), 1)
    equal = cells.sum(axis=1)[value] - cells[value, group]
    others = len(values) - cells.sum(axis=0)[group]
    chance = (equal[others > 0] / others[others > 0]).mean() if (others > 0).any() else np.nan
    return float(same.sum() / max(there.sum(), 1)), float(chance)


def principal(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores on the first two principal components, [N, 2], and their shares of the variance, [2].

    The sign of a component is such that its entry of largest magnitude is positive.
    """
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    if min(centered.shape) < 2:
        return np.pad(centered[:, :1], ((0, 0), (0, 1))), np.array([1.0, 0.0])
    _, sizes, axes = np.linalg.svd(_reduced(centered), full_matrices=False)
    axes = axes[:2] * np.sign(axes[[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    total = np.square(sizes).sum()
    return centered @ axes.T, np.square(sizes[:2]) / total if total else np.zeros(2)


def explained(points: np.ndarray, values: np.ndarray) -> float:
    """The share of the points' variance that lies between the values' means (eta squared), in [0, 1]."""
    centered = points - points.mean(axis=0)
    _, numbers = np.unique(values, return_inverse=True)
    counts = np.bincount(numbers)
    means = np.stack([np.bincount(numbers, weights=c) / counts for c in centered.T], axis=1)
    total = np.square(centered).sum()
    return float((counts[:, None] * np.square(means)).sum() / total) if total else 0.0


def origins(tiles: Tiles, more: Sequence[str]) -> list[str]:
    """Columns of two or more values that say where tiles come from, and of what else was asked those of few values."""
    there = [c for c in dict.fromkeys((*ORIGINS, *more)) if c in tiles.table.columns]
    counts = {c: len(set(tiles.column(c)) - {""}) for c in there}
    return [c for c in there if counts[c] >= 2 and (c in ORIGINS or counts[c] <= MOST_VALUES)]


def told_by(values: np.ndarray, labels: np.ndarray) -> float:
    """The balanced accuracy of naming the class from a value alone, such as the site: the best that can be done."""
    _, value = np.unique(values, return_inverse=True)
    cells = np.zeros((labels.max() + 1, value.max() + 1))
    np.add.at(cells, (labels, value), 1)
    cells = cells[cells.sum(axis=1) > 0]
    shares = cells / cells.sum(axis=1, keepdims=True)
    return float(shares.max(axis=0).sum() / len(cells))


def disputed(probes: Sequence[Probe], results: Sequence[Results]) -> pd.DataFrame:
    """Tiles whose label every consulted encoder contradicts with confidence, the surest first.

    Of each probe the best encoder is consulted, and those that cannot be told from it. One is confident of a class
    where its probability reaches the mean probability that tiles labeled so get (confident learning: Northcutt et al.
    2021, eq. 2). All have to name the same class.

    Returns:
        key, label, said (the class named), sure (mean of p(said) - p(label)).
    """
    verdicts: list[pd.DataFrame] = []
    for probe, result in zip(probes, results):
        best = probe.best()
        for row in probe.rows:
            pair = probe.against(best, row)
            if row is best or (pair is not None and not pair["excludes_zero"]):
                verdicts.append(_contradicted(result, row["name"]))
    if not verdicts:
        return pd.DataFrame(columns=["key", "label", "said", "sure"])
    agreed = verdicts[0]
    for other in verdicts[1:]:
        agreed = agreed.merge(other, on=["key", "label", "said"], suffixes=("", " of another"))
        agreed["sure"] += agreed.pop("sure of another")
    agreed["sure"] /= len(verdicts)
    return agreed.sort_values(["sure", "key"], ascending=[False, True], ignore_index=True)


def _contradicted(result: Results, name: str) -> pd.DataFrame:
    """What one encoder is confident of against the label, in out-of-fold probabilities, averaged over passes."""
    classes = [str(c) for c in result.data["classes"]]
    said = result.predictions[result.predictions["encoder"] == name]
    columns = [f"probability_{c}" for c in classes]
    means = said.groupby("key", sort=True)[columns].mean()
    given = said.drop_duplicates("key").set_index("key")["label"].astype(str).loc[means.index]
    probabilities, labels = means.to_numpy(dtype=np.float64), pd.Index(classes).get_indexer(pd.Index(given))
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=len(classes))
    sums = np.bincount(labels, weights=own, minlength=len(classes))
    level = np.divide(sums, counts, out=np.full(len(classes), np.inf), where=counts > 0)
    confident = np.where(probabilities >= level, probabilities, -1.0)
    named = confident.argmax(axis=1)
    rows = np.flatnonzero((confident.max(axis=1) >= 0) & (named != labels))
    sure = probabilities[rows, named[rows]] - probabilities[rows, labels[rows]]
    found = {"key": means.index[rows], "label": given.to_numpy()[rows], "said": np.array(classes)[named[rows]]}
    return pd.DataFrame(found | {"sure": sure})


def _named(embeddings: Embeddings, asked: Results) -> str:
    """The name under which results know these embeddings, which differs where two encoders go by one name."""

    def anonymous(fingerprint: dict[str, object]) -> dict[str, object]:
        return {k: v for k, v in fingerprint.items() if k != "name"}

    rows = asked.data["encoders"]
    same = [r["encoder"] for r in rows if anonymous(r["fingerprint"]) == anonymous(embeddings.encoder)]
    return str(same[0] if same else embeddings.name)


def _rows(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of features; all of them stay mapped from their file."""
    return features if np.array_equal(rows, np.arange(len(features))) else features[rows]


def _reduced(centered: np.ndarray) -> np.ndarray:
    """A matrix with the same singular values and right vectors, not taller than wide."""
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered


def _unit(features: np.ndarray) -> np.ndarray:
    rows = features.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
