"""Probes from embeddings to results: k nearest neighbors, logistic regression, named protocols, bags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
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


def run_knn(
    question: Question, ks: Sequence[int] = (20,), device: str = "cpu", ratios: Sequence[float] = ()
) -> dict[str, Any]:
    """Probe by k nearest neighbors, every k in one pass; write and return the results.

    See :func:`~eosin.ssl.metrics.knn_probabilities`; ``ratios`` as in :func:`run_linear`.
    """
    from eosin.ssl.metrics import TEMPERATURE, knn_probabilities

    task, split, leaks = prepare(question)
    ks, ratios = tuple(dict.fromkeys(ks)), tuple(dict.fromkeys(ratios))
    sides = _sides(question, task, split, ratios)
    _check_neighbors(ks, sides, ratios, "another --k")

    def probe(side: Side) -> tuple[np.ndarray, list[dict[str, Any]]]:
        return knn_probabilities(side.queries, side.train, side.labels, side.classes, ks, device=device), [{}] * len(ks)

    variants = {f"k = {k}" if len(ks) > 1 else "": {"k": k} for k in ks}
    answers = [a for e in task.encoders for a in _answers(task, split, e, sides, probe, "knn", variants, ratios)]
    parameters = {"k": list(ks), "temperature": TEMPERATURE, "similarity": "cosine"} | _shares(ratios)
    return conclude(question, task, split, leaks, answers, "dinov2-knn", parameters, "tile")


def run_preset(
    question: Question, name: str, family: str, device: str = "cpu", ratios: Sequence[float] = ()
) -> dict[str, Any]:
    """Probe by a protocol under the name that a paper gave it; see :mod:`eosin.eval.presets`. Write the results.

    A protocol of several runs makes each of them a pass of the split, so that values are means over the runs.
    ``ratios`` as in :func:`run_linear`.

    Raises UserError for a preset that is not of ``family``: "knn" or "logistic".
    """
    from eosin.eval.presets import names, preset, preset_probabilities

    if (chosen := preset(name)).protocol != family:
        raise UserError(f"preset '{name}' is of another kind; valid here: {', '.join(names(family))}")
    task, once, leaks = prepare(question)
    ratios = tuple(dict.fromkeys(ratios))
    runs = chosen.parameters.get("runs", 1)
    split = Split(once.kind, np.tile(once.assigned, (runs, 1)))
    sides = _sides(question, task, split, ratios)
    ks = chosen.parameters.get("k", ())
    _check_neighbors(ks, sides, ratios, f"--k instead of preset '{name}'")

    def probe(side: Side) -> tuple[np.ndarray, list[dict[str, Any]]]:
        return preset_probabilities(
            name,
            side.queries,
            side.train,
            side.labels,
            side.classes,
            device,
            groups=side.groups,
            seed=hash32(question.seed, purpose("preset fold"), side.fold),
        )

    variants: dict[str, dict[str, Any]] = {f"k = {k}": {} for k in ks} if len(ks) > 1 else {"": {}}
    answers = [a for e in task.encoders for a in _answers(task, split, e, sides, probe, name, variants, ratios)]
    if runs > 1:
        for answer in answers:
            answer.details |= _by_run(task, split, answer.probabilities, runs)
    parameters = {**chosen.parameters, "paper": chosen.paper, "differs": chosen.differs} | _shares(ratios)
    return conclude(question, task, split, leaks, answers, name, parameters, "tile")


def run_linear(question: Question, device: str = "cpu", ratios: Sequence[float] = ()) -> dict[str, Any]:
    """Probe by logistic regression; see :mod:`eosin.eval.linear`. Write and return the results.

    Args:
        ratios: shares of each training side to learn from in turn, in whole groups; see
            :func:`~eosin.eval.fewshot.label_share`.
    """
    task, split, leaks = prepare(question)
    ratios = tuple(dict.fromkeys(ratios))
    sides = _sides(question, task, split, ratios)
    answers = [a for e in task.encoders for a in _linear(question, task, split, e, sides, "", device, ratios)]
    return conclude(question, task, split, leaks, answers, "linear", _linear_parameters() | _shares(ratios), "tile")


def run_mlp(question: Question, width: int = 256, device: str = "cpu") -> dict[str, Any]:
    """Probe with one hidden layer; see :mod:`eosin.eval.mlp`. Write and return the results."""
    from eosin.eval.mlp import RECIPE, WIDEST, hidden_layer
    from eosin.eval.sgd import INNER_FOLDS, head_probabilities

    if not 1 <= width <= WIDEST:
        raise UserError(f"--width {width} makes no hidden layer; give 1 to {WIDEST}")
    task, split, leaks = prepare(question)

    def probe(side: Side) -> tuple[np.ndarray, list[dict[str, Any]]]:
        seed = hash32(question.seed, purpose("mlp fold"), side.fold)
        given = (side.queries, side.train, side.labels, side.groups, side.classes)
        found, details = head_probabilities(*given, RECIPE, seed, device, hidden_layer(width))
        return found[None], [details]

    sides = _sides(question, task, split)
    answers = [a for e in task.encoders for a in _answers(task, split, e, sides, probe, "mlp")]
    parameters = {"width": width, "activation": "GELU", "inner_folds": INNER_FOLDS} | asdict(RECIPE)
    return conclude(question, task, split, leaks, answers, "mlp", parameters, "tile")


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
    sides = _sides(question, task, split)
    for encoder in task.encoders:
        pooled = Embeddings(mean_pool(encoder.features, bags, len(task.labels)), task.table, encoder.encoder)
        answers += _linear(question, task, split, pooled, sides, "mean", device)
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


@dataclass(frozen=True)
class Side:
    """What a probe is given in one fold: queries [Q, D] to answer, and train [T, D] with labels and groups, [T].

    Both are rows of ``features``, [N, D], which may be mapped from a file, and are copied when they are asked for.
    """

    fold: int
    features: np.ndarray
    scored: np.ndarray
    learned: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    classes: int

    @property
    def queries(self) -> np.ndarray:
        """The rows to answer."""
        return self.features[self.scored]

    @property
    def train(self) -> np.ndarray:
        """The rows to learn from."""
        return self.features[self.learned]


def _sides(question: Question, task: Task, split: Split, ratios: Sequence[float] = ()) -> list[list[np.ndarray]]:
    """For each fold, the rows that are learned from: for each ratio a share of its groups, or all of them."""
    from eosin.eval.fewshot import label_share

    sides = []
    for learned, _ in split:
        rows = np.flatnonzero(learned)
        labels, groups = task.labels[rows], task.groups[rows]
        sides.append([rows[label_share(labels, groups, ratio, question.seed)] for ratio in ratios] or [rows])
    return sides


def _answers(
    task: Task,
    split: Split,
    encoder: Embeddings,
    sides: list[list[np.ndarray]],
    probe: Callable[[Side], tuple[np.ndarray, list[dict[str, Any]]]],
    what: str,
    variants: Mapping[str, dict[str, Any]] = MappingProxyType({"": {}}),
    ratios: Sequence[float] = (),
) -> list[Answer]:
    """Ask a probe of every fold: an answer for each ratio and each variant.

    Args:
        sides: see :func:`_sides`.
        probe: gives probabilities [R, Q, C] and what each of the R variants was made with.
        what: for the progress.
        variants: name -> what is known of it beforehand.
    """
    shape = (len(variants), len(split.rows), len(task.classes))
    found: list[np.ndarray] = []
    made: list[list[list[dict[str, Any]]]] = [[] for _ in ratios or [1.0]]
    for fold, (rows, _, scored) in enumerate(each_fold(split, f"{what}, {encoder.name}")):
        for share, learned in enumerate(sides[fold]):
            labels, groups = task.labels[learned], task.groups[learned]
            probabilities, details = probe(Side(fold, encoder.features, scored, learned, labels, groups, shape[2]))
            if fold == 0:
                found.append(np.empty(shape, dtype=probabilities.dtype))
            found[share][:, rows] = probabilities
            made[share].append(details)
    answers = []
    for share, probabilities in enumerate(found):
        learned_from = _learned_from(task, [side[share] for side in sides], ratios[share]) if ratios else {}
        for number, (variant, known) in enumerate(variants.items()):
            by_fold = [details[number] for details in made[share]]
            chosen = known | {key: [d[key] for d in by_fold] for key in by_fold[0]} | learned_from
            name = ", ".join(filter(None, [variant, f"{100 * ratios[share]:g} % of labels" if ratios else ""]))
            answers.append(Answer(encoder.name, name, encoder.encoder, probabilities[number], chosen))
    return answers


def _learned_from(task: Task, rows: list[np.ndarray], ratio: float) -> dict[str, Any]:
    groups = [len(np.unique(task.groups[r])) for r in rows]
    return {"share": {"ratio": ratio, "samples": [len(r) for r in rows], "groups": groups}}


def _shares(ratios: Sequence[float]) -> dict[str, Any]:
    return {"ratios": list(ratios)} if ratios else {}


def _check_neighbors(ks: Sequence[int], sides: list[list[np.ndarray]], ratios: Sequence[float], advice: str) -> None:
    """Refuse more neighbors than there are samples to vote, in any fold and share."""
    smallest = min(len(rows) for fold in sides for rows in fold)
    if ks and (min(ks) < 1 or max(ks) > smallest):
        share, larger = (" of the smallest share", " or larger --ratios") if ratios else ("", "")
        asked = ", ".join(map(str, ks))
        raise UserError(
            f"k = {asked} must lie between 1 and the {smallest} samples to vote{share}; give {advice}{larger}"
        )


def _by_run(task: Task, split: Split, probabilities: np.ndarray, runs: int) -> dict[str, Any]:
    """The primary metric of each run, and their deviation, of which the interval knows nothing."""
    passes = split.passes
    values = [
        primary(task, Split(split.kind, split.assigned[number : number + 1]), probabilities[passes == number])
        for number in range(len(split.assigned))
    ]
    by_run = np.reshape(values, (runs, -1)).mean(axis=1)
    return {f"{PRIMARY}_by_run": by_run.tolist(), f"{PRIMARY}_deviation": float(by_run.std(ddof=1))}


def _linear(
    question: Question,
    task: Task,
    split: Split,
    encoder: Embeddings,
    sides: list[list[np.ndarray]],
    variant: str,
    device: str,
    ratios: Sequence[float] = (),
) -> list[Answer]:
    from eosin.eval.linear import linear_probabilities

    def probe(side: Side) -> tuple[np.ndarray, list[dict[str, Any]]]:
        seed = hash32(question.seed, purpose("linear fold"), side.fold)
        given = (side.queries, side.features, side.labels, side.groups, side.classes)
        found, strength = linear_probabilities(*given, seed, device=device, rows=side.learned)
        return found[None], [{"C": strength}]

    return _answers(task, split, encoder, sides, probe, "linear", {variant: {}}, ratios)


def _linear_parameters() -> dict[str, Any]:
    from eosin.eval import linear

    return {
        "objective": "C * sum of cross-entropy + 0.5 * ||W||^2, free intercept, features standardized",
        "C": list(linear.GRID),
        "inner_folds": linear.INNER_FOLDS,
        "tolerance": linear.TOLERANCE,
    }
