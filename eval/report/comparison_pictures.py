"""Tiles on the comparison page: nearest neighbors with right and wrong frames, and tiles whose label is disputed.

Small JPEGs within a bound of bytes; what does not fit is left out and counted.
"""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pandas as pd

from eosin.data_tools.shards import ShardSet
from eosin.eval.report.comparison_samples import Tiles, drawn_rows, nearest, queries
from eosin.eval.report.page import Block, Cell, Gallery, Legend, Picture, Table, Words, photo
from eosin.eval.report.pictures import read_tiles

SIDE, FRAME, GAP = 88, 4, 6
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)  # Okabe and Ito's green and vermilion; a wrong tile also has a cut corner
MOST_ROWS, EACH_CLASS, MOST_DISPUTED = 32, 2, 24


class Room:
    """Bytes of pictures that a part of the page may still take, and how many pictures found none."""

    def __init__(self, left: int) -> None:
        self.left, self.refused = left, 0

    def keep(self, *pictures: Picture) -> list[Picture]:
        """The pictures, where all of them fit; none of them otherwise."""
        size = sum(len(p.src) for p in pictures)
        if size > self.left:
            self.refused += len(pictures)
            return []
        self.left -= size
        return list(pictures)


def neighbor_sheet(tiles: Tiles, shards: ShardSet, room: Room) -> list[Block]:
    """Some tiles of each class, and for each encoder the nearest tiles of other groups."""
    most = max(MOST_ROWS // len(tiles.encoders), 2)
    each = max(1, min(EACH_CLASS, most // len(tiles.classes)))
    asked = queries(tiles.labels, len(tiles.classes), each)
    asked = asked[drawn_rows(len(asked), most)]
    near = {name: nearest(features, tiles.groups, asked) for name, features in tiles.encoders}
    images = _images(tiles, shards, np.unique(np.concatenate([asked, *(n[n >= 0] for n in near.values())])))
    rows: list[list[str | Cell | list[Picture]]] = []
    for number, query in enumerate(asked.tolist()):
        label = tiles.classes[tiles.labels[query]]
        group = f"{label}, {tiles.groups[query]}"
        for place, (name, found) in enumerate(near.items()):
            there = [int(n) for n in found[number] if n >= 0]
            right = [tiles.labels[n] == tiles.labels[query] for n in there]
            strip = [_framed(images.get(n), r) for n, r in zip(there, right)]
            said = Counter(tiles.classes[tiles.labels[n]] for n in there)
            listed = ", ".join(f"{n} {c}" for c, n in said.most_common())
            shown = (
                [photo(np.concatenate(strip, axis=1), f"the tiles nearest to it for {name}: {listed}")] if strip else []
            )
            first = [photo(_framed(images.get(query), None), f"a tile of {group}")] if place == 0 else []
            kept = room.keep(*first, *shown)
            rows.append(
                [
                    kept[: len(first)],
                    f"{group}" if place == 0 else "",
                    name,
                    Cell(f"{sum(right)} of {len(there)}", title=listed),
                    kept[len(first) :],
                ]
            )
    head = ["Tile", "Class, group", "Encoder", "Same class", "Its nearest tiles of other groups, the nearest first"]
    caption = f"{len(asked)} tiles drawn by number; neighbors by cosine of the features."
    legend = [("rgb(0, 158, 115)", "same class"), ("rgb(213, 94, 0)", "another class (corner cut off)")]
    return [Legend(legend), Table(head, rows, caption)]


def disputed_sheet(found: pd.DataFrame, tiles: Tiles | None, shards: ShardSet | None, room: Room) -> list[Block]:
    """Counts of disputed labels by class, and the surest ones as pictures."""
    if not len(found):
        return [Words(["No label is disputed: no tile is confidently called another class by all probes consulted."])]
    counts = found.groupby(["label", "said"]).size().sort_values(ascending=False, kind="stable")
    listed = counts.head(MOST_DISPUTED).reset_index(name="tiles")
    rows = [[str(r.label), str(r.said), str(r.tiles)] for r in listed.itertuples()]
    blocks: list[Block] = [Table(["Given label", "Probes say", "Tiles"], rows)]
    top = found.head(MOST_DISPUTED)
    shown: list[Picture] = []
    if tiles is not None and shards is not None:
        place = pd.Index(tiles.keys).get_indexer(top["key"])
        images = _images(tiles, shards, place[place >= 0])
        for row, at in zip(top.itertuples(), place):
            if (image := images.get(int(at))) is not None:
                caption = f"{row.label} → {row.said}, {row.key}"
                shown += room.keep(photo(image, f"a tile given as {row.label}", caption))
    if shown:
        blocks += [Words([f"The surest {len(shown)}: given label → what probes say, tile."]), Gallery(shown, 130)]
    else:
        rows = [[str(r.key), str(r.label), str(r.said), f"{r.sure:.2f}"] for r in top.itertuples()]
        blocks.append(Table(["Tile", "Given", "Probes say", "Surer by"], rows, f"The surest {len(rows)}."))
    return blocks


def _images(tiles: Tiles, shards: ShardSet, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Pictures of rows of ``tiles``, [SIDE, SIDE, 3]; without those that cannot be found or read."""
    numbers = [_number(shards, str(tiles.keys[row]), int(tiles.rows[row]), tiles.files) for row in wanted]
    there = [(int(row), number) for row, number in zip(wanted, numbers) if number is not None]
    images, good = read_tiles(shards, [number for _, number in there])
    return {
        there[place][0]: cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        for place, image in zip(good, images)
    }


def _number(shards: ShardSet, key: str, row: int, rows: int) -> int | None:
    """The tile of a row of embeddings, which hold the tiles in their order without those that were refused."""
    last = min(row + max(len(shards) - rows, 0), len(shards) - 1)
    return next((tile for tile in range(row, last + 1) if shards.meta(tile)["key"] == key), None)


def _framed(image: np.ndarray | None, right: bool | None) -> np.ndarray:
    """A tile in its frame; gray where there is no picture of it."""
    inside = np.full((SIDE, SIDE, 3), 225, np.uint8) if image is None else image
    color = (255, 255, 255) if right is None else RIGHT if right else WRONG
    side = SIDE + 2 * FRAME
    out = np.full((side, side + GAP, 3), 255, np.uint8)
    out[:, :side] = color
    out[FRAME:-FRAME, FRAME : side - FRAME] = inside
    if right is False:
        cv2.fillPoly(out, [np.array([[side - 20, 0], [side, 0], [side, 20]])], color)
    return out
