"""From what a user gives - files, folders, a table - to a list of inputs with names, whose part each is, and whether
the work on them is done already. This module never opens an image.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, UserError
from eosin.data_tools.files import read_csv, refuse_occupied
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.slide import IMAGE_SUFFIXES, MPP_RANGE, SLIDE_SUFFIXES
from eosin.data_tools.slide_files import find_copies, join_series, sizes_of, with_companions
from eosin.data_tools.slide_names import FROZEN, facts_of

ABSENT = "listed in the table, but no such file was given"


@dataclass(frozen=True)
class Source:
    """One slide to be.

    Attributes:
        slide: its name, unique.
        path: its file, None where a table lists it and there is none.
        listed: what the table calls it, or its file name; the folder's for a DICOM series that fills one.
        facts: what the table and, where that is silent, the file name say.
        mpp: µm/px that a table gives, None for what the file says.
        refused: why it is left out before it is opened; "" where it is not.
        same_as: for one that is refused as a copy, the file that it is a copy of.
        nbytes: size of all its files.
    """

    slide: str
    path: Path | None
    listed: str
    facts: dict[str, str] = field(default_factory=dict)
    mpp: float | None = None
    refused: str = ""
    same_as: Path | None = None
    nbytes: int = 0


@dataclass
class Summary:
    """What became of the slides, or of the images, of a command.

    Attributes:
        refused: (name, reason) of each input that could not be used.
        notices: what the user should know, one line each.
    """

    lines: list[str]
    refused: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """DONE, or DONE_WITH_REFUSALS."""
        return DONE_WITH_REFUSALS if self.refused else DONE

    def __str__(self) -> str:
        lines = [*self.lines, *(f"note: {notice}" for notice in self.notices)]
        if self.refused:
            lines.append(f"refused: {len(self.refused)}")
            lines += ["\\n".join(f"  {name}: {reason}".splitlines()) for name, reason in self.refused[:20]]
            if len(self.refused) > 20:
                lines.append(f"  and {len(self.refused) - 20} more, in the slides table")
        return "\n".join(lines)


def find_slides(given: Sequence[Path]) -> list[Source]:
    """List slides from files and folders, a folder's sorted; folders are searched to any depth.

    A folder's plain images count only where it holds no slide, since scanners put pictures beside them. The files of a
    DICOM series are one slide. Of slides that are the same byte for byte the first by name is kept and the others are
    refused; so is one whose path is not UTF-8. What a file name says (:mod:`~eosin.data_tools.slide_names`) is among
    the facts.

    Raises UserError for a path that does not exist, a folder without slides, and a file given twice.
    """
    files: list[tuple[Path, Path]] = []  # the file, and what its name is relative to
    for path in given:
        if path.is_dir():
            found = find_files(path, SLIDE_SUFFIXES) or _pictures(path)
            if not found:
                raise UserError(f"{path} holds no slide; known endings: {' '.join(SLIDE_SUFFIXES + IMAGE_SUFFIXES)}")
            files += [(file, path) for file in found]
        elif path.is_file():
            files.append((path, path.parent))
        elif path.exists():
            raise UserError(f"{path} is no file; give slides or folders of slides")
        else:
            raise UserError(f"{path} does not exist; give slides or folders of slides")
    twice = [path for path, n in Counter(file.resolve() for file, _ in files).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each slide once")
    roots = dict(files)
    beside = Counter(file.parent for file in roots)
    series = join_series(list(roots))
    called = [_called(own[0], roots[own[0]], len(own) == beside[own[0].parent] > 1) for own in series]
    names = unique_names([ways for _, ways in called])
    members = [own if len(own) > 1 else with_companions(own[0]) for own in series]
    sizes = [sizes_of(own) for own in members]
    sources = [
        Source(name, own[0], listed, facts_of(listed), nbytes=sum(size))
        for name, own, (listed, _), size in zip(names, series, called, sizes)
    ]
    for number, source in enumerate(sources):
        if _printable(str(source.path)) != str(source.path):
            sources[number] = replace(source, refused="its path is not UTF-8; rename it")
    for group in find_copies(members, sizes):
        usable = sorted((number for number in group if not sources[number].refused), key=names.__getitem__)
        for copy in usable[1:]:
            first = usable[0]
            reason = f"the same bytes as {names[first]}"
            sources[copy] = replace(sources[copy], refused=reason, same_as=sources[first].path)
    return sources


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a folder, at any depth, with one of the endings; sorted, hidden ones left out.

    Links that lead nowhere are among them, so that whoever opens them says so.

    Raises UserError for a folder that cannot be read.
    """
    found = []
    for where, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(where) / name for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in suffixes and (path.is_file() or not path.exists())]
    return sorted(found)


