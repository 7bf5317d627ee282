"""Stain-normalized copies of a folder of images or of a shard set.

What cannot be normalized is copied as it is, counted and listed; what cannot be read is left out and listed.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, Refusal, UserError
from eosin.data_tools.files import atomic_dir
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.data_tools.slide import IMAGE_SUFFIXES, read_image
from eosin.data_tools.sources import find_files
from eosin.data_tools.stream import decode
from eosin.ssl.stain.fits import COLUMNS
from eosin.ssl.stain.normalizer import REASONS, Normalizer, make_normalizer

BATCH = 32
ENDINGS = (*IMAGE_SUFFIXES, ".tif", ".tiff")
QUALITY, SUBSAMPLING = 95, "444"  # of JPEGs written again
LISTED = "stain_raw.csv"  # in the result: what stayed raw or was left out, and why


@dataclass
class Converted:
    """What came of a conversion: images written, why some of them stayed raw, and (name, reason) of those left out."""

    images: int = 0
    raw: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """3 where something was left out, else 0."""
        return DONE_WITH_REFUSALS if self.refused else DONE


def normalize_folder(folder: Path, out: Path, description: dict[str, Any]) -> Converted:
    """Normalize every image of ``folder``, each by its own fit, to PNGs of the same relative names in ``out``.

    Raises UserError when the folder holds no image, two images would get one name, or ``out`` holds something.
    """
    files = find_files(folder, ENDINGS)
    if not files:
        raise UserError(f"{folder} holds no image and is no shard set; known endings: {' '.join(ENDINGS)}")
    names = [file.relative_to(folder).with_suffix(".png") for file in files]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"two images of {folder} would both be written as {twice[0]}; rename one")
    normalizer = make_normalizer(description, None)
    done, listed = Converted(), []
    with atomic_dir(out) as temporary:
        pairs = list(zip(files, names))
        for file, name in progress(pairs, total=len(pairs), desc="stain normalize", unit="images"):
            try:
                image = read_image(file)
            except Refusal as refusal:
                done.refused.append((name.as_posix(), str(refusal)))
                continue
            (image,), reason = _normalized(normalizer, [image], np.zeros(1, np.int64))
            if reason[0]:
                done.raw[REASONS[reason[0]]] += 1
                listed.append((name.as_posix(), REASONS[reason[0]]))
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(_png(image))
            done.images += 1
        _refuse_nothing(folder, done)
        _write_list(temporary, listed, done)
    return done


def normalize_shards(shards: ShardSet, out: Path, description: dict[str, Any]) -> Converted:
    """Normalize every tile of a shard set into a new one with the same keys, facts and slides.

    Raises UserError when there are no fits for mode "slide", nothing can be read, or ``out`` holds something.
    """
    normalizer = make_normalizer(description, shards)
    table = shards.slides().drop(columns=list(COLUMNS), errors="ignore")  # the fits are those of raw tiles
    config = {"verb": "stain normalize", "input": shards.identity, "stain": description, "of": shards.dataset["config"]}
    done, listed = Converted(), []
    with atomic_dir(out) as temporary:
        writer = ShardWriter(temporary)
        stream = progress(_batches(shards, done), total=len(shards), desc="stain normalize", unit="tiles")
        for tiles, images, jpeg, slides in _in_batches(stream):
            normalized, reason = _normalized(normalizer, images, slides)
            for tile, image, as_jpeg, slide, why in zip(tiles, normalized, jpeg, slides, reason):
                meta = shards.meta(tile)
                key = meta.pop("key")
                if why:
                    done.raw[REASONS[why]] += 1
                    listed.append((key, REASONS[why]))
                data = simplejpeg.encode_jpeg(image, QUALITY, "RGB", SUBSAMPLING) if as_jpeg else _png(image)
                writer.add(key, data, "jpg" if as_jpeg else "png", meta, int(slide))
                done.images += 1
        _refuse_nothing(shards.folder, done)
        _write_list(temporary, listed, done)
        writer.finish(table, tile_size=shards.tile_size, mpp=shards.mpp, config=config)
    return done


Tile = tuple[int, np.ndarray, bool, int]


def _batches(shards: ShardSet, done: Converted) -> Iterator[Tile | None]:
    """Number, pixels, whether stored as JPEG, and slide of each tile in order; None for one that cannot be read."""
    for tile in range(len(shards)):
        data = shards.image(tile)
        try:
            image = decode(data)
        except (ValueError, EOFError) as error:
            done.refused.append((str(shards.meta(tile)["key"]), str(error)))
            yield None
            continue
        yield tile, image, simplejpeg.is_jpeg(data), int(shards.row(tile)["slide"])


def _in_batches(tiles: Any) -> Iterator[tuple[list[int], list[np.ndarray], list[bool], np.ndarray]]:
    waiting: list[Tile] = []
    for tile in tiles:
        if tile is not None:
            waiting.append(tile)
        if len(waiting) == BATCH:
            yield _columns(waiting)
            waiting = []
    if waiting:
        yield _columns(waiting)


def _columns(tiles: list[Tile]) -> tuple[list[int], list[np.ndarray], list[bool], np.ndarray]:
    numbers, images, jpeg, slides = zip(*tiles)
    return list(numbers), list(images), list(jpeg), np.array(slides)


def _normalized(
    normalizer: Normalizer | None, images: list[np.ndarray], slides: np.ndarray
) -> tuple[list[np.ndarray], list[int]]:
    assert normalizer is not None
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    out, reason = normalizer(stack, torch.from_numpy(slides))
    return [np.ascontiguousarray(i) for i in out.permute(0, 2, 3, 1).numpy()], reason.tolist()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _refuse_nothing(source: Path, done: Converted) -> None:
    if not done.images:
        name, reason = done.refused[0] if done.refused else ("", "it is empty")
        raise UserError(f"nothing in {source} can be read; the first, {name}: {reason}")


def _write_list(folder: Path, listed: list[tuple[str, str]], done: Converted) -> None:
    rows = [(name, "raw", why) for name, why in listed] + [(name, "left out", why) for name, why in done.refused]
    if rows:
        with (folder / LISTED).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("image", "what", "reason"), *rows])
