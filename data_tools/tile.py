"""Slides to a shard set: exact, resumable, the same bytes whatever the number of processes and however often killed.

A process handles a slide and leaves its tiles in a tar of its own with its facts beside it; the parent takes slides in
a fixed order and deals their tiles into shards as soon as there are enough. All of it happens in ``OUT.unfinished``:
killed at any moment, the same command goes on there, and ``OUT`` appears when everything is in it. A slide that cannot
be used is refused with a reason and its row says so; it never stops the others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.coords import Coords, find_coords
from eosin.data_tools.dealing import Journal, Part
from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import sha256
from eosin.data_tools.given_masks import find_masks
from eosin.data_tools.pool import cores, run_each
from eosin.data_tools.progress import progress
from eosin.data_tools.pseudonyms import ids_of, pseudonym, pseudonymize, read_key, refuse_ids
from eosin.data_tools.qc import write_page
from eosin.data_tools.shards import ShardSet, write_dataset
from eosin.data_tools.slide import MPP_RANGE
from eosin.data_tools.sources import (
    Summary,
    already_made,
    find_slides,
    fingerprint,
    join_table,
    leave_out_frozen,
    parse_part,
    part_of,
    shorten,
)
from eosin.data_tools.tile_slide import DROP_REASONS, SUBSAMPLING, Job, Settings, part, refused, tile_source
from eosin.data_tools.working import publish, tidy, working_folder

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    *("slide", "source", "vendor", "patient", "site", "stain"),
    *("mpp", "mpp_source", "width", "height", "tissue_mm2", "sections", "magnifications", "tiles"),
    *(f"dropped_{reason}" for reason in DROP_REASONS),
    *("state", "reason"),
]
# A slide that was begun so often without an end is named: it may be what kills the process.
MANY_ATTEMPTS = 3
# What identifies the input of a tiling, as hashes.
INPUTS = ("input", "slides_csv", "coords", "masks")


def tile_slides(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    mpp: float | Sequence[float] = 0.5,
    tile_size: int = 256,
    slides_csv: Path | str | None = None,
    mpp_override: float | None = None,
    stain: str | None = None,
    frozen: bool = False,
    pseudonyms: Path | str | None = None,
    coords: Path | str | None = None,
    masks: Path | str | None = None,
    share: str | None = None,
    mix: int = 4,
    shard_mib: int = 256,
    workers: int | None = None,
    **settings: Any,
) -> Summary:
    """Tile slides into a new shard set.

    Args:
        sources: slide files, and folders that are searched for slides.
        out: a new folder; a finished one of the same input and settings is left as it is, and unfinished work beside
            it is gone on with.
        mpp: µm/px of the tiles, one or several.
        tile_size: their side, px.
        slides_csv: a table of the slides, joined by :func:`~eosin.data_tools.sources.join_table`.
        mpp_override: µm/px of the slides' finest level, instead of what their files say; the table goes before it.
        stain: of all slides that the table does not know; "H&E" by default.
        frozen: keep slides that their table or name says are of frozen sections.
        pseudonyms: file with the key by which the ids of slides and patients are replaced; made where there is none.
        coords: given places instead of a grid: see :func:`~eosin.data_tools.coords.read_coords`.
        masks: a folder of tissue masks instead of ours: see :mod:`eosin.data_tools.given_masks`.
        share: "k/n": only the k-th of n parts of the slides; :func:`~eosin.data_tools.merge.merge_parts` joins them.
        mix: the tiles of so many shards are dealt among one another; 0 keeps the slides' order.
        shard_mib: target size of a shard, MiB.
        workers: processes; one a core by default.
        **settings: the other fields of :class:`~eosin.data_tools.tile_slide.Settings`.

    Raises:
        UserError: bad arguments, or no slide gave a tile; then nothing is left behind.
    """
    out = Path(out)
    magnifications = tuple(sorted(map(float, mpp))) if isinstance(mpp, Sequence) else (float(mpp),)
    chosen = Settings(mpp=magnifications, tile_size=tile_size, **settings)
    chosen.check()
    check_work(workers, mpp_override, mix, shard_mib)
    jobs, notices, given = find_jobs(sources, slides_csv, frozen, pseudonyms, coords, masks, share)
    config: dict[str, Any] = {"verb": "tile", **asdict(chosen), "subsampling": SUBSAMPLING}
    config |= {"mpp_override": mpp_override, "stain": stain, "mix": mix, "shard_mib": shard_mib, **given}
    config = json.loads(json.dumps(config))  # as it will be read
    if already_made(out, config):
        tidy(out)
        made = summary(out)
        made.lines.insert(0, f"{out} holds these tiles already, of the same slides and settings; nothing to do")
        return made
    with working_folder(out, config) as folder:
        if not (folder / "dataset.json").exists():
            journal = _tile_all(folder, jobs, chosen, mpp_override, mix, shard_mib << 20, workers or cores())
            rows = [
                slide_row(job, facts, stain or "H&E") for job, facts in sorted(journal, key=lambda pair: pair[0].row)
            ]
            # A part may be empty: the whole is not.
            if share is None and not any(row["tiles"] for row in rows):
                reasons = shorten([f"{row['source']}: {row['reason']}" for row in rows], limit=3)
                raise UserError(f"no slide gave a tile, so nothing was written; {reasons}")
            write_page(folder / "qc.html", out.name, rows)
            write_dataset(
                folder,
                Journal(folder).shards,
                _table(rows),
                tile_size=chosen.stored_size,
                mpp=magnifications[0] if len(magnifications) == 1 else None,
                config=config,
            )
        for name in ("parts", "batches", "attempts"):
            shutil.rmtree(folder / name, ignore_errors=True)
        publish(folder, out)
    made = summary(out)
    made.notices += notices
    return made


def check_work(workers: int | None, mpp_override: float | None, mix: int = 0, shard_mib: int = 1) -> None:
    """Raise UserError for a value out of range."""
    for name, value, good, valid in (
        ("workers", workers, workers is None or workers >= 1, "1 or more"),
        ("mix", mix, mix >= 0, "0 or more"),
        ("shard-mib", shard_mib, 1 <= shard_mib <= 1 << 14, "1 to 16384"),
        (
            "mpp-override",
            mpp_override,
            mpp_override is None or MPP_RANGE[0] <= mpp_override <= MPP_RANGE[1],
            f"{MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px",
        ),
    ):
        if not good:
            raise UserError(f"--{name} {value} is out of range; valid: {valid}")


def find_jobs(
    sources: Sequence[Path | str],
    slides_csv: Path | str | None,
    frozen: bool,
    pseudonyms: Path | str | None,
    coords: Path | str | None,
    masks: Path | str | None,
    share: str | None,
) -> tuple[list[Job], list[str], dict[str, Any]]:
    """The slides to be tiled with all that is given of each, notices for the user, and what identifies the input."""
    k, n = parse_part(share) if share else (1, 1)
    found = find_slides([Path(source) for source in sources])
    notices: list[str] = []
    if slides_csv is not None:
        found, notices = join_table(found, Path(slides_csv))
    given: dict[str, Any] = {
        "input": fingerprint(source.path for source in found),
        "slides_csv": sha256(slides_csv) if slides_csv is not None else None,
        "frozen": frozen,
        "pseudonymized": pseudonyms is not None,
        "coords": None,
        "masks": None,
        "part": share,
    }
    if not frozen:
        found, left_out = leave_out_frozen(found)
        if left_out:
            notices.append(f"frozen sections left out (--frozen keeps them): {shorten([s.listed for s in left_out])}")
    mask_of: dict[str, Path] = {}
    coords_of: dict[str, Coords | Path] = {}
    if masks is not None:
        mask_of, more = find_masks(Path(masks), found)
        notices += more
        given["masks"] = fingerprint(mask_of[name] for name in sorted(mask_of))
        found = [source for source in found if source.slide in mask_of]
    if coords is not None:
        coords_of, more = find_coords(Path(coords), found)
        notices += more
        given["coords"] = fingerprint([Path(coords)] if Path(coords).is_file() else sorted(Path(coords).rglob("*")))
        found = [source for source in found if source.slide in coords_of]
    if not found:
        raise UserError("no slide is left to tile; " + "; ".join(notices))
    if n > len(found):
        raise UserError(f"--part {share} of {len(found)} slides leaves parts without any; give fewer parts")
    if pseudonyms is None:
        sources_now = found
    else:
        key = read_key(Path(pseudonyms))
        for source in found:
            if isinstance(places := coords_of.get(source.slide), Coords):
                refuse_ids([(facts, ids_of(source)) for facts in places.facts])
        sources_now = pseudonymize(found, key)
        # A hash without a key could be found by trying names.
        given |= {name: pseudonym("i", given[name], key) for name in INPUTS if given[name]}
    beside = {
        hidden.slide: (mask_of.get(source.slide), coords_of.get(source.slide))
        for source, hidden in zip(found, sources_now)
    }
    mine = part_of(sorted(sources_now, key=lambda source: source.slide), k, n)
    jobs = [Job(row, source, *beside[source.slide]) for row, source in enumerate(mine)]
    return jobs, notices, given


def slide_row(job: Job, facts: dict[str, Any], stain: str) -> dict[str, Any]:
    """A slide's row of the slides table: ours first, then the table's further columns as they are."""
    source = job.source
    known = {"slide": source.slide, "source": source.listed, "vendor": "", "mpp_source": "", "tissue_mm2": 0.0}
    known |= {"sections": 0, "magnifications": ""} | {f"dropped_{reason}": 0 for reason in DROP_REASONS} | facts
    for column, default in (("patient", source.slide), ("site", ""), ("stain", stain)):
        known[column] = source.facts.get(column) or default
    further = {
        f"given_{column}" if column in COLUMNS else column: value
        for column, value in source.facts.items()
        if column not in ("patient", "site", "stain")
    }
    return {column: known.get(column) for column in COLUMNS} | further


def _tile_all(
    folder: Path,
    jobs: list[Job],
    settings: Settings,
    mpp_override: float | None,
    mix: int,
    shard_bytes: int,
    workers: int,
) -> list[tuple[Job, dict[str, Any]]]:
    """Tile what is not tiled yet and deal it into shards; return every job with its facts."""
    for name in ("parts", "attempts", "qc"):
        (folder / name).mkdir(exist_ok=True)
    for path in (folder / "attempts").iterdir():
        if path.stat().st_size >= MANY_ATTEMPTS:
            print(
                f"note: {path.name} was begun {path.stat().st_size} times without an end; it may need more memory "
                "than there is",
                file=sys.stderr,
            )
    places = np.arange(len(jobs))
    key = purpose("order of slides") + settings.seed
    order = [jobs[place] for place in (np.argsort(permute(places, len(jobs), key)) if mix else places).tolist()]
    journal = Journal(folder)
    done = len(journal.facts)
    for job in order[:done]:  # a kill may have come between a batch's record and the end of its parts
        _forget(folder, job)
    waiting: list[tuple[Job, dict[str, Any], np.ndarray | None]] = []
    close = partial(_close, folder, journal, waiting, shard_bytes, key if mix else None)
    work = partial(tile_source, settings=settings, mpp_override=mpp_override, folder=folder)
    before, began = sum(facts["tiles"] for facts in journal.facts), time.monotonic()
    tiles = size = 0
    # Closed before the folder goes, so that no worker still writes into it.
    with contextlib.closing(run_each(work, order[done:], workers)) as results:
        shown = progress(
            results,
            total=len(order),
            start=done,
            desc="tile",
            unit="slides",
            status=lambda: f"{before + tiles} tiles, {tiles / (time.monotonic() - began):.0f} tiles/s",
        )
        for job, result in zip(order[done:], shown):
            facts, index = result if isinstance(result, tuple) else (refused(result), None)
            waiting.append((job, facts, index))
            tiles += facts["tiles"]
            size += part(folder, job.source).stat().st_size if index is not None else 0
            if size >= max(mix, 1) * shard_bytes:
                close()
                size = 0
    close()
    return list(zip(order, journal.facts))


def _close(
    folder: Path,
    journal: Journal,
    waiting: list[tuple[Job, dict[str, Any], np.ndarray | None]],
    shard_bytes: int,
    key: int | None,
) -> None:
    """Deal the slides that wait into shards, note it, and remove what they left."""
    if not waiting:
        return
    parts = [Part(part(folder, job.source), index, job.row) for job, _, index in waiting if index is not None]
    journal.add(parts, [facts for _, facts, _ in waiting], shard_bytes, key)
    for job, _, _ in waiting:
        _forget(folder, job)
    waiting.clear()


def _forget(folder: Path, job: Job) -> None:
    tar = part(folder, job.source)
    for path in (tar, tar.with_suffix(".npy"), tar.with_suffix(".json"), folder / "attempts" / tar.stem):
        path.unlink(missing_ok=True)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows)
    return table.astype({"mpp": "float64", "width": "Int64", "height": "Int64"})


def summary(out: Path) -> Summary:
    """What a finished shard set of slides says of itself."""
    shards = ShardSet(out)
    table, config = shards.slides(), shards.dataset["config"]
    dropped = Counter({reason: int(table[f"dropped_{reason}"].sum()) for reason in DROP_REASONS})
    bad = table[table["state"] == "refused"]
    asked = [f"{mpp:g}" for mpp in config["mpp"]]
    at = " and ".join([", ".join(asked[:-1]), asked[-1]]) if len(asked) > 1 else asked[0]
    have = [set(text.split()) for text in table.loc[table["state"] != "refused", "magnifications"]]
    lacking = {mpp: sum(mpp not in own for own in have) for mpp in asked}
    lines = [
        f"{out}: {len(shards)} tiles of {shards.tile_size} px at {at} µm/px "
        f"from {len(table) - len(bad)} of {len(table)} slides",
        "dropped: " + (", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"),
        f"pictures: {out / 'qc.html'}",
    ]
    notices = [
        f"{n} of {len(have)} slides are too coarse for {mpp} µm/px, or smaller than a tile of it"
        for mpp, n in lacking.items()
        if n
    ]
    return Summary(lines, list(zip(bad["source"].tolist(), bad["reason"].tolist())), notices)