def _pictures(folder: Path) -> list[Path]:
    """Plain images of a folder, without those in which earlier tilings show what they did."""
    return [
        path
        for path in find_files(folder, IMAGE_SUFFIXES)
        if path.parent.name != "qc"
        or not any((path.parent.parent / name).exists() for name in ("dataset.json", "settings.json"))
    ]


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}; mend that, or leave it out")


def unique_names(paths: Sequence[tuple[Path, ...]]) -> list[str]:
    """A name for each file: without its ending, with its folders where that is not unique, in full where need be.

    Args:
        paths: ways to name each file, the shortest first.

    Raises UserError where even the longest are not unique.
    """
    ways = [[*(without_ending(way) for way in file), file[-1].as_posix()] for file in paths]
    files_with = Counter(way for file in ways for way in set(file))
    names = [next((way for way in file if files_with[way] == 1), file[-1]) for file in ways]
    clash = [name for name, n in Counter(names).items() if n > 1]
    if clash:
        raise UserError(f"two files are both called '{clash[0]}'; give them one by one under different names")
    return names


def without_ending(path: Path) -> str:
    """``a/b.ome.tif`` -> ``a/b.ome``, since slide names carry dots."""
    return path.with_suffix("").as_posix()


def join_table(sources: list[Source], table: Path) -> tuple[list[Source], list[str]]:
    """Add what a table knows of the slides.

    A row finds its file by the column ``path`` (relative to the table, absolute, or a bare file name) or, without that
    column, by ``slide`` (the file's name with or without its ending). With both, ``slide`` renames the slide. The path
    of a DICOM series that fills a folder is the folder's.

    Returns:
        The sources with their facts, rows without a file last (``path`` None, refused), and notices for files without a
        row. Every further column is a fact; where a row says nothing, what the file name says stays.

    Raises UserError for a table with neither column, two rows for a file or slide, or an impossible mpp.
    """
    rows = read_csv(table, [])
    if not rows:
        raise UserError(f"{table} lists no slide; give a header with 'path' or 'slide', and a line a slide")
    columns = set(rows[0])
    key = next((c for c in ("path", "slide") if c in columns), None)
    if key is None:
        raise UserError(f"{table} has no column 'path' or 'slide'; its columns are: {', '.join(sorted(columns))}")
    by_key: dict[Path | str, set[int]] = defaultdict(set)
    for place, source in enumerate(sources):
        if key == "path" and source.path is not None:
            by_key[source.path.resolve()].add(place)
            if source.path.suffix.lower() == ".dcm":
                by_key[source.path.parent.resolve()].add(place)
        by_key[source.listed].add(place)
        by_key[source.slide].add(place)
    joined = dict(enumerate(sources))
    absent: list[Source] = []
    row_of: dict[int, int] = {}
    for line, row in enumerate(rows, start=2):
        facts = {c: v for c, v in row.items() if c not in ("path", "slide", "mpp")}
        mpp = _read_mpp(row.get("mpp", ""), f"{table} line {line}")
        value = row[key]
        ways = _ways_of(value, table.parent) if key == "path" else [value]
        number = next((next(iter(by_key[way])) for way in ways if len(by_key[way]) == 1), None)
        if number is None:
            name = row.get("slide") or without_ending(Path(value))
            absent.append(Source(name, None, value, _add_facts(facts_of(value), facts), mpp, ABSENT))
            continue
        if number in row_of:
            raise UserError(f"{table} lines {row_of[number]} and {line} are both about {sources[number].path}")
        row_of[number] = line
        found = sources[number]
        name = row.get("slide") or found.slide if key == "path" else found.slide
        joined[number] = replace(found, slide=name, facts=_add_facts(found.facts, facts), mpp=mpp)
    result = list(joined.values()) + absent
    twice = [name for name, n in Counter(s.slide for s in result).items() if n > 1]
    if twice:
        raise UserError(f"{table} gives the slide name '{twice[0]}' twice; names must be unique")
    lonely = [s.listed for i, s in joined.items() if i not in row_of]
    return result, [f"no row in {table.name}: {shorten(lonely)}"] if lonely else []


