"""PanNuke: three folds of arrays, images and masks of nuclei, to a folder of PNGs that can be packed and one of masks.

Arrays are mapped, never unpickled. Writing goes on where it was cut: a PNG that is there is complete.
"""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path
from eosin.data_tools.progress import progress
from eosin.data_tools.sources import find_files

# Pixels of a mask; the arrays' channels are 1 to 5 of these in order, then the background.
CLASSES = ("background", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
SIDES = {1: "train", 2: "val", 3: "test"}  # the first of the three official splits
FOLD = re.compile(r"fold[ _-]?([123])(?:[/_]|$)", re.IGNORECASE)


def find(folder: Path) -> pd.DataFrame:
    """A row an image of the arrays, with its tissue; ``path`` is the name under which :func:`export` writes it."""
    parts = []
    for fold, arrays in _folds(folder).items():
        images, tissues = _mapped(arrays["images"]), _mapped(arrays["types"])
        if images.ndim != 4 or images.shape[3] != 3 or tissues.shape != images.shape[:1] or tissues.dtype.kind != "U":
            raise UserError(
                f"{arrays['images']} and types.npy do not fit ({images.shape}, {tissues.shape}); copy them again"
            )
        count = len(images)
        parts.append(
            pd.DataFrame(
                {
                    "path": [f"fold{fold}_{i:04d}.png" for i in range(count)],
                    "label": [str(tissue) for tissue in tissues],
                    "fold": str(fold),
                    "split": SIDES[fold],
                    "index": range(count),
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"path": [], "label": []}, dtype=str)


def export(folder: Path, rows: pd.DataFrame, images: Path, masks: Path) -> list[str]:
    """Write images and masks of class numbers as PNGs; a mask is called as its image, and legend.csv names the classes.

    Returns:
        Of each image "yes" or "no": whether any of its nuclei is neoplastic.
    """
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    with atomic_path(masks / "legend.csv") as temporary:
        temporary.write_text("value,class\n" + "".join(f"{value},{name}\n" for value, name in enumerate(CLASSES)))
    arrays = {fold: (_mapped(found["images"]), _mapped(found["masks"])) for fold, found in _folds(folder).items()}
    neoplastic = []
    columns = zip(rows["path"], rows["fold"], rows["index"])
    for name, fold, index in progress(columns, total=len(rows), desc="PanNuke", unit="images"):
        pixels, nuclei = arrays[int(fold)]
        if not (images / name).is_file():
            _write(images / name, np.asarray(pixels[index]).round().clip(0, 255).astype(np.uint8)[..., ::-1])
        if (masks / name).is_file():
            classes = cv2.imread(str(masks / name), cv2.IMREAD_UNCHANGED)
        else:
            classes = class_map(np.asarray(nuclei[index]))
            _write(masks / name, classes)
        neoplastic.append("yes" if np.any(classes == 1) else "no")
    return neoplastic


def class_map(nuclei: np.ndarray) -> np.ndarray:
    """Class of each pixel, [H, W] uint8, of numbered nuclei [H, W, 6]; where two overlap the first channel counts."""
    inside = nuclei[..., :5] > 0
    return np.where(inside.any(axis=-1), inside.argmax(axis=-1) + 1, 0).astype(np.uint8)


def _folds(folder: Path) -> dict[int, dict[str, Path]]:
    """The three arrays of each fold that is there. Raises UserError where one of a fold's is missing."""
    found: dict[int, dict[str, Path]] = {}
    for path in find_files(folder, (".npy",)) if folder.is_dir() else []:
        match = FOLD.search(path.parent.relative_to(folder).as_posix())
        if match and path.stem in ("images", "masks", "types"):
            found.setdefault(int(match[1]), {}).setdefault(path.stem, path)
    for fold, arrays in found.items():
        for name in ("images", "masks", "types"):
            if name not in arrays:
                raise UserError(f"{folder} has no {name}.npy of fold {fold}; unpack its archive again")
    return dict(sorted(found.items()))


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not readable as a plain array: {' '.join(str(error).split())[:120]}") from None


def _write(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        cv2.imwrite(str(temporary), pixels)
