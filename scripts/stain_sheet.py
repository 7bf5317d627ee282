"""Draw every stain operation on eight tiles of a shard set with stain fits, as one PNG.

    python scripts/stain_sheet.py SHARDS OUT.png

A column a tile, of as many slides as can be; a row an operation, the uppermost the tiles as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from eosin.data_tools.files import atomic_path
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.ssl.config import Stain
from eosin.ssl.stain.augment import make_augmenter
from eosin.ssl.stain.normalizer import describe, make_normalizer

TILES, SIDE, LABEL = 8, 150, 210
NORMALIZATIONS = [
    ("Macenko, by slide", {"normalize": "slide"}),
    ("Macenko, by tile", {"normalize": "tile"}),
    ("Macenko, torchstain", {"normalize": "tile", "convention": "torchstain", "reference": "torchstain"}),
    ("Reinhard, by slide", {"normalize": "slide", "method": "reinhard"}),
    ("Reinhard, by tile", {"normalize": "tile", "method": "reinhard"}),
    ("modified Reinhard", {"normalize": "slide", "method": "reinhard-modified"}),
]
AUGMENTATIONS = [
    ("HED jitter .05", {"op": "hed", "sigma": 0.05}),
    ("HED jitter .2", {"op": "hed", "sigma": 0.2}),
    ("own stains moved", {"op": "perturb"}),
    ("RandStainNA", {"op": "randstainna"}),
    ("Reinhard, other slide", {"op": "reinhard"}),
]


def main(folder: str, out: str) -> None:
    """Write the sheet."""
    shards = ShardSet(folder)
    slide_of = shards.column("slide")
    fitted = np.flatnonzero(shards.slides()["stain_fit"] != "")
    chosen = [fitted[i] for i in np.linspace(0, len(fitted) - 1, TILES).round().astype(int)]
    tiles = [np.flatnonzero(slide_of == s) for s in chosen]
    numbers = [int(t[len(t) * (i + 1) // (TILES + 1)]) for i, t in enumerate(tiles)]
    images = torch.from_numpy(np.stack([decode(shards.image(n)) for n in numbers])).permute(0, 3, 1, 2).contiguous()
    slides = torch.tensor(chosen)
    rows = [("as it is", images)]
    for name, policy in NORMALIZATIONS:
        normalizer = make_normalizer(describe(Stain.model_validate(policy)), shards)
        rows.append((name, normalizer(images, slides).images))
    for name, operation in AUGMENTATIONS:
        crops = make_augmenter(Stain.model_validate({"augment": [operation]}), shards).of(images, slides)
        done = crops(images / 255, torch.arange(TILES), torch.arange(TILES))
        rows.append((name, (done * 255).round().to(torch.uint8)))
    sheet = np.full((len(rows) * SIDE, LABEL + TILES * SIDE, 3), 255, np.uint8)
    for y, (name, row) in enumerate(rows):
        at = (6, y * SIDE + SIDE // 2)
        cv2.putText(sheet, name, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 36, 44), 1, cv2.LINE_AA)
        for x, image in enumerate(row.permute(0, 2, 3, 1).numpy()):
            small = cv2.resize(image, (SIDE - 2, SIDE - 2), interpolation=cv2.INTER_AREA)
            left = LABEL + x * SIDE
            sheet[y * SIDE : y * SIDE + SIDE - 2, left : left + SIDE - 2] = small
    with atomic_path(Path(out)) as temporary:
        Image.fromarray(sheet).save(temporary)


if __name__ == "__main__":
    main(*sys.argv[1:])
