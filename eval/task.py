"""What a probe answers: embeddings of one or more encoders, row for row with labels and groups.

Labels and groups are columns of the embeddings or come from a CSV. Rows without a label or a group are left out and
counted; everything else that does not fit is refused here, before anything is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eosin.data_tools.embeddings import KEYS_ONLY, Embeddings, read_embeddings
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import read_csv
from eosin.eval.annotations import is_annotations, open_annotations, tile_labels

if TYPE_CHECKING:
    import pandas as pd

# What a row of a labels CSV speaks of -> the column of the embeddings that names it.
KEYS = {"tile": "key", "slide": "slide", "patient": "patient"}
LARGEST = 1e15  # feature, of which squares can be summed in 32 bits


@dataclass
class Task:
    """Samples with labels and groups, and the features that each encoder gives them.

    Attributes:
        encoders: one an encoder; features and table hold the rows of ``table``, in its order.
        table: N rows: everything the embeddings hold, and what a labels CSV added.
        keys: [N], the samples' names.
        labels: [N], class numbers.
        classes: names of the classes, sorted: as numbers where all are numbers.
        groups: [N], group numbers.
        group_names: names of the groups, sorted.
        left_out: reason -> number of samples.
    """

    encoders: list[Embeddings]
    table: pd.DataFrame
    keys: np.ndarray
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray
    group_names: list[str]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def ordered(self) -> bool:
        """Whether the classes are numbers, such as grades, so that an error by two is worse than one by one."""
        return _numbers(self.classes) is not None


def load_task(
    paths: list[Path], label: str, group: str, labels: Path | None = None, key: str = "slide", unit: str = "tile"
) -> Task:
    """Read embeddings of the same tiles and give each tile a label and a group.

    Args:
        paths: embeddings files, one an encoder.
        label: column that holds the label.
        group: column that holds what must not stand on both sides of a split.
        labels: CSV that adds columns, and goes before the embeddings' own; or annotations, whose classes become the
            column ``label`` where one covers half a tile (:mod:`eosin.eval.annotations`).
        key: what a row of the CSV speaks of: tile, slide or patient; the CSV has a column of that name.
        unit: what the result counts, for messages.

    Raises:
        UserError: a file or a column is missing, features are huge or not finite, keys repeat or differ between
            encoders, encoders saw different shard sets, or no row has both a label and a group.
    """
    encoders = read_encoders(paths)
    table = encoders[0].table
    if labels is not None:
        table = _annotate(table, labels, label) if is_annotations(labels) else join_csv(table, labels, key, [label])
    for column, option in ((label, "--label"), (group, "--group")):
        if column not in table.columns:
            hint = "" if labels is not None else "; labels kept elsewhere join with --labels x.csv --key slide"
            raise absent(paths[0], table, column, option, hint)
    texts, group_texts = text(table[label]), text(table[group])
    unlabeled, ungrouped = texts == "", group_texts == ""
    kept = ~(unlabeled | ungrouped)
    if not kept.any():
        raise UserError(f"no {unit} has both a label in '{label}' and a group in '{group}'; nothing is left to score")
    reasons = {f"no label in '{label}'": unlabeled, f"no group in '{group}'": ungrouped & ~unlabeled}
    classes, codes = np.unique(texts[kept], return_inverse=True)
    numbers = _numbers(list(classes))
    if numbers is not None:
        order = np.argsort(numbers, kind="stable")
        classes, codes = classes[order], np.argsort(order)[codes]
    group_names, groups = np.unique(group_texts[kept], return_inverse=True)
    encoders, table = keep_rows(encoders, table, kept)
    return Task(
        encoders,
        table,
        table["key"].to_numpy(dtype=object),
        codes.astype(np.int64),
        [str(c) for c in classes],
        groups.astype(np.int64),
        [str(g) for g in group_names],
        {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()},
    )


def read_encoders(paths: list[Path]) -> list[Embeddings]:
    """Read embeddings of the same tiles, all in the order of the first. Raises UserError as :func:`load_task`."""
    return _distinct([_read(path) for path in paths])


def keep_rows(
    encoders: list[Embeddings], table: pd.DataFrame, kept: np.ndarray
) -> tuple[list[Embeddings], pd.DataFrame]:
    """Embeddings and their table less the rows where ``kept``, [N] bool, is not set."""
    if kept.all():
        return encoders, table
    rows = np.flatnonzero(kept)
    encoders = [Embeddings(e.features[rows], e.table.iloc[rows], e.encoder, e.path) for e in encoders]
    return encoders, table.iloc[rows].reset_index(drop=True)


def absent(path: Path, table: pd.DataFrame, column: str, option: str, hint: str = "") -> UserError:
    """What to raise where embeddings lack a column that was asked for."""
    return UserError(
        f"{path} has no column '{column}' for {option}; {nearest(column, list(map(str, table.columns)))}{hint}"
    )


def pool_task(task: Task, bag: str) -> tuple[Task, np.ndarray]:
    """Turn a task of tiles into one of bags, whose label and group are those of all their tiles.

    Returns:
        The task of bags (its encoders still hold tiles), and the bag number of each tile, [T].

    Raises UserError when the column is absent or empty, or a bag holds tiles of two labels or two groups.
    """
    if bag not in task.table.columns:
        raise UserError(f"the embeddings have no column '{bag}' for --bag; {nearest(bag, list(task.table.columns))}")
    texts = text(task.table[bag])
    if (texts == "").any():
        raise UserError(f"{(texts == '').sum()} tiles have no '{bag}', so they belong to no bag; give another --bag")
    names, first, bags = np.unique(texts, return_index=True, return_inverse=True)
    for what, codes, of in (("labels", task.labels, task.classes), ("groups", task.groups, task.group_names)):
        odd = np.flatnonzero(codes != codes[first][bags])
        if len(odd):
            mine, other = of[codes[odd[0]]], of[codes[first][bags[odd[0]]]]
            raise UserError(
                f"bag '{texts[odd[0]]}' holds tiles of two {what} ('{other}' and '{mine}'); a bag has one: "
                "give another --bag, --label or --group"
            )
    pooled = Task(
        task.encoders,
        task.table.iloc[first].reset_index(drop=True),
        names.astype(object),
        task.labels[first],
        task.classes,
        task.groups[first],
        task.group_names,
        task.left_out,
    )
    return pooled, bags.astype(np.int64)


def identities(task: Task, group: str) -> dict[str, np.ndarray]:
    """What must not stand on both sides of a split -> [N], text: groups, patients, slides, and tiles of the same bytes.

    Only what the table tells: patients and slides where it has the columns, bytes where it has crc32 and size.
    """
    found = {group: np.array(task.group_names)[task.groups]}
    found |= {c: text(task.table[c]) for c in ("patient", "slide") if c in task.table.columns and c != group}
    if {"crc32", "size"} <= set(task.table.columns):
        crc32, size = text(task.table["crc32"]), text(task.table["size"])
        both = np.char.add(np.char.add(crc32, "-"), size)
        found["image"] = np.where((crc32 == "") | (size == ""), "", both)
    elif "image" in task.table.columns:  # of tiles straight from slides, a hash of their pixels
        found["image"] = text(task.table["image"])
    return found


def column_of(task: Task, column: str, option: str) -> np.ndarray:
    """A column of the task as text, [N]. Raises UserError when there is none."""
    if column not in task.table.columns:
        known = list(map(str, task.table.columns))
        raise UserError(f"the embeddings have no column '{column}' for {option}; {nearest(column, known)}")
    return text(task.table[column])


def same_in_bags(tiles: Task, bags: np.ndarray, columns: dict[str, str]) -> None:
    """Refuse columns (name -> option) of which a bag holds two values, since a bag has one."""
    _, first = np.unique(bags, return_index=True)
    for column, option in columns.items():
        values = column_of(tiles, column, option)
        odd = np.flatnonzero(values != values[first][bags])
        if len(odd):
            mine, other = values[odd[0]], values[first][bags[odd[0]]]
            raise UserError(
                f"a bag holds tiles of two '{column}', '{other}' and '{mine}'; give another --bag or {option}"
            )


def text(column: pd.Series) -> np.ndarray:
    """A column as strings, [N]; what is missing becomes empty, and 1.0 becomes 1."""
    if column.dtype.kind == "f":
        values = column.to_numpy()
        whole = np.isfinite(values) & (values == np.round(values))
        texts = ["" if np.isnan(v) else str(int(v)) if w else str(v) for v, w in zip(values, whole)]
    else:
        texts = ["" if v is None or v != v else str(v).strip() for v in column]
    return np.array(texts, dtype=object).astype(str)


def _numbers(names: list[str]) -> np.ndarray | None:
    """Names as finite numbers, None where one of them is none."""
    try:
        numbers = np.array([float(name) for name in names])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _read(path: Path) -> Embeddings:
    embeddings = read_embeddings(path)
    if "key" not in embeddings.table.columns or not len(embeddings.table):
        raise UserError(f"{path} holds no tiles")
    features = embeddings.features
    bad = ~((features.max(axis=1, initial=0) < LARGEST) & (features.min(axis=1, initial=0) > -LARGEST))
    keys = embeddings.table["key"]
    if bad.any():
        raise UserError(
            f"{path} holds NaN, infinite or huge features in {bad.sum()} of {len(bad)} rows, the first of tile "
            f"'{keys[bad.argmax()]}'; the encoder is broken"
        )
    repeated = keys.duplicated()
    if repeated.any():
        raise UserError(f"{path} holds tile '{keys[repeated.argmax()]}' twice; keys must be unique")
    return embeddings


def _distinct(encoders: list[Embeddings]) -> list[Embeddings]:
    """Bring all encoders to the first one's order of rows and give each its own name."""
    first = encoders[0]
    order = first.table["key"]
    for other in encoders[1:]:
        made_of = {str(e.encoder.get("shards", "")) for e in (first, other)}
        if len(made_of) > 1 and not any(name.startswith(KEYS_ONLY) for name in made_of):
            raise UserError(f"{first.path} and {other.path} were made from different shard sets; embed the same one")
        missing = len(set(order) ^ set(other.table["key"]))
        if missing:
            raise UserError(
                f"{first.path} and {other.path} do not hold the same tiles ({missing} are in one of them only); "
                "embed the same shard set with both encoders"
            )
        if not order.equals(other.table["key"]):
            rows = other.table.reset_index().set_index("key")["index"].loc[order].to_numpy()
            other.features, other.table = other.features[rows], other.table.iloc[rows].reset_index(drop=True)
    names = [e.name for e in encoders]
    if len(set(names)) < len(names):
        names = [f"{e.name} ({e.path.stem})" if names.count(e.name) > 1 and e.path else e.name for e in encoders]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"two embeddings go by the name '{twice}'; rename one of the files")
    return [Embeddings(e.features, e.table, e.encoder | {"name": n}, e.path) for e, n in zip(encoders, names)]


