"""Slides to a shard set: find the tissue, lay a grid at an exact µm/px, read, judge, encode, write.

A process handles a slide and writes its tiles to a tar of its own; the parent appends these in the slides' order, so
that the bytes do not depend on the number of processes. A slide that cannot be used is refused with a reason and its
row says so; it never stops the others. Nothing is seen at the output's path before all is written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import atomic_dir, sha256
from eosin.data_tools.progress import progress
from eosin.data_tools.qc import PICTURE_PIXELS, picture, write_page, write_png
from eosin.data_tools.shards import ShardWriter, TarWriter, slide_key, tile_key
from eosin.data_tools.slide import MPP_RANGE, Slide
from eosin.data_tools.sources import Source, Summary, already_made, find_slides, fingerprint, join_table, shorten
from eosin.data_tools.tissue import THUMBNAIL_MPP, Tissue, find_tissue, is_dark

if TYPE_CHECKING:
    import pandas as pd

Place = tuple[int, int, float]  # left, top in pixels of the finest level, share of tissue
SUBSAMPLING = "444"
# Share of a tile under pen above which it is dropped.
MAX_PEN = 0.02
# Below this standard deviation of gray a tile shows nothing, whatever the thumbnail promised.
MIN_CONTRAST = 4.0
# Share of a tile's contrast that is finer than two pixels; below it nothing is in focus.
MIN_SHARPNESS = 0.035
# A slide of which more tiles than this cannot be decoded is damaged, and is refused as a whole.
MAX_UNREADABLE = 0.05
# Small slides get a finer thumbnail, so that their outline is as good.
THUMBNAIL_PIXELS = 512
DROP_REASONS = ("background", "pen", "blank", "blur", "unreadable", "limit")
COLUMNS = [
    *("slide", "source", "vendor", "patient", "site", "stain"),
    *("mpp", "mpp_source", "width", "height", "tissue_mm2", "tiles"),
    *(f"dropped_{reason}" for reason in DROP_REASONS),
    *("state", "reason"),
]


@dataclass(frozen=True)
class Settings:
    """What decides which tiles a slide gives, and their bytes."""

    mpp: float
    tile_size: int
    min_tissue: float = 0.5
    quality: int = 90
    max_tiles: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        low, high = MPP_RANGE
        for name, good, valid in (
            ("mpp", low <= self.mpp <= high, f"{low:g} to {high:g} µm/px"),
            ("tile-size", 16 <= self.tile_size <= 4096, "16 to 4096 px"),
            ("min-tissue", 0 < self.min_tissue <= 1, "a share above 0 and up to 1"),
            ("quality", 1 <= self.quality <= 100, "1 to 100"),
            ("max-tiles", self.max_tiles is None or self.max_tiles > 0, "1 or more"),
        ):
            if not good:
                raise UserError(f"--{name} {getattr(self, name.replace('-', '_'))} is out of range; valid: {valid}")


def tile_slides(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    mpp: float = 0.5,
    tile_size: int = 256,
    min_tissue: float = 0.5,
    slides_csv: Path | str | None = None,
    mpp_override: float | None = None,
    stain: str | None = None,
    workers: int | None = None,
    quality: int = 90,
    max_tiles: int | None = None,
    seed: int = 0,
) -> Summary:
    """Tile slides into a new shard set; the same input gives the same bytes whatever the number of workers.

    Args:
        sources: slide files, and folders that are searched for slides.
        out: a new folder; a finished one of the same input and settings is left as it is.
        mpp: µm/px of the tiles.
        tile_size: their side, px.
        min_tissue: smallest share of a tile that is tissue.
        slides_csv: a table of the slides, joined by :func:`~eosin.data_tools.sources.join_table`.
        mpp_override: µm/px of the slides' finest level, instead of what their files say; the table goes before it.
        stain: of all slides that the table does not know; "H&E" by default.
        workers: processes; one a core by default.
        quality: of the JPEGs, which have full color resolution (4:4:4).
        max_tiles: at most so many a slide, drawn by ``seed``; all by default.

    Raises:
        UserError: bad arguments, or no slide gave a tile; then nothing is left behind.
    """
    out = Path(out)
    settings = Settings(mpp, tile_size, min_tissue, quality, max_tiles, seed)
    settings.check()
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} is out of range; valid: 1 or more")
    if mpp_override is not None and not MPP_RANGE[0] <= mpp_override <= MPP_RANGE[1]:
        raise UserError(f"--mpp-override {mpp_override} is out of range; valid: {MPP_RANGE[0]} to {MPP_RANGE[1]} µm/px")
    jobs = find_slides([Path(source) for source in sources])
    notices: list[str] = []
    if slides_csv is not None:
        jobs, notices = join_table(jobs, Path(slides_csv))
    config = {
        "verb": "tile",
        **asdict(settings),
        "subsampling": SUBSAMPLING,
        "mpp_override": mpp_override,
        "stain": stain,
        "input": fingerprint(job.path for job in jobs),
        "slides_csv": sha256(slides_csv) if slides_csv is not None else None,
    }
    if already_made(out, config):
        return Summary([f"{out} holds these tiles already, of the same slides and settings; nothing to do"])
    rows = []
    with atomic_dir(out) as folder:
        (folder / "qc").mkdir()
        parts = folder / "parts"
        parts.mkdir()
        writer = ShardWriter(folder)
        work = partial(_tile_source, settings=settings, mpp_override=mpp_override, folder=folder)
        # Closed before the folder goes, so that no worker still writes into it.
        with contextlib.closing(run_each(work, jobs, workers or len(os.sched_getaffinity(0)))) as results:
            shown = progress(results, total=len(jobs), desc="tile", unit="slides")
            for number, (job, result) in enumerate(zip(jobs, shown)):
                facts, index = result if isinstance(result, tuple) else (_refused(result), None)
                if index is not None:
                    part = _part(folder, job)
                    writer.append(part, index, slide=number)
                    part.unlink()
                rows.append(_row(job, facts, stain or "H&E"))
        if not any(row["tiles"] for row in rows):
            reasons = shorten([f"{row['source']}: {row['reason']}" for row in rows], limit=3)
            raise UserError(f"no slide gave a tile, so nothing was written; {reasons}")
        for leftover in parts.iterdir():
            leftover.unlink()
        parts.rmdir()
        write_page(folder / "qc.html", out.name, rows)
        dataset = writer.finish(_table(rows), tile_size=tile_size, mpp=mpp, config=config)
    dropped = Counter({reason: sum(row[f"dropped_{reason}"] for row in rows) for reason in DROP_REASONS})
    refused = [(row["source"], row["reason"]) for row in rows if row["state"] == "refused"]
    lines = [
        f"{out}: {dataset['tiles']} tiles of {tile_size} px at {mpp:g} µm/px "
        f"from {len(rows) - len(refused)} of {len(rows)} slides",
        "dropped: " + (", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"),
        f"pictures: {out / 'qc.html'}",
    ]
    return Summary(lines, refused, notices)


def grid(side: int, step: float, downsample: float) -> np.ndarray:
    """Left edges of the tiles along one axis, in pixels of the finest level, int64.

    Every tile lies inside the slide. Edges fall on whole pixels of the level that is read, so that nothing is
    interpolated between two of them; an edge moves by less than one of them, and the tile's size never changes.

    Args:
        side: of the slide, in pixels of the finest level.
        step: from tile to tile, in the same pixels, not rounded.
        downsample: of the level that is read.
    """
    edges = np.arange(int(side / step + 1e-9)) * step
    return np.rint(np.floor(edges / downsample + 1e-6) * downsample).astype(np.int64)


def box_means(mask: np.ndarray, lefts: np.ndarray, tops: np.ndarray, side: float) -> np.ndarray:
    """Mean of a mask over the boxes of a grid, [len(tops), len(lefts)], exact for edges between pixels.

    Args:
        mask: bool [H, W]; what lies outside counts as False.
        lefts: left edges in pixels of the mask.
        tops: upper edges.
        side: of a box, in the same pixels.
    """
    sums = cv2.integral(mask.astype(np.uint8)).astype(np.float64)  # [H + 1, W + 1]
    # Between its knots the integral of a mask is bilinear, so interpolating it is exact.
    sums = _interpolate(sums, np.concatenate([tops, tops + side]))
    sums = _interpolate(sums.T, np.concatenate([lefts, lefts + side])).T
    n, m = len(tops), len(lefts)
    boxes = sums[n:, m:] - sums[n:, :m] - sums[:n, m:] + sums[:n, :m]
    return np.clip(boxes / side**2, 0, 1)


def judge(tile: np.ndarray) -> str | None:
    """Why a tile, uint8 [N, N, 3], is not worth keeping: "blank", "blur" or None."""
    gray = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(np.float32)
    contrast = float(gray.std())
    if contrast < MIN_CONTRAST:
        return "blank"
    fine = float((gray - cv2.GaussianBlur(gray, (0, 0), 1.0)).std())
    return "blur" if fine < MIN_SHARPNESS * contrast else None


def run_each(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Generator[Any, None, None]:
    """Results of ``function`` for each job, in order, from a pool of processes.

    Where a job kills its process (a decoder's crash, memory) its result is the string of the reason.
    """
    todo = list(jobs)
    if min(workers, len(todo)) == 1:
        yield from map(function, todo)
        return
    while todo:
        done = 0
        with _pool(min(workers, len(todo))) as pool:
            try:
                for result in pool.map(function, todo):
                    yield result
                    done += 1
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(cancel_futures=True)
        todo = todo[done:]
        if todo:
            # Which job it was is not known; the first of the rest runs alone, and if it was another, that comes later.
            with _pool(1) as pool:
                try:
                    result = pool.submit(function, todo.pop(0)).result()
                except BrokenProcessPool:
                    result = "reading it killed the process"
            yield result


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fork is unsafe once a library has started threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    # A killed parent would leave its workers waiting forever.
    threading.Thread(target=follow, daemon=True).start()


def _tile_source(
    job: Source, settings: Settings, mpp_override: float | None, folder: Path
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Tile one slide into a tar of its own; return its facts and the tar's index, None where it is refused."""
    if job.path is None:
        return _refused("listed in the table, but no such file was given"), None
    facts: dict[str, Any] = {}
    try:
        with Slide(job.path, mpp_override if job.mpp is None else job.mpp) as slide:
            facts |= {"vendor": slide.vendor, "width": slide.size[0], "height": slide.size[1]}
            slide.require(settings.mpp)
            facts |= {"mpp": slide.mpp, "mpp_source": slide.mpp_source}
            index = _tile_slide(slide, job.slide, settings, folder, _part(folder, job), facts)
    except Refusal as refusal:
        _part(folder, job).unlink(missing_ok=True)
        return facts | _refused(str(refusal)), None
    return facts | {"state": "done", "reason": ""}, index


def _tile_slide(
    slide: Slide, name: str, settings: Settings, folder: Path, part: Path, facts: dict[str, Any]
) -> np.ndarray:
    """Write the tiles of a slide to ``part`` and its picture; what is learned goes into ``facts`` as it is learned."""
    assert slide.mpp is not None
    step = settings.tile_size * settings.mpp / slide.mpp
    if min(slide.size) < step:
        raise Refusal(f"{slide.size[0]} x {slide.size[1]} px, smaller than a tile ({math.ceil(step)} px)")
    longest = max(slide.size) * slide.mpp
    show_mpp = max(longest / PICTURE_PIXELS, slide.mpp)
    thumbnail_mpp = max(min(THUMBNAIL_MPP, longest / THUMBNAIL_PIXELS), slide.mpp)
    thumbnail = slide.thumbnail(thumbnail_mpp)
    show = partial(_write_picture, folder / "qc" / f"{slide_key(name)}.png", slide.thumbnail(show_mpp))
    if is_dark(thumbnail):
        show(None, np.zeros((0, 4)))
        raise Refusal("dark background with light from the specimen, as in fluorescence; brightfield slides are tiled")
    tissue = find_tissue(thumbnail, thumbnail_mpp)
    facts["tissue_mm2"] = float(tissue.mask.sum() * thumbnail_mpp**2 / 1e6)
    downsample = slide.downsamples[slide.level(settings.mpp / slide.mpp)]
    xs, ys = (grid(side, step, downsample) for side in slide.size)
    scale = slide.mpp / thumbnail_mpp
    share = box_means(tissue.mask, xs * scale, ys * scale, step * scale)  # [rows, columns]
    pen = box_means(tissue.pen, xs * scale, ys * scale, step * scale)
    wanted = (share >= settings.min_tissue) & (pen <= MAX_PEN)
    by_pen = (share + pen >= settings.min_tissue) & (pen > MAX_PEN)
    dropped = Counter({"pen": int(by_pen.sum()), "background": int((~wanted & ~by_pen).sum())})
    places = [(int(xs[column]), int(ys[row]), float(share[row, column])) for row, column in np.argwhere(wanted)]
    index = _write_tiles(slide, name, settings, part, places, dropped)
    facts |= {f"dropped_{reason}": dropped[reason] for reason in DROP_REASONS}
    corners = np.stack([index["x"], index["y"], index["x"] + step, index["y"] + step], axis=1)  # [tiles, 4]
    show(tissue, corners * (slide.mpp / show_mpp))
    if not len(index):
        found = f"{facts['tissue_mm2']:.3g} mm² of tissue were found"
        raise Refusal(f"no tile is at least {settings.min_tissue:.0%} tissue and in order; {found}")
    facts["tiles"] = len(index)
    return index


def _write_tiles(
    slide: Slide, name: str, settings: Settings, part: Path, places: list[Place], dropped: Counter[str]
) -> np.ndarray:
    """Write the tiles worth keeping, row by row; return the tar's index and count the others in ``dropped``."""
    encoded: Iterable[tuple[Place, bytes]]
    if settings.max_tiles is None:
        encoded = _encode_tiles(slide, settings, places, dropped)
    else:
        key = hash32(settings.seed, purpose("tiles of a slide"), purpose(name))
        drawn = sorted(places, key=lambda place: hash32(key, place[0], place[1]))
        some = itertools.islice(_encode_tiles(slide, settings, drawn, dropped), settings.max_tiles)
        encoded = sorted(some, key=lambda tile: (tile[0][1], tile[0][0]))
        dropped["limit"] = len(places) - len(encoded) - sum(dropped[r] for r in ("blank", "blur", "unreadable"))
    writer = TarWriter(part)
    for (x, y, share), image in encoded:
        meta = {"slide": name, "x": x, "y": y, "mpp": settings.mpp, "tissue": round(share, 3)}
        writer.add(tile_key(name, x, y, settings.mpp), image, "jpg", meta)
    index = writer.close()
    bad = dropped["unreadable"]
    if bad > MAX_UNREADABLE * (len(index) + bad):
        raise Refusal(f"damaged: {bad} of {len(index) + bad} tiles cannot be decoded")
    return index


def _encode_tiles(
    slide: Slide, settings: Settings, places: list[Place], dropped: Counter[str]
) -> Iterator[tuple[Place, bytes]]:
    import simplejpeg

    for place in places:
        try:
            tile = slide.read(place[0], place[1], settings.tile_size, settings.mpp)
        except Refusal:
            dropped["unreadable"] += 1
            continue
        reason = judge(tile)
        if reason:
            dropped[reason] += 1
            continue
        yield place, simplejpeg.encode_jpeg(tile, settings.quality, "RGB", SUBSAMPLING)


def _write_picture(path: Path, thumbnail: np.ndarray, tissue: Tissue | None, boxes: np.ndarray) -> None:
    write_png(path, picture(thumbnail, tissue, boxes))


def _part(folder: Path, job: Source) -> Path:
    return folder / "parts" / f"{slide_key(job.slide)}.tar"


def _refused(reason: str) -> dict[str, Any]:
    return {"tiles": 0, "state": "refused", "reason": reason}


def _row(job: Source, facts: dict[str, Any], stain: str) -> dict[str, Any]:
    """A row of the slides table: ours first, then the table's further columns as they are."""
    known = {"slide": job.slide, "source": job.listed, "vendor": "", "mpp_source": "", "tissue_mm2": 0.0}
    known |= {f"dropped_{reason}": 0 for reason in DROP_REASONS} | facts
    for column, default in (("patient", job.slide), ("site", ""), ("stain", stain)):
        known[column] = job.facts.get(column) or default
    further = {
        f"given_{column}" if column in COLUMNS else column: value
        for column, value in job.facts.items()
        if column not in ("patient", "site", "stain")
    }
    return {column: known.get(column) for column in COLUMNS} | further


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows)
    return table.astype({"mpp": "float64", "width": "Int64", "height": "Int64"})


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of ``values`` at fractional positions, linearly; positions outside take the nearest row."""
    at = np.clip(at, 0, len(values) - 1)
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    weight = (at - low)[:, None]
    return values[low] * (1 - weight) + values[low + 1] * weight
