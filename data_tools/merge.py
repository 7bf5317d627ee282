"""The parts of a tiling that was shared over machines, joined into one shard set that is provably whole.

Tars are linked, not copied, where the file system can; only their indices are written anew, since a slide's row in the
slides table changes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_dir
from eosin.data_tools.progress import progress
from eosin.data_tools.qc import write_page
from eosin.data_tools.shards import ShardSet, index_path, write_dataset
from eosin.data_tools.sources import Summary, already_made, parse_part, shorten
from eosin.data_tools.tile import summary
from eosin.data_tools.working import difference


def merge_parts(parts: Sequence[Path | str], out: Path | str) -> Summary:
    """Join shard sets that ``eosin tile --part k/n`` made of the same slides with the same settings.

    Args:
        parts: all n of them, in any order.
        out: a new folder; the parts stay as they are.

    Raises:
        UserError: a part is missing, given twice, of other settings or of other slides.
    """
    import pandas as pd

    out = Path(out)
    sets = _in_order([ShardSet(part) for part in parts])
    config = {name: value for name, value in sets[0].dataset["config"].items() if name != "part"} | {"part": None}
    if already_made(out, config):
        done = summary(out)
        done.lines.insert(0, f"{out} holds these parts already; nothing to do")
        return done
    tables = [part.slides() for part in sets]
    table = pd.concat(tables, ignore_index=True)
    twice = table["slide"][table["slide"].duplicated()]
    if len(twice):
        raise UserError(f"slide {twice.iloc[0]} is in two parts; make the parts again from the same slides")
    # As if all had been tiled at once: rows in the order of names.
    order = np.argsort(table["slide"].to_numpy(), kind="stable")
    row_of = np.argsort(order)
    shards: list[dict[str, Any]] = []
    first = np.cumsum([0, *(len(t) for t in tables)])
    with atomic_dir(out) as folder:
        (folder / "qc").mkdir()
        for number, part in enumerate(progress(sets, total=len(sets), desc="merge", unit="parts")):
            for shard, index in zip(part.dataset["shards"], part.indices()):
                tar = folder / f"tiles-{len(shards):06d}.tar"
                _link(part.folder / shard["file"], tar)
                index = index.copy()
                index["slide"] = row_of[first[number] + index["slide"]]
                np.save(index_path(tar), index, allow_pickle=False)
                shards.append(shard | {"file": tar.name})
            for picture in (part.folder / "qc").glob("*"):  # none where the user removed them
                _link(picture, folder / "qc" / picture.name)
        table = table.iloc[order].reset_index(drop=True)
        write_page(
            folder / "qc.html", out.name, [dict(zip(table.columns, row)) for row in table.itertuples(index=False)]
        )
        write_dataset(folder, shards, table, tile_size=sets[0].tile_size, mpp=sets[0].dataset["mpp"], config=config)
    return summary(out)


def _in_order(sets: list[ShardSet]) -> list[ShardSet]:
    """The parts from the first to the last, all there and alike."""
    numbered: dict[int, ShardSet] = {}
    settings: dict[str, Any] = {}
    for part in sets:
        config = part.dataset["config"]
        if config.get("verb") != "tile" or not config.get("part"):
            raise UserError(f"{part.name} was not made by 'eosin tile --part'; train on several sets by data.shards")
        k, n = parse_part(config["part"])
        here = config | {"part": f"of {n}"}
        settings = settings or here
        if here != settings:
            raise UserError(f"{part.name} was made otherwise than the others ({difference(settings, here)})")
        if k in numbered:
            raise UserError(f"{part.name} and {numbered[k].name} are both part {k} of {n}")
        numbered[k] = part
    if not sets:
        raise UserError("no part was given; give all that 'eosin tile --part' made")
    missing = [str(k) for k in range(1, n + 1) if k not in numbered]
    if missing:
        raise UserError(f"of {n} parts these are missing: {shorten(missing, limit=20)}; make or give them")
    return [numbered[k] for k in sorted(numbered)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
