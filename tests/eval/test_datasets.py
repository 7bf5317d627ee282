import csv
from collections import Counter

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.eval.annotations import open_annotations
from eosin.eval.datasets import DATASETS, pack, prepare
from eosin.eval.datasets_pannuke import CLASSES, class_map


def image(path, width=64, height=64, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(path.name)) % 1000)
    pixels = rng.integers(0, 256, (height, width, 3)) if value is None else np.full((height, width, 3), value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def table(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def packed(name, folder, tmp_path):
    shards = ShardSet(prepare(name, folder, tmp_path / "shards"))
    return shards, shards.table()


def test_crc100k_learns_from_one_folder_and_scores_the_other(tmp_path):
    for part, count in (("NCT-CRC-HE-100K", 3), ("CRC-VAL-HE-7K", 2)):
        for label in ("ADI", "TUM"):
            for i in range(count):
                image(tmp_path / "in" / part / label / f"{label}-{part[:3]}{i}.tif", 224, 224)
    shards, rows = packed("crc100k", tmp_path / "in", tmp_path)
    assert Counter(zip(rows.label, rows.split)) == {
        ("ADI", "train"): 3,
        ("TUM", "train"): 3,
        ("ADI", "test"): 2,
        ("TUM", "test"): 2,
    }
    assert rows.slide.nunique() == 10  # no patient is known, so no image is joined with another
    assert shards.mpp == 0.5


def test_pcam_joins_arrays_labels_and_slides(tmp_path):
    rng = np.random.default_rng(0)
    truth = {}
    for split, side in (("train", "train"), ("valid", "val"), ("test", "test")):
        stem = f"camelyonpatch_level_2_split_{split}"
        labels = rng.integers(0, 2, 4)
        colors = rng.integers(0, 256, (4, 1, 1, 3), dtype=np.uint8)
        with h5py.File(tmp_path / f"{stem}_x.h5", "w") as file:
            file["x"] = np.broadcast_to(colors, (4, 96, 96, 3))
        with h5py.File(tmp_path / f"{stem}_y.h5", "w") as file:
            file["y"] = labels.reshape(4, 1, 1, 1)
        slides = [f"{split}_{i // 2}" for i in range(4)]
        table(tmp_path / f"{stem}_meta.csv", ["", "coord_y", "wsi"], [[i, 5, s] for i, s in enumerate(slides)])
        for i in range(4):
            truth[tuple(colors[i, 0, 0])] = (("normal", "tumor")[labels[i]], slides[i], side)
    shards, rows = packed("pcam", tmp_path, tmp_path)
    assert len(rows) == 12
    assert shards.tile_size == 96
    for tile, row in rows.iterrows():
        color = decode(shards.image(tile))[48, 48].astype(int)
        nearest = min(truth, key=lambda c: np.abs(color - c).sum())
        assert truth[nearest] == (row.label, row.slide, row.split)
    first = (tmp_path / "shards" / "dataset.json").stat().st_mtime_ns
    prepare("pcam", tmp_path, tmp_path / "shards")
    assert (tmp_path / "shards" / "dataset.json").stat().st_mtime_ns == first


def test_pcam_refuses_what_is_compressed_cut_or_incomplete(tmp_path):
    stem = tmp_path / "camelyonpatch_level_2_split_test_"
    (tmp_path / f"{stem.name}x.h5.gz").write_bytes(b"")
    with pytest.raises(UserError, match="gunzip"):
        DATASETS["pcam"].find(tmp_path)
    with h5py.File(f"{stem}x.h5", "w") as file:
        file["x"] = np.zeros((4, 96, 96, 3), np.uint8)
    with h5py.File(f"{stem}y.h5", "w") as file:
        file["y"] = np.zeros((3, 1, 1, 1), np.uint8)
    with pytest.raises(UserError, match=r"_meta.csv is missing"):
        DATASETS["pcam"].find(tmp_path)
    table(tmp_path / f"{stem.name}meta.csv", ["", "wsi"], [[i, "a"] for i in range(4)])
    with pytest.raises(UserError, match="4 images, 3 labels and 4 rows"):
        DATASETS["pcam"].find(tmp_path)


def test_breakhis_joins_specimens_of_a_case_and_infers_no_scale(tmp_path):
    root = tmp_path / "BreaKHis_v1" / "histology_slides" / "breast"
    for label, kind, code, slide in (
        ("benign", "adenosis", "B_A", "14-22549AB"),
        ("benign", "adenosis", "B_A", "14-22549CD"),
        ("malignant", "ductal_carcinoma", "M_DC", "14-10926"),
    ):
        for magnification in (40, 400):
            name = f"SOB_{code}-{slide}-{magnification}-001.png"
            image(root / label / "SOB" / kind / f"SOB_{code}_{slide}" / f"{magnification}X" / name, 700, 460)
    shards, rows = packed("breakhis", tmp_path, tmp_path)
    assert Counter(zip(rows.label, rows.type, rows.patient)) == {
        ("benign", "adenosis", "22549"): 4,
        ("malignant", "ductal_carcinoma", "10926"): 2,
    }
    assert rows.slide.nunique() == 3
    assert set(rows.magnification) == {"40X", "400X"}
    assert shards.mpp is None
    assert shards.tile_size == 460


def test_bach_keeps_the_middle_at_half_size(tmp_path):
    for label in ("Normal", "Benign", "InSitu", "Invasive"):
        image(tmp_path / "Photos" / label / f"{label}001.tif", 2048, 1536, value=90)
    image(tmp_path / "Photos" / "Thumbs" / "x.tif", 64, 64)
    shards, rows = packed("bach", tmp_path, tmp_path)
    assert sorted(rows.label) == ["Benign", "InSitu", "Invasive", "Normal"]
    assert (shards.tile_size, shards.mpp) == (768, 0.84)
    assert set(rows.slide) == {"Normal001", "Benign001", "InSitu001", "Invasive001"}


def test_mhist_takes_label_and_side_from_its_table_and_lists_what_is_missing(tmp_path):
    for name in "abc":
        image(tmp_path / "images" / f"MHIST_{name}.png")
    header = ["Image Name", "Majority Vote Label"]
    header += ["Number of Annotators who Selected SSA (Out of 7)", "Partition"]
    rows = [["a", "SSA", 6, "train"], ["b", "HP", 2, "test"], ["c", "SSA", 4, "test"], ["d", "HP", 0, "train"]]
    table(tmp_path / "annotations.csv", header, [[f"MHIST_{r[0]}.png", *r[1:]] for r in rows])
    summary = pack("mhist", tmp_path, tmp_path / "shards")
    found = ShardSet(tmp_path / "shards").table().sort_values("slide")
    assert list(found.slide) == ["images/MHIST_a", "images/MHIST_b", "images/MHIST_c"]
    assert list(found.label) == ["SSA", "HP", "SSA"]
    assert list(found.split) == ["train", "test", "test"]
    assert summary.refused == [("images/MHIST_d.png", "no such file")]
    assert "4 of the 3152 published images are here" in str(summary)


def test_tcga_ut_groups_by_patient_at_the_finest_resolution(tmp_path):
    for resolution in "015":
        image(tmp_path / "Breast_invasive_carcinoma" / resolution / "TCGA-E2-A1L9-01Z-00-DX1" / "2_2_516.jpg")
        image(tmp_path / "Uterine_Carcinosarcoma" / resolution / "TCGA-N8-A4PN-01Z-00-DX2" / "2_3_521.jpg")
    _, rows = packed("tcga-ut", tmp_path, tmp_path)
    assert dict(zip(rows.patient, rows.label)) == {
        "TCGA-E2-A1L9": "Breast_invasive_carcinoma",
        "TCGA-N8-A4PN": "Uterine_Carcinosarcoma",
    }
    assert len(rows) == 2
    assert set(rows.site) == {"TCGA-E2", "TCGA-N8"}


def test_pannuke_gives_tiles_and_masks_of_one_name(tmp_path):
    rng = np.random.default_rng(0)
    nuclei = np.zeros((3, 2, 64, 64, 6))
    nuclei[0, 1, 10:20, 10:20, 0] = 7  # fold 1, image 1: a neoplastic nucleus
    nuclei[0, 1, 15:30, 10:20, 4] = 8  # an epithelial one under it
    pixels = rng.integers(0, 256, (3, 2, 64, 64, 3)).astype(np.float64)
    for fold in (1, 2, 3):
        for kind, arrays in (("images", {"images": pixels, "types": None}), ("masks", {"masks": nuclei})):
            folder = tmp_path / f"Fold {fold}" / kind / f"fold{fold}"
            folder.mkdir(parents=True)
            for name, values in arrays.items():
                array = np.array(["Breast", "Colon"]) if values is None else values[fold - 1]
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
    shards, rows = packed("pannuke", tmp_path, tmp_path)
    assert Counter(zip(rows.fold, rows.split)) == {("1", "train"): 2, ("2", "val"): 2, ("3", "test"): 2}
    assert Counter(rows.label) == {"Breast": 3, "Colon": 3}
    assert dict(zip(rows.key, rows.neoplastic))["fold1_0001"] == "yes"
    assert Counter(rows.neoplastic) == {"yes": 1, "no": 5}
    tile = int(np.flatnonzero(rows.key == "fold2_0001")[0])
    assert np.array_equal(decode(shards.image(tile)), pixels[1, 1])
    mask = cv2.imread(str(tmp_path / "shards-masks" / "fold1_0001.png"), cv2.IMREAD_UNCHANGED)
    assert (mask[10:20, 10:20] == 1).all()
    assert (mask[20:30, 10:20] == 5).all()
    assert np.count_nonzero(mask) == 200
    annotations, notices = open_annotations(tmp_path / "shards-masks", rows)  # as the dense probe reads them
    assert notices == []
    assert annotations.classes == list(CLASSES)
    assert np.array_equal(annotations.mask(int(np.flatnonzero(rows.key == "fold1_0001")[0]), 64), mask)
    assert {path.stem for path in (tmp_path / "shards-masks").glob("*.png")} == set(rows.key)
    (tmp_path / "shards-images" / "fold3_0000.png").unlink()
    prepare("pannuke", tmp_path, tmp_path / "shards")  # writes what is missing again, and packs nothing
    with pytest.raises(UserError, match=r"no masks\.npy of fold 2"):
        (tmp_path / "Fold 2" / "masks" / "fold2" / "masks.npy").unlink()
        DATASETS["pannuke"].find(tmp_path)


def test_pannuke_never_unpickles(tmp_path):
    folder = tmp_path / "fold1"
    folder.mkdir()
    for name in ("images", "masks", "types"):
        np.save(folder / f"{name}.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="not readable as a plain array"):
        DATASETS["pannuke"].find(tmp_path)


def test_masks_hold_the_first_class_where_nuclei_overlap():
    nuclei = np.zeros((1, 4, 6))
    nuclei[0, 1, [1, 3]] = 3
    nuclei[0, 2, 4] = 1
    nuclei[0, 3, 5] = 1  # the background's own channel
    assert class_map(nuclei).tolist() == [[0, 2, 5, 0]]


def test_camelyon17_is_split_by_hospital(tmp_path):
    root = tmp_path / "camelyon17_v1.0"
    rows = []
    for i, (center, split) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (4, 0)]):
        node = f"patient_{i:03d}_node_2"
        image(root / "patches" / node / f"patch_{node}_x_96_y_{i}.png", 96, 96)
        rows.append([i, f"{i:03d}", 2, 96, i, i % 2, i, center, split])
    header = ["", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    root.mkdir(exist_ok=True)
    table(root / "metadata.csv", header, rows)
    _, found = packed("camelyon17-wilds", tmp_path, tmp_path)
    found = found.sort_values("patient")
    assert list(found.split) == ["train", "val", "val", "test", "test", "train"]
    assert list(found.label) == ["normal", "tumor"] * 3
    assert list(found.site) == ["0", "0", "1", "2", "2", "4"]


def test_kather2016_reads_slides_from_names(tmp_path):
    for label, slide in (("01_TUMOR", "02"), ("02_STROMA", "02"), ("08_EMPTY", "10")):
        image(tmp_path / label / f"10009_CRC-Prim-HE-{slide}_009.tif_Row_301_Col_151.tif", 150, 150)
    _, rows = packed("kather2016", tmp_path, tmp_path)
    assert sorted(zip(rows.label, rows.patient)) == [
        ("EMPTY", "CRC-Prim-HE-10"),
        ("STROMA", "CRC-Prim-HE-02"),
        ("TUMOR", "CRC-Prim-HE-02"),
    ]


def test_lc25000_has_no_group_without_a_manifest(tmp_path):
    for organ, label in (("colon", "colon_n"), ("lung", "lung_scc")):
        image(tmp_path / "lung_colon_image_set" / f"{organ}_image_sets" / label / f"{label}1.jpeg")
    _, rows = packed("lc25000", tmp_path, tmp_path)
    assert sorted(rows.label) == ["colon_n", "lung_scc"]
    assert "group" not in rows


def test_pbc_makes_blocks_of_image_numbers(tmp_path):
    for label, name in (("basophil", "BA_147282"), ("basophil", "BA_147981"), ("platelet", "PLATELET_580")):
        image(tmp_path / "PBC_dataset_normal_DIB" / label / f"{name}.jpg", 360, 363)
    shards, rows = packed("pbc", tmp_path, tmp_path)
    assert sorted(zip(rows.label, rows.subtype, rows.id_block)) == [
        ("basophil", "BA", "147"),
        ("basophil", "BA", "147"),
        ("platelet", "PLATELET", "0"),
    ]
    assert shards.tile_size == 360
    assert set(rows.stain) == {"May-Grünwald-Giemsa"}


def test_real_sets_hold_what_their_manifests_say(real_data):
    for name, folder, count in (("lc25000", "lc25000_224", 2090), ("pbc", "pbc_blood", 1200)):
        with (real_data / folder / "manifest.csv").open() as file:
            truth = Counter((row["label"], row.get("group") or row["id_block"]) for row in csv.DictReader(file))
        known = DATASETS[name]
        rows = known.find(real_data / folder)
        assert len(rows) == count
        assert Counter(zip(rows[known.label], rows[known.group])) == truth


def test_blocks_of_real_blood_cells_follow_from_their_names(real_data, tmp_path):
    truth = DATASETS["pbc"].find(real_data / "pbc_blood")
    for path in truth.path:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    found = DATASETS["pbc"].find(tmp_path).set_index("path").loc[truth.path]
    assert list(found.id_block) == list(truth.id_block)
    assert list(found.subtype) == list(truth.subtype)


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_of_something_else_is_refused_with_the_way_to_get_it(name, tmp_path):
    (tmp_path / "in").mkdir()
    image(tmp_path / "in" / "cat.png")
    for folder in (tmp_path / "in", tmp_path / "absent"):
        with pytest.raises(UserError, match="https://") as refusal:
            prepare(name, folder, tmp_path / "shards")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "shards").exists()


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError, match="no public set 'crc'"):
        prepare("crc", "in", "out")
