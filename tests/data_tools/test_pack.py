"""Packing image folders: bytes kept, labels and groups kept, bad images listed, nothing outside the folder read."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, USER_ERROR, UserError
from eosin.data_tools.pack import pack_images, scale_to_tile
from eosin.data_tools.shards import ShardSet, slide_key
from eosin.launch.cli import main


def save(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **kwargs: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **kwargs)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of three JPEGs each."""
    for number in range(6):
        save(tmp_path / "images" / ("benign", "tumor")[number // 3] / f"t.{number}.jpg", seed=number)
    return tmp_path / "images"


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_jpegs_of_the_right_size_are_stored_byte_for_byte(folder, tmp_path):
    pack_images(folder, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    files = sorted(folder.rglob("*.jpg"))
    assert len(shards) == 6
    assert shards.tile_size == 64
    assert shards.mpp is None
    for number, file in enumerate(files):
        assert shards.image(number) == file.read_bytes()
        name = file.relative_to(folder).with_suffix("").as_posix()
        assert shards.meta(number) == {
            "key": slide_key(name),
            "slide": name,
            "label": file.parent.name,
            "x": 0,
            "y": 0,
            "mpp": None,
        }
    table = shards.table()
    assert table["label"].tolist() == ["benign"] * 3 + ["tumor"] * 3
    assert table["stain"].unique().tolist() == ["H&E"]


def test_manifest_keeps_every_column_and_groups(folder, tmp_path):
    rows = [
        {
            "path": file.relative_to(folder).as_posix(),
            "diagnosis": file.parent.name[0],
            "case": f"c{i % 2}",
            "patient": f"p{i % 2}",
            "n": str(i),
            "tiles": "9",
        }
        for i, file in enumerate(sorted(folder.rglob("*.jpg")))
    ]
    manifest = write_manifest(tmp_path / "m.csv", rows)
    pack_images(folder, tmp_path / "out", manifest=manifest, label="diagnosis", group="case", mpp=0.5, stain="none")
    shards = ShardSet(tmp_path / "out")
    metas = [shards.meta(i) for i in range(6)]
    assert [m["label"] for m in metas] == list("bbbttt")
    assert [m["slide"] for m in metas] == ["c0", "c1"] * 3
    assert [{k: m[k] for k in ("diagnosis", "case", "patient", "n", "tiles")} for m in metas] == [
        {k: row[k] for k in ("diagnosis", "case", "patient", "n", "tiles")} for row in rows
    ]
    slides = shards.slides()
    assert slides["slide"].tolist() == ["c0", "c1"]
    assert slides["patient"].tolist() == ["p0", "p1"]
    assert slides["tiles"].tolist() == [3, 3]
    assert slides["given_tiles"].tolist() == ["9", "9"]
    assert slides["stain"].tolist() == ["none", "none"]
    assert "diagnosis" not in slides  # not the same for all images of a slide
    assert (slides["mpp"] == 0.5).all()
    assert shards.column("slide").tolist() == [0, 1] * 3
    assert shards.column("mpp").tolist() == [0.5] * 6


def test_same_bytes_twice(folder, tmp_path):
    for name in ("a/s", "b/s"):
        pack_images(folder, tmp_path / name, tile_size=32)
    for file in (tmp_path / "a" / "s").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "s" / file.name).read_bytes()


def test_other_sizes_need_a_tile_size(folder, tmp_path):
    save(folder / "tumor" / "wide.jpg", (100, 64))
    with pytest.raises(UserError, match=r"64 x 64 \(6\), 100 x 64 \(1\); give --tile-size"):
        pack_images(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    pack_images(folder, tmp_path / "out", tile_size=64)
    shards = ShardSet(tmp_path / "out")
    assert {Image.open(io.BytesIO(shards.image(i))).size for i in range(7)} == {(64, 64)}
    assert shards.image(0) == sorted(folder.rglob("*.jpg"))[0].read_bytes()


def test_different_sizes_are_said_before_all_is_read(folder, tmp_path, monkeypatch):
    save(folder / "benign" / "a.jpg", (100, 64))
    (folder / "tumor" / "z.jpg").write_bytes(b"x")
    monkeypatch.setattr("eosin.data_tools.pack.ENOUGH_SIZES", 3)
    with pytest.raises(UserError, match=r"64 x 64 \(2\), 100 x 64 \(1\); give --tile-size"):
        pack_images(folder, tmp_path / "out")


def test_single_oblong_size_needs_a_tile_size_too(tmp_path):
    save(tmp_path / "images" / "a.png", (80, 64))
    with pytest.raises(UserError, match="80 x 64"):
        pack_images(tmp_path / "images", tmp_path / "out")


def test_scaling_is_antialiased_and_central():
    stripes = np.zeros((300, 400, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can hold
    scaled = scale_to_tile(stripes, 100)
    assert scaled.shape == (100, 100, 3)
    assert np.abs(scaled.astype(int) - 127).max() < 45
    ramp = np.repeat(np.linspace(0, 255, 400)[None], 300, 0).round().astype(np.uint8)
    scaled = scale_to_tile(np.repeat(ramp[..., None], 3, 2), 150)
    assert scaled[0, [0, -1], 0] == pytest.approx([255 * 50 / 400, 255 * 350 / 400], abs=1.5)


def test_png_rgb_is_kept_and_rgba_is_composited(tmp_path):
    rgb = save(tmp_path / "images" / "a.png")
    rgba = np.zeros((64, 64, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "images" / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "images" / "c.jpg", exif=exif)
    pack_images(tmp_path / "images", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert shards.image(0) == rgb.read_bytes()
    assert np.asarray(Image.open(io.BytesIO(shards.image(1)))).min() == 255
    turned = np.asarray(Image.open(io.BytesIO(shards.image(2)))).astype(int)
    assert np.abs(turned - np.asarray(Image.open(tmp_path / "images" / "c.jpg"))[::-1, ::-1]).mean() < 3


def test_bad_images_are_listed(folder, tmp_path, capsys):
    (folder / "tumor" / "zero.jpg").touch()
    data = (folder / "tumor" / "t.3.jpg").read_bytes()
    (folder / "tumor" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "tumor" / "text.png").write_text("no")
    assert main(["pack", str(folder), "--out", str(tmp_path / "out")]) == DONE_WITH_REFUSALS
    said = capsys.readouterr().out
    assert "tumor/zero.jpg: an empty file" in said
    assert "tumor/cut.jpg: not readable as an image" in said
    listed = pd.read_csv(tmp_path / "out" / "refused.csv")
    assert listed["path"].tolist() == ["tumor/cut.jpg", "tumor/text.png", "tumor/zero.jpg"]
    slides = ShardSet(tmp_path / "out").slides().set_index("slide")
    assert len(ShardSet(tmp_path / "out")) == 6
    assert (slides["state"] == "refused").sum() == 3
    assert slides.loc["tumor/zero", "dropped_refused"] == 1
    assert main(["pack", str(folder), "--out", str(tmp_path / "out")]) == DONE_WITH_REFUSALS
    again = capsys.readouterr().out
    assert "nothing to do" in again
    assert again[again.index("refused: 3") :] == said[said.index("refused: 3") :]


def test_mostly_bad_is_an_error(tmp_path):
    for number in range(30):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"x")
    save(tmp_path / "images" / "good.jpg")
    with pytest.raises(
        UserError, match=r"30 of 31 images .* cannot be used, so nothing was written; 0.jpg: not readable"
    ):
        pack_images(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("../secret.jpg", "must be relative and stay inside"),
        ("/etc/passwd", "must be relative and stay inside"),
        ("a/../../secret.jpg", "must be relative and stay inside"),
        ("C:\\secret.jpg", "must be relative and stay inside"),
        ("", "must be relative and stay inside"),
    ],
)
def test_manifest_never_leaves_the_folder(folder, tmp_path, path, said):
    save(tmp_path / "secret.jpg")
    manifest = write_manifest(tmp_path / "m.csv", [{"path": path, "label": "x"}])
    with pytest.raises(UserError, match=f"line 2: path .* {said}"):
        pack_images(folder, tmp_path / "out", manifest=manifest)


def test_manifest_mistakes(folder, tmp_path, capsys):
    good = {"path": "tumor/t.3.jpg", "label": "x"}
    for rows, options, said in (
        ([{"file": "a"}], {}, "has no column 'path'"),
        ([good], {"label": "lable"}, "has no column 'lable' (--label); did you mean 'label'?"),
        ([good], {"group": "slide"}, "has no column 'slide' (--group)"),
        ([good | {"x": "1"}], {}, "a column 'x', which the tile itself owns"),
        ([good, good], {}, "lists tumor/t.3.jpg twice"),
    ):
        manifest = write_manifest(tmp_path / "m.csv", rows)
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command = ["pack", str(folder), "--out", str(tmp_path / "out"), "--manifest", str(manifest), *arguments]
        assert main(command) == USER_ERROR
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    manifest = write_manifest(tmp_path / "m.csv", [good, good | {"path": "tumor/gone.jpg"}])
    summary = pack_images(folder, tmp_path / "out", manifest=manifest)
    assert summary.refused == [("tumor/gone.jpg", "no such file")]


def test_manifest_with_a_slide_column(folder, tmp_path):
    rows = [{"path": f"tumor/t.{i}.jpg", "slide": "TCGA-1.x"} for i in (3, 4)]
    pack_images(folder, tmp_path / "out", manifest=write_manifest(tmp_path / "m.csv", rows))
    assert ShardSet(tmp_path / "out").slides()["slide"].tolist() == ["TCGA-1.x"]


def test_folder_mistakes(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, options, said in (
        (tmp_path / "gone", {}, "is not a folder"),
        (tmp_path / "empty", {}, "holds no image"),
        (folder, {"tile_size": 3}, "--tile-size 3"),
        (folder, {"mpp": 100.0}, "--mpp 100.0"),
        (folder, {"label": "diagnosis"}, "names a column of a manifest"),
    ):
        with pytest.raises(UserError, match=said):
            pack_images(path, tmp_path / "out", **options)


def test_a_shard_set_is_not_packed_for_its_pictures(folder, tmp_path):
    pack_images(folder, tmp_path / "set")
    save(tmp_path / "set" / "qc" / "a.png")
    with pytest.raises(UserError, match="set is a shard set already"):
        pack_images(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_differ_only_in_their_ending(tmp_path):
    save(tmp_path / "images" / "a.jpg")
    save(tmp_path / "images" / "a.png")
    pack_images(tmp_path / "images", tmp_path / "out")
    keys = [ShardSet(tmp_path / "out").meta(i)["key"] for i in range(2)]
    assert keys == ["a=2ejpg", "a=2epng"]


def test_second_run_does_nothing(folder, tmp_path, capsys):
    command = ["pack", str(folder), "--out", str(tmp_path / "out")]
    assert main(command) == DONE
    before = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    assert main(command) == DONE
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == before
    save(folder / "tumor" / "new.jpg")
    assert main(command) == USER_ERROR
    shutil.rmtree(tmp_path / "out")
    assert main(command) == DONE


@pytest.mark.slow
def test_real_folders(real_data, tmp_path):
    tiles = real_data / "lc25000_224"
    pack_images(tiles, tmp_path / "lc", manifest=tiles / "manifest.csv", label="label", group="pseudo_slide")
    manifest = pd.read_csv(tiles / "manifest.csv", dtype=str)
    shards = ShardSet(tmp_path / "lc")
    table = shards.table()
    for column in manifest.columns.drop("path"):
        assert table[column].tolist() == manifest[column].tolist()
    assert len(shards.slides()) == manifest["pseudo_slide"].nunique()
    for number in (0, 1000, 2089):
        assert shards.image(number) == (tiles / manifest["path"][number]).read_bytes()
    cells = real_data / "pbc_blood"
    pack_images(
        cells,
        tmp_path / "pbc",
        manifest=cells / "manifest.csv",
        label="label",
        group="id_block",
        tile_size=224,
        stain="Giemsa",
    )
    assert len(ShardSet(tmp_path / "pbc")) == 1200