def leave_out_frozen(sources: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """The slides to keep, and those of frozen sections: of which ``preparation`` is "frozen"."""
    frozen = [source.facts.get("preparation", "").strip().lower() == FROZEN for source in sources]
    kept = [source for source, out in zip(sources, frozen) if not out]
    return kept, [source for source, out in zip(sources, frozen) if out]


def parse_part(text: str) -> tuple[int, int]:
    """``"3/8"`` as (3, 8): the third of eight parts. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    part, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part {text} is not k/n with 1 <= k <= n, such as 3/8")
    return part, parts


def part_of(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """The slides of one part of ``parts``, counted from 1, in the order given.

    Slides are dealt out by size, the largest first, each to the part that holds the least (Graham, "Bounds on
    multiprocessing timing anomalies", 1969), so that the parts hold about as many bytes. Which part a slide belongs to
    depends on the names and sizes of all slides, and not on their order.
    """
    weights = [0 if source.refused else source.nbytes for source in sources]
    held = [(0, 0, number) for number in range(1, parts + 1)]  # bytes and slides of each part
    mine = set()
    for slide in sorted(range(len(sources)), key=lambda number: (-weights[number], sources[number].slide)):
        nbytes, slides, number = held[0]
        heapq.heapreplace(held, (nbytes + weights[slide], slides + 1, number))
        if number == part:
            mine.add(slide)
    return [source for number, source in enumerate(sources) if number in mine]


def fingerprint(paths: Iterable[Path | None]) -> str:
    """A hash of the files' names and sizes, in order: tells whether the same command has the same input."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size if path is not None and path.is_file() else -1
        digest.update(os.fsencode(path.name if path else "") + f"\0{size}\n".encode())
    return digest.hexdigest()


def already_made(out: Path, config: dict[str, Any]) -> bool:
    """Whether ``out`` is a complete shard set made with this very configuration.

    Raises UserError where it holds anything else: another shard set, named by the first setting that differs, or
    something of the user's.
    """
    if (out / "dataset.json").is_file():
        there = ShardSet(out).dataset.get("config", {})
        if there == config:
            return True
        differs = next(k for k in sorted({*there, *config}) if there.get(k) != config.get(k))
        raise UserError(
            f"{out} is a shard set made otherwise ({differs}: {there.get(differs)!r} there, {config.get(differs)!r} "
            "asked); give a new folder, or remove it first"
        )
    refuse_occupied(out)
    return False


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """``a, b, c and 7 more``."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _called(file: Path, root: Path, fills_folder: bool) -> tuple[str, tuple[Path, ...]]:
    """What a slide is called, and ways to name it; a DICOM series that fills a folder is called as that."""
    where = file.relative_to(root)
    name = file.name
    if fills_folder:
        name = file.parent.absolute().name
        # The ending goes where the slide is named by it; the folder's own dots stay.
        where = where.parent.parent / f"{name}.dcm"
    ways: tuple[Path, ...] = (Path(where.name), where, root.absolute().name / where)
    if _printable(str(ways[-1])) != str(ways[-1]):
        ways = tuple(Path(_printable(str(way))) for way in ways)
    return _printable(name), ways


def _ways_of(path: str, folder: Path) -> Iterator[Path | str]:
    """What the path in a table of this folder may mean: relative to it, to the working folder, or a bare file name."""
    yield (folder / path).resolve()
    yield Path(path).resolve()
    yield Path(path).name


def _printable(path: str) -> str:
    """A path as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _add_facts(known: dict[str, str], told: dict[str, str]) -> dict[str, str]:
    """What is known and what a table tells, which goes first unless it is empty."""
    return known | {column: value for column, value in told.items() if value.strip() or column not in known}


def _read_mpp(text: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        mpp = float(text)
    except ValueError:
        raise UserError(f"{where}: mpp '{text}' is not a number of µm/px") from None
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(f"{where}: mpp {text} is outside {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px")
    return mpp
