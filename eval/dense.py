"""The dense probe: what an encoder's patch tokens know of the places in a tile, by linear maps on frozen tokens.

Segmentation: logistic regression of a patch's shares of classes (cross-entropy against the shares), its logits
stretched bilinearly to the tile's pixels, and Dice and IoU of the pixels. Values: ridge regression of a patch's mean of
each channel, and Pearson's r and the absolute error over a grid of cells. Every tile is answered by a probe that never
saw its group, and pixels that are not annotated are neither learned from nor scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.embeddings import Embeddings
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.shards import ShardSet
from eosin.eval import contamination, dense_data, linear
from eosin.eval.annotations import IGNORED, LEGEND, Annotations, open_annotations, tile_places
from eosin.eval.dense_scores import class_values, value_values
from eosin.eval.encoders import Encoder
from eosin.eval.frame import Row, clusters_of, leaks_and_reason, refuse_foreign, write_frame
from eosin.eval.logistic import Scale, logistic_path
from eosin.eval.question import Question, asked_columns, each_fold, leaks_of, make_split
from eosin.eval.regress import grouped_split
from eosin.eval.ridge import GRID, chosen_ridge
from eosin.eval.splits import Split
from eosin.eval.statistics import DRAWS, bootstrap_weights
from eosin.eval.task import Task, text

if TYPE_CHECKING:
    import pandas as pd

# Patches that a probe learns from; more of them change little, as those of one tile are alike.
MOST_PATCHES = 60_000
CELLS = 14  # a side, over which values are compared, whatever the encoder's grid
ABSENT = -1e4  # logit of a class that a training side lacks
AT_ONCE = 32  # tiles whose pixels are told at once
SHOWN = 8  # tiles in the picture


@dataclass
class _Ground:
    """What all encoders are held against: N tiles, their truth, split and clusters."""

    question: Question
    masks: Path
    regress: bool
    patches: int
    shards: ShardSet
    tiles: np.ndarray
    task: Task
    split: Split
    clusters: np.ndarray  # [N]
    draws: np.ndarray  # [1 + draws, clusters]
    shown: np.ndarray
    truth: np.ndarray  # of classes [N, T, T]; of values [N, CELLS, CELLS, C]
    annotations: Annotations
    leaks: list[dict[str, Any]]


def run_dense(
    question: Question,
    encoders: Sequence[Encoder],
    shards: ShardSet,
    masks: Path,
    regress: bool = False,
    patches: int = MOST_PATCHES,
    tile_size: float | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Probe the patch tokens of encoders on the annotated tiles of a shard set; write the results and a picture.

    Notes of the results speak of slides without annotations and files that fit nothing too.

    Args:
        question: group, split and out; its embeddings and labels are not looked at.
        encoders: with patch tokens, or "color" (:func:`~eosin.eval.dense_data.tokens_of`).
        shards: whose tiles are embedded; none of it is written.
        masks: annotations, or images of values (:mod:`eosin.eval.annotations`).
        regress: the masks hold values, not classes.
        patches: at most so many are learned from, the same number of each tile.
        tile_size: a tile's side in pixels of the slide's finest level, where the shard set does not know it.
        batch_size: tiles that are embedded at once.

    Raises:
        UserError: an encoder without patch tokens, nothing that is annotated, or a split that cannot be made.
    """
    from eosin.eval.dense_sheet import sheet_path, write_sheet

    names = [e.name for e in encoders]
    if len(set(names)) < len(names):
        raise UserError(f"two encoders go by the name '{max(names, key=names.count)}'; give each once")
    if patches < 1:
        raise UserError(f"--patches {patches} leaves nothing to learn from; give 1 or more")
    for encoder in encoders:
        dense_data.tokens_of(encoder)
    folder = question.out.resolve().parent
    ground, notices = _ground(question, shards, masks, regress, patches, tile_size, folder)
    rows, frames, pictures = [], [], {}
    for encoder in encoders:
        table = ground.task.table.copy()
        made = encoder.fingerprint | {"shards": shards.identity} | contamination.mark(table, encoder.seen)
        ground.task.encoders.append(Embeddings(np.empty((len(table), 0), np.float32), table, made))
        encoder = replace(encoder, fingerprint=made)
        tokens = dense_data.token_maps(encoder, shards, ground.tiles, folder, batch_size)
        row, frame, pictures[encoder.name] = (_values if regress else _classes)(ground, tokens)
        rows.append(row)
        frames.append(frame)
        del tokens
    images = np.zeros((len(ground.shown), shards.tile_size, shards.tile_size, 3), np.uint8)
    for places, found in dense_data.decoded(shards, ground.tiles[ground.shown], SHOWN, "picture"):
        images[places] = found
    write_sheet(sheet_path(question.out), images, ground.truth[ground.shown], pictures, ground.annotations.classes)
    return _results(ground, rows, frames, notices)


