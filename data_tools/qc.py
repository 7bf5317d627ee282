"""Pictures to judge a tiling by: one a slide, and a page of them all.

A picture shows the slide, the tissue's outline, what was rejected in a color a reason, and the grid of kept tiles.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from eosin.data_tools.shards import slide_key
from eosin.data_tools.tissue import Tissue

PICTURE_PIXELS = 1024
OUTLINE = (0, 160, 60)
GRID = (20, 60, 200)
COLORS = {
    "pen_red": (255, 0, 200),
    "pen_green": (0, 220, 220),
    "pen_blue": (255, 150, 0),
    "pen_black": (230, 220, 0),
    "debris": (110, 110, 110),
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Tiling: {title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.2rem }}
figure {{ margin: 0 }} img {{ width: 100%; height: 240px; object-fit: contain; background: #f2f2f2 }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }} .refused {{ color: #a00000 }}
.key span {{ display: inline-block; margin-right: 1.2em }}
.key i {{ display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em }}
</style></head><body>
<h1>{title}</h1>
<p class="key">{key}</p>
<main>
{figures}
</main></body></html>
"""


def picture(thumbnail: np.ndarray, tissue: Tissue | None, boxes: np.ndarray) -> np.ndarray:
    """Draw the verdict over a slide.

    Args:
        thumbnail: uint8 [H, W, 3]; the masks are stretched onto it.
        tissue: None where it was not looked for.
        boxes: kept tiles, [n, 4] as left, top, right, bottom, in pixels of the thumbnail.
    """
    image = thumbnail.copy()
    height, width = image.shape[:2]
    thickness = max(1, round(max(height, width) / 500))
    if tissue is not None:
        for reason, area in tissue.rejected.items():
            there = _stretch(area, width, height) > 0
            image[there] = image[there] // 2 + np.array(COLORS[reason], np.uint8) // 2
        for left, top, right, bottom in boxes.round().astype(int).tolist():
            cv2.rectangle(image, (left, top), (right - 1, bottom - 1), GRID, 1)
        outlines, _ = cv2.findContours(_stretch(tissue.mask, width, height), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(image, outlines, -1, OUTLINE, thickness)
    return image


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, uint8 [H, W, 3]. Unlike OpenCV's own writing, a full disk raises."""
    path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())


def write_page(path: Path, title: str, slides: Sequence[dict[str, Any]]) -> None:
    """Write the page of all slides; pictures are looked for in ``qc/`` beside it.

    Args:
        slides: rows of the slides table.
    """
    names = {OUTLINE: "tissue", GRID: "kept tile"} | {
        color: reason.replace("_", " ") for reason, color in COLORS.items()
    }
    key = "".join(f'<span><i style="background:rgb{color}"></i>{name}</span>' for color, name in names.items())
    figures = "\n".join(_figure(path.parent, row) for row in slides)
    path.write_text(PAGE.format(title=html.escape(title), key=key, figures=figures), encoding="utf-8")


def _figure(folder: Path, row: dict[str, Any]) -> str:
    name = html.escape(str(row["slide"]))
    file = f"qc/{slide_key(row['slide'])}.png"
    image = f'<a href="{file}"><img loading="lazy" alt="" src="{file}"></a>' if (folder / file).is_file() else ""
    if row["state"] == "done":
        said = f"{row['tiles']} tiles, {row['tissue_mm2']:.2f} mm² of tissue"
    else:
        said = f'<span class="refused">refused: {html.escape(str(row["reason"]))}</span>'
    return f"<figure>{image}<figcaption><b>{name}</b><br>{said}</figcaption></figure>"


def _stretch(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
