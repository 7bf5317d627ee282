"""The report: one page that loads nothing, escapes everything, says who won whoever won, and draws what is there."""

from __future__ import annotations

import base64
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from eosin.data_tools import qc
from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.results import write_results
from eosin.data_tools.shards import ShardSet, slide_key, write_slides
from eosin.eval.encoders import weights_sha256
from eosin.eval.probe import attention_path
from eosin.eval.report import exhibits, findings, limits, pictures, sections, write_report
from eosin.eval.report.material import gather
from eosin.eval.report.page import Words
from eosin.launch.cli import main
from eosin.ssl.crops_sheet import views
from eosin.ssl.feed import Phase
from eosin.ssl.whole_tiles import BACKGROUND

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$"
METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc")
TRAINED, RANDOM, COLOR = "run", "random:run", "color"


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)


def metric(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def results(
    path: Path,
    scores: dict[str, float],
    pairs: dict[tuple[str, str], tuple[float, float, float]],
    protocol: str = "dinov2-knn",
    variant: str = "",
    weights: str = "0" * 64,
    keys: tuple[str, ...] = ("s0", "s1", "s2", "s3"),
    **more: object,
) -> Path:
    """Write results as 'eosin eval' does, with made-up values; ``pairs`` are (a, b) -> difference with interval."""

    def name(encoder: str) -> str:
        return f"{encoder} + {variant}" if variant else encoder

    encoders = [
        {
            "name": name(e),
            "encoder": e,
            "variant": variant,
            "fingerprint": {"name": e, "statistics": "12"} if e == COLOR else {"name": e, "weights": weights},
            "metrics": {m: metric(v) for m in METRICS},
        }
        for e, v in scores.items()
    ]
    comparisons = [
        {"a": name(a), "b": name(b), "metric": "balanced_accuracy", "value": v, "low": low, "high": high}
        | {"excludes_zero": low > 0 or high < 0}
        for (a, b), (v, low, high) in pairs.items()
    ]
    data = {
        "protocol": protocol,
        "parameters": {"folds": 5, "seed": 0},
        "label": "label",
        "group": "patient",
        "unit": "tile",
        "n": 48,
        "groups": 4,
        "classes": ["x", "y"],
        "class_counts": [47, 1],
        "left_out": {},
        "chance": dict.fromkeys(METRICS, 0.5),
        "encoders": encoders,
        "comparisons": comparisons,
        "notes": [],
    } | more
    said = pd.DataFrame({"key": keys, "group": keys, "fold": 0, "label": list("xyxy"), "predicted": list("xyyx")})
    write_results(path, data, pd.concat([said.assign(encoder=name(e)) for e in scores]))
    return path


def knn(path: Path, **more: object) -> Path:
    scores = {TRAINED: 0.81, RANDOM: 0.70, COLOR: 0.90}
    pairs = {(RANDOM, TRAINED): (-0.11, -0.16, -0.06), (TRAINED, COLOR): (-0.09, -0.14, -0.04)}
    pairs |= {(RANDOM, COLOR): (-0.2, -0.3, -0.1)}
    return results(path, scores, pairs, **more)


def mil(path: Path, shards: Path, slides: list[str]) -> Path:
    """Results of slides with the attention of their tiles: tile i of slide i % 4 gets more the later it comes."""
    pairs = {(TRAINED, COLOR): (0.0, -0.1, 0.1)}
    results(path, {TRAINED: 0.6, COLOR: 0.6}, pairs, "mil", "attention", keys=tuple(slides), unit="slide")
    tiles = [ShardSet(shards).meta(i)["key"] for i in range(48)]
    attention = pd.DataFrame({"key": tiles, "slide": [slides[i % 4] for i in range(48)]})
    attention.assign(encoder=TRAINED, attention=np.repeat(np.arange(12), 4) / 66).to_parquet(attention_path(path))
    return path


def report(run: Path, out: Path, found: list[Path] | None = None, **more: object) -> Page:
    settings = {"results": found or [], "shards": None, "release": None, "title": "A title"} | more
    write_report(run, out, **settings)
    return Page(out)


@pytest.fixture(scope="module")
def full(tiny_run, tiny_shards, tmp_path_factory) -> tuple[Path, Path, list[Path]]:
    """A run, its shard set and results where every text that a user gives is hostile and nothing is missing."""
    folder = tmp_path_factory.mktemp("full")
    shards = folder / "shards"
    shutil.copytree(tiny_shards, shards)
    names = [f"{HOSTILE}{i}" for i in range(4)]
    table = ShardSet(shards).slides().assign(slide=names, site=HOSTILE, label=[HOSTILE, "y"] * 2, synthetic="true")
    table.loc[3, ["stain", "stain_fit", "stain_reason"]] = [HOSTILE, "", HOSTILE]
    refused = {"slide": f"{HOSTILE}r", "state": "refused", "reason": HOSTILE, "stain_fit": "", "stain_reason": ""}
    write_slides(shards, pd.concat([table, pd.DataFrame([refused])], ignore_index=True))
    (shards / "qc").mkdir()
    for name in names:
        qc.write_png(shards / "qc" / f"{slide_key(name)}.png", np.full((40, 60, 3), 200, np.uint8))
    found = [knn(folder / "knn.json", notes=[HOSTILE], classes=[HOSTILE, "y"])]
    found.append(mil(folder / "mil.json", shards, names))
    return tiny_run, shards, found


@pytest.fixture(scope="module")
def page(full, tmp_path_factory) -> Page:
    run, shards, found = full
    return report(run, tmp_path_factory.mktemp("page") / "report.html", found, shards=shards, title=HOSTILE)


def test_page_loads_and_runs_nothing(page):
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action", "data")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base"}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert "url(" not in page.raw
    assert "@import" not in page.raw
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attrs.get("content")) for tag, attrs in page.tags
    ]