def _ground(
    question: Question,
    shards: ShardSet,
    masks: Path,
    regress: bool,
    patches: int,
    tile_size: float | None,
    folder: Path,
) -> tuple[_Ground, list[str]]:
    """Find the truth and the split; all refusals happen before the first encoder sees a tile."""
    refuse_foreign(question.out)
    table = tile_places(shards, tile_size)
    for column, option in ({question.group: "--group"} | asked_columns(question)).items():
        if column not in table.columns:
            raise UserError(
                f"{shards.name} has no column '{column}' for {option}; {nearest(column, list(map(str, table.columns)))}"
            )
    table["crc32"], table["size"] = (shards.column(name).astype(np.int64) for name in ("crc32", "size"))
    annotations, notices = open_annotations(masks, table, None if regress else shards.tile_size)
    has_file, grouped = annotations.file >= 0, text(table[question.group]) != ""
    left_out = {"no annotation": int((~has_file).sum())}
    left_out[f"no group in '{question.group}'"] = int((has_file & ~grouped).sum())
    tiles = np.flatnonzero(has_file & grouped)
    good = dense_data.readable(shards, tiles)
    left_out["an image that cannot be read"] = int((~good).sum())
    tiles = tiles[good]
    nothing = UserError(
        f"no tile of {shards.name} lies under an annotation of {masks} and has a group"
        + (f"; see which values its {LEGEND} names" if annotations.legend else "")
    )
    if not len(tiles):
        raise nothing
    if regress:
        truth = dense_data.value_truth(annotations, tiles, (CELLS, CELLS))
        named = annotations.legend or {}
        classes = [named.get(str(c + 1)) or f"channel {c + 1}" for c in range(truth.shape[3])]
        kinds, labels = ["values"], np.zeros(len(tiles), dtype=np.int64)
    else:
        truth = dense_data.class_truth(annotations, tiles, shards.tile_size, folder)
        counts = _counts(truth, range(len(truth)), len(annotations.classes))
        left_out["no annotation"] += int((counts.sum(axis=1) == 0).sum())
        classes, truth, tiles, counts = _present(annotations.classes, truth, tiles, counts)
        if not len(tiles):
            raise nothing
        if len(classes) == 1:
            raise UserError(
                f"{masks} annotates one class only in these tiles ('{classes[0]}'); a probe needs two or more"
            )
        kinds, labels = classes, _leading(classes, counts, text(table[question.group])[tiles])
    names, groups = np.unique(text(table[question.group])[tiles], return_inverse=True)
    rows = table.iloc[tiles].reset_index(drop=True)
    task = Task(
        [], rows, rows["key"].to_numpy(dtype=object), labels, kinds, groups, [str(n) for n in names],
        {reason: n for reason, n in left_out.items() if n},
    )  # fmt: skip
    # Where no class leads anywhere but one, or there are none, there is nothing for folds to spread.
    split = (make_split if len(np.unique(labels)) > 1 else grouped_split)(question, task)
    leaks = leaks_of(question, split, task)
    clusters, cluster_names = clusters_of(question, task)
    draws = bootstrap_weights(len(cluster_names), DRAWS, question.seed)
    annotations.classes = classes
    scored = np.unique(split.rows)
    shown = scored[_varied(labels[scored], tiles[scored], question.seed)]
    return _Ground(
        question, masks, regress, patches, shards, tiles, task, split, clusters, draws, shown, truth, annotations, leaks
    ), notices


