import numpy as np
import pytest
from PIL import Image

from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.launch.cli import main
from eosin.ssl import crops_sheet

SMALL = ["model.args={depth: 1}", "crops={global_size: 160, local_size: 32, local_count: 4}"]


def test_the_sheet_shows_stored_tiles_of_different_slides_and_hidden_patches(tiny_shards, tmp_path, capsys):
    out = tmp_path / "crops.png"
    hidden = ["objective.mask_probability=1", "objective.mask_ratio=[0.5,0.5]", "stain.augment=none", "augment.gray=0"]
    hidden += ["augment.jitter=0", "augment.blur=[0,0,0]", "stain.normalize=off"]
    code = main(["inspect", "crops", str(tiny_shards), "demo", *SMALL, *hidden, "--tiles", "3", "--out", str(out)])
    assert code == 0
    assert "crops of 3 tiles" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    shards, side = ShardSet(tiny_shards), crops_sheet.SIDE
    method = Image.Resampling.LANCZOS if shards.tile_size > side else Image.Resampling.NEAREST
    tiles = [Image.fromarray(decode(shards.image(t))) for t in range(len(shards))]
    stored = [np.asarray(tile.resize((side, side), method)) for tile in tiles]
    slides, left = [], crops_sheet.MARGIN
    for row in range(3):
        top = crops_sheet.MARGIN + 3 * crops_sheet.LINE + row * (crops_sheet.LINE + side + crops_sheet.GAP)
        shown = sheet[top + crops_sheet.LINE :][:side, left : left + side]
        (tile,) = [t for t, image in enumerate(stored) if (image == shown).all()]
        slides.append(int(shards.row(tile)["slide"]))
        crop = sheet[top + crops_sheet.LINE :][:side, left + side + 2 * crops_sheet.GAP :][:, :side]
        middles = crop[8::16, 8::16]  # of patches
        assert (middles == 150).all(axis=2).mean() == 0.5
    assert len(set(slides)) == 3


def test_a_last_phase_has_a_part_of_its_own(tiny_shards, tmp_path):
    out = tmp_path / "crops.png"
    last = "high_resolution={steps: 10, crops: {global_size: 192, local_size: 48, local_count: 2}}"
    heights = []
    for more in ([], [last]):
        assert (
            main(["inspect", "crops", str(tiny_shards), "demo", *SMALL, *more, "--tiles", "1", "--out", str(out)]) == 0
        )
        heights.append(Image.open(out).height)
    assert heights[1] == 2 * heights[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "x.jpg"], "x.jpg is not a PNG"),
        (["--tiles", "0", "--out", "x.png"], "--tiles 0 is not a number of tiles"),
        (["data.balance=[hospital]", "--out", "x.png"], "has no column 'hospital'"),
        (["crops.global_size=97", "--out", "x.png"], "97 is not a multiple of the patch size"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tiny_shards, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "crops", str(tiny_shards), "demo", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_overrides_may_follow_an_option(tiny_shards, tmp_path, capsys):
    out = tmp_path / "crops.png"
    assert main(["inspect", "crops", str(tiny_shards), "demo", "--tiles", "1", "--out", str(out), *SMALL]) == 0
    assert capsys.readouterr().out == f"{out}: crops of 1 tiles\n"


def test_a_sheet_of_a_shard_set_and_what_it_holds_in_words(tiny_shards, tmp_path, capsys):
    out = tmp_path / "shards.png"
    assert main(["inspect", "shards", str(tiny_shards), "--tiles", "12", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{tiny_shards}: 48 tiles of 64 px at 0.5 µm/px of 4 slides" in said
    assert "  tiles a slide   12\n" in said
    assert said.endswith(f"picture: {out}\n")
    assert Image.open(out).width > 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["shards", "demo", "--out", "x.png"], "'demo': eosin inspect shards takes no recipe"),
        (["crops", "--out", "x.png"], "eosin inspect crops needs a recipe"),
        (["shards", "--out", "x.jpg"], "x.jpg is not a PNG"),
        (["shards", "--tiles", "0", "--out", "x.png"], "--tiles 0 is not a number of tiles"),
    ],
)
def test_arguments_of_the_other_picture_are_one_line(tiny_shards, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", given[0], str(tiny_shards), *given[1:]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