def test_hostile_text_is_shown_as_text(page):
    shown = " ".join(HOSTILE.split())
    assert page.raw.count("<script>") == 0
    # Title, a slide's caption, a site, a label, a stain's reason, a refusal, a note.
    assert page.text.count(shown) > 15
    assert ("title", {}) in page.tags


def test_every_picture_can_be_seen_and_has_words(page):
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) > 40
    for attrs in images:
        assert attrs["alt"]
        with Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",", 1)[1]))) as image:
            image.verify()
            assert max(image.size) > 30


def test_all_sections_are_there_in_the_order_of_the_road(page):
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert anchors == [
        *("verdict", "inputs", "masks", "stain", "crops", "curves", "tokens", "probes", "attention", "limits"),
        "reproduction",
    ]
    for words in (
        "All slides are synthetic",
        "H&E operations are off for 1 slide",
        "not an explanation",
        "not a medical device",
    ):
        assert words in page.text
    for words in ("makes them.", "adds it.", "adds them.", "Nothing is logged"):
        assert words not in page.text


def test_report_is_the_same_each_time(full, page, tmp_path):
    run, shards, found = full
    assert report(run, tmp_path / "again.html", found, shards=shards, title=HOSTILE).raw == page.raw


def test_verdict_says_who_won_also_when_it_was_color(page):
    text = page.text
    assert "Against random weights the trained encoder wins in the one probe." in text
    assert "Against color alone the trained encoder loses in 1 and is undecided in 1 of 2 probes." in text
    assert (
        "kNN (balanced accuracy; label 'label', 48 tiles, no patient on both sides of a split): "
        "trained .81 [.76, .86] beats random weights .70 [.65, .75] (difference +.11 [+.06, +.16], excludes zero); "
        "it loses to color alone .90 [.85, .95] (difference −.09 [−.14, −.04], excludes zero). Chance is .50."
    ) in text
    assert "kNN .81 [.76, .86] .70 [.65, .75] .90 [.85, .95] .50 color alone" in text


def probe_of(tmp_path: Path, ours: float, theirs: float, pair: tuple[float, float, float]) -> findings.Probe:
    path = results(tmp_path / "r.json", {TRAINED: ours, COLOR: theirs}, {(TRAINED, COLOR): pair})
    return findings.probes(findings.load([path]))[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "pair", "headline", "winner"),
    [
        (0.8, 0.7, (0.1, 0.02, 0.2), "wins", "trained"),
        (0.7, 0.8, (-0.1, -0.2, -0.02), "loses", "color alone"),
        (0.8, 0.7, (0.1, -0.02, 0.2), "is undecided", "undecided: trained, color alone"),
        # Ahead of another that guesses is no victory.
        (0.5, 0.2, (0.3, 0.2, 0.4), "is not above chance, like its rival,", "nobody: not above chance"),
    ],
)
def test_outcome_of_one_probe(tmp_path, ours, theirs, pair, headline, winner):
    probe = probe_of(tmp_path, ours, theirs, pair)
    assert findings.headline([probe]) == [f"Against color alone the trained encoder {headline} in the one probe."]
    assert findings.winner(probe) == winner


