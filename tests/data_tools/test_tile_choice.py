"""Which tiles a slide gives: overlaps, regions, several µm/px, islands, places, masks, samples, microarrays."""

import json
from collections import Counter

import cv2
import h5py
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, USER_ERROR, UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.tile import tile_slides
from eosin.data_tools.tile_plan import plan_tiles
from eosin.launch.cli import main


@pytest.fixture(scope="module")
def slide(section, pyramid, tmp_path_factory):
    """1400 x 1300 px at .25 µm/px with a level of half that."""
    path = tmp_path_factory.mktemp("slide") / "a.1.tif"
    return pyramid(path, section(1400, 1300), 0.25, [(700, 650)])


def metas(folder):
    shards = ShardSet(folder)
    return [shards.meta(number) for number in range(len(shards))]


def pixels(folder, number):
    return simplejpeg.decode_jpeg(ShardSet(folder).image(number)).astype(int)


def test_several_resolutions_are_tiled_at_once_as_each_alone(slide, tmp_path):
    tile_slides([slide], tmp_path / "both", mpp=[1, 0.5], tile_size=64, workers=1)
    both = ShardSet(tmp_path / "both")
    found = {meta["key"]: both.image(number) for number, meta in enumerate(metas(tmp_path / "both"))}
    alone = {}
    for mpp in (0.5, 1.0):
        tile_slides([slide], tmp_path / f"{mpp}", mpp=mpp, tile_size=64, workers=1)
        shards = ShardSet(tmp_path / f"{mpp}")
        assert shards.mpp == mpp
        alone |= {meta["key"]: shards.image(number) for number, meta in enumerate(metas(tmp_path / f"{mpp}"))}
    assert found == alone
    assert both.mpp is None
    assert sorted(set(both.column("mpp").tolist())) == [0.5, 1.0]
    assert both.slides()["magnifications"].tolist() == ["0.5 1"]


def test_a_resolution_that_a_slide_has_not_is_left_out(slide, tmp_path):
    tile_slides([slide], tmp_path / "out", mpp=[0.1, 0.5], tile_size=64, workers=1)
    assert ShardSet(tmp_path / "out").slides()["magnifications"].tolist() == ["0.5"]


def test_overlapping_tiles_show_the_same_pixels(slide, section, tmp_path):
    tile_slides([slide], tmp_path / "out", mpp=0.25, tile_size=128, overlap=32, quality=95, workers=1)
    places = [(meta["x"], meta["y"]) for meta in metas(tmp_path / "out")]
    assert {x % 96 for x, _ in places} == {y % 96 for _, y in places} == {0}
    assert len(places) == len(set(places)) > 60
    for number in range(0, len(places), 7):
        x, y = places[number]
        truth = section(1400, 1300)[y : y + 128, x : x + 128]
        assert np.abs(pixels(tmp_path / "out", number) - truth).mean() < 2


def test_a_region_has_its_tile_in_the_middle(slide, section, tmp_path):
    tile_slides([slide], tmp_path / "tiles", mpp=0.25, tile_size=128, quality=95, workers=1, min_tissue=0.9)
    tile_slides([slide], tmp_path / "out", mpp=0.25, tile_size=128, region=224, quality=95, workers=1, min_tissue=0.9)
    shards = ShardSet(tmp_path / "out")
    assert shards.tile_size == 224
    for number, meta in enumerate(metas(tmp_path / "out")):
        x, y = meta["x"], meta["y"]
        assert min(x, y) >= 0
        assert max(x + 224 - 1400, y + 224 - 1300) <= 0
        found = pixels(tmp_path / "out", number)
        assert found.shape == (224, 224, 3)
        assert np.abs(found - section(1400, 1300)[y : y + 224, x : x + 224]).mean() < 2
        distance = np.hypot((x + 112 - 700) / 560, (y + 112 - 650) / 520)
        assert distance < 1  # the middle is tissue
    assert (shards.column("x") % 128 == 0).all()


