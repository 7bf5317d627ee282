"""What is in a shard set, in one picture and a few words: its slides, its tiles, their color, and tiles to look at.

Of the index all rows are read, of images and their JSON a sample, which is spread over as many slides as can be. This
module changes nothing.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.draws import hash32, permute, purpose
from eosin.data_tools.errors import UserError
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import ShardSet

if TYPE_CHECKING:
    import pandas as pd

MOST_TILES = 400
SAMPLE = 1000  # tiles of which colors and tissue are measured
DRAW = purpose("tiles of the sheet")
GROUPS = ("state", "stain", "site", "label")  # columns of the slides table that are counted
GRAY = 0.02  # saturation below which a color has no hue
SHOWN = 192  # pixels of a tile in the picture


@dataclass(frozen=True)
class Sample:
    """Tiles that were looked at, in the order they were drawn; those that cannot be read are left out.

    Attributes:
        slides: row in the slides table, [n].
        images: of the first tiles only, uint8 [SHOWN, SHOWN, 3].
        colors: mean RGB in [0, 1], [n, 3].
        density: mean optical density, log10(255 / I), over pixels and channels, [n].
        tissue: share of tissue, [n], NaN where the JSON has none.
        unreadable: tiles that were drawn and cannot be read.
    """

    slides: np.ndarray
    images: list[np.ndarray]
    colors: np.ndarray
    density: np.ndarray
    tissue: np.ndarray
    unreadable: int


@dataclass(frozen=True)
class Content:
    """All that the picture and the words tell of a shard set."""

    shards: ShardSet
    table: pd.DataFrame
    tiles_of_slide: np.ndarray  # [slides]
    mpps: dict[float, int]  # tiles of each µm/px, the finest first; empty where it is not known
    sample: Sample

    @property
    def dropped(self) -> dict[str, int]:
        """Tiles that were dropped, by reason, the most first; empty for a set that was not tiled."""
        import pandas as pd

        columns = [column for column in map(str, self.table) if column.startswith("dropped_")]
        sums = {c.removeprefix("dropped_"): pd.to_numeric(self.table[c], errors="coerce").sum() for c in columns}
        return {reason: int(n) for reason, n in sorted(sums.items(), key=lambda pair: -pair[1]) if n}

    def groups(self, column: str) -> dict[str, int]:
        """Slides of each value of a column, the most first; empty where the column says nothing."""
        if column not in self.table:
            return {}
        counts = self.table[column].fillna("").astype(str).value_counts()
        return {} if set(counts.index) <= {""} else {str(name) or "not given": int(n) for name, n in counts.items()}

    @property
    def hue(self) -> np.ndarray:
        """Hue of the tiles' mean colors in degrees, [n]; NaN for gray ones."""
        hsv = np.array([colorsys.rgb_to_hsv(*color) for color in self.sample.colors]).reshape(-1, 3)
        return np.where(hsv[:, 1] < GRAY, np.nan, 360 * hsv[:, 0])


def write_sheet(shards: ShardSet, out: Path, tiles: int = 64) -> list[str]:
    """Draw what is in a shard set into the PNG ``out``; return the same in words, line by line.

    Raises:
        UserError: ``out`` is no PNG, ``tiles`` is out of range, the set is empty, damaged, or none of its tiles can be
            read.
    """
    from eosin.data_tools.shards_picture import draw

    if out.suffix != ".png":
        raise UserError(f"--out {out} is not a PNG; give a name that ends in .png")
    if not 1 <= tiles <= MOST_TILES:
        raise UserError(f"--tiles {tiles} is not a number of tiles to look at; give 1 to {MOST_TILES}")
    content = survey(shards, tiles)
    draw(content, out)
    return [*words(content), f"picture: {out}"]


def survey(shards: ShardSet, tiles: int) -> Content:
    """Look at a shard set; of the sample the first ``tiles`` keep their images."""
    if not len(shards):
        raise UserError(f"{shards.name} has no tile to look at")
    table = shards.slides().reset_index(drop=True)
    slide = shards.column("slide")
    if len(table) != shards.slide_count or slide.min() < 0 or slide.max() >= len(table):
        raise UserError(f"{shards.name}: the slides table does not fit the index; run 'eosin verify {shards.name}'")
    counts = np.bincount(slide, minlength=len(table))
    drawn = spread(counts, max(tiles, SAMPLE))
    sample = _look(shards, locate(slide, drawn), drawn[:, 0], tiles)
    if not len(sample.slides):
        raise UserError(f"no tile of {shards.name} can be read; run 'eosin verify {shards.name}'")
    mpps, tiles_of_mpp = np.unique(shards.column("mpp"), return_counts=True)
    known = {round(float(mpp), 4): int(n) for mpp, n in zip(mpps, tiles_of_mpp) if not np.isnan(mpp)}
    return Content(shards, table, counts, known, sample)


def spread(counts: np.ndarray, most: int) -> np.ndarray:
    """Draw tiles of as many slides as can be: from every slide one, in a drawn order, then from every slide another.

    Args:
        counts: tiles of each slide, [slides].
        most: tiles wanted.

    Returns:
        Slide and rank of the tile among those of its slide, int64 [min(most, tiles), 2]; a longer draw begins with a
        shorter one.
    """
    slides = np.flatnonzero(counts)
    slides = slides[np.argsort(hash32(DRAW, slides), kind="stable")]
    turns: list[np.ndarray] = []
    left = min(most, int(counts.sum()))
    while left:
        turn = slides[counts[slides] > len(turns)][:left]
        ranks = [int(permute(np.array([len(turns)]), int(counts[s]), DRAW, int(s))[0]) for s in turn]
        turns.append(np.stack([turn, ranks], axis=1))
        left -= len(turn)
    return np.concatenate(turns).astype(np.int64)


