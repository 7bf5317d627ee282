"""Images in tars of WebDataset: members that share what stands before the first dot are one sample. Nothing is ever
unpacked to disk, no link is followed, and memory grows with the largest tar's number of samples, not its bytes.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.pack_sources import MAX_BYTES, SUFFIXES, Image, Source, readable, refuse, refuse_escape
from eosin.data_tools.sources import shorten

# A sample's key and what follows its first dot, as WebDataset splits a name.
SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
MAX_TEXT = 1 << 20  # bytes of the text that goes with an image


def tar_source(what: str, files: list[Path], names: list[str], wanted: Sequence[str]) -> Source:
    """Images with the keys of ``json`` as their columns, ``cls`` as the column ``label`` and ``txt`` as ``text``.

    Raises UserError for what is no whole plain tar, or holds no image.
    """
    notices: list[str] = []
    count = sum(_scan_tar(path, notices) for path in files)
    return Source(what, files, count, partial(_tar_images, files, names, wanted), notices)


def _scan_tar(file: Path, notices: list[str]) -> int:
    """How many images, or members to be refused, a tar holds; only headers are read.

    Raises UserError for what is no whole tar.
    """
    count = 0
    others: list[str] = []
    for _, parts in _samples(file):
        odd, pictures = _judge(parts)
        if odd or pictures:
            count += 1
        elif len(others) < 1000:
            others += [readable(info.name) for info in parts.values()]
    if others:
        more = " or more" if len(others) >= 1000 else ""
        notices.append(f"{file}: members that go with no image: {len(others)}{more}, {shorten(others, limit=3)}")
    if not count:
        raise UserError(f"{file} holds no image; known endings: {' '.join(SUFFIXES)}")
    return count


def _samples(file: Path, archive: tarfile.TarFile | None = None) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members by key and ending. What has no ending is its own sample; folders are left out."""
    if archive is None:
        with _open_tar(file) as opened:
            yield from _samples(file, opened)
        return
    key = ""
    parts: dict[str, tarfile.TarInfo] = {}
    while (info := _next(file, archive)) is not None:
        found = SAMPLE.fullmatch(info.name)
        own, ending = (found[1], found[2]) if found else (info.name, "")
        if own != key or ending in parts:
            if parts:
                yield key, parts
            key, parts = own, {}
        if not info.isdir():
            parts[ending] = info
    if parts:
        yield key, parts


def _open_tar(file: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(file, "r:")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{file} is not a plain tar: {error}; unpack a compressed one to .tar first") from None


def _next(file: Path, archive: Any) -> tarfile.TarInfo | None:
    try:
        info = archive.next()
        archive.members.clear()  # else all headers of a tar of any size stay in memory
        if info is None:
            archive.fileobj.seek(archive.offset)
            # tarfile ends without a word at a broken header, but a whole tar ends with empty blocks.
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of archive")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{file} is cut or broken at byte {archive.offset}: {error}; copy it again") from None
    return info


def _tar_images(files: list[Path], names: list[str], wanted: Sequence[str]) -> Iterator[Image]:
    for file, name in zip(files, names):
        keys: set[str] = set()
        with _open_tar(file) as archive:
            for key, parts in _samples(file, archive):
                key = readable(key).removeprefix("./")
                image = _tar_image(archive, f"{name}/{key}", f"{file.name}: {key}", parts, wanted)
                if image is None:
                    continue
                if key in keys:
                    again = f"{image.name}#{archive.offset}"
                    image = Image(again, image.listed, partial(refuse, "a second sample of this key"), {})
                keys.add(key)
                yield image


def _tar_image(
    archive: tarfile.TarFile, name: str, listed: str, parts: dict[str, tarfile.TarInfo], wanted: Sequence[str]
) -> Image | None:
    """A sample's image; None where it holds none."""
    odd, pictures = _judge(parts)
    if not odd and not pictures:
        return None
    try:
        if odd:
            kind = "a link" if odd[0].islnk() or odd[0].issym() else "no plain file"
            raise Refusal(f"'{readable(odd[0].name)}' is {kind}")
        refuse_escape(parts[pictures[0]].name)
        if len(pictures) > 1:
            raise Refusal(f"it has {len(pictures)} images: {', '.join(pictures)}")
        facts = _tar_facts(archive, parts)
        for column in wanted:
            if column not in facts:
                raise Refusal(f"nothing that goes with it has a column '{column}'")
    except Refusal as refusal:
        return Image(name, listed, partial(refuse, str(refusal)), {})
    return Image(name, listed, partial(_read_part, archive, parts[pictures[0]], MAX_BYTES), facts)


def _judge(parts: dict[str, tarfile.TarInfo]) -> tuple[list[tarfile.TarInfo], list[str]]:
    """Members of a sample that are no plain files, and the endings of those that are images."""
    odd = [info for info in parts.values() if not info.isfile() or info.issparse()]
    return odd, [ending for ending in parts if f".{ending}".lower() in SUFFIXES]


def _tar_facts(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for ending, column in (("json", ""), ("cls", "label"), ("txt", "text")):
        if ending not in parts:
            continue
        try:
            text = _read_part(archive, parts[ending], MAX_TEXT).decode()
            known = {column: text.strip()} if column else json.loads(text, parse_constant=lambda _: None)
            json.dumps(known, ensure_ascii=False).encode()  # raises where it cannot be written again
        except (ValueError, RecursionError):
            raise Refusal(f"its {ending} is not readable as {'text' if column else 'JSON'}") from None
        if not isinstance(known, dict):
            raise Refusal("its json is no JSON object")
        facts |= known
    return facts


def _read_part(archive: tarfile.TarFile, info: tarfile.TarInfo, limit: int) -> bytes:
    if info.size > limit:
        raise Refusal(f"'{info.name}' has {info.size} bytes, over the bound of {limit}")
    return archive.extractfile(info).read()  # type: ignore[union-attr]