def test_png_keeps_every_bit(slide, section, tmp_path):
    tile_slides([slide], tmp_path / "out", mpp=0.25, tile_size=128, format="png", workers=1)
    shards = ShardSet(tmp_path / "out")
    for number, meta in enumerate(metas(tmp_path / "out")):
        found = cv2.imdecode(np.frombuffer(shards.image(number), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert (found == section(1400, 1300)[meta["y"] : meta["y"] + 128, meta["x"] : meta["x"] + 128]).all()
    assert len(shards) > 20


def test_biopsies_smaller_than_a_tile_are_shown_whole(pyramid, section, tmp_path):
    """Two of 200 µm, each on the corner of four tiles of 225 µm: a quarter of it fills .16 of each."""
    image = np.full((1900, 1900, 3), 244, np.uint8)
    for corner in (450 - 250, 1350 - 250):
        image[corner : corner + 500, corner : corner + 500] = section(500, 500)  # tissue 400 px wide
    path = pyramid(tmp_path / "a.tif", image, 0.5)
    tile_slides([path], tmp_path / "out", mpp=0.5, tile_size=450, min_tissue=0.5, workers=1)
    found = sorted((meta["x"] + 225, meta["y"] + 225) for meta in metas(tmp_path / "out"))
    np.testing.assert_allclose(found, [(450, 450), (1350, 1350)], atol=12)
    assert {meta["tissue"] > 0.5 for meta in metas(tmp_path / "out")} == {True}


@pytest.mark.parametrize("how", ["random", "stratified"])
def test_a_sample_is_of_the_grid_and_even_where_asked(slide, tmp_path, how):
    tile_slides([slide], tmp_path / "all", mpp=0.25, tile_size=64, workers=1)
    tile_slides([slide], tmp_path / "out", mpp=0.25, tile_size=64, max_tiles=40, sample=how, workers=1)
    everything = {(meta["x"], meta["y"]) for meta in metas(tmp_path / "all")}
    some = {(meta["x"], meta["y"]) for meta in metas(tmp_path / "out")}
    assert len(some) == 40
    assert some < everything
    quarters = Counter((x > 668, y > 618) for x, y in some)
    if how == "stratified":
        assert max(quarters.values()) - min(quarters.values()) <= 5
    row = ShardSet(tmp_path / "out").slides().iloc[0]
    assert row["dropped_limit"] == len(everything) - 40


def test_given_places_are_tiled_where_they_are_with_what_is_known_of_them(slide, section, tmp_path):
    (tmp_path / "spots.csv").write_text(
        "slide,center_x,center_y,barcode,slide_tissue\na.1,700,650,AAA,x\na.1,300.4,400,CCC,y\na.1,20,650,out,z\nb,1,1,d,w\n"
    )
    summary = tile_slides(
        [slide], tmp_path / "out", mpp=0.25, tile_size=128, coords=tmp_path / "spots.csv", quality=95, workers=1
    )
    assert any("b" in notice for notice in summary.notices)
    found = {meta["barcode"]: meta for meta in metas(tmp_path / "out")}
    assert {name: (meta["x"], meta["y"]) for name, meta in found.items()} == {"AAA": (636, 586), "CCC": (236, 336)}
    assert found["AAA"]["tissue"] == 1.0
    assert ShardSet(tmp_path / "out").slides()["dropped_outside"].tolist() == [1]
    for number, meta in enumerate(metas(tmp_path / "out")):
        truth = section(1400, 1300)[meta["y"] : meta["y"] + 128, meta["x"] : meta["x"] + 128]
        assert np.abs(pixels(tmp_path / "out", number) - truth).mean() < 2


def test_places_of_trident_and_clam_need_their_own_size(slide, tmp_path, capsys):
    (tmp_path / "patches").mkdir()
    places = np.array([[256, 512], [512, 512], [768, 256]])
    with h5py.File(tmp_path / "patches" / "a.1.h5", "w") as file:
        file["coords"] = places
        file["coords"].attrs.update({"patch_size": 128, "patch_level": 0, "downsample": [1.0, 1.0]})
    command = ["tile", str(slide), "--coords", str(tmp_path / "patches"), "--tile-size", "128", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "no"), "--mpp", "0.5"]) == USER_ERROR
    assert "give --mpp 0.25" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out"), "--mpp", "0.25"]) == DONE
    assert sorted((meta["x"], meta["y"]) for meta in metas(tmp_path / "out")) == sorted(map(tuple, places.tolist()))


