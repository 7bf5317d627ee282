"""An image folder to a shard set. JPEGs of the right size are stored byte for byte, and so are RGB PNGs; everything
else is scaled and encoded. What cannot be decoded is refused and listed. No file outside the folder is ever read.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from eosin.data_tools.errors import Refusal, UserError, nearest
from eosin.data_tools.files import atomic_dir, read_csv, sha256
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardWriter, slide_key
from eosin.data_tools.slide import MPP_RANGE, read_image
from eosin.data_tools.sources import Summary, already_made, find_files, fingerprint, shorten, unique_names

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
QUALITY = 95
SUBSAMPLING = "444"
# The tile itself owns these names.
RESERVED = ("key", "x", "y", "mpp")
# More bad images than this share mean that something else is wrong than a few files.
MAX_REFUSED = 0.5


@dataclass
class Image:
    """One image to be packed: its path relative to the folder, its key, its slide, and the manifest's columns."""

    path: Path
    key: str
    slide: str
    facts: dict[str, str] = field(default_factory=dict)


def pack_images(
    folder: Path | str,
    out: Path | str,
    *,
    manifest: Path | str | None = None,
    label: str | None = None,
    group: str | None = None,
    tile_size: int | None = None,
    mpp: float | None = None,
    stain: str = "H&E",
) -> Summary:
    """Pack images into a new shard set; the same input gives the same bytes.

    Without a manifest every image of the folder is packed, and the first folder on its way is its label. Each image is
    a slide of its own where neither ``group`` nor a column ``slide`` says otherwise.

    Args:
        folder: searched to any depth; with a manifest, the root of its paths.
        out: a new folder; a finished one of the same input and settings is left as it is.
        manifest: CSV with the column ``path``; every further column is kept, as text.
        label: the column that is the label, kept as ``label`` beside its own name.
        group: the column whose value is the slide's name.
        tile_size: scale the shorter side to it, then cut the middle; by default all images must have one size.
        mpp: µm/px of the tiles as stored, None where unknown.
        stain: of all images that have no column ``stain``; "none" for what is not stained.

    Raises:
        UserError: bad arguments, a path that leaves the folder, different sizes without ``tile_size``, or mostly bad
            images; then nothing is left behind.
    """
    folder, out = Path(folder), Path(out)
    _check(folder, tile_size, mpp)
    images = _listed(folder, Path(manifest), label, group) if manifest else _found(folder, label, group)
    config = {
        "verb": "pack",
        "label": label,
        "group": group,
        "tile_size": tile_size,
        "mpp": mpp,
        "stain": stain,
        "quality": QUALITY,
        "subsampling": SUBSAMPLING,
        "manifest": sha256(manifest) if manifest else None,
        "input": fingerprint(folder / image.path for image in images),
    }
    if already_made(out, config):
        return Summary([f"{out} holds these tiles already, of the same images and settings; nothing to do"])
    slides = {name: number for number, name in enumerate(dict.fromkeys(image.slide for image in images))}
    tiles: Counter[str] = Counter()
    refused: list[tuple[str, str]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    with atomic_dir(out) as temporary:
        writer = ShardWriter(temporary)
        for image in progress(images, total=len(images), desc="pack", unit="images"):
            try:
                data, extension, size = _encode(folder / image.path, tile_size)
            except Refusal as refusal:
                refused.append((image.path.as_posix(), str(refusal)))
                continue
            sizes[size] += 1
            if tile_size is None and (len(sizes) > 1 or size[0] != size[1]):
                continue  # nothing will be written; all sizes are to be named
            meta = image.facts | {"slide": image.slide, "x": 0, "y": 0, "mpp": mpp}
            writer.add(image.key, data, extension, meta, slides[image.slide])
            tiles[image.slide] += 1
        _refuse_bad(folder, len(images), refused)
        if tile_size is None and (len(sizes) > 1 or any(width != height for width, height in sizes)):
            found = shorten([f"{width} x {height} ({n})" for (width, height), n in sizes.most_common()])
            raise UserError(f"{folder} holds images of different sizes or not square: {found}; give --tile-size")
        side = tile_size or next(iter(sizes))[0]
        table = _table(images, tiles, Counter(dict(_bad_of_slide(images, refused))), mpp, stain)
        if refused:
            with (temporary / "refused.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *refused])
        dataset = writer.finish(table, tile_size=side, mpp=mpp, config=config)
    lines = [f"{out}: {dataset['tiles']} tiles of {side} px of {len(slides)} slides"]
    if refused:
        lines.append(f"the refused are listed in {out / 'refused.csv'}")
    return Summary(lines, refused)


def scale_to_tile(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to ``size`` with antialiasing and cut the middle: uint8 [size, size, 3]."""
    import cv2

    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if scale != 1:
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        pixels = cv2.resize(pixels, target, interpolation=method)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _check(folder: Path, tile_size: int | None, mpp: float | None) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of images")
    if tile_size is not None and not 16 <= tile_size <= 4096:
        raise UserError(f"--tile-size {tile_size} is out of range; valid: 16 to 4096 px")
    if mpp is not None and not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(f"--mpp {mpp} is out of range; valid: {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px")


def _found(folder: Path, label: str | None, group: str | None) -> list[Image]:
    """Every image of a folder; the first folder on the way is the label."""
    for option, column in (("--label", label), ("--group", group)):
        if column not in (None, "label"):
            raise UserError(f"{option} {column} names a column of a manifest; give --manifest")
    paths = [path.relative_to(folder) for path in find_files(folder, SUFFIXES)]
    if not paths:
        raise UserError(f"{folder} holds no image; known endings: {' '.join(SUFFIXES)}")
    facts = [{"label": path.parts[0]} if len(path.parts) > 1 else {} for path in paths]
    return _named(paths, facts, [fact.get("label") if group else None for fact in facts])


def _listed(folder: Path, manifest: Path, label: str | None, group: str | None) -> list[Image]:
    """The images of a manifest."""
    rows = read_csv(manifest, ["path"])
    if not rows:
        raise UserError(f"{manifest} lists no image")
    columns = list(rows[0])
    for option, column in (("--label", label), ("--group", group)):
        if column is not None and column not in columns:
            raise UserError(f"{manifest} has no column '{column}' ({option}); {nearest(column, columns)}")
    taken = [column for column in columns if column in RESERVED]
    if taken:
        raise UserError(f"{manifest} has a column '{taken[0]}', which the tile itself owns; rename it")
    paths = [_inside(row["path"], f"{manifest} line {line}") for line, row in enumerate(rows, start=2)]
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise UserError(f"{manifest} lists {twice[0].as_posix()} twice")
    by = group or ("slide" if "slide" in columns else None)
    facts = [{c: v for c, v in row.items() if c not in ("path", "slide")} for row in rows]
    if label is not None:
        facts = [fact | {"label": row[label]} for fact, row in zip(facts, rows)]
    return _named(paths, facts, [row[by] if by else None for row in rows])


def _named(paths: list[Path], facts: list[dict[str, str]], slides: list[str | None]) -> list[Image]:
    names = unique_names([(path,) for path in paths])
    return [
        Image(path, slide_key(name), slide or name, fact)
        for path, name, slide, fact in zip(paths, names, slides, facts)
    ]


def _inside(text: str, where: str) -> Path:
    """A relative path that stays inside its folder."""
    path = PurePosixPath(text.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UserError(f"{where}: path '{text}' must be relative and stay inside the folder")
    return Path(path)


def _encode(path: Path, tile_size: int | None) -> tuple[bytes, str, tuple[int, int]]:
    """An image's bytes as stored, their ending, and its (width, height) as it came."""
    import simplejpeg

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Refusal("no such file") from None
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None
    if not data:
        raise Refusal("an empty file (0 bytes)")
    pixels = read_image(path)
    height, width = pixels.shape[:2]
    as_it_is = tile_size is None or height == width == tile_size
    extension = _storable(path) if as_it_is else None
    if extension is None:
        tile = pixels if as_it_is else scale_to_tile(pixels, tile_size or 0)
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(tile), QUALITY, "RGB", SUBSAMPLING)
        extension = "jpg"
    return data, extension, (width, height)


def _storable(path: Path) -> str | None:
    """The ending under which a file can be stored as it is: an upright JPEG or RGB PNG; None for all else."""
    from PIL import Image as Pillow

    with Pillow.open(path) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1:
            return "jpg"
        return "png" if image.format == "PNG" and image.mode == "RGB" and "transparency" not in image.info else None


def _refuse_bad(folder: Path, n: int, refused: list[tuple[str, str]]) -> None:
    if len(refused) == n or len(refused) > max(MAX_REFUSED * n, 10):
        listed = shorten([f"{path}: {reason}" for path, reason in refused], limit=3)
        raise UserError(f"{len(refused)} of {n} images of {folder} cannot be used, so nothing was written; {listed}")


def _bad_of_slide(images: list[Image], refused: list[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    bad = {path for path, _ in refused}
    yield from Counter(image.slide for image in images if image.path.as_posix() in bad).items()


def _table(images: list[Image], tiles: Counter[str], bad: Counter[str], mpp: float | None, stain: str) -> pd.DataFrame:
    """One row a slide; a manifest's column stands here too where it is the same for all images of each slide."""
    import pandas as pd

    facts = pd.DataFrame([image.facts for image in images], index=[image.slide for image in images])
    grouped = facts.groupby(level=0, sort=False)
    constant = [column for column in facts.columns if (grouped[column].nunique(dropna=False) == 1).all()]
    shared = grouped.first()[constant]
    rows = []
    for slide in shared.index:
        known = shared.loc[slide].to_dict()
        ours = {
            "slide": slide,
            "source": slide,
            "patient": known.pop("patient", "") or slide,
            "site": known.pop("site", ""),
            "stain": known.pop("stain", "") or stain,
            "mpp": np.nan if mpp is None else mpp,
            "mpp_source": "" if mpp is None else "override",
            "tiles": tiles[slide],
            "dropped_refused": bad[slide],
            "state": "done" if tiles[slide] else "refused",
            "reason": "" if tiles[slide] else "none of its images can be used",
        }
        rows.append(ours | {f"given_{name}" if name in ours else name: value for name, value in known.items()})
    return pd.DataFrame(rows)