def _annotate(table: pd.DataFrame, path: Path, label: str) -> pd.DataFrame:
    """Add the class that annotations give each tile, empty where none covers half of it."""
    annotations, _ = open_annotations(path, table)
    return table.assign(**{label: tile_labels(annotations)[0]})


def join_csv(table: pd.DataFrame, path: Path, key: str, required: list[str]) -> pd.DataFrame:
    """Add the columns of a CSV, among them the required ones, to the table; rows it does not name get empty cells.

    Args:
        key: what a row of the CSV speaks of, and the column that says which: tile, slide or patient.

    Raises UserError when the CSV lacks a column, names a tile (slide, patient) twice, or names none of the table.
    """
    import pandas as pd

    column = KEYS[key]
    if column not in table.columns:
        raise UserError(f"the embeddings have no column '{column}' to join {path} by; give another --key")
    rows = pd.DataFrame(read_csv(path, [key, *required]))
    if rows.empty:
        raise UserError(f"{path} has a header but no rows")
    rows[key] = rows[key].str.strip()
    repeated = rows[key].duplicated()
    if repeated.any():
        raise UserError(f"{path} names {key} '{rows[key][repeated.argmax()]}' twice; one row each")
    names = text(table[column])
    added = rows.set_index(key).reindex(names).reset_index(drop=True).drop(columns="key", errors="ignore")
    if not np.isin(names, rows[key]).any():
        raise UserError(f"{path} names no {key} of the embeddings (theirs look like '{names[0]}')")
    own = [c for c in table.columns if c not in added.columns]
    return pd.concat([table[own], added], axis=1)
