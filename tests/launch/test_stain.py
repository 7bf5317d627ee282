"""``eosin stain`` from the command line, and stain operations in a training run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from eosin.data_tools.shards import ShardSet, write_slides
from eosin.launch.cli import main

TRAIN = ["run.steps=2", "optim.warmup=0", "run.log_every=1", "data.batch=48"]


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def test_fit_reference_normalize_and_audit(shards, tmp_path, capsys):
    assert main(["stain", "fit", str(shards), "--convention", "torchstain"]) == 0
    assert main(["stain", "fit", str(shards)]) == 0
    assert "4 of 4 slides fitted" in capsys.readouterr().out
    reference = tmp_path / "reference.json"
    assert main(["stain", "reference", str(shards), "--out", str(reference)]) == 0
    assert main(["stain", "normalize", str(shards), "--to", str(reference), "--out", str(tmp_path / "n")]) == 0
    assert "48 images, 48 of them normalized" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "n")]) == 0
    # Normalized to their own look, tiles hardly change.
    assert len(ShardSet(tmp_path / "n")) == 48
    assert main(["stain", "audit", str(shards), "--out", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_images_are_normalized(tmp_path, shards, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(folder / "white.png")
    assert main(["stain", "normalize", str(folder), "--to", str(shards), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 images, 0 of them normalized" in said
    assert "1 stay raw: too little tissue" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "nowhere"], "nowhere does not exist"),
        (["fit", "{shards}", "--tiles", "0"], "--tiles 0"),
        (["reference", "nowhere.png", "--out", "{out}.json"], "nowhere.png does not exist"),
        (["reference", "{shards}", "--out", "{out}"], "ends in .json"),
        (["normalize", "nowhere", "--out", "{out}"], "nowhere is no folder"),
        (["normalize", "{shards}", "--to", "nope", "--out", "{out}"], "no stain reference 'nope'"),
        (["normalize", "{images}", "--mode", "slide", "--out", "{out}"], "knows no slides"),
        (["normalize", "{shards}", "--convention", "tiatoolbox", "--out", "{out}"], "no reference of its own"),
        (["normalize", "{shards}", "--out", "{shards}/inside"], "lies inside"),
        (["reference", "{images}", "--out", "{out}.json"], "a folder without a shard set"),
        (["audit", "nowhere", "--out", "{out}.html"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, words, shards, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    places = {"shards": shards, "out": tmp_path / "out", "images": tmp_path / "images"}
    assert main(["stain", *(a.format(**places) for a in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]
    assert len([line for line in said if line.startswith("eosin:")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["slide", "tile"])
def test_a_run_counts_and_lists_what_stays_raw(mode, shards, tiny_recipe, tmp_path, capsys):
    table = ShardSet(shards).slides()
    table.loc[0, "stain"] = "IHC"
    table.loc[1, ["stain_fit", "stain_reason"]] = ["", "too little tissue"]
    write_slides(shards, table)
    run = tmp_path / "run"
    arguments = [*tiny_recipe, f"data.shards={shards}", f"run.dir={run}", *TRAIN, f"stain.normalize={mode}"]
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().out
    assert "the tiles of 1 of 4 slides stay raw: its slide is not H&E" in said
    assert ("the tiles of 1 of 4 slides stay raw: its slide has no fit" in said) == (mode == "slide")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A batch is the whole shard set: 12 tiles of each slide.
    expected = 24 / 48 if mode == "slide" else 12 / 48
    assert [r["stain_raw"] for r in records] == [expected] * 2
    assert not (run / "stain_raw.jsonl").exists()
    assert json.loads((run / "stain.json").read_text())["mode"] == mode


def test_a_run_lists_the_tiles_that_cannot_be_fitted(tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    he = np.array([[0.60, 0.73, 0.33], [0.20, 0.90, 0.38]])
    for i in range(8):
        amounts = rng.uniform(0, 1.2, (64 * 64, 2)) if i else np.zeros((64 * 64, 2))
        image = (256 * np.exp(-amounts @ he) - 1).clip(0, 255).astype(np.uint8).reshape(64, 64, 3)
        Image.fromarray(image).save(folder / f"{i}.png")
    shards, run = tmp_path / "packed", tmp_path / "run"
    assert main(["pack", str(folder), "--out", str(shards)]) == 0
    arguments = [
        *tiny_recipe,
        f"data.shards={shards}",
        f"run.dir={run}",
        *TRAIN,
        "data.batch=8",
        "stain.normalize=tile",
    ]
    assert main(["train", *arguments]) == 0
    listed = [json.loads(line) for line in (run / "stain_raw.jsonl").read_text().splitlines()]
    assert listed == [{"shards": str(shards), "tile": 0, "reason": "too little tissue"}]


def test_a_run_keeps_its_reference_when_the_file_is_gone(shards, tiny_recipe, tmp_path, capsys):
    reference, run = tmp_path / "r.json", tmp_path / "run"
    assert main(["stain", "reference", str(shards), "--out", str(reference)]) == 0
    arguments = [*tiny_recipe, f"data.shards={shards}", f"run.dir={run}", *TRAIN, f"stain.reference={reference}"]
    assert main(["train", *arguments, "stain.normalize=slide"]) == 0
    reference.unlink()
    assert main(["embed", str(run), str(shards), "--out", str(tmp_path / "e.safetensors")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "release")]) == 0
    assert main(["embed", str(tmp_path / "release"), str(shards), "--out", str(tmp_path / "f.safetensors")]) == 0
    from eosin.data_tools.embeddings import read_embeddings

    ours, theirs = (read_embeddings(tmp_path / f"{n}.safetensors") for n in "ef")
    np.testing.assert_allclose(ours.features, theirs.features, atol=1e-4)
    assert ours.encoder["normalizer"] == theirs.encoder["normalizer"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stain.augment=hed", "stain.augment: 'hed' is not valid"),
        ("stain.augment=[{op: head}]", "'hed', 'perturb', 'randstainna', 'reinhard'"),
        ("stain.augment=[{op: hed, sgma: 1}]", "no key 'stain.augment.0.hed.sgma'; did you mean 'sigma'"),
        ("stain.augment=[{op: hed, p: 2}]", "stain.augment.0.hed.p"),
        ("stain.reference=nope", "no stain reference 'nope'"),
        ("stain.convention=torchstain", "follows the convention 'eosin', not 'torchstain'"),
    ],
)
def test_a_wrong_policy_is_one_line(override, words, shards, tiny_recipe, tmp_path, capsys):
    arguments = [*tiny_recipe, f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", *TRAIN]
    assert main(["train", *arguments, "stain.normalize=slide", override]) == 2
    assert words in capsys.readouterr().err
