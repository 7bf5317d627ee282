"""Tiling against exhaustive geometry, a second process, killed processes and broken inputs."""

import errno
import io
import json
import os
import subprocess
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from eosin.data_tools import tile as tile_module
from eosin.data_tools import tile_slide as tile_slide_module
from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, USER_ERROR, UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.slide import Slide
from eosin.data_tools.tile import tile_slides
from eosin.data_tools.tile_slide import judge
from eosin.data_tools.tissue import Thresholds
from eosin.launch.cli import main


@pytest.fixture
def slides(section, pyramid, tmp_path):
    """Three good slides at 0.5 µm/px of different sizes."""
    folder = tmp_path / "slides"
    (folder / "more").mkdir(parents=True)
    pyramid(folder / "b.1.tif", section(1201, 1103), 0.5, [(601, 552)])
    pyramid(folder / "a.tif", section(900, 700), 0.5)
    pyramid(folder / "more" / "c.tif", section(1000, 900), 0.25)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tiles_are_where_they_say_and_hold_what_the_slide_shows(section, pyramid, tmp_path):
    image = section(1201, 1103)
    path = pyramid(tmp_path / "a.tif", image, 0.5)
    tile_slides([path], tmp_path / "out", mpp=0.5, tile_size=128, quality=95)
    shards = ShardSet(tmp_path / "out")
    truth = ((np.mgrid[0:1103, 0:1201] - np.array([1103, 1201])[:, None, None] / 2) ** 2).astype(float)
    inside = truth[1] / (0.4 * 1201) ** 2 + truth[0] / (0.4 * 1103) ** 2 < 1
    seen = set()
    for number in range(len(shards)):
        meta = shards.meta(number)
        x, y = meta["x"], meta["y"]
        seen.add((x, y))
        pixels = simplejpeg.decode_jpeg(shards.image(number))
        assert np.abs(pixels.astype(int) - image[y : y + 128, x : x + 128]).mean() < 2
        assert meta["tissue"] == pytest.approx(inside[y : y + 128, x : x + 128].mean(), abs=0.1)
        assert meta["key"] == f"a_{x}_{y}_500"
    shares = {
        (x, y): inside[y : y + 128, x : x + 128].mean()
        for x in range(0, 1201 - 127, 128)
        for y in range(0, 1103 - 127, 128)
    }
    assert len(seen) == len(shards)
    assert {place for place, share in shares.items() if share > 0.6} <= seen
    assert seen <= {place for place, share in shares.items() if share > 0.4}


def test_bytes_do_not_depend_on_workers(slides, tmp_path):
    (tmp_path / "table.csv").write_text("path,label\nslides/a.tif,x\nslides/b.1.tif,y\nslides/more/c.tif,z\n")
    for name, workers in (("one/s", 1), ("three/s", 3)):
        tile_slides([slides], tmp_path / name, tile_size=128, workers=workers, slides_csv=tmp_path / "table.csv")
    one, three = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "three")
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []
    assert len([name for name in one if name.startswith("s/qc/")]) == 3


