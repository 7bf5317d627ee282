"""Regression: how well ridge regression on frozen features tells numbers, such as the expression of genes, out of fold.

Every sample is predicted by a fit that never saw its group. Metrics are computed for each target and then averaged over
targets:

- ``pearson``: Pearson's r in each fold, averaged over folds. Pooled over folds, predictions that know nothing but the
  mean of their training side would correlate negatively with what that side lacks;
- ``pearson_within``: r within each cluster (patient) of three samples or more, averaged over clusters: what is told of
  the differences inside a patient, without those between patients, stain among them;
- ``r2``: 1 less the squared error over that of the scored samples' own mean, all folds together;
- ``mae``: mean absolute error in standard deviations of the target, so that targets of several units can be averaged.

A prediction that never varies has an r of 0; a target that never varies has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.draws import generator, hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval import splits, statistics
from eosin.eval.frame import Row, clusters_of, interval, leaks_and_reason, refuse_foreign, write_frame
from eosin.eval.metrics import mean_defined
from eosin.eval.presets import preset
from eosin.eval.question import Question, each_fold, leaks_of
from eosin.eval.ridge import GRID, INNER_FOLDS, chosen_ridge, ridge_predictions
from eosin.eval.splits import LEARN, Split, stratified_folds
from eosin.eval.task import Task, absent, column_of, join_csv, keep_rows, read_encoders, text

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("pearson", "pearson_within", "r2", "mae")
LEAST_WITHIN = 3  # samples of a cluster
LARGEST = 1e100  # number of a target, so that squares stay finite
FLAT = 1e-10  # share of a sum of squares below which it is rounding


def run_regress(question: Question, targets: Sequence[str] = (), name: str | None = None) -> dict[str, Any]:
    """Predict targets out of fold; write and return the results.

    Args:
        question: its ``label`` is what the targets go by in the results, its ``labels`` a CSV that holds them.
        targets: columns of the CSV or of the embeddings; where there are none, every numeric column that the CSV adds.
        name: a preset of the family ridge in place of the own protocol, which chooses its penalties.

    Raises UserError for what is missing, no number, or the same everywhere, and where sides cannot be made.
    """
    refuse_foreign(question.out)
    chosen = preset(name) if name else None
    if chosen and chosen.protocol != "ridge":
        raise UserError(f"preset '{name}' is of another kind; valid here: hest-ridge")
    task, values, names, notes = load_targets(question, targets)
    split = grouped_split(question, task)
    leaks, leak_notes = leaks_and_reason(question, leaks_of(question, split, task))
    rows, folds, once = split.rows, split.folds, np.unique(split.rows)
    truth = values[rows]
    varies = np.any([np.ptp(truth[folds == fold], axis=0) > 0 for fold in range(len(split))], axis=0)
    if not varies.all():
        raise UserError(
            f"target '{names[varies.argmin()]}' is the same in all that a fold scores, in every fold, so that r is "
            "undefined; give fewer --folds, or leave it out of --targets"
        )
    middle, deviation = values[once].mean(axis=0), values[once].std(axis=0)
    clusters, cluster_names = clusters_of(question, task, rows)
    weights = statistics.bootstrap_weights(len(cluster_names), statistics.DRAWS, question.seed)
    answers, frames = [], []
    for encoder in task.encoders:
        predicted, details = _predict(question, task, split, encoder.features, values, names, name)
        told = (predicted - middle) / deviation
        found = score((truth - middle) / deviation, told, clusters, folds, weights)  # metric -> [R, G]
        by_target = {target: {m: interval(found[m][:, column]) for m in METRICS} for column, target in enumerate(names)}
        more = {"targets": by_target, "details": details}
        answers.append(Row(encoder.name, encoder.encoder, {m: mean_defined(v) for m, v in found.items()}, more))
        frames.append(_predictions(task, split, encoder.name, names, truth, predicted))
    import pandas as pd

    chance: dict[str, float | None] = {"pearson": 0.0, "pearson_within": 0.0, "r2": 0.0}
    chance["mae"] = float(np.abs((truth - middle) / deviation).mean())
    if not np.isfinite(answers[0].values["pearson_within"][0]):
        del chance["pearson_within"]
        notes.append(f"No target varies within a '{question.cluster or question.group}', so there is no r within.")
    if chosen:
        notes.append(f"{name} has no intercept, so R² and MAE count the mean of a target as an error.")
    return write_frame(
        question,
        task,
        answers,
        pd.concat(frames, ignore_index=True),
        protocol=name or "ridge",
        parameters=(dict(chosen.parameters) | {"paper": chosen.paper} if chosen else _parameters())
        | ({"folds": question.folds} if question.split in ("kfold", "monte-carlo") else {}),
        primary="pearson",
        chance=chance,
        clusters=len(cluster_names),
        scored=once,
        own={
            "classes": [],
            "targets": [
                {"name": n, "mean": float(m), "deviation": float(d)} for n, m, d in zip(names, middle, deviation)
            ],
            "split": split.describe(task.labels, task.groups, []),
            "leaks": leaks,
        },
        notes=[*leak_notes, *notes],
    )


def load_targets(question: Question, targets: Sequence[str]) -> tuple[Task, np.ndarray, list[str], list[str]]:
    """The task, which has no classes; its targets, [N, G] float64; their names; and notes on columns left out.

    Rows without a group or without one of the targets are left out and counted.
    """
    encoders = read_encoders(question.embeddings)
    table = own = encoders[0].table
    if question.labels is not None:
        table = join_csv(table, question.labels, question.key, list(targets))
    elif not targets:
        raise UserError("no targets are given; name columns with --targets, or a CSV of them with --targets-from")
    asked = {question.group, question.cluster, question.side}
    named = list(dict.fromkeys(targets)) or [c for c in table.columns if c not in own.columns and c not in asked]
    for column, option in ((question.group, "--group"), *((t, "--targets") for t in named)):
        if column not in table.columns:
            raise absent(question.embeddings[0], table, column, option)
    read, notes = {}, []
    for target in named:
        numbers, odd = as_numbers(table[target])
        if odd is None and np.isfinite(numbers).any():
            read[target] = numbers
        elif targets:
            said = f"holds '{odd}', which is no number, or too large a one" if odd is not None else "is empty"
            raise UserError(f"target '{target}' {said}; mend the column or leave it out of --targets")
        else:
            notes.append(
                f"Column '{target}' is no target: {'not a number everywhere' if odd is not None else 'empty'}."
            )
    if not read:
        raise UserError(f"{question.labels} adds no numeric column to the embeddings; name columns with --targets")
    groups = text(table[question.group])
    lacking, ungrouped = ~np.isfinite(np.stack(list(read.values()), axis=1)), groups == ""
    missing = lacking.any(axis=1)
    if (missing | ungrouped).all():
        worst = list(read)[int(lacking.sum(axis=0).argmax())]
        raise UserError(
            f"no tile has a group in '{question.group}' and a number for every target; '{worst}' lacks the most: "
            "leave it out with --targets"
        )
    encoders, table = keep_rows(encoders, table, kept := ~(missing | ungrouped))
    reasons = {"a target missing": missing, f"no group in '{question.group}'": ungrouped & ~missing}
    varied = {target: numbers[kept] for target, numbers in read.items() if np.ptp(numbers[kept]) > 0}
    same = [target for target in read if target not in varied]
    if same and (targets or not varied):
        raise UserError(f"target '{same[0]}' is the same in every tile; leave it out of --targets")
    notes += [f"Column '{target}' is no target: the same in every tile." for target in same]
    group_names, members = np.unique(groups[kept], return_inverse=True)
    task = Task(
        encoders,
        table,
        table["key"].to_numpy(dtype=object),
        np.zeros(len(table), dtype=np.int64),
        [],
        members.astype(np.int64),
        [str(g) for g in group_names],
        {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()},
    )
    return task, np.stack(list(varied.values()), axis=1), list(varied), notes


def as_numbers(column: pd.Series) -> tuple[np.ndarray, str | None]:
    """A column as float64, NaN where missing (empty, NaN, NA); and the first cell that is no number to use, if any."""
    import pandas as pd

    if column.dtype.kind in "biuf":
        values = column.to_numpy(dtype=np.float64)
        odd = np.abs(values) > LARGEST
        return values, str(values[odd.argmax()]) if odd.any() else None
    texts = text(column)
    missing = np.isin(np.char.lower(texts), ("", "nan", "na"))
    values = pd.to_numeric(pd.Series(np.where(missing, "nan", texts)), errors="coerce").to_numpy(dtype=np.float64)
    odd = ~(np.abs(values) <= LARGEST) & ~missing
    return values, str(texts[odd.argmax()]) if odd.any() else None


def grouped_split(question: Question, task: Task) -> Split:
    """Sides by whole groups, of about as many samples each; there are no classes to spread.

    Raises UserError for fewer groups than folds.
    """
    groups, n_groups, folds = task.groups, len(task.group_names), question.folds
    if question.split == "fixed":
        return splits.fixed(column_of(task, question.side, "--side"), np.arange(len(groups)), question.side)
    if question.split == "leave-one-group-out":
        folds = n_groups
    if folds < 2 or n_groups < folds:
        raise UserError(f"{n_groups} groups cannot fill {folds} folds; sides need 2 folds or more, each of a group")
    if question.split == "leave-one-group-out":
        return Split(question.split, groups[None])
    if question.split == "kfold":
        drawn = hash32(question.seed, purpose("folds"))
        return Split(question.split, stratified_folds(task.labels, groups, folds, drawn)[None])
    if question.repeats < 1:
        raise UserError(f"--repeats {question.repeats} scores nothing; give 1 or more")
    passes = np.full((question.repeats, len(groups)), LEARN, dtype=np.int64)
    for number in range(question.repeats):
        drawn = hash32(question.seed, purpose("monte carlo"), number)
        chosen = int(generator(drawn).integers(folds))
        passes[number, stratified_folds(task.labels, groups, folds, drawn) == chosen] = 0
    return Split(question.split, passes)


def score(
    truth: np.ndarray, predicted: np.ndarray, clusters: np.ndarray, folds: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of each target under every draw: metric -> [R, G], NaN where undefined.

    A fold whose clusters were drawn twice counts twice in the mean over folds.

    Args:
        truth: [M, G], near zero and of unit size.
        predicted: [M, G].
        clusters: [M], numbers in [0, K).
        folds: [M], of each sample.
        weights: [R, K], how often each cluster counts.
    """
    from scipy.sparse import csr_matrix

    # What a fold scores of a cluster is a cell; cells are in the order of folds.
    pairs, cells = np.unique(np.stack([folds, clusters]), axis=1, return_inverse=True)
    held = csr_matrix((np.ones(len(cells)), (cells, np.arange(len(cells)))))
    error = predicted - truth
    columns = (
        np.ones_like(truth),
        truth,
        predicted,
        truth**2,
        predicted**2,
        truth * predicted,
        np.abs(error),
        error**2,
    )
    sums = [held @ column for column in columns]  # each [cells, G]
    drawn = weights[:, pairs[1]]  # [R, cells]
    by_fold, weight = [], []
    for fold in np.unique(folds):
        inside = pairs[0] == fold
        by_fold.append(correlation(*(drawn[:, inside] @ part[inside] for part in sums[:6])))
        weight.append(np.where(np.isfinite(by_fold[-1]), drawn[:, inside].mean(axis=1, keepdims=True), 0))
    within = np.where(sums[0] >= LEAST_WITHIN, correlation(*sums[:6]), np.nan)
    n, x, xx, absolute, squared = (drawn @ sums[number] for number in (0, 1, 3, 6, 7))
    spread = xx - x**2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "pearson": sum(np.nan_to_num(r) * w for r, w in zip(by_fold, weight)) / sum(weight),
            "pearson_within": (drawn @ np.nan_to_num(within)) / (drawn @ np.isfinite(within)),
            "r2": np.where(spread > FLAT * xx, 1 - squared / spread, np.nan),
            "mae": absolute / n,
        }


