"""The report: one page that loads nothing, escapes everything, says who won whoever won, and draws what is there."""

from __future__ import annotations

import argparse
import base64
import io
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from eosin.data_tools import qc
from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results, write_results
from eosin.data_tools.shards import ShardSet, slide_key, write_slides
from eosin.eval.encoders import weights_sha256
from eosin.eval.probe import attention_path
from eosin.eval.report import exhibits, findings, limits, sections, write_report
from eosin.eval.report.material import gather
from eosin.eval.report.page import Words
from eosin.launch.cli import main
from eosin.launch.verbs import eval as eval_verb

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


def test_command_of_results_says_every_option_that_made_them(cohort, write, tmp_path):
    features, columns = cohort(2.0)
    columns |= {"scanner": [f"it's {i % 2}" for i in range(320)], "box": [f"b{i % 8}" for i in range(320)]}
    path = write("e", features, **columns)
    for verb, *options in (
        ["knn", "--group", "patient", "--k", "3", "10", "--split", "monte-carlo", "--repeats", "2", "--folds", "4"],
        ["knn", "--group", "patient", "--preset", "uni-knn", "--by", "scanner", "--cluster", "slide", "--seed", "7"],
        ["knn", "--group", "box", "--split", "leave-one-group-out", "--allow-leak", "it's a test; $HOME"],
        ["retrieval", "--group", "patient", "--top", "1", "2"],
        ["fewshot", "--group", "patient", "--shots", "1", "2", "--episodes", "4", "--preset", "thunder-simpleshot"],
    ):
        out = tmp_path / f"r {verb}.json"
        given = [verb, str(path), "--label", "label", *options, "--out", str(out)]
        assert main(["eval", *given]) == 0
        command = sections.eval_command(findings.load([out])[0], str(path))
        assert parsed(shlex.split(command)[2:]) == parsed(given)


def parsed(arguments: list[str]) -> argparse.Namespace:
    """What 'eosin eval' understands."""
    parser = argparse.ArgumentParser()
    eval_verb.add_arguments(parser)
    return parser.parse_args(arguments)


def test_other_kinds_of_results_go_into_the_report(tiny_run, tmp_path):
    names = ("pearson", "mae")
    path = results(tmp_path / "r.json", {TRAINED: 0.4, COLOR: 0.2}, {}, "ridge", primary="pearson", classes=[])
    data, said = read_results(path)
    for row in data["encoders"]:
        row["metrics"] = {m: metric(1.5) if m == "mae" else row["metrics"]["auroc"] for m in names}
    data["encoders"][1]["metrics"]["pearson"] = None
    pair = {"a": TRAINED, "b": COLOR, "metric": "pearson", "value": 0.2, "low": 0.1, "high": 0.3, "excludes_zero": True}
    data |= {"chance": {"pearson": None, "mae": 1.0}, "comparisons": [pair], "class_counts": []}
    write_results(path, {k: v for k, v in data.items() if k not in ("schema", "kind")}, said)
    text = report(tiny_run, tmp_path / "r.html", [path, knn(tmp_path / "knn.json")]).text
    assert "Encoder Pearson r MAE in deviations run .40 [.35, .45] 1.50 [1.45, 1.55] color – 1.50" in text
    assert "chance – 1.00" in text
    assert "Ridge regression" in text
    assert "run − color +.20 [+.10, +.30] excludes zero" in text


def test_further_metrics_and_an_allowed_leak_are_shown(tmp_path):
    leaks = {"found": [{"what": "slide", "count": 3, "example": "s", "samples": 9}], "reason": "why not"}
    path = results(tmp_path / "r.json", {TRAINED: 0.8}, {}, leaks=leaks, chance={"quadratic_kappa": 0.0})
    data, _ = read_results(path)
    data["encoders"][0]["metrics"]["quadratic_kappa"] = metric(0.6)
    probe = findings.probes([findings.Results(path, data, pd.DataFrame())])[0]
    assert [findings.title_of(m) for m in probe.metrics][-1] == "quadratic kappa"
    assert findings.metric_rows(probe)[0][-1] == ".60\u00a0[.55,\u00a0.65]"
    assert "no patient on both sides" not in probe.conditions
    assert "a leak was allowed: 3 of 'slide' on both sides of a split" in probe.conditions


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
