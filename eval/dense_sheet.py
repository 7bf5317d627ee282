"""A picture of what dense probes said: tiles, what is true of them, and what each probe told, side by side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from eosin.data_tools.files import atomic_path
from eosin.eval.annotations import IGNORED

TILE = 160  # pixels of a tile in the picture
PAD, HEAD = 8, 30
OPACITY = 0.55
# Okabe and Ito 2008, told apart by all; further classes begin anew at half the brightness.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167), (240, 228, 66))
FONT, SIZE = cv2.FONT_HERSHEY_SIMPLEX, 0.42


def sheet_path(out: Path) -> Path:
    """Path of the picture that belongs to the results of a dense probe at ``out``."""
    return out.with_suffix(".png")


def write_sheet(
    path: Path, images: np.ndarray, truth: np.ndarray, told: dict[str, np.ndarray], names: list[str]
) -> None:
    """Write a row a tile: the tile, its truth, and what each encoder's probe told.

    Args:
        images: uint8 [n, T, T, 3].
        truth: class numbers [n, T, T], uint8; or values [n, h, w, C], of which the first channel is shown.
        told: encoder -> the same.
        names: of classes, or of channels.
    """
    values = truth.ndim == 4
    columns = {"tile": None, "truth": truth} | told
    low, high = (np.percentile(truth[..., 0], q) for q in (2, 98)) if values else (0.0, 1.0)
    width = PAD + (TILE + PAD) * len(columns)
    legend = [f"{names[0]}: dark {low:.4g}, bright {high:.4g}"] if values else names
    rows = [np.full((HEAD, width, 3), 255, np.uint8)]
    for number, name in enumerate(columns):
        place = PAD + number * (TILE + PAD), 20
        cv2.putText(rows[0], _fitting(name)[0], place, FONT, SIZE, (0, 0, 0), 1, cv2.LINE_AA)
    for i, image in enumerate(images):
        row = np.full((TILE + PAD, width, 3), 255, np.uint8)
        base = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
        for number, shown in enumerate(columns.values()):
            left = PAD + number * (TILE + PAD)
            if shown is None:
                row[:TILE, left : left + TILE] = base
            elif values:
                row[:TILE, left : left + TILE] = _heat(shown[i, ..., 0], float(low), float(high))
            else:
                row[:TILE, left : left + TILE] = _overlay(base, shown[i])
        rows.append(row)
    sheet = np.concatenate([*rows, *_legend(legend, width, [] if values else list(map(color, range(len(names)))))])
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())


def color(number: int) -> tuple[int, ...]:
    """Color of a class."""
    turn, place = divmod(number, len(COLORS))
    return tuple(c >> turn for c in COLORS[place])


def _overlay(base: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A tile under the colors of its classes; what is not annotated stays as it is."""
    mask = cv2.resize(mask, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    table = np.zeros((IGNORED + 1, 3), np.float32)
    table[:IGNORED] = [color(c) for c in range(IGNORED)]
    mixed = base * (1 - OPACITY) + table[mask] * OPACITY
    return np.where((mask == IGNORED)[..., None], base, mixed).astype(np.uint8)


def _heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = ((values - low) / max(high - low, 1e-12)).clip(0, 1) * 255
    large = cv2.resize(scaled.astype(np.uint8), (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    return cv2.applyColorMap(large, cv2.COLORMAP_VIRIDIS)[..., ::-1]


def _legend(names: list[str], width: int, colors: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Names behind their colors, where they have any, in as many lines as they take."""
    lines: list[np.ndarray] = []
    left = width
    for number, name in enumerate(names):
        box = 19 if colors else 0
        text, wide = _fitting(name, width - 2 * PAD - box)
        if left + box + wide > width - PAD:
            lines.append(np.full((HEAD, width, 3), 255, np.uint8))
            left = PAD
        if colors:
            lines[-1][8:22, left : left + 14] = colors[number]
        cv2.putText(lines[-1], text, (left + box, 20), FONT, SIZE, (0, 0, 0), 1, cv2.LINE_AA)
        left += box + wide + 2 * PAD
    return lines


def _fitting(name: str, width: int = TILE) -> tuple[str, int]:
    """A name that OpenCV can write, its middle left out where it is wider, and its width in pixels."""
    plain = name.encode("ascii", "replace").decode()

    def wide(text: str) -> int:
        return int(cv2.getTextSize(text, FONT, SIZE, 1)[0][0])

    text, kept = plain, len(plain)
    while wide(text) > width and kept > 2:
        kept -= 1
        text = f"{plain[: kept // 2]}..{plain[-(kept - kept // 2) :]}"
    return text, wide(text)
