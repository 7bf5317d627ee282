"""Embeddings straight from slides against the way over a shard set of PNGs, which loses nothing."""

import csv
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.eval import embed_slides as module
from eosin.eval import slide_tiles
from eosin.eval.embed import embed
from eosin.eval.embed_slides import embed_slides
from eosin.eval.encoders import load_encoder
from eosin.launch.cli import main
from eosin.ssl.stain.fits import fit_slides

TILING = ["--tile-size", "64", "--mpp", "0.5", "1", "--mpp-override", "0.5"]


def paint(seed: int, side: int = 400) -> np.ndarray:
    """A section on glass, uint8 [side, side, 3]: an ellipse with nuclei."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((side, side)).astype(np.float32), (0, 0), 3.5)
    nuclei = np.clip(noise / noise.std() - 0.5, 0, 1)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    inside = (x / 0.4) ** 2 + (y / 0.4) ** 2 < 1
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    amounts = np.stack([(1.0 + 0.2 * seed) * nuclei, np.full_like(nuclei, 0.35)], axis=-1) * inside[..., None]
    image = 244 * np.exp(-amounts @ stains) + rng.normal(0, 0.7, (side, side, 3))
    return image.clip(0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Four slides of two patients, one not H&E, one broken and one of glass; and a table of them."""
    folder = tmp_path_factory.mktemp("slides") / "slides"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(paint(number)).save(folder / f"s{number}.png")
    Image.fromarray(np.full((400, 400, 3), 244, np.uint8)).save(folder / "glass.png")
    (folder / "broken.png").write_bytes((folder / "s0.png").read_bytes()[:3000])
    with (folder.parent / "slides.csv").open("w", newline="") as file:
        rows = [(f"s{n}", f"p{n // 2}", "IHC" if n == 3 else "H&E", "yes" if n else "no") for n in range(4)]
        csv.writer(file).writerows([("slide", "patient", "stain", "label"), *rows])
    return folder


@pytest.fixture(scope="module")
def shards(slides, tmp_path_factory):
    """The same slides tiled, in their order and without loss, with stain fits."""
    out = tmp_path_factory.mktemp("tiled") / "shards"
    table = str(slides.parent / "slides.csv")
    assert (
        main(["tile", str(slides), "--out", str(out), *TILING, "--slides", table, "--mix", "0", "--format", "png"]) == 3
    )
    fit_slides(ShardSet(out), tiles_per_slide=32)
    return out


@pytest.mark.parametrize(("kind", "workers"), [("color", "2"), ("run", "1")])
def test_slides_give_what_tiling_and_embedding_give(
    kind, workers, slides, shards, tiny_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(slide_tiles, "PIECE_BYTES", 7 * 3 * 64**2)  # pieces of 7 tiles, which are no whole batches
    name = str(tiny_run) if kind == "run" else "color"
    out, by_tiles = tmp_path / "e.safetensors", tmp_path / "tiles.safetensors"
    embed(load_encoder(name), ShardSet(shards), by_tiles, 16)
    capsys.readouterr()
    arguments = [str(slides), "--slides", str(slides.parent / "slides.csv"), *TILING, "--workers", workers]
    assert main(["embed", name, *arguments, "--out", str(out), "--batch-size", "16", "--device", "cpu"]) == 3
    said = capsys.readouterr().err
    found, expected = read_embeddings(out), read_embeddings(by_tiles)
    assert list(found.table["key"]) == list(expected.table["key"])
    assert found.table["slide"].nunique() == 4
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6, rtol=0)
    same = [c for c in expected.table.columns if c not in ("crc32", "size") and not c.startswith("stain_")]
    assert [c for c in found.table.columns if c != "image"] == same
    for column in same:
        assert list(found.table[column]) == list(expected.table[column]), column
    with (tmp_path / "e.refused.csv").open(newline="") as file:
        refused = {row["key"]: row["reason"] for row in csv.DictReader(file)}
    assert set(refused) == {"broken.png", "glass.png"}
    assert "no tile is at least 50% tissue" in refused["glass.png"]
    assert "left out: broken.png: " in said
    if kind == "run":  # each slide is brought to the reference by its own stains, but for the one that is not H&E
        raw = found.table["slide"] == "s3"
        assert f"{raw.sum()} tiles are not stain-normalized, they stay raw: its slide is not H&E" in said
        assert found.table["slide"].value_counts().max() <= 32  # so that both fits are of all tiles
        plain = load_encoder(name)
        raw &= found.table["mpp"] == 0.5
        images = torch.from_numpy(np.stack([_tile(slides, row) for _, row in found.table[raw].iterrows()]))
        np.testing.assert_allclose(found.features[raw], plain(images.permute(0, 3, 1, 2)).numpy(), atol=1e-5)


