"""Pictures to judge a tiling by: one a slide, and a page of them all.

A picture shows the slide, the tissue's outline, what was rejected in a color a reason, and the grid of kept tiles. The
page is made to be scanned: it loads a picture when it comes into view, and finds, filters and sorts ten thousand
slides without a server. It needs no other file than the pictures, and can be read without its script.
"""

from __future__ import annotations

import colorsys
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from eosin.data_tools.shards import slide_key
from eosin.data_tools.tissue import REASONS, Tissue

Color = tuple[int, int, int]
PICTURE_PIXELS = 1024
OUTLINE: Color = (0, 160, 60)
GRID: Color = (20, 60, 200)
COLORS: dict[str, Color] = {
    "pen_red": (255, 0, 200),
    "pen_green": (0, 220, 220),
    "pen_blue": (255, 150, 0),
    "pen_black": (230, 220, 0),
    "debris": (110, 110, 110),
    "edge": (150, 80, 20),
}
# Tiles that are dropped as a matter of course, and say nothing of the slide.
EXPECTED = ("background", "limit")
# Reasons of refusal to choose from on the page; the rarer ones are one entry.
MAX_REASONS = 30
RARE = ("refused", "another reason")


def picture(
    thumbnail: np.ndarray,
    tissue: Tissue | None,
    boxes: np.ndarray,
    names: Mapping[str, tuple[float, float]] | None = None,
) -> np.ndarray:
    """Draw the verdict over a slide.

    Args:
        thumbnail: uint8 [H, W, 3]; the masks are stretched onto it.
        tissue: None where it was not looked for.
        boxes: kept tiles, [n, 4] as left, top, right, bottom, in pixels of the thumbnail.
        names: of cores or sections, and the point (x, y) that each is written above, in pixels of the thumbnail.
    """
    image = thumbnail.copy()
    height, width = image.shape[:2]
    thickness = max(1, round(max(height, width) / 500))
    if tissue is not None:
        for reason, area in tissue.rejected.items():
            there = _stretch(area, width, height) > 0
            image[there] = image[there] // 2 + np.array(color_of(reason), np.uint8) // 2
    for left, top, right, bottom in boxes.round().astype(int).tolist():
        cv2.rectangle(image, (left, top), (right - 1, bottom - 1), GRID, 1)
    if tissue is not None:
        outlines, _ = cv2.findContours(_stretch(tissue.mask, width, height), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(image, outlines, -1, OUTLINE, thickness)
    for name, point in (names or {}).items():
        _write_name(image, name, point)
    return image


def color_of(reason: str) -> Color:
    """The color of what was rejected; a reason without one in :data:`COLORS` has its own, always the same."""
    if reason in COLORS:
        return COLORS[reason]
    red, green, blue = colorsys.hsv_to_rgb(zlib.crc32(reason.encode()) / 2**32, 0.9, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, uint8 [H, W, 3]. Unlike OpenCV's own writing, a full disk raises."""
    path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())


def write_page(path: Path, title: str, slides: Sequence[Mapping[Any, Any]]) -> None:
    """Write the page of all slides; pictures are looked for in ``qc/`` beside it.

    Args:
        slides: rows of the slides table: slide, state, reason, tiles, tissue_mm2, and counts of tiles that were not
            kept in columns called ``dropped_`` and the reason.
    """
    from jinja2 import Environment, StrictUndefined

    pictures = {file.name for file in (path.parent / "qc").glob("*.png")}
    marks = [_marks(row) for row in slides]
    filters = _filters(marks)
    numbers = {(kind, what): i for i, (kind, what, _) in enumerate(itertools.chain(*filters.values()))}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("eosin.data_tools").joinpath("qc.html.j2").read_text("utf-8"))
    page = template.render(
        title=title,
        summary=_summary(slides),
        key=[(OUTLINE, "tissue"), (GRID, "kept tile"), *((color_of(r), r.replace("_", " ")) for r in REASONS)],
        filters=filters,
        figures=[
            _figure(row, pictures) | {"marks": [numbers.get(mark, numbers.get(RARE)) for mark in found]}
            for row, found in zip(slides, marks)
        ],
    )
    path.write_text(page, encoding="utf-8")


def _summary(slides: Sequence[Mapping[str, Any]]) -> list[str]:
    refused = sum(row["state"] != "done" for row in slides)
    total: Counter[str] = Counter()
    for row in slides:
        total.update(_dropped(row))
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in total.items() if n) or "none"
    return [
        f"{len(slides):,} slides: {len(slides) - refused:,} done, {refused:,} refused",
        f"{sum(row['tiles'] for row in slides):,} tiles",
        f"{sum(row['tissue_mm2'] for row in slides):,.1f} mm² of tissue",
        f"tiles dropped: {dropped}",
    ]


def _dropped(row: Mapping[str, Any]) -> dict[str, int]:
    return {key.removeprefix("dropped_"): int(n) for key, n in row.items() if key.startswith("dropped_")}


def _judged(row: Mapping[str, Any]) -> dict[str, int]:
    """Of the dropped tiles, those that show something of the slide."""
    return {reason: n for reason, n in _dropped(row).items() if n and reason not in EXPECTED}


def _filters(marks: list[list[tuple[str, str]]]) -> dict[str, list[tuple[str, str, int]]]:
    """What the page can show alone, by heading: (kind, what, slides of it), the most frequent first."""
    by_kind: dict[str, list[tuple[str, str, int]]] = {"state": [], "refused": [], "dropped": []}
    for (kind, what), n in Counter(itertools.chain(*marks)).most_common():
        by_kind[kind].append((kind, what, n))
    rare = by_kind["refused"][MAX_REASONS:]
    if rare:
        by_kind["refused"][MAX_REASONS:] = [(*RARE, sum(n for *_, n in rare))]
    return {heading: entries for heading, entries in by_kind.items() if entries}


def _marks(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a slide can be found by: its state, the gist of why it was refused, what its tiles were dropped for."""
    if row["state"] != "done":
        # The gist leaves out what differs from slide to slide: numbers, and what follows a colon, or is in brackets.
        gist = re.sub(r"\d[\d.,]*", "…", re.split(r"[:;(]", str(row["reason"]))[0]).strip()
        return [("state", "refused"), ("refused", gist)]
    return [("state", "done"), *(("dropped", reason) for reason in _judged(row))]


def _figure(row: Mapping[str, Any], pictures: set[str]) -> dict[str, Any]:
    file = f"{slide_key(row['slide'])}.png"
    dropped = _judged(row)
    return {
        "name": row["slide"],
        "picture": file if file in pictures else None,
        "tiles": int(row["tiles"]),
        "tissue": float(row["tissue_mm2"]),
        "share": sum(dropped.values()) / max(1, sum(dropped.values()) + row["tiles"]),
        "dropped": ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()),
        "refused": str(row["reason"]) if row["state"] != "done" else None,
    }


def _write_name(image: np.ndarray, name: str, point: tuple[float, float]) -> None:
    """Write black on white above a point, and inside the picture."""
    scale, font = max(image.shape[:2]) / 2000, cv2.FONT_HERSHEY_SIMPLEX
    (wide, high), below = cv2.getTextSize(name, font, scale, 1)
    left = min(max(round(point[0] - wide / 2), 0), max(0, image.shape[1] - wide))
    base = min(max(round(point[1] - high / 2), high + 2), image.shape[0] - 1 - below)
    for color, thickness in (((255, 255, 255), 4), ((20, 20, 30), 1)):
        cv2.putText(image, name, (left, base), font, scale, color, thickness, cv2.LINE_AA)


def _stretch(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