def locate(slide: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Number of the tile that has a rank among those of its slide.

    Args:
        slide: of each tile of the set, [tiles].
        drawn: slide and rank, [n, 2].
    """
    some = np.flatnonzero(np.isin(slide, np.unique(drawn[:, 0])))
    by_slide = some[np.argsort(slide[some], kind="stable")]
    return by_slide[np.searchsorted(slide[by_slide], drawn[:, 0]) + drawn[:, 1]]


def words(content: Content) -> list[str]:
    """Counts and medians of a shard set, line by line."""
    shards, table, sample = content.shards, content.table, content.sample
    counts = content.tiles_of_slide[content.tiles_of_slide > 0]
    rows = [("slides", f"{len(table):,}, of which {len(counts):,} have tiles")]
    rows += [(f"  by {column}", _listed(content.groups(column))) for column in GROUPS]
    least, median, most = counts.min(), np.median(counts), counts.max()
    rows.append(("tiles a slide", f"median {median:,.0f}, {least:,} to {most:,}" if least < most else f"{least:,}"))
    rows.append(("tiles by µm/px", _listed({f"{mpp:g}": n for mpp, n in content.mpps.items()})))
    if "tissue_mm2" in table:
        area = table["tissue_mm2"][content.tiles_of_slide > 0]
        rows.append(("tissue a slide", f"median {area.median():.3g} mm², {area.sum():,.4g} mm² in all"))
    rows.append(("tiles dropped", _listed(content.dropped)))
    looked = f"of {len(sample.slides):,} tiles drawn"
    if not np.isnan(sample.tissue).all():
        rows.append(("tissue a tile", f"median {np.nanmedian(sample.tissue):.0%}, {looked}"))
    hue = circular_median(content.hue)
    colored = "gray" if np.isnan(hue) else f"median hue {hue:.0f}°"
    rows.append(("color", f"{colored}, median optical density {np.median(sample.density):.2f}, {looked}"))
    if sample.unreadable:
        drawn = len(sample.slides) + sample.unreadable
        bad = f"{sample.unreadable} of {drawn:,} tiles drawn; run 'eosin verify {clean(shards.name)}'"
        rows.append(("cannot be read", bad))
    lines = [f"  {name:<15} {value}" for name, value in rows if value]
    return [f"{clean(shards.name)}: {headline(content)}", *lines]


def headline(content: Content) -> str:
    """The set in a line: how much there is of it."""
    shards = content.shards
    files = shards.dataset["shards"]
    mpp = f" at {shards.mpp:g} µm/px" if shards.mpp is not None else ""
    size = sum(shard["bytes"] for shard in files) / 2**20
    there = f"{size:,.0f} MiB" if size < 10_000 else f"{size / 1024:,.0f} GiB"
    return (
        f"{_number(len(shards), 'tile')} of {shards.tile_size} px{mpp} of {_number(len(content.table), 'slide')}, "
        f"in {_number(len(files), 'shard')}, {there}"
    )


def clean(text: Any) -> str:
    """Text from a file in one printable line."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def circular_median(degrees: np.ndarray) -> float:
    """The median of angles, counted from opposite their mean direction; NaN where there are none."""
    degrees = degrees[~np.isnan(degrees)]
    if not len(degrees):
        return np.nan
    start = cut_of_circle(degrees)
    return float((start + np.median((degrees - start) % 360)) % 360)


def cut_of_circle(degrees: np.ndarray) -> float:
    """The angle opposite the mean direction, where a circle is cut for a histogram."""
    mean = np.exp(1j * np.deg2rad(degrees[~np.isnan(degrees)])).mean()
    return float(np.rad2deg(np.angle(mean)) + 180) % 360


def _look(shards: ShardSet, tiles: np.ndarray, slides: np.ndarray, shown: int) -> Sample:
    import cv2

    from eosin.data_tools.stream import decode_tile

    rows = shards.rows(tiles)
    found = zip(tiles.tolist(), rows, slides.tolist(), shards.images(tiles, rows))
    density_of = -np.log10(np.clip(np.arange(256), 1, None) / 255)
    images: list[np.ndarray] = []
    measured = []
    for tile, row, slide, data in progress(found, total=len(tiles), desc="inspect", unit="tiles"):
        try:
            image = decode_tile(data, int(row["crc32"]), shards.tile_size)
            tissue = shards.meta(tile).get("tissue")
        except (ValueError, EOFError, OSError, UserError):
            continue
        if len(images) < shown:
            method = cv2.INTER_AREA if shards.tile_size > SHOWN else cv2.INTER_NEAREST
            images.append(cv2.resize(image, (SHOWN, SHOWN), interpolation=method))
        known = tissue if isinstance(tissue, (int, float)) else np.nan
        measured.append((slide, *image.mean((0, 1)) / 255, density_of[image].mean(), known))
    values = np.array(measured, np.float64).reshape(-1, 6)
    colors, density, tissues = values[:, 1:4], values[:, 4], values[:, 5]
    return Sample(values[:, 0].astype(np.int64), images, colors, density, tissues, len(tiles) - len(values))


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _listed(counts: dict[str, int], most: int = 6) -> str:
    shown = [f"{clean(name)} {n:,}" for name, n in list(counts.items())[:most]]
    more = len(counts) - most
    return ", ".join([*shown, *([f"and {more} others"] if more > 0 else [])])
