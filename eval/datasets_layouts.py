"""How public tile sets lie on disk, one function a set: folder -> a row an image, with what its names and tables say.

``path`` is relative to the folder. Nothing is decoded or written here; a function that finds nothing returns no row.
What a set does not publish, such as patients, is no column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_csv
from eosin.data_tools.sources import find_files

PCAM = "camelyonpatch_level_2_split"
PCAM_SPLITS = {"train": "train", "valid": "val", "test": "test"}
BREAKHIS_FOLDER = re.compile(r"SOB_[BM]_[A-Z]+_(?P<slide>\d+-(?P<number>\d+)[A-Z]*)")
TCGA = re.compile(r"(?P<patient>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})")
KATHER = re.compile(r"CRC-Prim-HE-\d+")
WILDS_OUT = {"1": "val", "2": "test"}  # centers held out by the official split


def crc100k(folder: Path) -> pd.DataFrame:
    """NCT-CRC-HE-100K (or, where that is absent, its raw form NONORM) to learn from, CRC-VAL-HE-7K to be scored."""
    normalized = (folder / "NCT-CRC-HE-100K").is_dir()
    train = _classes(folder, folder / f"NCT-CRC-HE-100K{'' if normalized else '-NONORM'}", ".tif", split="train")
    return pd.concat([train, _classes(folder, folder / "CRC-VAL-HE-7K", ".tif", split="test")], ignore_index=True)


def kather2016(folder: Path) -> pd.DataFrame:
    """Class folders as 01_TUMOR; the slide, one a patient, is part of the file names."""
    rows = _classes(folder, _inside(folder, "Kather_texture_2016_image_tiles_5000"), ".tif")
    rows["label"] = [label.partition("_")[2] or label for label in rows.label]
    found = [KATHER.search(path) for path in rows.path]
    rows["patient"] = rows["slide"] = [match[0] if match else "" for match in found]
    return rows


def breakhis(folder: Path) -> pd.DataFrame:
    """.../benign|malignant/SOB/<type>/SOB_B_TA_14-16184CD/40X/*.png."""
    rows = []
    for path in _files(folder, ".png"):
        parts = Path(path).parts
        if len(parts) < 6:
            continue
        label, _, kind, slide, magnification = parts[-6:-1]
        match = BREAKHIS_FOLDER.fullmatch(slide)
        if match and label in ("benign", "malignant") and re.fullmatch(r"\d+X", magnification):
            rows.append(
                {
                    "path": path,
                    "label": label,
                    "type": kind,
                    "slide": slide,
                    # A number with other letters behind it is another specimen of the same case.
                    "patient": match["number"],
                    "magnification": magnification,
                }
            )
    return _frame(rows)


def bach(folder: Path) -> pd.DataFrame:
    """Photos/<class>/*.tif; the file's name, which lists of patients use, is the slide's."""
    photos = _inside(folder, "ICIAR2018_BACH_Challenge/Photos", "Photos")
    rows = _classes(folder, photos, ".tif", of=("Normal", "Benign", "InSitu", "Invasive"))
    rows["slide"] = [Path(path).stem for path in rows.path]
    return rows


def mhist(folder: Path) -> pd.DataFrame:
    """images/ and annotations.csv, which gives the label by majority, the votes and the side."""
    table = folder / "annotations.csv"
    if not table.is_file():
        return _frame([])
    votes = "Number of Annotators who Selected SSA (Out of 7)"
    rows = read_csv(table, ["Image Name", "Majority Vote Label", votes, "Partition"])
    return _frame(
        {
            "path": f"images/{row['Image Name']}",
            "label": row["Majority Vote Label"],
            "votes_ssa": row[votes],
            "split": row["Partition"],
        }
        for row in rows
    )


def tcga_ut(folder: Path) -> pd.DataFrame:
    """<cancer type>/0/<TCGA barcode>/*.jpg: resolution 0 of six, .5 µm/px."""
    rows = []
    for path in _files(folder, ".jpg"):
        parts = Path(path).parts
        match = TCGA.match(parts[-2]) if len(parts) >= 4 else None
        if match and parts[-3] == "0":
            rows.append({"path": path, "label": parts[-4], "slide": parts[-2], "patient": match["patient"]})
    return _frame(rows)


def lc25000(folder: Path) -> pd.DataFrame:
    """<organ>_image_sets/<class>/*.jpeg, or a manifest.csv with label, group and pseudo_slide."""
    if (folder / "manifest.csv").is_file():
        return _manifest(folder, ["path", "label", "group", "pseudo_slide"])
    root = _inside(folder, "lung_colon_image_set")
    sets = [_classes(folder, root / f"{organ}_image_sets", ".jpeg") for organ in ("colon", "lung")]
    return pd.concat(sets, ignore_index=True)


def pbc(folder: Path) -> pd.DataFrame:
    """<class>/<subtype>_<number>.jpg, or a manifest.csv with label and id_block: the number's thousands."""
    if (folder / "manifest.csv").is_file():
        return _manifest(folder, ["path", "label", "subtype", "id_block"])
    rows = _classes(folder, _inside(folder, "PBC_dataset_normal_DIB"), ".jpg")
    found = [re.fullmatch(r"([A-Z]+)_(\d+)", Path(path).stem) for path in rows.path]
    rows["subtype"] = [match[1] if match else "" for match in found]
    rows["id_block"] = [str(int(match[2]) // 1000) if match else "" for match in found]
    return rows


def camelyon17_wilds(folder: Path) -> pd.DataFrame:
    """metadata.csv and patches/patient_<p>_node_<n>/*.png; sides are those of the official split by center."""
    root = _inside(folder, "camelyon17_v1.0")
    if not (root / "metadata.csv").is_file():
        return _frame([])
    columns = ["patient", "node", "x_coord", "y_coord", "tumor", "center", "split"]
    rows = []
    for row in read_csv(root / "metadata.csv", columns):
        node = f"patient_{row['patient'].zfill(3)}_node_{row['node']}"
        name = f"patch_{node}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        rows.append(
            {
                "path": (root.relative_to(folder) / "patches" / node / name).as_posix(),
                "label": {"0": "normal", "1": "tumor"}.get(row["tumor"], ""),
                "slide": node,
                "patient": row["patient"].zfill(3),
                "site": row["center"],
                "split": WILDS_OUT.get(row["center"], "train" if row["split"] == "0" else "val"),
            }
        )
    return _frame(rows)


def pcam(folder: Path) -> pd.DataFrame:
    """HDF5 of images and labels and a table of slides for each of the three sides; a row an image of the arrays."""
    import h5py

    parts = []
    for split, side in PCAM_SPLITS.items():
        images, labels, meta = (folder / f"{PCAM}_{split}_{what}" for what in ("x.h5", "y.h5", "meta.csv"))
        there = [path for path in (images, labels, meta) if path.is_file()]
        for path in (images, labels):
            if path not in there and (zipped := path.with_name(f"{path.name}.gz")).is_file():
                raise UserError(f"{zipped} is compressed; unpack it first: gunzip {zipped}")
        if not there:
            continue
        lacking = next((path for path in (images, labels, meta) if path not in there), None)
        if lacking:
            raise UserError(f"{lacking} is missing beside {there[0].name}; it comes from the same page")
        table = read_csv(meta, ["wsi"])
        try:
            with h5py.File(images, "r") as file, h5py.File(labels, "r") as other:
                count, classes = file["x"].shape[0], other["y"][:].reshape(-1)
        except (OSError, KeyError) as error:
            raise UserError(f"{images} or its labels are not readable as PCam's HDF5: {error}") from None
        if not count == len(classes) == len(table):
            sizes = f"{count} images, {len(classes)} labels and {len(table)} rows of {meta.name}"
            raise UserError(f"{folder} holds {sizes} of side '{split}'; copy the files again")
        names = [row["wsi"] for row in table]
        frame = {"path": images.name, "index": range(count), "label": [("normal", "tumor")[c] for c in classes]}
        parts.append(pd.DataFrame(frame | {"slide": names, "patient": names, "split": side}))
    return pd.concat(parts, ignore_index=True) if parts else _frame([])


def _files(folder: Path, *suffixes: str) -> list[str]:
    if not folder.is_dir():
        return []
    return [path.relative_to(folder).as_posix() for path in find_files(folder, suffixes)]


def _classes(folder: Path, root: Path, suffix: str, of: Iterable[str] = (), **more: str) -> pd.DataFrame:
    """Images at ``root``/<class>/<name><suffix>."""
    rows = []
    for path in _files(root, suffix):
        parts = Path(path).parts
        if len(parts) == 2 and (not of or parts[0] in of):
            rows.append({"path": (root / path).relative_to(folder).as_posix(), "label": parts[0]} | more)
    return _frame(rows)


def _manifest(folder: Path, columns: list[str]) -> pd.DataFrame:
    return _frame({column: row[column] for column in columns} for row in read_csv(folder / "manifest.csv", columns))


def _inside(folder: Path, *names: str) -> Path:
    """The first of these folders that is there, else the folder itself."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    return frame if len(frame) else pd.DataFrame({"path": [], "label": []}, dtype=str)