def test_below_chance_is_explained(tmp_path):
    level = probe_of(tmp_path, 0.5, 0.46, (0.04, -0.1, 0.1))
    below = probe_of(tmp_path, 0.5, 0.44, (0.06, -0.1, 0.1))  # ± .05 around .44 ends at .49, chance is .5
    assert findings.below_chance([level]) == []
    (said,) = findings.below_chance([level, below])
    assert said.startswith("Below chance in kNN: groups that were held out resemble another class")


def test_headline_counts_every_probe(tmp_path):
    won, lost = (probe_of(tmp_path, 0.8, 0.7, (s * 0.1, s * 0.1 - 0.05, s * 0.1 + 0.05)) for s in (1, -1))
    level = probe_of(tmp_path, 0.8, 0.8, (0.0, -0.1, 0.1))
    (said,) = findings.headline([won, lost, won, level])
    assert said == "Against color alone the trained encoder wins in 2, loses in 1 and is undecided in 1 of 4 probes."


def test_results_of_other_weights_are_called_out(tiny_run, tmp_path):
    teacher = gather(tiny_run, [], None, None).teacher
    for weights, stale in (("0" * 64, True), (weights_sha256(teacher), False)):
        m = gather(tiny_run, [knn(tmp_path / "knn.json", weights=weights)], None, None)
        warned = [b for b in sections.verdict(m).blocks if isinstance(b, Words) and b.style == "warning"]
        assert ["does not have the weights" in b.lines[0] for b in warned] == [True] * stale


def test_release_of_this_run_is_recognized(tiny_run, tmp_path):
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "release")]) == 0
    text = report(tiny_run, tmp_path / "r.html", release=tmp_path / "release").text
    assert "holds the weights of this checkpoint" in text
    assert f'timm.create_model("local-dir:{tmp_path / "release"}", pretrained=True)' in text


def limits_of(run: Path, *found: Path) -> str:
    return " ".join(limits.limits(gather(run, list(found), None, None)).blocks[0].lines)


def test_limits_come_from_the_data(tiny_run, tmp_path):
    said = limits_of(tiny_run, knn(tmp_path / "knn.json"))
    for words in (
        "Only 4 patients",
        "2 sites (a, b) and no other, and no probe held a whole site out",
        "names no scanner",
        "Only H&E",
        "One magnification: 0.5 µm/px (about 20×)",
        "Class 'y' is rare (1 tiles, 2.1 %)",
        "8 steps of 8 tiles are 1.3 passes",
    ):
        assert words in said
    assert "synthetic" not in said
    assert "no probe held" not in limits_of(tiny_run, knn(tmp_path / "site.json", group="site"))


def test_what_is_missing_says_which_command_adds_it(tiny_run, tiny_shards, tmp_path):
    run, shards = tmp_path / "run", tmp_path / "shards"
    run.mkdir()
    config = (tiny_run / "config.yaml").read_text().replace("normalize: slide", "normalize: 'off'")
    (run / "config.yaml").write_text(config)
    shutil.copytree(tiny_shards, shards)
    write_slides(shards, ShardSet(shards).slides()[["slide"]])
    text = report(run, tmp_path / "r.html", shards=shards).text
    for words in (
        "'eosin eval knn E... --label L --group G --out knn.json'",
        "'eosin tile SLIDES --out SHARDS' makes them",
        f"'eosin stain fit {shards}' adds them",
        "'eosin train' writes metrics.jsonl",
        "No checkpoint yet",
        "--results R.json adds them",
        "'eosin eval mil E... --label L --group G --out R.json' adds it",
        "'eosin export RUN --out RELEASE'",
        "The run is not complete: 0 of 8 steps",
        "names no site",
    ):
        assert words in text