def _classes(ground: _Ground, tokens: dense_data.Tokens) -> tuple[Row, pd.DataFrame, np.ndarray]:
    """Probe one encoder for classes: its row of the results, what was said of each tile, and of the shown ones."""
    classes, truth, split = ground.annotations.classes, ground.truth, ground.split
    n_classes, side = len(classes), truth.shape[1]
    shares = dense_data.patch_shares(truth, tokens.grid, n_classes)  # [N, h, w, C]
    flat = shares.reshape(len(shares), -1, n_classes)
    usable = flat.sum(axis=2) > 0
    of_tile, patch = dense_data.drawn_patches(usable, ground.tiles, ground.patches, ground.question.seed)
    features = tokens.maps.reshape(*usable.shape, -1)[of_tile, patch]  # [M, D]
    target = flat[of_tile, patch]  # [M, C]
    confusion = np.zeros((len(split.rows), n_classes, n_classes), dtype=np.int64)
    shown = np.full((len(ground.shown), side, side), IGNORED, np.uint8)
    chosen: list[float] = []
    device = tokens.encoder.device
    for rows, learned, scored in each_fold(split, f"dense, {tokens.encoder.name}"):
        mine = learned[of_tile]
        weights, intercepts, strength = _fit_classes(
            features[mine],
            target[mine],
            ground.task.groups[of_tile[mine]],
            hash32(ground.question.seed, purpose("dense fold"), len(chosen)),
            device,
        )
        chosen.append(strength)
        tiles, answers = np.flatnonzero(scored), np.flatnonzero(rows)
        for first in range(0, len(tiles), AT_ONCE):
            some = tiles[first : first + AT_ONCE]
            told = told_classes(tokens.maps[some], weights, intercepts, side)
            for tile, answer, said in zip(some, answers[first : first + AT_ONCE], told):
                real = truth[tile] != IGNORED
                pairs = truth[tile][real].astype(np.int64) * n_classes + said[real]
                confusion[answer] = np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
                shown[ground.shown == tile] = said
    clusters = ground.clusters[split.rows]
    values, per_class = class_values(confusion, split.rows, clusters, split.passes, ground.draws, classes)
    details = {"C": chosen, "grid": list(tokens.grid), "dimension": tokens.maps.shape[3], "patches": len(of_tile)}
    columns = {f"annotated_{c}": confusion[:, i].sum(axis=1) for i, c in enumerate(classes)}
    columns |= {f"told_{c}": confusion[:, :, i].sum(axis=1) for i, c in enumerate(classes)}
    columns |= {f"both_{c}": confusion[:, i, i] for i, c in enumerate(classes)}
    row = Row(tokens.encoder.name, tokens.encoder.fingerprint, values, {"classes": per_class, "details": details})
    return row, _said(ground, tokens.encoder.name, columns), shown


