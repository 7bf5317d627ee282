"""The stain audit: its figures against numpy and scikit-image, phantoms brought together, outliers, hostile names."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.color import rgb2lab

from eosin.data_tools.errors import UserError
from eosin.data_tools.phantom import REFERENCE, WHITE
from eosin.data_tools.shards import ShardSet, write_slides
from eosin.data_tools.stream import decode
from eosin.eval.report import stain_audit, stain_outliers, stain_truth
from eosin.eval.report.page import Table
from eosin.launch.cli import main
from eosin.ssl.config import Stain
from eosin.ssl.stain.fits import COLUMNS, fit_slides
from eosin.ssl.stain.normalizer import METHODS, describe
from eosin.ssl.stain.reference import BUILT_IN

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$"


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)


def description(**more: str) -> dict:
    found = describe(Stain(normalize="slide", **more))
    assert found is not None
    return found


def audit(shards: Path, out: Path, **more: str) -> Page:
    stain_audit.write_audit(ShardSet(shards), out, description(**more))
    return Page(out)


def repeated(fits: list[str], count: int, seed: int = 0) -> pd.DataFrame:
    """A slides table of ``count`` slides whose fits differ a little, as those of slides of one laboratory do."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        fit = json.loads(fits[i % len(fits)])
        vectors = np.array(fit["vectors"]) + rng.normal(0, 0.005, (2, 3))
        fit["vectors"] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist()
        fit["maxima"] = (np.array([1.7, 1.0]) * np.exp(rng.normal(0, 0.03, 2))).tolist()
        row = {"slide": f"s{i}", "site": "ab"[i % 2], "stain": "H&E", "stain_fit": json.dumps(fit), "stain_reason": ""}
        row |= {"stain_tiles": 12, "stain_pixels": 4000, "stain_angle": 28.0, "stain_residual": rng.normal(0.02, 0.001)}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture
def copy(tiny_shards, tmp_path):
    """A copy of the tiny shard set whose slides table may be replaced."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    return folder


@pytest.fixture(scope="module")
def phantom_shards(tmp_path_factory) -> Path:
    """Tiles of six phantoms of two laboratories, fitted."""
    from eosin.data_tools.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("stain_audit")
    table = write_phantoms(folder / "slides", patients=6, slides_per_patient=1, side_um=512, workers=1)
    slides, shards = str(folder / "slides" / "slides"), str(folder / "shards")
    assert main(["tile", slides, "--slides", str(table), "--out", shards, "--workers", "1"]) == 0
    fit_slides(ShardSet(folder / "shards"))
    return folder / "shards"


def test_variance_is_that_of_scikit_image(tiny_shards):
    shards = ShardSet(tiny_shards)
    colors = stain_audit.gather(shards, description()).colors
    fits = [json.loads(f) for f in shards.slides()["stain_fit"]]
    reference = description()["reference"]
    target = np.array(reference["vectors"]) * np.array(reference["maxima"])[:, None]
    expected: list[list[np.ndarray]] = [[], []]
    for slide in range(4):
        # Each slide has 12 tiles, fewer than are sampled.
        tiles = np.concatenate([decode(shards.image(i)).reshape(-1, 3) for i in range(48) if i % 4 == slide])
        tissue = rgb2lab(tiles / 255)[:, 0] < 87.5
        own = np.array(fits[slide]["vectors"]) * np.array(fits[slide]["maxima"])[:, None]
        density = np.maximum(-np.log((tiles[tissue] + 1.0) / np.array(fits[slide]["white"])), 0)
        # What lies outside the two stains stays.
        mixed = density + density @ np.linalg.pinv(own) @ (target - own)
        after = 256 * np.exp(-mixed) - 1
        for place, pixels in enumerate((tiles[tissue], np.rint(after.clip(0, 255)))):
            expected[place].append(rgb2lab(pixels / 255).mean(axis=0))
    assert np.abs(colors - np.array(expected)).max() < 0.02
    before, after = (np.trace(np.cov(np.array(e), rowvar=False, ddof=1)) for e in expected)
    found = [stain_outliers.variances(c) for c in colors]
    assert found[0].sum() == pytest.approx(before, rel=0.02)
    assert found[1].sum() == pytest.approx(after, rel=0.02)
    assert stain_audit.gather(shards, description()).ratio == pytest.approx(after / before, rel=0.04)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_normalization_halves_the_variance_between_phantoms(phantom_shards, method):
    found = stain_audit.gather(ShardSet(phantom_shards), description(method=method))
    before, after = found.spreads
    assert len(found.fitted) == 6
    assert before.sum() > 10
    assert found.ratio == pytest.approx(after.sum() / before.sum())
    assert found.ratio < 0.5


def test_the_verb_writes_the_page_of_phantoms(phantom_shards, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["stain", "audit", str(phantom_shards), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = Page(out)
    assert "Synthetic slides: no tissue of any patient" in page.text
    assert "6 of 6 slides have a stain fit; too few to say which stand out." in page.text
    share = re.search(r"lowers the color variance between slides: (\d+) % of it is left", page.text)
    assert share is not None
    assert int(share[1]) < 50
    sheets = [a for tag, a in page.tags if tag == "img" and a["alt"] == "tiles before and after normalization"]
    assert len(sheets) == 6


def test_the_page_loads_nothing(tiny_shards, tmp_path):
    page = audit(tiny_shards, tmp_path / "page.html")
    assert all((a["src"] or "").startswith("data:image/") for tag, a in page.tags if tag == "img")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"}
    for word in (
        "Verdict",
        "Fits and outliers",
        "Before and after",
        "Color variance",
        "Known truth",
        "Failures",
        "How",
    ):
        assert word in page.text
    assert "SYNTHETIC: these tiles are phantoms" in page.text
    assert "what remains is what that method cannot undo" in page.text
    assert "4 of 4 slides have a stain fit" in page.text
    assert "that takes 8 fitted slides, and there are 4" in page.text
    assert f"eosin stain audit {tiny_shards} --out page.html --to eosin --method macenko" in page.text


def test_same_input_same_bytes(tiny_shards, tmp_path):
    (tmp_path / "again").mkdir()
    audit(tiny_shards, tmp_path / "page.html")
    audit(tiny_shards, tmp_path / "again" / "page.html")
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "again" / "page.html").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["again", "page.html"]


def test_planted_outliers_are_listed_and_only_they(copy, tmp_path):
    table = repeated(list(ShardSet(copy).slides()["stain_fit"]), 20)
    strong, turned = json.loads(table.loc[3, "stain_fit"]), json.loads(table.loc[11, "stain_fit"])
    strong["maxima"] = [1.7, 3.0]
    turned["vectors"][0] = [0.3, 0.8, 0.5196]
    table.loc[3, "stain_fit"], table.loc[11, "stain_fit"] = json.dumps(strong), json.dumps(turned)
    table.loc[7, "stain_residual"] = 0.2
    write_slides(copy, table)
    found = stain_audit.gather(ShardSet(copy), description())
    assert set(found.outliers) == {3, 7, 11}
    assert [d.name for d in found.outliers[3]] == ["eosin intensity"]
    assert [d.name for d in found.outliers[7]] == ["density outside the two stains"]
    assert {d.name for d in found.outliers[11]} >= {"red part of hematoxylin", "blue part of hematoxylin"}
    values = np.log([json.loads(f)["maxima"][1] for f in table["stain_fit"]])
    score = 0.6745 * (values[3] - np.median(values)) / np.median(np.abs(values - np.median(values)))
    assert found.outliers[3][0].score == pytest.approx(score)
    page = audit(copy, tmp_path / "page.html")
    assert "3 slides of 20" in page.text
    assert f"eosin intensity 3.000, usually {np.exp(np.median(values)):.3f} (z +{score:.1f})" in page.text
    assert "3 of them stand out" in page.text


def test_slides_that_agree_have_no_outlier_and_one_that_does_not_has():
    same = np.full(9, 1.5)
    assert not stain_outliers.robust_scores(same).any()
    assert stain_outliers.robust_scores(np.append(same, 1.6))[-1] > 3.5
    assert not stain_outliers.robust_scores(np.full(4, np.nan)).any()
    assert np.isfinite(stain_outliers.robust_scores(np.append(same, np.nan))).all()


def test_hostile_names_are_escaped_and_every_failure_is_said(copy, tmp_path):
    table = ShardSet(copy).slides()
    table["slide"] = [f"{HOSTILE}{i}" for i in range(4)]
    table["site"] = HOSTILE
    table.loc[2, ["stain_fit", "stain_reason"]] = ["", HOSTILE]
    table.loc[3, ["stain", "stain_fit", "stain_reason"]] = ["PAS", "", "not H&E: left as it is"]
    write_slides(copy, table)
    page = audit(copy, tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert f"{HOSTILE}2" in page.text
    assert "2 of 4 slides have a stain fit" in page.text
    assert "24 of 48 tiles stay raw, those of 2 slides." in page.text
    assert "not H&E: left as it is 1 12" in page.text


def test_slides_of_other_stains_stay_out_of_the_variance(copy, tmp_path):
    table = ShardSet(copy).slides()
    table.loc[3, "stain"] = "PAS"  # though it has a fit
    write_slides(copy, table)
    found = stain_audit.gather(ShardSet(copy), description())
    assert found.fitted.tolist() == [0, 1, 2]
    assert found.colors.shape == (2, 3, 3)
    assert "its slide is not H&E 1 12" in audit(copy, tmp_path / "page.html").text


def test_one_fitted_slide_has_no_variance(copy, tmp_path):
    table = ShardSet(copy).slides()
    table.loc[1:, "stain_fit"] = ""
    write_slides(copy, table)
    page = audit(copy, tmp_path / "page.html")
    assert "1 of 4 slides has a stain fit" in page.text
    assert "There is no color variance between slides" in page.text
    assert "nan" not in page.text


def test_without_fits_it_is_one_line(copy, tmp_path, capsys):
    table = ShardSet(copy).slides()
    out = tmp_path / "page.html"

    def refusal(slides: pd.DataFrame) -> str:
        write_slides(copy, slides)
        assert main(["stain", "audit", str(copy), "--out", str(out)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert not out.exists()
        assert len(lines) == 1
        return lines[0]

    assert "eosin stain fit" in refusal(table.drop(columns=list(COLUMNS)))
    none = refusal(table.assign(stain_fit="", stain_reason=["too little\ntissue", "no tiles", "no tiles", ""]))
    assert "2 no tiles, 1 its slide has no fit, 1 too little tissue" in none
    assert "its slide is not H&E" in refusal(table.assign(stain="IHC", stain_reason=""))
    other = table["stain_fit"].str.replace('"eosin"', '"torchstain"')
    assert "torchstain" in refusal(table.assign(stain_fit=other))


def test_out_that_is_a_folder_is_refused(tiny_shards, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        stain_audit.write_audit(ShardSet(tiny_shards), tmp_path, description())


def test_sites_take_turns():
    sites = np.array(["a"] * 30 + ["b"] * 2 + ["c"] * 5)
    chosen = stain_audit.take_turns(np.arange(37), sites, 8)
    assert len(set(chosen)) == 8
    assert [str(sites[n]) for n in chosen] == list("aaabbccc")
    assert stain_audit.take_turns(np.arange(37), sites, 8) == chosen
    assert stain_audit.take_turns(np.array([4, 31]), sites, 8) == [4, 31]


def test_the_color_table_is_read_as_scipy_reads_it():
    from scipy.interpolate import RegularGridInterpolator

    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (2, 3, 20, 20))
    colors[0, :, 0, 0], colors[0, :, 0, 1] = 0, 255
    found = stain_truth.color_cube(torch.from_numpy(colors.astype(np.uint8))).numpy()
    axis = np.linspace(0, 1, 17)
    knots = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    red, green, blue = np.moveaxis(knots ** np.array(stain_truth.GAMMA), -1, 0)
    # Each channel is bent by the difference of the other two.
    bent = [
        red + stain_truth.TWIST * np.sin(np.pi * green) * (blue - green),
        green + stain_truth.TWIST * np.sin(np.pi * blue) * (red - blue),
        blue + stain_truth.TWIST * np.sin(np.pi * red) * (green - red),
    ]
    table = RegularGridInterpolator((axis, axis, axis), np.stack(bent, axis=-1).clip(0, 1))
    expected = table(np.moveaxis(colors, 1, -1) / 255) * 255
    assert np.abs(np.moveaxis(found, 1, -1) - expected).max() < 0.51
    assert found[0, :, 0, 0].tolist() == [0, 0, 0]
    assert found[0, :, 0, 1].tolist() == [255, 255, 255]


def test_the_phantom_tiles_are_the_same_under_other_optics():
    truth, stained = stain_truth.phantom_tiles(REFERENCE), stain_truth.another_laboratory(torch.zeros(0))
    assert truth.shape == stained.shape == (3, 3, 256, 256)
    concentrations = []
    for images, matrix, thickness in (
        (truth, REFERENCE.stains, 1.0),
        (stained, stain_truth.LABORATORIES["lab-2"], stain_truth.THICKNESS),
    ):
        density = -np.log((images.numpy().transpose(0, 2, 3, 1) + 0.5) / WHITE)
        concentrations.append(density @ np.linalg.pinv(np.array(matrix) * thickness))
    assert np.abs(concentrations[0] - concentrations[1]).mean() < 0.02


def test_what_remains_of_a_known_change(tiny_shards):
    truth = stain_truth.phantom_tiles(REFERENCE)
    tissue = rgb2lab(truth.permute(0, 2, 3, 1).numpy() / 255)[..., 0] < 87.5
    section = stain_truth.known_truth(BUILT_IN["eosin"])
    table = next(b for b in section.blocks if isinstance(b, Table))
    assert list(table.head[2:]) == list(METHODS)
    assert [row[0] for row in table.rows] == list(stain_truth.OPERATORS)
    for row in table.rows:
        changed = stain_truth.OPERATORS[row[0]](truth)
        labs = [rgb2lab(i.permute(0, 2, 3, 1).numpy() / 255) for i in (changed, truth)]
        expected = np.linalg.norm(labs[0] - labs[1], axis=-1)[tissue].mean()
        assert float(row[1]) == pytest.approx(expected, abs=0.06)
    left = {row[0]: [float(cell.split()[0]) / float(row[1]) for cell in row[2:]] for row in table.rows}
    # Each method undoes best what its own model holds.
    assert np.argmin(left["another laboratory's stains"]) == METHODS.index("macenko")
    assert np.argmin(left["shift of lightness and color"]) == METHODS.index("reinhard")
    assert left["another laboratory's stains"][METHODS.index("macenko")] < 0.2
