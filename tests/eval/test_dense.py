"""The dense probe against scikit-learn, sums by hand, and tokens that are planted to tell all or nothing."""

import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.eval import dense_data
from eosin.eval.color import color_statistics
from eosin.eval.dense import run_dense
from eosin.eval.dense_scores import class_values, value_values
from eosin.eval.dense_sheet import color, write_sheet
from eosin.eval.encoders import Encoder, load_encoder
from eosin.eval.question import Question
from eosin.launch.cli import main
from eosin.ssl.seen import Seen, hashed

SIDE, GRID, PATCH = 32, 4, 8
COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128]], np.uint8)


def encoder(name, function):
    return Encoder(name, {"name": name}, None, torch.device("cpu"), lambda tiles: tiles.float().mean((2, 3)), function)


def seen(tiles):
    """Mean color of each patch: what tells the class of these tiles exactly."""
    return torch.nn.functional.avg_pool2d(tiles.float(), PATCH).permute(0, 2, 3, 1) / 255


def noise(tiles):
    """Tokens that hang on each tile's bytes and tell nothing of its places."""
    drawn = [np.random.default_rng(int(t.long().sum())).normal(size=(GRID, GRID, 6)) for t in tiles]
    return torch.from_numpy(np.stack(drawn)).float()


@pytest.fixture
def make(tmp_path):
    """Pack tiles of 12 patients, 4 each, and write a mask for each; masks are of classes or of values."""

    def make(images, masks, patients=12, each=4):
        folder, given = tmp_path / "shards", tmp_path / "masks"
        folder.mkdir()
        given.mkdir()
        writer = ShardWriter(folder)
        for i, (image, mask) in enumerate(zip(images, masks)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            writer.add(f"t{i}", file.getvalue(), "png", {"x": 0, "y": 0, "mpp": 0.5}, i // each)
            if mask.dtype == np.uint8 and mask.ndim == 2:
                Image.fromarray(mask).save(given / f"t{i}.png")
            else:
                tifffile.imwrite(given / f"t{i}.tif", mask, photometric="minisblack")
        table = {"slide": [f"s{p}" for p in range(patients)], "patient": [f"p{p}" for p in range(patients)]}
        writer.finish(pd.DataFrame(table | {"site": "", "tiles": each}), tile_size=SIDE, mpp=0.5, config={})
        return folder, given

    return make


def striped(seed=0, count=48):
    """Tiles of three upright stripes whose color tells their class, 1 to 3; a fourth is gray and not annotated."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        masks[i] = np.repeat(rng.permutation([1, 2, 3, 0]), PATCH)[None]
    images = COLORS[masks.astype(int) - 1].astype(int) + rng.integers(-20, 20, (count, SIDE, SIDE, 1))
    return images.clip(0, 255).astype(np.uint8), masks


def test_tokens_that_tell_the_class_give_a_dice_of_1_and_noise_gives_chance(make, tmp_path):
    shards, masks = make(*striped())
    question = Question([], "masks", "patient", tmp_path / "dense.json", folds=3)
    run_dense(question, [encoder("seen", seen), encoder("noise", noise)], ShardSet(shards), masks)
    results, said = read_results(tmp_path / "dense.json")
    exact, blind = (e["metrics"] for e in results["encoders"])
    assert {m: exact[m]["value"] for m in exact} == {"dice": 1.0, "iou": 1.0, "pixel_accuracy": 1.0}
    # Guessing each of three classes at its share of a third.
    assert results["chance"] == pytest.approx({"dice": 1 / 3, "iou": 1 / 5, "pixel_accuracy": 1 / 3})
    assert abs(blind["dice"]["value"] - 1 / 3) < 0.05
    assert blind["dice"]["low"] < 1 / 3 < blind["dice"]["high"]
    assert results["primary"] == "dice"
    (pair,) = (c for c in results["comparisons"] if c["metric"] == "dice")
    assert pair["value"] == pytest.approx(1 - blind["dice"]["value"])
    assert pair["excludes_zero"]
    assert results["verdict"] == ["seen (Dice 1.000) won: its difference to every other encoder excludes zero."]
    # A quarter of each tile is gray, not annotated, and not counted.
    assert results["classes"] == ["1", "2", "3"]
    assert results["class_counts"] == [48 * SIDE * PATCH] * 3
    assert (said[["annotated_1", "annotated_2", "annotated_3"]] == SIDE * PATCH).all(axis=None)
    assert (said.groupby("group")["fold"].nunique() == 1).all()
    assert (tmp_path / "dense.png").stat().st_size > 1000
    picture = np.asarray(Image.open(tmp_path / "dense.png"))
    # Truth and the exact answer look the same where anything is annotated; 160 px wide, from 176 and 344 on.
    assert (np.abs(picture[40:1300, 176:336].astype(int) - picture[40:1300, 344:504]).max(axis=2) > 0).mean() < 0.3
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))]


def test_tokens_that_tell_the_patient_tell_no_class_of_others(make, tmp_path):
    images, masks = striped()
    mine = np.array([1, 2, 3])[np.arange(12) % 3]  # a class a patient
    masks[:] = np.repeat(mine, 4)[:, None, None]
    patient = {image.tobytes(): i // 4 for i, image in enumerate(images)}

    def known(tiles):
        eye = np.eye(12)[[patient[t.permute(1, 2, 0).contiguous().numpy().tobytes()] for t in tiles]]
        return torch.from_numpy(np.broadcast_to(eye[:, None, None], (len(tiles), GRID, GRID, 12)).copy()).float()

    shards, given = make(images, masks)
    question = Question([], "m", "patient", tmp_path / "d.json", folds=4)
    results = run_dense(question, [encoder("patient", known)], ShardSet(shards), given)
    assert results["encoders"][0]["metrics"]["dice"]["value"] <= 1 / 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_values_are_told_exactly_from_tokens_that_hold_them(make, tmp_path, dtype):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 80, (48, 3, GRID, GRID)).repeat(PATCH, axis=2).repeat(PATCH, axis=3)  # [N, 3, 32, 32]
    values = np.stack([blocks[:, 0] * 3 + 7, blocks[:, 2] - blocks[:, 1] + 90], axis=1).astype(dtype)
    if dtype == np.uint8:  # a PNG of one channel
        values = values[:, 0]
    shards, given = make(blocks.transpose(0, 2, 3, 1).astype(np.uint8), values)
    encoders = [encoder("seen", seen), encoder("noise", noise), encoder("same", lambda t: torch.ones(len(t), 2, 2, 3))]
    question = Question([], "markers", "patient", tmp_path / "d.json", folds=3)
    results = run_dense(question, encoders, ShardSet(shards), given, regress=True)
    exact, blind, same = (e["metrics"] for e in results["encoders"])
    assert exact["pearson"]["value"] > 0.999999
    assert exact["mae"]["value"] < 1e-3
    assert abs(blind["pearson"]["value"]) < 0.1
    assert abs(same["pearson"]["value"]) < 0.2  # the means of the folds differ a little
    deviation = [t["deviation"] for t in results["targets"]]
    truth = values.reshape(48, -1, SIDE, SIDE)
    assert [t["mean"] for t in results["targets"]] == pytest.approx(truth.mean(axis=(0, 2, 3)).tolist(), rel=1e-5)
    # About the mean, the mean absolute deviation of the cells; they average up to four patches, and so vary less.
    assert all(0 < d <= s for d, s in zip(deviation, truth.std(axis=(0, 2, 3))))
    assert set(exact) == {"pearson", "mae"}
    assert [t["name"] for t in results["targets"]] == ["channel 1", "channel 2"][: len(deviation)]
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_what_pretraining_saw_stands_in_the_results(make, tmp_path):
    shards, masks = make(*striped())
    salt = "00" * 16
    listed = {"salt": salt, "slides": set(), "patients": {hashed("patients", f"p{p}", salt) for p in (1, 4, 7)}}
    knowing = replace(encoder("seen", seen), seen=Seen((listed,), complete=True, sha256="x"))
    question = Question([], "m", "patient", tmp_path / "d.json", folds=3)
    results = run_dense(question, [knowing, encoder("unknown", seen)], ShardSet(shards), masks)
    found = results["encoders"][0]["contamination"]
    assert (found["known"], found["samples"], found["patients"], found["share"]) == (True, 12, 3, 0.25)
    assert any("12) are of" in note and "'seen' saw" in note for note in results["notes"])
    assert any("Not known" in note and "unknown" in note for note in results["notes"])


def test_dice_and_iou_are_scikit_learn_s_under_every_draw():
    from sklearn.metrics import accuracy_score, f1_score, jaccard_score

    rng = np.random.default_rng(0)
    real, told = rng.integers(0, 3, (2, 10, 50))
    clusters = np.arange(10) // 2
    real[clusters == 4] = 0  # one cluster has one class only
    confusion = np.zeros((10, 3, 3), dtype=np.int64)
    for tile in range(10):
        np.add.at(confusion[tile], (real[tile], told[tile]), 1)
    draws = np.concatenate([np.ones((1, 5)), rng.multinomial(5, np.ones(5) / 5, size=6), [[0, 0, 0, 0, 5]]])
    values, per_class = class_values(
        confusion, np.arange(10), clusters, np.zeros(10, dtype=int), draws, ["a", "b", "c"]
    )
    for row, weights in enumerate(draws[:-1]):
        repeated = np.repeat(np.arange(10), weights[clusters].astype(int))
        y, p = real[repeated].ravel(), told[repeated].ravel()
        assert values["dice"][row] == pytest.approx(f1_score(y, p, average="macro"))
        assert values["iou"][row] == pytest.approx(jaccard_score(y, p, average="macro"))
        assert values["pixel_accuracy"][row] == pytest.approx(accuracy_score(y, p))
    # With class a alone, the others are undefined and left out.
    only = f1_score(real[8:].ravel(), told[8:].ravel(), labels=[0], average="macro")
    assert values["dice"][-1] == pytest.approx(only)
    each = f1_score(real.ravel(), told.ravel(), average=None)
    assert [per_class[c]["dice"]["value"] for c in "abc"] == pytest.approx(each)
    assert per_class["b"]["n"] == (real == 1).sum()
    assert [per_class[c]["clusters"] for c in "abc"] == [5, 4, 4]


def test_passes_are_averaged():
    confusion = np.array([[[4, 0], [0, 4]], [[0, 4], [4, 0]], [[4, 0], [4, 0]]])
    tiles, passes = np.array([7, 2, 7]), np.array([0, 1, 2])
    values, each = class_values(confusion, tiles, np.zeros(3, dtype=int), passes, np.ones((1, 1)), ["a", "b"])
    assert values["dice"][0] == pytest.approx((1 + 0 + (2 / 3 + 0) / 2) / 3)
    assert values["iou"][0] == pytest.approx((1 + 0 + (1 / 2 + 0) / 2) / 3)
    assert [each[c]["n"] for c in "ab"] == [8, 8]  # of two tiles, one of which stands in two passes


def test_pearson_and_error_are_numpy_s_under_every_draw():
    rng = np.random.default_rng(0)
    truth = rng.normal(1000, 5, (8, 3, 3, 2))
    told = 0.5 * truth + rng.normal(0, 3, truth.shape)
    told[..., 1] = 4.0
    clusters = np.arange(8) // 2
    draws = np.concatenate([np.ones((1, 4)), rng.multinomial(4, np.ones(4) / 4, size=5)])
    values, per_channel = value_values(truth, told, clusters, np.zeros(8, dtype=int), draws, ["x", "y"])
    deviation = truth.std(axis=(0, 1, 2))
    for row, weights in enumerate(draws):
        repeated = np.repeat(np.arange(8), weights[clusters].astype(int))
        r = np.corrcoef(truth[repeated][..., 0].ravel(), told[repeated][..., 0].ravel())[0, 1]
        assert values["pearson"][row] == pytest.approx((r + 0) / 2)  # what never varies has an r of 0
        error = np.abs(truth - told)[repeated].mean(axis=(0, 1, 2)) / deviation
        assert values["mae"][row] == pytest.approx(error.mean())
    assert per_channel["y"]["pearson"]["value"] == 0


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 7)])
def test_shares_of_a_patch_count_parts_of_pixels(grid):
    truth = np.random.default_rng(0).choice([0, 1, 255], (3, 10, 10)).astype(np.uint8)
    shares = dense_data.patch_shares(truth, grid, 2)
    # Each pixel as grid x grid small ones, of which every patch holds a whole number.
    fine = truth.repeat(grid[0], axis=1).repeat(grid[1], axis=2)
    for y in range(grid[0]):
        for x in range(grid[1]):
            patch = fine[:, 10 * y : 10 * y + 10, 10 * x : 10 * x + 10]
            for c in range(2):
                np.testing.assert_allclose(shares[:, y, x, c], (patch == c).mean(axis=(1, 2)), atol=1e-6)


def test_color_tokens_are_the_statistics_of_each_patch():
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = dense_data.color_tokens(tiles)
    assert tokens.shape == (2, 14, 14, 12)
    patch = tiles[1:, :, 32:48, 160:176]
    torch.testing.assert_close(tokens[1, 2, 10], color_statistics(patch)[0].float())
    assert dense_data.color_tokens(tiles[..., :100, :100]).shape == (2, 14, 14, 12)


def test_patches_are_drawn_by_tile_and_not_by_company():
    usable = np.random.default_rng(0).random((6, 16)) < 0.6
    usable[3] = False
    tiles = np.array([5, 9, 11, 12, 40, 41])
    rows, patches = dense_data.drawn_patches(usable, tiles, 24, seed=1)
    assert usable[rows, patches].all()
    assert np.bincount(rows, minlength=6).tolist() == [4, 4, 4, 0, 4, 4]
    assert len(set(zip(rows.tolist(), patches.tolist()))) == len(rows)
    some_rows, some = dense_data.drawn_patches(usable[[1, 4]], tiles[[1, 4]], 8, seed=1)
    for alone, together in ((0, 1), (1, 4)):
        assert sorted(some[some_rows == alone]) == sorted(patches[rows == together])
    assert sorted(patches[rows == 0]) != sorted(dense_data.drawn_patches(usable, tiles, 24, seed=2)[1][rows == 0])


def test_what_makes_no_sense_is_refused_in_one_line(make, tmp_path, monkeypatch):
    shards, masks = make(*striped())
    question = Question([], "masks", "patient", tmp_path / "d.json", folds=3)

    def refusal(encoders, masks=masks, question=question, **settings):
        with pytest.raises(UserError) as caught:
            run_dense(question, encoders, ShardSet(shards), masks, **settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "d.json").exists()
        return str(caught.value)

    good = encoder("seen", seen)
    assert "'none' has no patch tokens" in refusal([encoder("none", None)])
    broken = encoder("broken", lambda tiles: seen(tiles) * float("inf"))
    assert "'broken' gives tokens that are not finite" in refusal([broken])
    assert "two encoders go by the name 'seen'" in refusal([good, good])
    assert "no column 'person' for --group" in refusal([good], question=Question([], "m", "person", question.out))
    assert "--patches 0" in refusal([good], patches=0)
    assert "does not exist" in refusal([good], masks=tmp_path / "absent")
    Image.fromarray(np.full((SIDE, SIDE), 9, np.uint8)).save(masks / "t0.png")
    assert "class '9' is annotated in 1 group only ('p0')" in refusal([good])
    nowhere = Question([], "m", "site", question.out)
    assert "lies under an annotation" in refusal([good], question=nowhere)
    assert "lies under an annotation" in refusal([good], question=nowhere, regress=True)
    (masks / "legend.csv").write_text("value,class\n77,absent\n78,absent too\n")
    assert "lies under an annotation" in refusal([good])
    (masks / "legend.csv").write_text("value,class\n1,one\n2,two\n3,two\n")
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "has no room for" in refusal([good])


def test_every_class_stands_in_the_picture(tmp_path):
    names = [f"class {n}" + " of a long name" * 4 for n in range(12)]
    images, truth = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8), 255, np.uint8)
    write_sheet(tmp_path / "s.png", images, truth, {"encoder": truth}, names)
    shown = np.unique(np.asarray(Image.open(tmp_path / "s.png")).reshape(-1, 3), axis=0).tolist()
    assert all(list(color(n)) in shown for n in range(12))


def test_the_command_line_with_color_and_a_network(make, tmp_path, capsys):
    shards, masks = make(*striped())
    (masks / "legend.csv").write_text("value,class\n1,red\n2,green\n3,blue\n")
    out = tmp_path / "dense.json"
    arguments = ["eval", "dense", "color", "timm:test_vit", str(shards), "--masks", str(masks), "--group", "patient"]
    assert main([*arguments, "--folds", "2", "--patches", "400", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "dense-linear · label 'masks', 3 classes · 48 tiles in 12 groups of 'patient'" in shown
    results = json.loads(out.read_text())
    color, network = results["encoders"]
    assert color["metrics"]["dice"]["value"] > 0.95
    assert network["details"]["grid"] == list(
        load_encoder("timm:test_vit").tokens(torch.zeros(1, 3, 8, 8).byte()).shape[1:3]
    )
    assert set(color["classes"]) == {"red", "green", "blue"}
    assert main([*arguments, "--out", str(masks / "legend.csv")]) == 2
