import itertools
import json

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.eval.curves import CLEAN, Plan, cache_folder, run_curves
from eosin.eval.curves_frame import curve_lines, curves_of, draw
from eosin.eval.degrade import Degradation
from eosin.eval.encoders import Encoder, color_statistics
from eosin.eval.fewshot import label_share
from eosin.eval.question import Question
from eosin.launch.cli import main

SIDE = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """160 tiles of 20 patients: fine or coarse noise in two colors, four classes in all."""
    folder = tmp_path_factory.mktemp("curves") / "shards"
    folder.mkdir()
    writer, rng = ShardWriter(folder), np.random.default_rng(0)
    for i in range(160):
        fine, red = (i // 8) % 2, (i // 16) % 2
        noise = rng.normal(0, 30, (SIDE, SIDE)) if fine else np.kron(rng.normal(0, 30, (4, 4)), np.ones((8, 8)))
        color = np.array([150, 110, 130]) if red else np.array([110, 150, 130])
        pixels = (color + noise[..., None]).clip(0, 255).astype(np.uint8)
        meta = {"x": SIDE * i, "y": 0, "mpp": 0.5, "texture": ("coarse", "fine")[fine], "color": ("green", "red")[red]}
        writer.add(f"t{i}", simplejpeg.encode_jpeg(pixels, 98, "RGB", "444"), "jpg", meta, slide=i // 8)
    names = [f"s{i}" for i in range(20)]
    slides = pd.DataFrame({"slide": names, "patient": names, "site": "", "stain": "H&E", "tiles": 8})
    writer.finish(slides, tile_size=SIDE, mpp=0.5, config={})
    return ShardSet(folder)


class Counted:
    """Counts the tiles that an encoder was asked for."""

    def __init__(self, function):
        self.function, self.tiles = function, 0

    def __call__(self, tiles):
        self.tiles += len(tiles)
        return self.function(tiles)


def made(name, function):
    return Encoder(name, {"name": name}, None, torch.device("cpu"), function)


def detail(tiles):
    """Energy between neighboring pixels, and energy in all: their ratio is high where the noise is fine."""
    gray = tiles.float().mean(dim=1)
    near = gray.diff(dim=1).square().mean(dim=(1, 2)) + gray.diff(dim=2).square().mean(dim=(1, 2))
    return torch.stack([near / 400, torch.ones_like(near)], dim=1)


def question(out, label):
    return Question([], label, "patient", out)


def values(results, encoder):
    rows = {e["variant"]: e["metrics"]["balanced_accuracy"] for e in results["encoders"] if e["encoder"] == encoder}
    return {variant: metric["value"] for variant, metric in rows.items()}


BLURS = tuple(Degradation("blur", sigma) for sigma in (0.3, 0.5, 0.7, 4))


def test_detail_is_lost_with_blur_and_color_is_not(shards, tmp_path):
    encoders = [made("detail", detail), made("color", color_statistics)]
    plan = Plan((*BLURS, Degradation("jpeg", 95)), k=5)
    texture = run_curves(encoders, shards, question(tmp_path / "texture.json", "texture"), plan)
    found = values(texture, "detail")
    fall = [found[name] for name in ("clean", "blur 0.3", "blur 0.5", "blur 0.7", "blur 4")]
    assert fall[0] == 1
    assert all(mild >= strong for mild, strong in itertools.pairwise(fall))
    assert fall[-1] == 0.5  # all tiles look coarse to the probe
    last = next(c for c in texture["comparisons"] if c["b"] == "detail + blur 4" and c["metric"] == "balanced_accuracy")
    assert (last["a"], last["value"], last["excludes_zero"]) == ("detail + clean", 0.5, True)
    assert "blur 4: 0.500; the fall excludes zero at" in " ".join(texture["verdict"])
    color = run_curves(encoders, shards, question(tmp_path / "color.json", "color"), plan)
    assert set(values(color, "color").values()) == {1.0}
    assert "color: balanced accuracy 1.000" in "\n".join(curve_lines(color))
    assert any("no fall excludes zero" in line for line in color["verdict"])


def test_fitted_on_degraded_tiles_asks_what_is_left(shards, tmp_path):
    # Blurred by σ, fine noise loses energy but keeps more of it between neighbors than coarse noise has.
    encoders = [made("detail", detail)]
    mild = Degradation("blur", 0.7)
    clean = run_curves(encoders, shards, question(tmp_path / "a.json", "texture"), Plan((mild,), k=5))
    alike = run_curves(encoders, shards, question(tmp_path / "b.json", "texture"), Plan((mild,), k=5, fit="degraded"))
    assert values(clean, "detail")["blur 0.7"] < values(alike, "detail")["blur 0.7"]
    assert values(clean, "detail")["clean"] == values(alike, "detail")["clean"]


def test_features_are_kept_and_only_what_is_missing_is_made(shards, tmp_path):
    counted = Counted(detail)
    encoders, out = [made("detail", counted)], tmp_path / "c.json"
    first = run_curves(encoders, shards, question(out, "texture"), Plan(BLURS[:1], k=5))
    assert counted.tiles == 2 * 160
    second = run_curves(encoders, shards, question(out, "texture"), Plan(BLURS[:2], (0.5,), k=5))
    assert counted.tiles == 3 * 160
    assert values(second, "detail")["blur 0.3"] == values(first, "detail")["blur 0.3"]
    assert len(list(cache_folder(out).glob("*.safetensors"))) == 3
    run_curves(encoders, shards, question(out, "texture"), Plan(BLURS[:1], k=5, max_tiles=100))
    assert counted.tiles == 3 * 160 + 2 * 100


def test_degrading_comes_before_the_encoder_and_changes_nothing_when_clean(shards, tmp_path):
    seen = {}

    def look(tiles):
        seen.setdefault("mean", []).append(tiles.float().mean(dim=(2, 3)))
        return detail(tiles)

    magnified = Degradation("magnification", 2)
    run_curves([made("detail", look)], shards, question(tmp_path / "c.json", "texture"), Plan((magnified,), k=5))
    clean, worse = torch.cat(seen["mean"]).chunk(2)
    pixels = simplejpeg.decode_jpeg(shards.image(3))
    assert torch.allclose(clean[3], torch.from_numpy(pixels.mean(axis=(0, 1))).float(), atol=1e-3)
    middle = pixels[8:24, 8:24].mean(axis=(0, 1))
    assert np.abs(worse[3].numpy() - middle).max() < 3
    assert CLEAN.name == "clean"


def test_shares_of_the_labels_take_whole_patients(shards, tmp_path):
    plan = Plan((), (0.5, 0.1), probe="linear")
    results = run_curves([made("color", color_statistics)], shards, question(tmp_path / "c.json", "color"), plan)
    rows = {e["variant"]: e for e in results["encoders"]}
    assert list(rows) == ["clean", "labels 50 %", "labels 10 %"]
    for share, learned in ((50, 64), (10, 16)):  # of 128 tiles of 16 patients, 8 tiles each
        assert rows[f"labels {share} %"]["details"]["learned_from"] == pytest.approx([learned] * 5, abs=8)
    assert all(n % 8 == 0 for n in rows["labels 10 %"]["details"]["learned_from"])
    assert [p["amount"] for p in results["curves"][0]["points"]] == [0.5, 0.1]
    assert not any("Whole groups" in note for note in results["notes"])
    plan = Plan((), (0.01,), probe="linear")  # two patients at least, 16 of 128 tiles
    results = run_curves([made("color", color_statistics)], shards, question(tmp_path / "c.json", "color"), plan)
    assert any("are taken: labels 1 % holds 1" in note for note in results["notes"])
    plan = Plan((), (0.5, 0.1), k=20)  # half the labels are 32 a class, a tenth are 8
    results = run_curves([made("color", color_statistics)], shards, question(tmp_path / "c.json", "color"), plan)
    assert any("At labels 10 % a class has fewer than k = 20 samples" in note for note in results["notes"])


def test_few_labels_are_all_that_is_learned_from(shards, tmp_path):
    out = tmp_path / "c.json"
    run_curves([made("color", color_statistics)], shards, question(out, "texture"), Plan((), (0.2,), k=1))
    table = shards.table()
    images = np.stack([simplejpeg.decode_jpeg(shards.image(i)) for i in range(len(shards))])
    features = color_statistics(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    said = read_results(out)[1]
    said = said[said.encoder == "color + labels 20 %"].set_index("key").loc[table.key]
    labels, patients = (
        (table.texture == "fine").to_numpy().astype(int),
        np.unique(table.patient, return_inverse=True)[1],
    )
    for fold in range(5):
        learned, scored = np.flatnonzero(said.fold != fold), np.flatnonzero(said.fold == fold)
        used = learned[label_share(labels[learned], patients[learned], 0.2, 0)]
        nearest = used[(features[scored] @ features[used].T).argmax(axis=1)]
        assert list(table.texture[nearest]) == list(said.predicted.iloc[scored])


def test_results_follow_the_contract_and_the_picture_has_a_panel_a_curve(shards, tmp_path):
    out = tmp_path / "c.json"
    plan = Plan((Degradation("downsample", 4), Degradation("blur", 2)), (0.5,), k=5)
    results = run_curves(
        [made("detail", detail), made("color", color_statistics)], shards, question(out, "color"), plan
    )
    read, predictions = read_results(out)
    assert read["encoders"][0]["metrics"] == json.loads(json.dumps(results["encoders"][0]["metrics"]))
    assert [c["kind"] for c in read["curves"]] == ["downsample", "blur", "labels"]
    assert read["curves"][0]["points"] == [{"variant": "downsample 4", "amount": 4, "mpp": 2.0}]
    assert read["curves"][1]["points"] == [{"variant": "blur 2", "amount": 2, "um": 1.0}]
    assert len(predictions) == 160 * 2 * 4
    part = predictions[predictions.encoder == "color + blur 2"]
    by_hand = np.mean([(part.predicted == part.label)[part.label == c].mean() for c in ("green", "red")])
    assert values(read, "color")["blur 2"] == pytest.approx(by_hand)
    draw(results, tmp_path / "c.png")
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert pixels.shape[1] > 1200  # three panels beside each other


def test_no_scale_is_made_up():
    blurs = [Degradation("blur", 2)]
    for mpp in (None, pd.Series(["", ""]), pd.Series([0.5, 0.25]), pd.Series([0.5, np.nan])):
        assert curves_of(blurs, [], mpp)[0]["points"] == [{"variant": "blur 2", "amount": 2}]


def test_points_go_from_mild_to_strong_in_whatever_order_they_are_asked():
    asked = [Degradation(kind, amount) for kind, amount in (("blur", 4), ("jpeg", 10), ("blur", 1), ("jpeg", 90))]
    found = curves_of(asked, [("labels 10 %", 0.1), ("labels 50 %", 0.5)], None)
    points = {curve["kind"]: [point["amount"] for point in curve["points"]] for curve in found}
    assert points == {"blur": [1, 4], "jpeg": [90, 10], "labels": [0.5, 0.1]}


def test_refusals(shards, tmp_path):
    encoders, plan = [made("detail", detail)], Plan(BLURS[:1], k=5)
    with pytest.raises(UserError, match="no column 'grade'"):
        run_curves(encoders, shards, question(tmp_path / "c.json", "grade"), plan)
    with pytest.raises(UserError, match="two encoders go by the name 'detail'"):
        run_curves(encoders * 2, shards, question(tmp_path / "c.json", "color"), plan)
    with pytest.raises(UserError, match=r"--share 1\.5 is out of range"):
        run_curves(encoders, shards, question(tmp_path / "c.json", "color"), Plan((), (1.5,)))
    with pytest.raises(UserError, match="'labels 10 %' is asked for twice"):
        run_curves(encoders, shards, question(tmp_path / "c.json", "color"), Plan((), (0.1, 0.10000000001)))
    with pytest.raises(UserError, match="--max-tiles 0 is not a number of tiles"):
        run_curves(encoders, shards, question(tmp_path / "c.json", "color"), Plan(BLURS[:1], max_tiles=0))
    with pytest.raises(UserError, match="k = 500 must lie between 1 and"):
        run_curves(encoders, shards, question(tmp_path / "c.json", "color"), Plan(BLURS[:1], k=500))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results"):
        run_curves(encoders, shards, question(tmp_path / "mine.json", "color"), plan)


def test_command(shards, tmp_path, capsys):
    out = tmp_path / "c.json"
    base = ["eval", "curves", "color", str(shards.folder), "--label", "color", "--group", "patient", "--out", str(out)]
    few = ["--magnification", "--downsample", "8", "--jpeg", "10", "--blur", "--share", "--k", "5"]
    assert main([*base, *few]) == 0
    said = capsys.readouterr().out
    assert "downsample 8" in said
    assert "jpeg 10" in said
    assert "blur" not in said
    assert out.with_suffix(".png").is_file()
    assert main([*base, "--magnification", "--downsample", "--jpeg", "--blur", "--share"]) == 2
    assert "no curve is left" in capsys.readouterr().err
    assert main([*base, "--jpeg", "0"]) == 2
    assert "--jpeg 0 is out of range" in capsys.readouterr().err