def correlation(
    n: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Pearson's r of truth x and prediction y from their sums; NaN where x never varies, else 0 where y never does."""
    with np.errstate(invalid="ignore", divide="ignore"):
        spread_x, spread_y = xx - x**2 / n, yy - y**2 / n
        found = (xy - x * y / n) / np.sqrt(spread_x * spread_y)
        return np.where(spread_x > FLAT * xx, np.where(spread_y > FLAT * yy, found, 0.0), np.nan)


def _predict(
    question: Question,
    task: Task,
    split: Split,
    features: np.ndarray,
    values: np.ndarray,
    names: list[str],
    name: str | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    predicted = np.empty((len(split.rows), len(names)))
    penalties = []
    for rows, learned, scored in each_fold(split, name or "ridge"):
        if name:
            given = preset(name).parameters
            predicted[rows] = ridge_predictions(features[scored], features[learned], values[learned], **given)
            continue
        predicted[rows], found = chosen_ridge(
            features[scored], features[learned], values[learned], task.groups[learned], question.seed
        )
        penalties.append(found)
    if name:
        return predicted, {}
    return predicted, {"penalty": {n: [float(p[column]) for p in penalties] for column, n in enumerate(names)}}


def _parameters() -> dict[str, Any]:
    return {
        "features": "standardized by the training side",
        "targets": "centered by the training side; each has its own penalty, so that its unit changes nothing",
        "penalty": "of those in 'penalties' the one with the least squared error over inner grouped folds; "
        "times the number of samples it is scikit-learn's alpha",
        "penalties": list(GRID),
        "inner_folds": INNER_FOLDS,
    }


def _predictions(
    task: Task, split: Split, encoder: str, names: list[str], truth: np.ndarray, predicted: np.ndarray
) -> pd.DataFrame:
    import pandas as pd

    known = {
        "encoder": encoder,
        "key": task.keys[split.rows],
        "group": np.array(task.group_names, dtype=object)[task.groups[split.rows]],
        "fold": split.folds,
    }
    told = {f"true_{n}": truth[:, column] for column, n in enumerate(names)}
    return pd.DataFrame(known | told | {f"predicted_{n}": predicted[:, column] for column, n in enumerate(names)})
