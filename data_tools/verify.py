"""Whether a shard set is whole: checksums, index against tars, keys, places, decoding, and the slides table's counts.

Everything is read from the tars themselves, never through the index that is being judged, a shard a process at a time.
Nothing is changed, but that on demand an index is written again where its tar proves what it held.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import read_json
from eosin.data_tools.pool import cores, run_each
from eosin.data_tools.progress import progress
from eosin.data_tools.repair import tar_tiles
from eosin.data_tools.shard_check import Found, Job, Rules, Slides, check_shard, hash_keys
from eosin.data_tools.shards import SCHEMA, index_name
from eosin.data_tools.sources import shorten

if TYPE_CHECKING:
    import pandas as pd

MOST_PROBLEMS = 20  # that a user reads
COLUMNS = ("slide", "stain", "tiles")  # that the readers of a slides table count on


class Verdict(NamedTuple):
    """What was found: problems, one line each; tiles decoded; indices that were rebuilt, one line each; what is left.

    ``lost`` are the shards whose bytes are not those that were written, ``mendable`` those of which only the index is
    wrong.
    """

    problems: list[str]
    decoded: int
    repaired: list[str]
    lost: list[str]
    mendable: list[str]


def verify_shards(
    folder: Path | str, sample: int | None = None, workers: int | None = None, repair: bool = False
) -> Verdict:
    """Look for anything wrong in a shard set; the verdict does not depend on the number of processes.

    Args:
        folder: the shard set.
        sample: decode only so many tiles, spread over all by a fixed draw; all by default.
        workers: processes; one a core by default.
        repair: write an index that is missing or wrong again where :func:`~eosin.data_tools.repair.rebuild_index` can
            prove it, and judge the set as it is then.

    Raises:
        UserError: a number out of range, or the folder is no shard set of this schema.
    """
    for name, value in (("sample", sample), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is out of range; valid: 1 or more")
    if "://" in str(folder) or ":/" in str(folder):  # a Path has one slash left
        raise UserError("a shard set behind a URL is not verified from afar; copy it here and verify the copy")
    folder = Path(folder)
    dataset = _described(folder)
    shards, total = dataset["shards"], sum(shard["tiles"] for shard in dataset["shards"])
    table, table_problems = _read_slides(folder)
    slides = None if table is None else Slides(table["slide"].tolist(), _sizes(table))
    rules = Rules(dataset["tile_size"], _mpps(dataset), slides)
    verdict = Verdict([], 0, [], [], [])
    problems, decoded, keys = verdict.problems, 0, array("Q")
    of_slide, outside, counted = np.zeros(0 if slides is None else len(slides.names), np.int64), 0, True
    work = partial(check_shard, folder=folder, rules=rules, repair=repair)
    # Closed before an error is told, so that no process still writes.
    with contextlib.closing(run_each(work, _jobs(shards, total, sample), workers or cores())) as results:
        for found, shard in zip(progress(results, total=len(shards), desc="verify", unit="shards"), shards):
            name = shard["file"]
            if isinstance(found, str):
                found = Found([f"{name}: {found}"])
            more = [f"{name}: {found.further} more problems"] if found.further else []
            problems += found.problems + more
            decoded += found.decoded
            keys.frombytes(found.keys.tobytes())
            if found.repaired:
                wrong = found.wrong_index.removeprefix(f"{index_name(name)}: ")
                verdict.repaired.append(f"{index_name(name)}: rebuilt from its tar; it was wrong: {wrong}")
            elif found.lost:
                verdict.lost.append(name)
            elif found.wrong_index:
                verdict.mendable.append(name)
            counted = counted and found.slides is not None
            if found.slides is not None:
                outside += _count(found.slides, of_slide)
    unlisted = {path.name for path in folder.glob("*.tar")} - {shard["file"] for shard in shards}
    problems += [f"{name}: not listed in dataset.json; remove it" for name in sorted(unlisted)]
    problems += _twice(np.frombuffer(keys, np.uint64), folder, shards)
    if dataset["tiles"] != total:
        problems.append(f"dataset.json: says {dataset['tiles']} tiles where its shards have {total}")
    problems += table_problems
    if table is not None:
        problems += _table_problems(table, dataset["slides"], of_slide if counted else None, outside)
    return verdict._replace(decoded=decoded)


def report(folder: Path, verdict: Verdict, repair: bool = False) -> str:
    """What a user reads: one line a problem, bounded, and what to do about them, or that all is well."""
    lines = _bounded(verdict.repaired)
    rebuilt = f"; indices rebuilt: {len(verdict.repaired)}" if verdict.repaired else ""
    if not verdict.problems:
        return "\n".join([*lines, f"{folder}: whole; {verdict.decoded} tiles decoded{rebuilt}"])
    todo = []
    if verdict.lost:
        todo.append(f"{shorten(verdict.lost)}: copy again from where the set is whole, or make the shard set again")
    if verdict.mendable and not repair:
        todo.append(f"'eosin verify {folder} --repair' rebuilds what the tars prove")
    todo = todo or ["make the shard set again"]
    problems = f"{len(verdict.problems)} problem{'s' * (len(verdict.problems) > 1)}"
    lines += [*_bounded(verdict.problems), f"{folder}: {problems}{rebuilt}; {'; '.join(todo)}"]
    # Names come from files, and a line break in one is no second line.
    return "\n".join("".join(c if c.isprintable() else "�" for c in line) for line in lines)


def _described(folder: Path) -> dict[str, Any]:
    """The content of ``dataset.json``, of which all that is used here is there."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist; make a shard set with 'eosin tile' or 'eosin pack'")
    dataset = read_json(folder / "dataset.json", "the description of a shard set")
    if dataset.get("kind") != "eosin shard set" or dataset.get("schema") != SCHEMA:
        raise UserError(f"{folder} holds no shard set of schema {SCHEMA}; make one with 'eosin tile' or 'eosin pack'")
    try:
        numbers = [dataset[name] for name in ("tiles", "slides", "tile_size")]
        for shard in dataset["shards"]:
            numbers += [shard["tiles"], shard["bytes"]]
            if Path(shard["file"]).name != shard["file"] or len(shard["sha256"]) != 64:
                raise KeyError(f"shard {shard['file']!r}")  # a file elsewhere is none of this set's
        if not all(type(number) is int for number in numbers):
            raise TypeError("a number is none")
        _mpps(dataset)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/dataset.json is incomplete ({error}); make the shard set again") from None
    return dataset