def _fit_classes(
    features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights [D, C], intercepts [C] and the C chosen for patches [M, D] with shares of classes [M, C].

    The strength is chosen for the class that covers the most of each patch; cross-entropy against shares is that of a
    sample a class, weighed by its share.
    """
    strength = linear.choose_strength(features, target.argmax(axis=1), groups, target.shape[1], seed, device)
    rows, labels = np.nonzero(target)
    present, codes = np.unique(labels, return_inverse=True)
    scale = Scale.of(features)
    shares = target[rows, labels].astype(np.float64)
    (fit,) = logistic_path(features, codes, (strength,), rows=rows, scale=scale, sample_weights=shares, device=device)
    weights = np.zeros((features.shape[1], target.shape[1]))
    intercepts = np.full(target.shape[1], ABSENT)
    weights[:, present], intercepts[present] = fit.weights, fit.intercepts
    return weights, intercepts, strength


def told_classes(maps: np.ndarray, weights: np.ndarray, intercepts: np.ndarray, side: int) -> np.ndarray:
    """The likeliest class of each pixel, uint8 [B, side, side], of patch tokens [B, h, w, D] under a linear head."""
    logits = torch.from_numpy(maps.astype(np.float32) @ weights.astype(np.float32) + intercepts.astype(np.float32))
    stretched = F.interpolate(logits.permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=False)
    return stretched.argmax(dim=1).to(torch.uint8).numpy()


def _values(ground: _Ground, tokens: dense_data.Tokens) -> tuple[Row, pd.DataFrame, np.ndarray]:
    """As :func:`_classes`, for values."""
    names, truth, split = ground.annotations.classes, ground.truth, ground.split
    target = truth
    if tokens.grid != (CELLS, CELLS):
        target = dense_data.value_truth(ground.annotations, ground.tiles, tokens.grid)
    flat = target.reshape(len(target), -1, len(names))
    usable = np.ones(flat.shape[:2], dtype=bool)
    of_tile, patch = dense_data.drawn_patches(usable, ground.tiles, ground.patches, ground.question.seed)
    features = tokens.maps.reshape(*usable.shape, -1)[of_tile, patch]
    down, across = (dense_data.overlaps(np.linspace(0, n, CELLS + 1), n) for n in tokens.grid)
    said = np.zeros((len(split.rows), CELLS, CELLS, len(names)), dtype=np.float32)
    chosen: list[list[float]] = []
    # A linear map is known by what it gives at zero and along each axis.
    probes = np.concatenate([np.zeros((1, features.shape[1])), np.eye(features.shape[1])])
    for rows, learned, scored in each_fold(split, f"dense, {tokens.encoder.name}"):
        mine = learned[of_tile]
        groups = ground.task.groups[of_tile[mine]]
        seed = hash32(ground.question.seed, purpose("dense fold"), len(chosen))
        found, penalties = chosen_ridge(probes, features[mine], flat[of_tile[mine], patch[mine]], groups, seed)
        chosen.append(penalties.tolist())
        tiles, answers = np.flatnonzero(scored), np.flatnonzero(rows)
        for first in range(0, len(tiles), AT_ONCE):
            maps = tokens.maps[tiles[first : first + AT_ONCE]].astype(np.float64) @ (found[1:] - found[0]) + found[0]
            said[answers[first : first + AT_ONCE]] = np.einsum("ih,bhwc,jw->bijc", down, maps, across, optimize=True)
    values, per_channel = value_values(
        truth[split.rows], said, ground.clusters[split.rows], split.passes, ground.draws, names
    )
    details = {"penalty": chosen, "grid": list(tokens.grid), "dimension": tokens.maps.shape[3], "patches": len(of_tile)}
    row = Row(tokens.encoder.name, tokens.encoder.fingerprint, values, {"targets": per_channel, "details": details})
    columns = {f"measured_{c}": truth[split.rows][..., i].mean(axis=(1, 2)) for i, c in enumerate(names)}
    columns |= {f"told_{c}": said[..., i].mean(axis=(1, 2)) for i, c in enumerate(names)}
    last = {int(tile): answer for answer, tile in enumerate(split.rows)}
    return row, _said(ground, tokens.encoder.name, columns), said[[last[int(tile)] for tile in ground.shown]]


def _results(ground: _Ground, rows: list[Row], frames: list[pd.DataFrame], notices: list[str]) -> dict[str, Any]:
    import pandas as pd

    question, task, split = ground.question, ground.task, ground.split
    names, once = ground.annotations.classes, np.unique(split.rows)
    parameters: dict[str, Any] = {"patches": ground.patches, "tokens": "float16"}
    if question.split in ("kfold", "monte-carlo"):
        parameters["folds"] = question.folds
    found, leak_notes = leaks_and_reason(question, ground.leaks)
    own: dict[str, Any] = {
        "masks": str(ground.masks),
        "split": split.describe(task.labels, task.groups, task.classes),
        "leaks": found,
    }
    chance: dict[str, float | None]
    if ground.regress:
        truth = ground.truth[once]
        deviation = truth.std(axis=(0, 1, 2), dtype=np.float64)
        targets = [
            {"name": n, "mean": float(truth[..., i].mean(dtype=np.float64)), "deviation": float(deviation[i])}
            for i, n in enumerate(names)
        ]
        own |= {"classes": [], "targets": targets}
        parameters |= {"cells": CELLS, "penalty": list(GRID), "mae": "in deviations of the truth"}
        chance, primary, protocol = {"pearson": 0.0, "mae": None}, "pearson", "dense-ridge"
    else:
        pixels = _counts(ground.truth, once, len(names)).sum(axis=0)
        share = pixels / pixels.sum()
        own |= {"classes": names, "class_counts": pixels.tolist()}
        parameters |= {
            "C": list(linear.GRID),
            "inner_folds": linear.INNER_FOLDS,
            "objective": "cross-entropy against a patch's shares of classes, features standardized",
            "pixels": "logits stretched bilinearly",
        }
        # Guessing each class at its share, and for accuracy the largest one always.
        chance = {
            "dice": 1 / len(names),
            "iou": float((share / (2 - share)).mean()),
            "pixel_accuracy": float(share.max()),
        }
        primary, protocol = "dice", "dense-linear"
    return write_frame(
        question,
        task,
        rows,
        pd.concat(frames, ignore_index=True),
        protocol=protocol,
        parameters=parameters,
        primary=primary,
        chance=chance,
        clusters=ground.draws.shape[1],
        scored=once,
        own=own,
        notes=[*leak_notes, *notices],
    )


def _said(ground: _Ground, encoder: str, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row a scored tile."""
    import pandas as pd

    rows, task = ground.split.rows, ground.task
    known = {
        "encoder": encoder,
        "key": task.keys[rows],
        "group": np.array(task.group_names, dtype=object)[task.groups[rows]],
        "fold": ground.split.folds,
    }
    return pd.DataFrame(known | columns)


def _counts(truth: np.ndarray, rows: Iterable[int], n_classes: int) -> np.ndarray:
    """Pixels of each class in some tiles, [n, C]."""
    found = [np.bincount(truth[row].ravel(), minlength=IGNORED + 1)[:n_classes] for row in rows]
    return np.array(found, dtype=np.int64).reshape(-1, n_classes)


def _present(
    classes: list[str], truth: np.ndarray, tiles: np.ndarray, counts: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Leave out tiles without an annotated pixel and classes without a pixel."""
    kept, there = counts.sum(axis=1) > 0, counts.sum(axis=0) > 0
    if not kept.all():
        # Moved to the front row by row, since the truth may be larger than memory.
        for to, row in enumerate(np.flatnonzero(kept).tolist()):
            truth[to] = truth[row]
    truth = truth[: int(kept.sum())]
    if not there.all():
        codes = np.full(IGNORED + 1, IGNORED, np.uint8)
        codes[: len(classes)][there] = np.arange(there.sum())
        for to in range(len(truth)):
            truth[to] = codes[truth[to]]
    return [c for c, t in zip(classes, there) if t], truth, tiles[kept], counts[kept][:, there]


def _leading(classes: list[str], counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The class that folds count a tile to, [N]: what it holds the most of, measured by what all tiles hold.

    A class that leads in one group only leads nowhere, since folds could not spread it. Raises UserError for a class
    without a pixel in any other group.
    """
    excess = counts / counts.sum(axis=0)
    for name, pixels in zip(classes, counts.T):
        where = np.unique(groups[pixels > 0])
        if len(where) == 1:
            raise UserError(
                f"class '{name}' is annotated in 1 group only ('{where[0]}'), so a grouped split cannot hold it on "
                "both sides; leave it out in legend.csv, or group by something finer"
            )
    while True:
        leading = excess.argmax(axis=1)
        lonely = [c for c in np.unique(leading) if len(np.unique(groups[leading == c])) == 1]
        if not lonely:
            return leading
        excess[:, lonely] = -1


def _varied(labels: np.ndarray, tiles: np.ndarray, seed: int) -> np.ndarray:
    """Places of a few tiles to show, drawn from each kind in turn."""
    words = hash32(seed, purpose("dense sheet"), tiles)
    order = np.lexsort((words, labels))
    turn = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.lexsort((labels[order], turn))][:SHOWN])
