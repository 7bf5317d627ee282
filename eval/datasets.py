"""Public tile sets that people use: how to get each, what its folder must hold, and its way into a shard set.

Nothing is downloaded. What a set does not publish is not made up: where no patient is known, no group is named after
one, and the note says what a split by the next best thing still lets through.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.pack import pack_images
from eosin.data_tools.sources import Summary
from eosin.eval import datasets_layouts as layouts
from eosin.eval import datasets_pannuke as pannuke

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Dataset:
    """A public tile set.

    Attributes:
        name: as it is called here.
        about: what its tiles and classes are.
        license: as its makers state it; read theirs before use.
        get: how to obtain it.
        layout: what its folder holds.
        rows: folder -> a row an image (see :mod:`~eosin.eval.datasets_layouts`), none where the layout is another.
        images: how many are published.
        label: column of the shard set to be told.
        group: column that must not stand on both sides of a split.
        note: what a reader of its numbers has to know.
        mpp: µm/px of the published images where their makers state one.
        side: column of the official split, None where there is none.
        tile_size: px that the shorter side is scaled to, before the middle is cut; None where all are square and alike.
        scale: published px to a stored px.
        stain: of the tiles.
        masks: whether masks for a dense probe are written beside its shard set (:func:`masks_of`).
    """

    name: str
    about: str
    license: str
    get: str
    layout: str
    rows: Callable[[Path], pd.DataFrame]
    images: int
    label: str
    group: str
    note: str
    mpp: float | None = None
    side: str | None = None
    tile_size: int | None = None
    scale: int = 1
    stain: str = "H&E"
    masks: bool = False

    def find(self, folder: Path) -> pd.DataFrame:
        """A row an image: its path in ``folder``, label, and what else is known of it.

        Raises UserError, with what was expected and how to get it, where nothing of the set is there.
        """
        rows = self.rows(Path(folder))
        if rows.empty:
            what = "does not exist" if not Path(folder).exists() else f"does not hold {self.name}"
            raise UserError(f"{folder} {what}; expected {self.layout}. {self.get}")
        return rows


def prepare(name: str, folder: Path, out: Path) -> Path:
    """Pack the public set ``name`` at ``folder`` into the shard set ``out``; a finished one is left as it is.

    Raises UserError for an unknown name, another layout, or what :func:`~eosin.data_tools.pack.pack_images` refuses.
    """
    pack(name, folder, out)
    return Path(out)


def pack(name: str, folder: Path, out: Path) -> Summary:
    """As :func:`prepare`; returns what became of the images."""
    known = dataset(name)
    folder, out = Path(folder), Path(out)
    rows = known.find(folder)
    summary = _PACKERS.get(name, _pack_files)(known, folder, rows, out)
    short = known.images - len(rows)
    if short > 0:
        summary.notices.append(f"{len(rows)} of the {known.images} published images are here; {short} are missing")
    return summary


def masks_of(shards: Path) -> Path:
    """The folder of the masks of a packed public set that has some."""
    return shards.with_name(f"{shards.name}-masks")


def dataset(name: str) -> Dataset:
    """The set of that name. Raises UserError for an unknown one."""
    if name not in DATASETS:
        raise UserError(f"there is no public set '{name}'; {nearest(name, list(DATASETS))}")
    return DATASETS[name]


def listing() -> list[str]:
    """The sets as lines of text: a head, what its tiles are, and how to get it."""
    lines = []
    for known in DATASETS.values():
        mpp = f"{known.mpp:g} µm/px" if known.mpp else ""
        side = "official split" if known.side else ""
        head = f"{known.name:<18}{known.images:>9,} images   {mpp:<12} {side:<15} {known.license}"
        lines += [head, f"    {known.about}", f"    {known.get}", ""]
    return [*lines, "What its folder must hold, and what to know of its numbers: eosin eval data NAME"]


def description(name: str) -> list[str]:
    """One set as lines of text. Raises UserError for an unknown one."""
    known = dataset(name)
    side = f" --split fixed --side {known.side}" if known.side else ""
    return [
        f"{known.name}: {known.about}; {known.images:,} images",
        f"license: {known.license}",
        f"{known.get}.",
        f"FOLDER holds {known.layout}",
        f"pack it:  eosin eval data {known.name} FOLDER --out SHARDS",
        f"ask it:   eosin eval linear ... --label {known.label} --group {known.group}{side}",
        known.note,
    ]


def _pack_files(known: Dataset, folder: Path, rows: pd.DataFrame, out: Path) -> Summary:
    """Pack files by a manifest of what is known of them."""
    with tempfile.TemporaryDirectory() as temporary:
        manifest = Path(temporary) / "manifest.csv"
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(rows.columns)
            writer.writerows(rows.itertuples(index=False))
        return pack_images(
            folder,
            out,
            manifest=manifest,
            label=known.label,
            tile_size=known.tile_size,
            mpp=known.mpp and known.mpp * known.scale,
            stain=known.stain,
        )


def _pack_pannuke(known: Dataset, folder: Path, rows: pd.DataFrame, out: Path) -> Summary:
    images, masks = out.with_name(f"{out.name}-images"), masks_of(out)
    neoplastic = pannuke.export(folder, rows, images, masks)
    summary = _pack_files(known, images, rows.drop(columns="index").assign(neoplastic=neoplastic), out)
    summary.notices.append(f"masks of the nuclei's classes, called as the tiles' keys: {masks}")
    return summary


def _pack_pcam(known: Dataset, folder: Path, rows: pd.DataFrame, out: Path) -> Summary:
    """Pack arrays with their columns in a second file beside each, as PCam itself has its labels."""
    import h5py

    with tempfile.TemporaryDirectory() as temporary:
        given = []
        for path, part in rows.groupby("path", sort=False):
            columns = Path(temporary) / f"{str(path).removesuffix('x.h5')}y.h5"
            with h5py.File(columns, "w") as file:
                for column in part.columns.drop(["path", "index"]):
                    file.create_dataset(column, data=part[column].astype(object).tolist(), dtype=h5py.string_dtype())
            given += [folder / str(path), columns]
        return pack_images(given, out, label=known.label, mpp=known.mpp and known.mpp * known.scale, stain=known.stain)


_PACKERS: Mapping[str, Callable[[Dataset, Path, Any, Path], Summary]] = {"pannuke": _pack_pannuke, "pcam": _pack_pcam}

_SETS = (
    Dataset(
        name="crc100k",
        about=(
            "colorectal cancer and normal tissue, 9 classes; NCT-CRC-HE-100K to learn from, CRC-VAL-HE-7K to be scored"
        ),
        license="CC BY 4.0",
        get="Download NCT-CRC-HE-100K.zip and CRC-VAL-HE-7K.zip from https://zenodo.org/records/1214456 and unzip both",
        layout="NCT-CRC-HE-100K/<class>/*.tif and CRC-VAL-HE-7K/<class>/*.tif",
        rows=layouts.crc100k,
        images=107_180,
        label="label",
        group="slide",
        note=(
            "Patients are not published, so each image is its own slide here. The two sides are of different "
            "patients; folds within one side are not, and intervals over images are too narrow. NCT-CRC-HE-100K is "
            "color-normalized; where only NCT-CRC-HE-100K-NONORM is there, that is taken."
        ),
        mpp=0.5,
        side="split",
    ),
    Dataset(
        name="pcam",
        about="PatchCamelyon: lymph nodes, 96 px, tumor in the middle 32 px or not",
        license="CC0",
        get="Download all *_x.h5.gz, *_y.h5.gz and *_meta.csv from https://zenodo.org/records/2546921 and gunzip them",
        layout="camelyonpatch_level_2_split_{train,valid,test}_{x.h5,y.h5,meta.csv}",
        rows=layouts.pcam,
        images=327_680,
        label="label",
        group="slide",
        note=(
            "Slides are from the tables *_meta.csv, and a slide stands for its patient. Some images occur more than "
            "once. Two scanners at level 2 have about .9 and 1 µm/px, so none is stored."
        ),
        side="split",
    ),
    Dataset(
        name="breakhis",
        about="BreaKHis: breast tumors, benign and malignant, 8 types, each field at four magnifications",
        license="CC BY 4.0",
        get=(
            "Download BreaKHis_v1.tar.gz from "
            "https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/ and unpack it"
        ),
        layout=(
            "BreaKHis_v1/histology_slides/breast/{benign,malignant}/SOB/<type>/SOB_..._14-<number>/<40X..400X>/*.png"
        ),
        rows=layouts.breakhis,
        images=7_909,
        label="label",
        group="patient",
        note=(
            "Of 460 × 700 px the middle 460 px are kept. The patient is the case number without the letters behind "
            "it, which joins specimens of one case (22549AB, 22549CD). '40X' counts the eyepiece too and is a 4× "
            "objective: the column magnification is a name, and no µm/px is stored."
        ),
        tile_size=460,
    ),
    Dataset(
        name="bach",
        about="BACH (ICIAR 2018): breast, normal, benign, in situ and invasive",
        license="CC BY-NC-ND 4.0",
        get="Download ICIAR2018_BACH_Challenge.zip from https://zenodo.org/records/3632035 and unzip it",
        layout="ICIAR2018_BACH_Challenge/Photos/{Normal,Benign,InSitu,Invasive}/*.tif",
        rows=layouts.bach,
        images=400,
        label="label",
        group="slide",
        note=(
            "Of 2048 × 1536 px the middle 1536 px are kept, at half size (.84 µm/px). Patients are not in the archive, "
            "so each image is its own slide here and folds share patients; the challenge's page links a list of them, "
            "to be joined with --labels and a CSV of slide (n001), label and patient."
        ),
        mpp=0.42,
        tile_size=768,
        scale=2,
    ),
    Dataset(
        name="mhist",
        about="MHIST: colorectal polyps, hyperplastic (HP) or sessile serrated adenoma (SSA)",
        license="Dartmouth's Dataset Research Use Agreement",
        get="Ask for it at https://bmirds.github.io/MHIST/ and unzip images.zip beside annotations.csv",
        layout="annotations.csv and images/MHIST_*.png",
        rows=layouts.mhist,
        images=3_152,
        label="label",
        group="slide",
        note=(
            "Patients are not published, so each image is its own slide here and intervals over images are too "
            "narrow. votes_ssa says how many of 7 pathologists chose SSA. Sources disagree on µm/px, so none is "
            "stored."
        ),
        side="split",
    ),
    Dataset(
        name="tcga-ut",
        about="TCGA-UT: uniform tumor regions of 32 cancer types of TCGA, 256 px",
        license="CC BY-NC-SA 4.0",
        get="Download the archives of cancer types from https://zenodo.org/records/5889558 and unzip them",
        layout="<cancer type>/0/<TCGA barcode>/*.jpg",
        rows=layouts.tcga_ut,
        images=271_710,
        label="label",
        group="patient",
        note=(
            "Of its six resolutions the finest, 0, is taken. Many encoders were trained on TCGA: look at what they "
            "have seen."
        ),
        mpp=0.5,
    ),
    Dataset(
        name="pannuke",
        about="PanNuke: 19 tissues, 256 px, with masks of nuclei of 5 classes",
        license="CC BY-NC-SA 4.0",
        get="Download Fold 1, 2 and 3 from https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke and unzip them",
        layout="Fold 1/images/fold1/{images,types}.npy, Fold 1/masks/fold1/masks.npy, and so on",
        rows=pannuke.find,
        images=7_901,
        label="label",
        group="slide",
        note=(
            "The label is the tissue; neoplastic says whether any nucleus is. Patients are not published, so each "
            "image is its own slide here. split is the first of three official ones; --split leave-one-group-out "
            "--group fold scores all folds. Images and masks are written beside the shard set as PNGs."
        ),
        mpp=0.25,
        side="split",
        masks=True,
    ),
    Dataset(
        name="lc25000",
        about="LC25000: colon and lung, benign and cancer, 5 classes, all augmented copies of a few originals",
        license="free for research, no formal license",
        get="Download LC25000.zip as https://github.com/tampapath/lung_colon_image_set says and unzip it",
        layout=(
            "lung_colon_image_set/{colon,lung}_image_sets/<class>/*.jpeg, or manifest.csv with path, label, group and"
            " pseudo_slide"
        ),
        rows=layouts.lc25000,
        images=25_000,
        label="label",
        group="group",
        note=(
            "Each original has many augmented copies, and the archive does not say which: only with a manifest is "
            "there a column group, and without one no split is fair. µm/px is not published."
        ),
    ),
    Dataset(
        name="pbc",
        about="PBC: single cells of peripheral blood, 8 types, about 360 px",
        license="CC BY 4.0",
        get="Download PBC_dataset_normal_DIB.zip from https://data.mendeley.com/datasets/snkd93bnjr/1 and unzip it",
        layout="PBC_dataset_normal_DIB/<class>/*.jpg, or manifest.csv with path, label, subtype and id_block",
        rows=layouts.pbc,
        images=17_092,
        label="label",
        group="id_block",
        note=(
            "Smears are not published; blocks of a thousand image numbers (id_block) stand in for them. The middle "
            "360 px are kept. µm/px is not published."
        ),
        tile_size=360,
        stain="May-Grünwald-Giemsa",
    ),
    Dataset(
        name="camelyon17-wilds",
        about="Camelyon17 of WILDS: lymph nodes of five hospitals, 96 px, tumor in the middle 32 px or not",
        license="CC0",
        get="Download camelyon17_v1.0 as https://wilds.stanford.edu says (about 10 GB) and unpack it",
        layout="camelyon17_v1.0/metadata.csv and camelyon17_v1.0/patches/patient_<p>_node_<n>/*.png",
        rows=layouts.camelyon17_wilds,
        images=455_954,
        label="label",
        group="patient",
        note=(
            "split is the official one by hospital (column site): 2 is scored, and val holds hospital 1 and the "
            "images of the others that were put aside. The sides are of different patients, but for val."
        ),
        side="split",
    ),
    Dataset(
        name="kather2016",
        about="Kather 2016: textures of colorectal cancer, 8 classes, 150 px",
        license="CC BY 4.0",
        get="Download Kather_texture_2016_image_tiles_5000.zip from https://zenodo.org/records/53169 and unzip it",
        layout="Kather_texture_2016_image_tiles_5000/<01_TUMOR..08_EMPTY>/*.tif",
        rows=layouts.kather2016,
        images=5_000,
        label="label",
        group="patient",
        note=(
            "Slides, one a patient, are read from the file names (CRC-Prim-HE-01 to 10): with ten of them, give "
            "--folds 5 or fewer, and read intervals with care."
        ),
        mpp=0.495,
    ),
)
DATASETS: Mapping[str, Dataset] = {known.name: known for known in _SETS}