def _mpps(dataset: dict[str, Any]) -> list[float] | None:
    """The resolutions that a set's tiles may have; None where they are not known."""
    asked = dataset["config"].get("mpp")
    if dataset["mpp"] is not None:
        return [float(dataset["mpp"])]
    return [float(mpp) for mpp in asked] if isinstance(asked, list) else None


def _jobs(shards: Sequence[dict[str, Any]], total: int, sample: int | None) -> list[Job]:
    """Each shard with the numbers of the tiles in it that are to be decoded, None: all."""
    if sample is None or sample >= total:
        return [(shard, None) for shard in shards]
    drawn = np.sort(permute(np.arange(sample), total, purpose("verify")))
    starts = np.cumsum([0, *(shard["tiles"] for shard in shards)])
    edges = np.searchsorted(drawn, starts)
    return [(s, drawn[i:j] - start) for s, start, i, j in zip(shards, starts, edges, edges[1:])]


def _count(found: tuple[np.ndarray, np.ndarray], of_slide: np.ndarray) -> int:
    """Add the tiles of each slide number to those of the slides table; return how many are of none of these."""
    numbers, tiles = found
    known = (numbers >= 0) & (numbers < len(of_slide))
    of_slide[numbers[known]] += tiles[known]
    return int(tiles[~known].sum())


def _twice(hashes: np.ndarray, folder: Path, shards: Sequence[dict[str, Any]]) -> list[str]:
    """Keys that several tiles have; they are looked up by name only where there are any. Sorts ``hashes``."""
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return []
    count: Counter[str] = Counter()
    for shard in shards:
        with contextlib.suppress(Refusal):
            keys = [tile.key for tile in tar_tiles(folder / shard["file"])]
            named = np.isin(hash_keys(keys), twice[:MOST_PROBLEMS])
            count.update(key for key, is_named in zip(keys, named) if is_named)
    # One hash may be of two keys.
    lines = [f"key {key}: {n} tiles have it" for key, n in count.items() if n > 1]
    more = len(twice) - MOST_PROBLEMS
    return lines + ([f"and {more} more keys that several tiles have"] if more > 0 else [])


def _read_slides(folder: Path) -> tuple[pd.DataFrame | None, list[str]]:
    """The slides table with its names as text, None where slides cannot be told by it, and what is wrong with it."""
    import pandas as pd

    path = folder / "slides.parquet"
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        return None, [f"{path.name}: missing"]
    except (OSError, ValueError) as error:
        return None, [f"{path.name}: not readable: {' '.join(str(error).split())[:200]}"]
    lacking = [column for column in COLUMNS if column not in table]
    problems = [f"{path.name}: has no column {', '.join(lacking)}"] if lacking else []
    if "slide" in lacking:
        return None, problems
    return table.assign(slide=table["slide"].astype(str)), problems


def _sizes(table: pd.DataFrame) -> np.ndarray:
    """Width, height and µm/px of each slide, [n, 3], NaN where it is not known."""
    import pandas as pd

    sizes = np.full((len(table), 3), np.nan)
    for number, column in enumerate(("width", "height", "mpp")):
        # Of a packed set such a column came from a manifest, is text, and says something else.
        if column in table and pd.api.types.is_numeric_dtype(table[column]):
            sizes[:, number] = table[column].to_numpy(np.float64, na_value=np.nan)
    return sizes


def _table_problems(table: pd.DataFrame, expected: int, of_slide: np.ndarray | None, outside: int) -> Iterator[str]:
    """``of_slide``: tiles of each slide, None where not all indices can be read; ``outside``: tiles of no slide."""
    import pandas as pd

    name = "slides.parquet"
    if len(table) != expected:
        yield f"{name}: {len(table)} slides where dataset.json says {expected}"
    if outside:
        yield f"{name}: {outside} tiles belong to slides that are not in it"
    if table["slide"].duplicated().any():
        yield f"{name}: slide {table['slide'][table['slide'].duplicated()].iloc[0]} has two rows"
    if of_slide is not None and "tiles" in table:
        said = pd.to_numeric(table["tiles"], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        for number in np.flatnonzero(said != of_slide):
            slide = table["slide"].iloc[number]
            yield f"{name}: slide {slide} should have {said[number]:g} tiles and has {of_slide[number]}"


def _bounded(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_PROBLEMS
    return [*lines[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