def test_slides_table(slides, tmp_path):
    (tmp_path / "t.csv").write_text(
        "path,slide,patient,site,stain,scanner,mpp,tiles,age\n"
        "slides/a.tif,A1,P1,S1,,scan,,7,61\n"
        "c.tif,C1,P2,,IHC,scan,0.26,8,\n"
        "slides/gone.svs,G1,P3,S2,,scan,,9,50\n"
    )
    summary = tile_slides([slides], tmp_path / "out", tile_size=128, slides_csv=tmp_path / "t.csv", workers=1)
    table = ShardSet(tmp_path / "out").slides().set_index("slide")
    assert list(table.index) == ["A1", "C1", "G1", "b.1"]
    counts = np.bincount(ShardSet(tmp_path / "out").column("slide"), minlength=4)
    assert counts.tolist() == table["tiles"].tolist()
    table = table.loc[["A1", "b.1", "C1", "G1"]]
    assert table["source"].tolist() == ["a.tif", "b.1.tif", "c.tif", "slides/gone.svs"]
    assert table["patient"].tolist() == ["P1", "b.1", "P2", "P3"]
    assert table["stain"].tolist() == ["H&E", "H&E", "IHC", "H&E"]
    assert table["mpp"].iloc[:3].tolist() == pytest.approx([0.5, 0.5, 0.26])
    assert table["mpp_source"].tolist() == ["tiff tag", "tiff tag", "override", ""]
    assert table.loc["A1", ["width", "height", "vendor"]].tolist() == [900, 700, "generic-tiff"]
    assert table.loc["A1", ["scanner", "age", "given_tiles"]].tolist() == ["scan", "61", "7"]
    assert table["state"].tolist() == ["done", "done", "done", "refused"]
    assert summary.refused == [("slides/gone.svs", "listed in the table, but no such file was given")]
    assert "b.1.tif" in summary.notices[0]
    ellipse = np.pi * 0.4 * 900 * 0.4 * 700 * 0.25e-6
    assert table.loc["A1", "tissue_mm2"] == pytest.approx(ellipse, rel=0.08)
    dropped = [column for column in table if column.startswith("dropped_")]
    totals = table[["tiles", *dropped]].sum(axis=1)
    assert totals.tolist() == [7 * 5, 9 * 8, int(1000 * 0.52 / 128) * int(900 * 0.52 / 128), 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,label\na,x\n", "has no column 'path' or 'slide'"),
        ("path,mpp\na.tif,half\n", "line 2: mpp 'half' is not a number"),
        ("path,mpp\na.tif,352\n", "line 2: mpp 352 is outside"),
        ("path\na.tif\nslides/a.tif\n", "lines 2 and 3 are both about"),
        ("path,slide\na.tif,same\nc.tif,same\n", "the slide name 'same' twice"),
        ("", "lists no slide; give a header with 'path' or 'slide'"),
    ],
)
def test_tables_that_make_no_sense(slides, tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        tile_slides([slides], tmp_path / "out", slides_csv=tmp_path / "t.csv")
    assert not (tmp_path / "out").exists()


def test_max_tiles_draws_by_seed(slides, tmp_path):
    def places(seed: int) -> list[tuple[int, int]]:
        out = tmp_path / f"seed{seed}"
        tile_slides([slides / "b.1.tif"], out, tile_size=128, max_tiles=9, seed=seed, mix=0)
        shards = ShardSet(out)
        row = shards.slides().iloc[0]
        assert row["tiles"] == 9
        assert row["dropped_limit"] == everything - 9
        return list(zip(shards.column("y").tolist(), shards.column("x").tolist()))

    tile_slides([slides / "b.1.tif"], tmp_path / "all", tile_size=128)
    everything = len(ShardSet(tmp_path / "all"))
    first, second = places(1), places(2)
    assert first == sorted(first)
    assert first != second


def test_blank_and_blurred_tiles_are_judged(section):
    tile = section(1201, 1103)[400:656, 500:756]
    assert judge(tile, Thresholds()) is None
    assert judge(cv2.GaussianBlur(tile, (0, 0), 8), Thresholds()) == "blur"
    assert judge(np.full((256, 256, 3), 200, np.uint8), Thresholds()) == "blank"


def test_bad_slides_among_good_ones(slides, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (slides / "zero.svs").touch()
    (slides / "noise.ndpi").write_bytes(rng.bytes(5000))
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(slides / "x.png")
    (slides / "x.png").rename(slides / "picture.svs")
    good = (slides / "a.tif").read_bytes()
    (slides / "cut.tif").write_bytes(good[: len(good) // 2])
    glow = (cv2.GaussianBlur(rng.standard_normal((900, 900)), (0, 0), 6) > 0.1) * np.uint8(255)
    dark = np.stack([0 * glow, 0 * glow, glow], axis=-1)
    import tifffile

    tag = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(slides / "dapi.tif", dark, tile=(256, 256), photometric="rgb", metadata=None, **tag)
    tifffile.imwrite(slides / "nompp.tif", dark, tile=(256, 256), photometric="rgb", metadata=None)
    tag["resolution"] = (1000, 1000)
    tifffile.imwrite(slides / "coarse.tif", dark, tile=(256, 256), photometric="rgb", metadata=None, **tag)
    tag["resolution"] = (20000, 20000)
    glass = np.full((900, 900, 3), 240, np.uint8)
    tifffile.imwrite(slides / "glass.tif", glass, tile=(256, 256), photometric="rgb", metadata=None, **tag)
    tifffile.imwrite(slides / "tiny.tif", glass[:100], tile=(256, 256), photometric="rgb", metadata=None, **tag)
    code = main(["tile", str(slides), "--out", str(tmp_path / "out"), "--tile-size", "128", "--workers", "1"])
    said = capsys.readouterr().out
    assert code == DONE_WITH_REFUSALS
    assert "from 3 of 12 slides" in said
    for name, reason in (
        ("zero.svs", "an empty file"),
        ("noise.ndpi", "not a slide of a known format"),
        ("picture.svs", "a PNG image named .svs"),
        ("dapi.tif", "as in fluorescence"),
        ("nompp.tif", "no resolution (µm/px) in the file; give --mpp-override"),
        ("coarse.tif", "the finest level is 10 µm/px, coarser than the asked 0.5"),
        ("glass.tif", "no tile is at least 50% tissue"),
        ("tiny.tif", "smaller than a tile"),
    ):
        assert f"  {name}: " in said
        assert reason in said.split(f"  {name}: ")[1].splitlines()[0]
    shards = ShardSet(tmp_path / "out")
    table = shards.slides().set_index("slide")
    assert table.loc[["a", "b.1", "c"], "state"].tolist() == ["done"] * 3
    assert (table["state"] == "refused").sum() == 9
    assert table.loc["dapi", "reason"].startswith("dark background")
    assert table.loc["cut", "state"] == "refused"


def test_damaged_part_of_a_slide(section, tmp_path):
    """One bad tile in many is dropped and counted; many refuse the slide."""
    import tifffile

    image = np.tile(section(1024, 1024), (2, 2, 1))
    for name, broken in (("one", 1), ("many", 36)):
        tiles = [
            simplejpeg.encode_jpeg(np.ascontiguousarray(image[y : y + 64, x : x + 64]), 95)
            for y in range(0, 2048, 64)
            for x in range(0, 2048, 64)
        ]
        for number in range(broken):
            tiles[32 * (7 + number // 6) + 5 + number % 6] = b"\xff\xd8" + bytes(500)
        tag = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
        common = {"photometric": "rgb", "metadata": None}
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tiff:
            tiff.write(
                iter(tiles), shape=image.shape, dtype=np.uint8, tile=(64, 64), compression="jpeg", **common, **tag
            )
            for side in (1024, 512):
                coarse = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
                tiff.write(coarse, tile=(64, 64), subfiletype=1, **common)
    summary = tile_slides(
        [tmp_path / "one.tif", tmp_path / "many.tif"], tmp_path / "out", tile_size=64, quality=95, workers=1
    )
    table = ShardSet(tmp_path / "out").slides().set_index("slide")
    assert table.loc["one", ["dropped_unreadable", "state"]].tolist() == [1, "done"]
    assert summary.refused[0][0] == "many.tif"
    assert "damaged: 36 of" in summary.refused[0][1]
    assert (320, 448) not in set(zip(*(ShardSet(tmp_path / "out").column(axis).tolist() for axis in "xy")))


def test_nothing_usable_leaves_nothing(tmp_path, capsys):
    (tmp_path / "zero.svs").touch()
    assert main(["tile", str(tmp_path), "--out", str(tmp_path / "out")]) == USER_ERROR
    error = capsys.readouterr().err
    assert "no slide gave a tile" in error
    assert "an empty file" in error
    assert [path.name for path in tmp_path.iterdir()] == ["zero.svs"]


def test_missing_path_empty_folder_and_bad_values(tmp_path, slides):
    (tmp_path / "empty").mkdir()
    for sources, options, said in (
        ([tmp_path / "gone.svs"], {}, "gone.svs does not exist"),
        ([tmp_path / "empty"], {}, "holds no slide; known endings"),
        ([slides, slides / "a.tif"], {}, "given twice"),
        ([slides], {"mpp": 0.0}, "--mpp 0 is out of range"),
        ([slides], {"tile_size": 4}, "--tile-size 4 is out of range"),
        ([slides], {"min_tissue": 0.0}, "--min-tissue"),
        ([slides], {"mpp_override": 353.0}, "--mpp-override"),
        ([slides], {"workers": 0}, "--workers 0"),
        ([slides], {"slides_csv": tmp_path / "gone.csv"}, "gone.csv does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            tile_slides(sources, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_else_is_kept(slides, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something else"):
        tile_slides([slides], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_second_run_does_nothing_and_other_settings_are_refused(slides, tmp_path, capsys):
    command = ["tile", str(slides), "--out", str(tmp_path / "out"), "--workers", "1", "--tile-size", "128"]
    assert main(command) == DONE
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main([*command, "--workers", "2"]) == DONE
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert main([*command[:-1], "64"]) == USER_ERROR
    assert "tile_size: 128 there, 64 asked" in capsys.readouterr().err
    (slides / "a.tif").unlink()
    assert main(command) == USER_ERROR
    assert "(input:" in capsys.readouterr().err


def test_ihc_image_without_resolution(tmp_path):
    from skimage.data import immunohistochemistry

    Image.fromarray(immunohistochemistry()).save(tmp_path / "ihc.png")
    with pytest.raises(UserError, match="--mpp-override"):
        tile_slides([tmp_path / "ihc.png"], tmp_path / "out")
    tile_slides([tmp_path / "ihc.png"], tmp_path / "out", tile_size=128, mpp_override=0.5, stain="IHC")
    row = ShardSet(tmp_path / "out").slides().iloc[0]
    assert (row["stain"], row["mpp_source"], row["tiles"]) == ("IHC", "override", 16)


def test_pictures_and_page(slides, tmp_path):
    (tmp_path / "t.csv").write_text('path,slide\nslides/a.tif,"<b>&""x"\n')
    tile_slides([slides / "a.tif"], tmp_path / "out", tile_size=128, slides_csv=tmp_path / "t.csv")
    page = (tmp_path / "out" / "qc.html").read_text()
    assert "&lt;b&gt;&amp;&#34;x" in page
    assert '<b>&"x' not in page
    assert "http:" not in page
    assert "https:" not in page
    (picture,) = (tmp_path / "out" / "qc").iterdir()
    assert f'src="qc/{picture.name}"' in page
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape == (700, 900, 3)
    for color in ((0, 160, 60), (20, 60, 200)):  # outline and grid
        assert (drawn == color).all(-1).sum() > 500


def test_full_disk(slides, tmp_path, capsys, monkeypatch):
    command = ["tile", str(slides), "--out", str(tmp_path / "out"), "--tile-size", "128", "--workers", "1"]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tile_module.Journal, "add", full)
    assert main(command) == USER_ERROR
    assert "No space left on device; mend that and run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    read = mock.Mock(side_effect=Slide)
    monkeypatch.setattr(tile_slide_module, "Slide", read)
    assert main(command) == DONE
    assert read.call_count == 0  # what was tiled before is not tiled again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "slides"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_really_full_disk_under_workers(slides, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert (
            main(["tile", str(slides), "--out", str(disk / "out"), "--tile-size", "128", "--workers", "2"])
            == USER_ERROR
        )
        assert "No space left on device" in capsys.readouterr().err
        assert [path.name for path in disk.iterdir()] == ["out.unfinished"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_phantoms_give_tiles_without_pen(phantoms, tmp_path):
    summary = tile_slides(
        [phantoms / "slides"], tmp_path / "out", mpp=0.5, tile_size=256, slides_csv=phantoms / "slides.csv"
    )
    assert summary.exit_code == DONE, summary
    shards = ShardSet(tmp_path / "out")
    table = shards.slides()
    assert len(table) == 18
    assert table["label"].nunique() == 3
    assert table["dropped_pen"].sum() > 0
    leaked = total = 0
    for number in range(len(shards)):
        row = shards.row(number)
        truth = {
            kind: cv2.imread(str(phantoms / "truth" / f"{table['slide'][row['slide']]}_{kind}.png"), 0) > 127
            for kind in ("tissue", "pen")
        }
        x, y, side = row["x"] // 8, row["y"] // 8, 32  # the truth is at 4 µm/px
        assert truth["tissue"][y : y + side, x : x + side].mean() > 0.35
        leaked += truth["pen"][y : y + side, x : x + side].mean() > 0.05
        total += 1
    assert leaked <= 0.005 * total


@pytest.mark.slow
def test_real_slides(real_data, tmp_path, capsys):
    code = main(["tile", str(real_data / "wsi"), "--out", str(tmp_path / "out"), "--mpp", "0.5", "--tile-size", "224"])
    said = capsys.readouterr().out
    assert code == DONE_WITH_REFUSALS
    assert "camelyon_overview_jpeg2000.dcm: the finest level is 28.97 µm/px, coarser than the asked 0.5" in said
    assert "test3-DAPI-2-387.ndpi: dark background" in said
    shards = ShardSet(tmp_path / "out")
    table = shards.slides().set_index("slide")
    assert 38 <= table.loc["CMU-1-Small-Region", "tiles"] <= 52
    assert 25 <= table.loc["instanseg_HE_example.ome", "tiles"] <= 36
    tile = np.asarray(Image.open(io.BytesIO(shards.image(0))))
    assert tile.shape == (224, 224, 3)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["mpp"] == 0.5