def test_a_line_being_written_is_left_out_and_a_broken_one_refused(tiny_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run / "config.yaml", run)
    lines = (tiny_run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    assert len(gather(run, [], None, None).records) == lines.count("\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "lo\n' + lines)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not JSON"):
        gather(run, [], None, None)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda r: r["run"].joinpath("config.yaml").unlink(), "is not a run: it has no config.yaml"),
        (lambda r: r["results"].write_text('{"schema": 99, "kind": "eosin results"}'), "holds no results of schema 1"),
        (lambda r: r["results"].unlink(), "does not exist; expected results"),
        (lambda r: shutil.rmtree(r["shards"]), "give its place with --shards"),
        (lambda r: r["release"].joinpath("config.json").unlink(), "is no release"),
        (lambda r: r["out"].mkdir(), "is a folder; give the path of an HTML file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_run, tiny_shards, tmp_path, capsys, break_it, words):
    paths = {name: tmp_path / name for name in ("run", "shards", "release")}
    paths |= {"results": knn(tmp_path / "knn.json"), "out": tmp_path / "report.html"}
    paths["run"].mkdir()
    shutil.copy(tiny_run / "config.yaml", paths["run"])
    shutil.copytree(tiny_shards, paths["shards"])
    paths["release"].mkdir()
    (paths["release"] / "config.json").write_text("{}")
    break_it(paths)
    capsys.readouterr()
    options = [x for name in ("results", "shards", "release", "out") for x in (f"--{name}", str(paths[name]))]
    assert main(["report", str(paths["run"]), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not paths["out"].is_file()
    assert not list(tmp_path.glob(".*partial*"))


def laid(cells: list[tuple[int, int]], images: np.ndarray | None = None) -> pictures.Mosaic:
    images = np.zeros((len(cells), 8, 8, 3), np.uint8) if images is None else images
    return pictures.Mosaic(np.arange(len(cells)), images, np.array(cells), True, True)


def test_mosaic_puts_tiles_where_they_lie(tiny_shards):
    # Positions of slide 1: x = 64, 320, ... in one row, so 256 pixels from tile to tile.
    found = pictures.mosaic(ShardSet(tiny_shards), 1)
    assert found.cells.tolist() == [[0, i] for i in range(12)]
    assert found.tiles.tolist() == list(range(1, 48, 4))
    red, blue = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    image = laid([(0, 2), (1, 0)]).paint(np.stack([red, blue]))
    side = pictures.MOSAIC_PIXELS // 3
    assert image.shape == (2 * side, 3 * side, 3)
    assert image[side // 2, 2 * side + side // 2].tolist() == [255, 0, 0]
    assert image[side + side // 2, side // 2].tolist() == [0, 0, 255]
    assert (image[: side // 2, : 2 * side] == 255).all()


def test_places_follow_the_slides_resolution_across_gaps():
    # Tiles of 256 px at 0.5 µm/px on a slide of 0.2499 µm/px: 512.2 pixels apart, none beside another.
    places = np.array([[0, 0], [1024, 0], [round(40 * 512.2), round(77 * 512.2)]])
    assert pictures._cells(places, 512.2).tolist() == [[0, 0], [2, 0], [40, 77]]


def test_of_a_large_slide_the_fullest_window_is_shown():
    rng = np.random.default_rng(0)
    crowd = [(100 + r, 30 + c) for r in range(12) for c in range(12) if (r, c) != (3, 4)]
    strewn = [(int(r), int(c)) for r, c in rng.integers(0, 90, (200, 2))]
    cells = np.array(crowd + sorted(set(strewn)))
    assert sorted(pictures._window(cells, 12).tolist()) == list(range(len(crowd)))


def test_heat_is_gray_without_attention_and_vermilion_at_full():
    white = np.full((3, 8, 8, 3), 255, np.uint8)
    mosaic = laid([(0, 0), (0, 1), (0, 2)], white)
    image = pictures.heat(mosaic, np.array([0.0, 4.0, 8.0]), 4.0)
    side = image.shape[0]
    colors = [image[side // 2, side // 2 + i * side].tolist() for i in range(3)]
    full = [round(255 * 0.15 + c * 0.85) for c in pictures.HEAT]
    assert colors == [[255, 255, 255], full, full]


def test_crops_shown_are_the_tile_itself_when_augmentation_is_off(tiny_run):
    m = gather(tiny_run, [], None, None)
    config = m.config.model_copy(
        update={
            "crops": m.config.crops.model_copy(update={"global_size": 64, "global_scale": [1.0, 1.0]}),
            "augment": m.config.augment.model_copy(
                update={"flips": False, "rotate90": False, "jitter": 0.0, "gray": 0.0, "blur": [0.0, 0.0, 0.0]}
            ),
            "stain": m.config.stain.model_copy(update={"augment": []}),
            "objective": m.config.objective.model_copy(update={"mask_probability": 1.0, "mask_ratio": [0.5, 0.5]}),
        }
    )
    phase = Phase(range(config.run.steps), config, Mixture({m.shards.name: 1.0}), m.normalizer, None)
    found = views(phase, 4)
    assert sorted(v.slide for v in found) == [0, 1, 2, 3]
    for view in found:
        expected = pictures.normalized(m.normalizer, view.raw[None], [view.slide])[0]
        np.testing.assert_array_equal(view.normalized, expected)
        for crop in view.global_crops:
            hidden = (crop == 150).all(axis=2) | (crop == 105).all(axis=2)
            # Half of the 4 × 4 patches of 16 px.
            assert hidden.sum() == 8 * 16 * 16
            whole = np.abs(crop.astype(int) - expected.astype(int))[~hidden]
            # An aspect that happens to be near 1 can crop a few rows.
            assert np.median(whole) <= 1


def test_token_colors_are_the_principal_components(tiny_run):
    from sklearn.decomposition import PCA

    m = gather(tiny_run, [], None, None)
    purple, pink, white = (90, 60, 150), (230, 150, 190), (250, 250, 250)
    images = np.empty((2, 64, 64, 3), np.uint8)
    images[:, :, :32], images[:, :, 32:], images[1, 32:] = purple, pink, white
    rng = np.random.default_rng(0)
    images[1, :32] = rng.integers(0, 120, (32, 64, 3))
    mosaic = laid([(0, 0), (0, 1)], images)
    (image,), share = pictures.token_pictures(m.teacher, m.config, None, [(0, mosaic)])
    side = image.shape[0]
    quarter = side // 4
    left, right = image[quarter, quarter], image[quarter, side - quarter]
    assert np.abs(left.astype(int) - right).max() > 40  # the two halves of the first tile differ
    # The same color below, but for the patch's position.
    np.testing.assert_allclose(image[side - quarter, quarter].astype(int), left, atol=8)
    assert image[side - quarter, side + quarter].tolist() == [BACKGROUND] * 3

    tiles = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    small = torch.nn.functional.interpolate(tiles, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (m.config.augment.mean, m.config.augment.std))
    with torch.no_grad():
        tokens = m.teacher.forward_features((small - mean) / std)[:, 1:].reshape(8, -1)
    tissue = tokens[[0, 1, 2, 3, 4, 5]].double().numpy()
    assert share == pytest.approx(PCA(3).fit(tissue).explained_variance_ratio_.sum(), abs=1e-4)


@pytest.mark.slow
def test_a_browser_shows_it_without_errors_or_requests(full, page, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no Chromium is installed")
    (tmp_path / "report.html").write_text(page.raw, encoding="utf-8")
    said, asked = [], []
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((tmp_path / "report.html").as_uri())
        loaded = tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        shot = tab.screenshot(full_page=True)
        browser.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert loaded
    assert wide <= 1280
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))
    assert pixels.shape[0] > 4000
    assert pixels.reshape(-1, 3).std(axis=0).min() > 5


def test_a_set_tiled_beside_is_shown_with_why_it_stays_as_it_is(tiny_run, tiny_shards, tmp_path):
    from eosin.ssl.stain.fits import fit_slides

    other = tmp_path / "other-stain"
    shutil.copytree(tiny_shards, other)
    write_slides(other, ShardSet(other).slides().assign(stain="IHC"))
    fit_slides(ShardSet(other))
    write_report(tiny_run, tmp_path / "r.html", results=[], shards=None, release=None, title="t", beside=[other])
    page = (tmp_path / "r.html").read_text()
    assert "not trained on: other-stain" in page
    assert "H&amp;E operations are off for 4 slides" in page


@pytest.mark.parametrize("broken", ["{garbage", "[1]", '{"convention": "eosin", "vectors": 1}'])
def test_a_broken_stain_fit_is_said_in_a_line_and_the_report_goes_on(tiny_run, tiny_shards, tmp_path, broken):
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(tiny_shards, shards)
    shutil.copytree(tiny_run, run)
    table = ShardSet(shards).slides()
    table.loc[1, "stain_fit"] = broken
    write_slides(shards, table)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["stain"] |= {"normalize": "off", "augment": []}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = gather(run, [], shards, None)
    said = [b for b in exhibits.stain(found).blocks if isinstance(b, Words) and b.style == "warning"]
    assert [len(b.lines) for b in said] == [1]
    for part in (f"1, the first of slide '{table['slide'][1]}'", f"'eosin stain fit {shards}'"):
        assert part in said[0].lines[0]