def test_a_mask_replaces_ours(slide, tmp_path):
    mask = np.zeros((650, 700), np.uint8)
    mask[325:, 350:] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.1.png")
    tile_slides([slide], tmp_path / "out", mpp=0.25, tile_size=64, masks=tmp_path / "masks", workers=1)
    tile_slides([slide], tmp_path / "ours", mpp=0.25, tile_size=64, workers=1)
    found = {(meta["x"], meta["y"]) for meta in metas(tmp_path / "out")}
    assert min(min(place) for place in found) >= 640 - 32
    there = {(meta["x"], meta["y"]) for meta in metas(tmp_path / "ours") if meta["x"] >= 704 and meta["y"] >= 704}
    assert there <= found


def test_sections_are_numbered(section, pyramid, tmp_path):
    cut = section(900, 800)
    image = np.full((1900, 900, 3), 244, np.uint8)
    image[:800], image[1100:] = cut, cut
    path = pyramid(tmp_path / "a.tif", np.kron(image, np.ones((1, 1, 1), np.uint8)), 0.5)
    tile_slides([path], tmp_path / "out", tile_size=128, workers=1, thresholds=_thresholds("section_gap_um=150"))
    assert {(meta["section"], meta["y"] > 950) for meta in metas(tmp_path / "out")} == {(1, False), (2, True)}
    assert ShardSet(tmp_path / "out").slides()["sections"].tolist() == [2]
    config = json.loads((tmp_path / "out" / "dataset.json").read_text())["config"]
    assert config["thresholds"]["section_gap_um"] == 150


def test_tiles_of_a_microarray_carry_their_cores(section, pyramid, tmp_path):
    core = section(400, 400)  # tissue 320 px wide
    image = np.full((1500, 2000, 3), 244, np.uint8)
    for row in range(3):
        for column in range(4):
            if (row, column) != (1, 2):
                image[row * 500 + 50 :, column * 500 + 50 :][:400, :400] = core
    path = pyramid(tmp_path / "tma.tif", image, 2.0)
    tile_slides([path], tmp_path / "out", mpp=2.0, tile_size=64, tma=True, workers=1)
    cores = Counter(meta["core"] for meta in metas(tmp_path / "out"))
    assert sorted(cores) == [f"{row}{column}" for row in "ABC" for column in range(1, 5) if f"{row}{column}" != "B3"]
    for meta in metas(tmp_path / "out"):
        assert meta["core"] == f"{'ABC'[(meta['y'] + 32) // 500]}{(meta['x'] + 32) // 500 + 1}"
    with pytest.raises(UserError, match="no regular array of round cores"):
        tile_slides([pyramid(tmp_path / "a.tif", section(900, 800), 0.5)], tmp_path / "no", tma=True, workers=1)