def _tile(slides, row):
    """A tile of a slide at the slide's own .5 µm/px, read by hand."""
    image = np.asarray(Image.open(slides / f"{row['slide']}.png"))
    return image[row["y"] : row["y"] + 64, row["x"] : row["x"] + 64]


def test_a_table_of_places_is_followed(slides, tmp_path):
    places = tmp_path / "places.csv"
    places.write_text("slide,x,y,spot\ns0,100,120,A\ns0,200,40,B\ns1,7,9,C\n")
    out = tmp_path / "e.safetensors"
    arguments = [str(slides), "--coords", str(places), "--tile-size", "64", "--mpp-override", "0.5", "--workers", "1"]
    assert main(["embed", "color", *arguments, "--out", str(out)]) == 0
    found = read_embeddings(out)
    assert found.table[["slide", "x", "y", "spot"]].to_numpy().tolist() == [
        ["s0", 100, 120, "A"],
        ["s0", 200, 40, "B"],
        ["s1", 7, 9, "C"],
    ]
    for (_, row), features in zip(found.table.iterrows(), found.features):
        tile = _tile(slides, row).reshape(-1, 3) / 255
        np.testing.assert_allclose(features[:6], np.concatenate([tile.mean(axis=0), tile.std(axis=0)]), atol=1e-6)
    assert main(["embed", "color", *arguments, "--out", str(out)]) == 0  # nothing to do
    places.write_text("slide,x,y,spot\ns0,100,121,A\n")
    assert main(["embed", "color", *arguments, "--out", str(out)]) == 2


def test_a_slide_that_cannot_be_read_to_its_end_is_refused_and_the_others_are_whole(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_tiles, "PIECE_BYTES", 7 * 3 * 64**2)
    options = {"tile_size": 64, "mpp_override": 0.5, "workers": 1}
    given = [slides / f"s{number}.png" for number in range(3)]
    embed_slides(load_encoder("color"), given, tmp_path / "whole.safetensors", **options)

    def dying(piece, **settings):
        bad = piece.job.source.slide == "s1" and piece.first == 7
        return "reading it killed the process" if bad else slide_tiles.read(piece, **settings)

    monkeypatch.setattr(module, "read", dying)
    summary = embed_slides(load_encoder("color"), given, tmp_path / "e.safetensors", **options)
    assert summary.refused == [("s1.png", "reading it killed the process")]
    found, whole = (read_embeddings(tmp_path / f"{name}.safetensors") for name in ("e", "whole"))
    others = (whole.table["slide"] != "s1").to_numpy()
    assert 0 < (~others).sum() < len(others)
    assert list(found.table["key"]) == list(whole.table["key"][others])
    np.testing.assert_array_equal(found.features, whole.features[others])


def test_killed_it_goes_on_after_the_last_finished_slide(tmp_path):
    folder, out = tmp_path / "slides", tmp_path / "e.safetensors"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(paint(number, side=600)).save(folder / f"s{number:02d}.png")
    options = {"tile_size": 32, "mpp_override": 0.5, "workers": 1, "batch_size": 8}
    command = [sys.executable, "-m", "eosin.launch", "embed", "color", str(folder), "--out", str(out)]
    command += ["--tile-size", "32", "--mpp-override", "0.5", "--workers", "2", "--batch-size", "8"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    parts = tmp_path / "e.safetensors.unfinished"
    while process.poll() is None and len(list(parts.glob("part-*"))) < 3:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = {path.name for path in parts.glob("part-*")}
    assert 3 <= len(there) < 8
    assert not out.exists()
    (folder / "s00.png").write_bytes(bytes((folder / "s00.png").stat().st_size))  # finished, it is not read again
    assert embed_slides(load_encoder("color"), [folder], out, **options).refused == []
    Image.fromarray(paint(0, side=600)).save(folder / "s00.png")
    embed_slides(load_encoder("color"), [folder], tmp_path / "whole.safetensors", **options)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not parts.exists()


def test_bad_input_is_one_line_and_leaves_nothing(slides, shards, tmp_path, capsys):
    out, table = str(tmp_path / "e.safetensors"), str(slides.parent / "slides.csv")
    for arguments, said in [
        ([str(shards), "--mpp", "1"], "--mpp is for slides"),
        ([str(shards), "--slides", table], "--slides is for slides"),
        ([str(shards), str(slides)], "is a shard set; give it alone"),
        ([str(slides / "absent.svs")], "does not exist; give slides"),
        ([str(slides), "--tile-size", "4"], "--tile-size 4 is out of range"),
        (
            [str(slides / "glass.png"), "--mpp-override", "0.5"],
            "no slide gave a tile, so nothing was written; glass.png",
        ),
        ([str(slides), "--batch-size", "many"], "--batch-size many is not a number"),
    ]:
        assert main(["embed", "color", *arguments, "--out", out]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder"):
        embed_slides(load_encoder("color"), [slides], tmp_path, mpp_override=0.5)
    assert not list(tmp_path.iterdir())
