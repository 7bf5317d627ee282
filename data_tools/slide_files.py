"""Which files are one slide, how large it is, and which slides are copies of another. No pixel is decoded here.

A DICOM slide is a series of several files, its levels, label and overview; OpenSlide opens it by any of them and finds
the others in the same folder by the Series Instance UID (https://openslide.org/formats/dicom/). Only that attribute is
read, never one that names a patient. A MIRAX slide is a file and a folder beside it; a Hamamatsu VMS or VMU slide is a
short text that names its other files.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path

# Slides of one size are compared by this much of either end of their files before they are read whole.
END_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 20
HEAD_BYTES = 64 << 10
SERIES = 0x0020000E
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
# Value representations with a length of 32 bits after two reserved bytes (DICOM PS3.5, table 7.1-1).
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}


def join_series(files: Sequence[Path]) -> list[list[Path]]:
    """Put the files of one DICOM series in one folder together; every other file stays alone. The order is kept."""
    beside = Counter(file.parent for file in files if _is_dicom(file))
    joined: dict[Hashable, list[Path]] = defaultdict(list)
    for file in files:
        series = series_of(file) if _is_dicom(file) and beside[file.parent] > 1 else None
        joined[(file.parent, series) if series else file].append(file)
    return list(joined.values())


def series_of(path: Path) -> str | None:
    """The Series Instance UID of a DICOM file; None where it cannot be read or is not near the file's beginning.

    Explicit VR little endian is read, which every encoding that OpenSlide supports uses.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        return _find_series(head) if head[128:132] == b"DICM" else None
    except (OSError, struct.error, UnicodeDecodeError):
        return None


def with_companions(path: Path) -> list[Path]:
    """A slide's file, and the others that its format keeps beside it."""
    try:
        if path.suffix.lower() == ".mrxs":
            return [path, *sorted(file for file in path.with_suffix("").iterdir() if file.is_file())]
        if path.suffix.lower() in (".vms", ".vmu") and path.stat().st_size <= MAX_TEXT_BYTES:
            named = (line.partition("=")[2].strip() for line in path.read_text("latin-1").splitlines())
            beside = {path.parent / Path(name).name for name in named if name}
            return [path, *sorted(file for file in beside if file.is_file())]
    except (OSError, ValueError):  # whoever opens the slide says so
        pass
    return [path]


def sizes_of(files: Iterable[Path]) -> list[int]:
    """Bytes of each file, 0 where there is none."""
    return [_size(file) for file in files]


def find_copies(slides: Sequence[Sequence[Path]], sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of slides that are the same byte for byte, up to the names of their files.

    Only files of equal size are read, and whole only where their ends are equal. Empty slides are nobody's copies.

    Args:
        slides: the files of each.
        sizes: their bytes.

    Returns:
        The slides' numbers, two or more a group, both in ascending order.
    """
    groups = _alike((n for n in range(len(slides)) if sum(sizes[n])), lambda n: tuple(sorted(sizes[n])))
    for amount in (END_BYTES, None):
        closer = partial(_digest, slides, amount)
        groups = [alike for group in groups for alike in _alike(group, closer)]
    return sorted(groups)


def _alike(numbers: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Numbers of equal keys together, where there are two or more."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _digest(slides: Sequence[Sequence[Path]], ends: int | None, number: int) -> Hashable:
    """A hash of a slide's files, or of this much of their ends; equal to no other where one cannot be read."""
    try:
        return tuple(sorted(_digest_file(file, ends) for file in slides[number]))
    except OSError:
        return object()


def _digest_file(path: Path, ends: int | None) -> bytes:
    with path.open("rb") as file:
        if ends is None:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(file.read(ends))
        file.seek(max(0, _size(path) - ends))
        digest.update(file.read(ends))
    return digest.digest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() == ".dcm"


def _find_series(head: bytes) -> str | None:
    """Walk the elements, which ascend; those inside a sequence (of a referenced series, say) are passed over."""
    at, depth = 132, 0
    while True:
        group, element = struct.unpack_from("<HH", head, at)
        tag = group << 16 | element
        if tag in (ITEM, ITEM_END, SEQUENCE_END):
            (length,) = struct.unpack_from("<I", head, at + 4)
            at += 8
            depth -= tag == SEQUENCE_END
            if tag == ITEM and length != UNDEFINED:
                at += length
            continue
        if depth <= 0 and tag > SERIES:
            return None
        if head[at + 4 : at + 6] in LONG:
            (length,) = struct.unpack_from("<I", head, at + 8)
            at += 12
        else:
            (length,) = struct.unpack_from("<H", head, at + 6)
            at += 8
        if length == UNDEFINED:
            depth += 1
            continue
        if depth <= 0 and tag == SERIES:
            return head[at : at + length].decode("ascii").rstrip("\0 ") or None
        at += length