def test_the_plan_says_what_then_happens(section, pyramid, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(5):
        pyramid(folder / f"s{number}.tif", section(700, 600, seed=number), 0.5)
    summary = plan_tiles([folder], tile_size=64)
    tile_slides([folder], tmp_path / "out", tile_size=64, workers=1)
    shards = ShardSet(tmp_path / "out")
    (tiles,) = (line for line in summary.lines if line.startswith("tiles"))
    assert float(tiles.split()[2].replace(",", "")) == pytest.approx(len(shards), rel=0.02)
    (disk,) = (line for line in summary.lines if line.startswith("disk"))
    size = sum(shard["bytes"] for shard in shards.dataset["shards"])
    assert float(disk.split()[2]) * 1e9 == pytest.approx(size, rel=0.2)
    assert main(["tile", str(folder), "--plan", "--tile-size", "64"]) == DONE
    assert "CPU hours" in capsys.readouterr().out


def test_the_plan_goes_on_over_slides_that_are_refused(section, pyramid, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    pyramid(folder / "good.tif", section(700, 600), 0.5)
    pyramid(folder / "unknown.tif", section(700, 600, seed=1), None)
    lines = str(plan_tiles([folder], tile_size=64))
    assert "would be refused: 1 of 2: unknown.tif: no resolution" in lines
    (folder / "good.tif").rename(tmp_path / "good.tif")
    for wrong, said in (
        (["--workers", "-1"], "--workers -1 is out of range"),
        (["--mpp-override", "0"], "--mpp-override 0.0 is out of range"),
        (["--mpp", "nan"], "--mpp nan is out of range"),
        (["--mpp", "0.5", "inf"], "--mpp 0.5 inf is out of range"),
    ):
        assert main(["tile", str(tmp_path / "good.tif"), "--plan", *wrong]) == USER_ERROR
        assert said in capsys.readouterr().err


def test_a_resolution_that_a_slide_does_not_have_is_said(slide, tmp_path):
    made = tile_slides([slide], tmp_path / "out", mpp=[0.1, 0.5, 16], tile_size=64, workers=1)
    assert "at 0.1, 0.5 and 16 µm/px" in made.lines[0]
    assert [notice.split(" are ")[0] for notice in made.notices] == ["1 of 1 slides"] * 2
    assert [" 0.1 " in made.notices[0], " 16 " in made.notices[1]] == [True, True]
    assert {meta["mpp"] for meta in metas(tmp_path / "out")} == {0.5}


def test_what_a_pseudonymized_set_holds_names_no_one(slide, tmp_path):
    (tmp_path / "t.csv").write_text("slide,patient,age\na.1,Jane Doe,61\n")
    key, out = tmp_path / "key", tmp_path / "out"
    tile_slides([slide], out, tile_size=128, slides_csv=tmp_path / "t.csv", pseudonyms=key, workers=1)
    everything = b"".join(path.read_bytes() + path.name.encode() for path in out.rglob("*") if path.is_file())
    everything += ShardSet(out).slides().to_csv().encode()
    for name in (b"a.1", b"a=2e1", b"Jane", b"Doe", key.read_bytes()):
        assert name not in everything
    assert ShardSet(out).slides()["age"].tolist() == ["61"]
    again = tile_slides([slide], out, tile_size=128, slides_csv=tmp_path / "t.csv", pseudonyms=key, workers=1)
    assert "nothing to do" in again.lines[0]


def test_copies_and_frozen_sections_are_listed(section, pyramid, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    names = [f"TCGA-A6-2680-01{kind}.tif" for kind in ("Z-00-DX1", "A-01-TS1")]
    for number, name in enumerate(names):
        pyramid(folder / name, section(500, 500, seed=number), 0.5)
    (folder / "copy.tif").write_bytes((folder / names[0]).read_bytes())
    command = ["tile", str(folder), "--tile-size", "128", "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == DONE_WITH_REFUSALS
    said = capsys.readouterr().out
    assert "frozen sections left out (--frozen keeps them): TCGA-A6-2680-01A-01-TS1" in said
    assert "the same bytes as" in said
    assert main([*command, str(tmp_path / "out")]) == DONE_WITH_REFUSALS  # and says so again
    assert main([*command, str(tmp_path / "all"), "--frozen"]) == DONE_WITH_REFUSALS
    table = ShardSet(tmp_path / "all").slides().set_index("slide")
    assert table.loc[table.index.str.startswith("TCGA"), "patient"].tolist() == ["TCGA-A6-2680"] * 2
    assert table.loc[[name.removesuffix(".tif") for name in names], "preparation"].tolist() == ["FFPE", "frozen"]


def _thresholds(*words):
    from eosin.data_tools.tissue import Thresholds

    return Thresholds.of(words)
