"""The comparison page: planted leaks, tints, wrong labels and uneven classes are on it; its numbers are recomputed."""

from __future__ import annotations

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix

from eosin.data_tools.embeddings import Embeddings, write_embeddings
from eosin.data_tools.results import read_results, write_results
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.eval.embed import embed
from eosin.eval.encoders import load_encoder
from eosin.eval.probe import run_knn
from eosin.eval.question import Question
from eosin.eval.report import comparison, comparison_plots, findings
from eosin.eval.report import comparison_samples as samples
from eosin.eval.report.comparison import TaskDone, write_comparison
from eosin.launch.cli import main

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$"


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, visible text, and the cells of each row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[tuple[str, dict[str, str | None]]]] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)
        if self.tags and self.tags[-1][0] in ("td", "th") and data.strip():
            cell, attrs = self.rows[-1][-1]
            self.rows[-1][-1] = (cell + data.replace("\u00a0", " "), attrs)

    def row(self, *start: str) -> list[str]:
        """The first row whose cells begin so."""
        return next(cells for row in self.rows if (cells := [c for c, _ in row])[: len(start)] == list(start))

    def pictures(self, alt: str) -> list[str]:
        return [str(a["src"]) for tag, a in self.tags if tag == "img" and str(a["alt"]).startswith(alt)]


def page_of(folder: Path, *tasks: TaskDone, title: str = "A suite") -> Page:
    write_comparison(folder / "index.html", title, tasks)
    return Page(folder / "index.html")


@pytest.fixture(scope="module")
def tinted(tmp_path_factory) -> TaskDone:
    """40 patients of two classes at two sites, one of which stains redder; 18 of 20 of a class are of one site.

    Tiles show noise of one texture: only the tint tells the classes apart, and features of the other encoder hardly
    do. Every name that a user gives is hostile.
    """
    folder = tmp_path_factory.mktemp("tinted")
    (folder / "shards").mkdir()
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder / "shards")
    classes = np.arange(40) % 2
    sites = np.where(np.arange(40) >= 4, classes, 1 - classes)
    for n in range(240):
        image = rng.normal((150 + 60 * sites[n % 40], 100, 160), 25, (24, 24, 3)).clip(0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(image).save(data, "png")
        meta = {"x": 24 * n, "y": 0, "mpp": 0.5}
        writer.add(f"t{n}", data.getvalue(), "png", meta, slide=n % 40)
    names = [f"p{p}{HOSTILE}" for p in range(40)]
    table = {"slide": names, "patient": names, "site": np.where(sites, HOSTILE, "plain"), "tiles": 6}
    table["label"] = np.where(classes, HOSTILE, "normal")
    writer.finish(pd.DataFrame(table), tile_size=24, mpp=0.5, config={})
    shards = ShardSet(folder / "shards")
    embed(load_encoder("color"), shards, folder / "color.safetensors")
    known = shards.table()
    features = rng.normal(size=(240, 8)) + 0.4 * (known["label"] == HOSTILE).to_numpy()[:, None]
    fingerprint = {"name": HOSTILE, "shards": shards.identity, "weights": "0" * 64}
    write_embeddings(folder / "m.safetensors", Embeddings(features.astype(np.float32), known, fingerprint))
    embeddings = [folder / "m.safetensors", folder / "color.safetensors"]
    question = Question(embeddings, "label", "patient", folder / "knn.json", by=("site",))
    run_knn(question)
    return TaskDone(f"tint {HOSTILE}", HOSTILE, folder / "shards", embeddings, [folder / "knn.json"], [])


@pytest.fixture(scope="module")
def page(tinted, tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), tinted, title=HOSTILE)


def study(write, tmp_path: Path, features: np.ndarray, columns: dict, name: str = "study") -> TaskDone:
    """A task of one encoder, probed by kNN."""
    embeddings = [write(f"{name}-e", features, **columns)]
    run_knn(Question(embeddings, "label", "patient", tmp_path / f"{name}.json"))
    return TaskDone(name, "A study.", None, embeddings, [tmp_path / f"{name}.json"], [])


def test_page_loads_and_runs_nothing_and_escapes_everything(page):
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action", "data")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base", "link script"}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert page.raw.count("&lt;script&gt;alert(1)") > 20
    assert "<script" not in page.raw
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")


def test_page_is_the_same_each_time_and_bounded(tinted, page, tmp_path):
    assert page_of(tmp_path, tinted, title=HOSTILE).raw == page.raw
    assert len(page.raw) < 2_600_000


def test_a_planted_tint_is_said_in_words_and_numbers(tinted, page):
    assert "color has the highest balanced accuracy" in page.text
    assert "Color alone does as well as anything here" in page.text
    # 18 of 20 patients of each class are of the site that most of it come from.
    said = "who knows nothing of a tile but its 'site' names its class with a balanced accuracy of .90 (chance .50)"
    assert f": {said}" in page.text  # at the top, behind the task's name
    assert f"W{said[1:]}" in page.text
    table = ShardSet(tinted.shards).table()
    color = samples.read_embeddings(tinted.embeddings[1]).features.astype(np.float64)
    plane = PCA(2, svd_solver="full").fit(color)
    places = pd.DataFrame(plane.transform(color))
    shares = []
    for values in (table["label"], table["site"]):
        means = places.groupby(values.to_numpy()).transform("mean")
        shares.append(means.pow(2).to_numpy().sum() / places.pow(2).to_numpy().sum())
    said = page.row("color", findings.number(plane.explained_variance_ratio_.sum()))
    assert said[2:] == [findings.number(s) for s in shares]
    assert shares[1] > 0.8 > shares[0]
    assert any("by subgroup" in word.lower() for word in page.words)


def test_neighbors_have_frames_of_their_class(tinted, page):
    first, *_ = page.pictures("the tiles nearest to it for color")
    import base64

    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.split(",")[1]))).convert("RGB")).astype(int)
    assert strip.shape == (96, 5 * 102, 3)
    alt = next(a["alt"] for _, a in page.tags if a.get("src") == first)
    counts = {name: int(n) for n, name in re.findall(r"(\d) (normal|<script)", str(alt))}
    right = [abs(strip[48, 102 * i + 1] - (0, 158, 115)).max() < 40 for i in range(5)]
    wrong = [abs(strip[48, 102 * i + 1] - (213, 94, 0)).max() < 40 for i in range(5)]
    # The first tile that is asked for is of the first class.
    assert sum(right) == counts.get("<script", 0)
    assert sum(wrong) == counts.get("normal", 0)
    assert sum(right) + sum(wrong) == 5


def test_nearest_is_brute_force_over_other_groups(monkeypatch):
    rng = np.random.default_rng(0)
    features, groups = rng.normal(size=(90, 6)), np.array([f"g{i % 7}" for i in range(90)])
    monkeypatch.setattr(samples, "CHUNK", 200)  # many chunks
    found = samples.nearest(features, groups, np.arange(20), k=4)
    for row, near in enumerate(found):
        others = [j for j in range(90) if groups[j] != groups[row]]
        cosine = [
            features[row] @ features[j] / np.linalg.norm(features[row]) / np.linalg.norm(features[j]) for j in others
        ]
        assert near.tolist() == [others[i] for i in np.argsort(cosine)[::-1][:4]]
    lonely = samples.nearest(features[:3], np.array(["a", "a", "b"]), np.arange(3), k=2)
    assert lonely.tolist() == [
        [2, -1],
        [2, -1],
        samples.nearest(features[:3], np.array(list("aab")), np.array([2]), 2)[0].tolist(),
    ]


def test_alike_counts_pairs_of_different_groups():
    values, groups = np.array(list("aabbb")), np.array(list("xyxyz"))
    near = np.array([[1, 3], [0, 2], [4, -1], [0, 4], [2, 3]])
    pairs = [[values[i] == values[j] for j in range(5) if groups[i] != groups[j]] for i in range(5)]
    same, chance = samples.alike(values, near, groups)
    assert same == pytest.approx(6 / 9)
    assert chance == pytest.approx(np.mean([np.mean(p) for p in pairs]))


@pytest.mark.parametrize("shape", [(60, 5), (5, 60), (40, 1)])
def test_principal_components_are_those_of_scikit_learn(shape):
    features = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    points, shares = samples.principal(features.astype(np.float32))
    reference = PCA(min(2, shape[1]), svd_solver="full").fit(features.astype(np.float32).astype(np.float64))
    places = reference.transform(features.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(np.abs(points[:, : places.shape[1]]), np.abs(places), atol=1e-8)
    np.testing.assert_allclose(shares[: places.shape[1]], reference.explained_variance_ratio_, atol=1e-10)


def test_flipped_labels_are_on_the_disputed_sheet(write, cohort, tmp_path):
    features, columns = cohort(8.0)
    features[:, 0] -= 4  # classes on either side, as cosine sees them
    rng = np.random.default_rng(1)
    flipped = rng.permutation(320)[:32]
    columns["label"][flipped] = np.where(columns["label"][flipped] == "tumor", "normal", "tumor")
    done = study(write, tmp_path, features, columns)
    results = findings.load(done.results)
    found = samples.disputed(findings.probes(results), results)
    planted = {f"t{i}" for i in flipped}
    hits = len(planted & set(found["key"]))
    print(f"{hits} of {len(planted)} flips found, {hits} of {len(found)} disputed were flipped")
    assert hits >= 0.9 * len(planted)
    assert hits >= 0.9 * len(found)
    assert planted >= set(found["key"].head(20))
    text = page_of(tmp_path, done).text
    assert f"{len(found)} of 320 tiles are confidently called another class" in text
    for (label, said), n in found.groupby(["label", "said"]).size().items():
        assert f"{label} {said} {n}" in text
    assert found["key"][0] in text


def test_disputed_means_confident_and_agreed_by_the_best(tmp_path):
    rows = [encoder("a", 0.8), encoder("b", 0.78), encoder("c", 0.6)]
    pairs = [pair("a", "b", 0.02, False), pair("a", "c", 0.2, True), pair("b", "c", 0.2, True)]
    path = made_up(tmp_path / "r.json", rows, pairs, classes=["x", "y"])
    # p(x): own labels get .60 of x and .65 of y on average, so k2 is called y with .8, and k5 is wrong but unsure.
    a = [0.9, 0.7, 0.2, 0.1, 0.4, 0.55]
    b = [0.9, 0.8, 0.1, 0.1, 0.2, 0.30]
    c = [0.9, 0.9, 0.9, 0.1, 0.1, 0.10]  # clearly worse, so it is not asked
    known = {"key": [f"k{i}" for i in range(6)], "label": list("xxxyyy")}
    frames = [
        pd.DataFrame(known | {"encoder": n, "probability_x": p, "probability_y": 1 - np.array(p)})
        for n, p in (("a", a), ("b", b), ("c", c))
    ]
    result = findings.Results(path, read_results(path)[0], pd.concat(frames))
    found = samples.disputed(findings.probes([result]), [result])
    assert found[["key", "label", "said"]].values.tolist() == [["k2", "x", "y"]]
    assert found["sure"][0] == pytest.approx((0.8 - 0.2 + 0.9 - 0.1) / 2)


def test_right_labels_are_hardly_disputed(write, cohort, tmp_path):
    features, columns = cohort(8.0)
    features[:, 0] -= 4
    results = findings.load(study(write, tmp_path, features, columns).results)
    assert len(samples.disputed(findings.probes(results), results)) <= 3


def test_uneven_classes_are_said(write, cohort, tmp_path):
    features, columns = cohort(3.0)
    even = study(write, tmp_path, features, columns, "even")
    tumor = np.flatnonzero(columns["label"] == "tumor")
    columns["label"][tumor[:112]] = ""  # 48 of 160 stay
    text = page_of(tmp_path, even, study(write, tmp_path, features, columns, "uneven")).text
    assert text.count("Classes are uneven") == 1
    assert text.count("classes are uneven: 'normal' has 3.3 times as many as 'tumor'.") == 1
    assert "uneven: classes are uneven" in text  # at the top, behind the task's name
    assert "Classes are uneven: 'normal' has 3.3 times as many as 'tumor'" in text
    assert "(.77 by naming 'normal' always)" in text  # 160 of 208
    assert "normal 160 76.9 % tumor 48 23.1 %" in text


def test_many_sites_that_give_the_class_away_are_said(write, cohort, tmp_path):
    features, columns = cohort(3.0)
    # Each patient at a site of its own: more than a plot tells apart, and each of one class.
    done = study(write, tmp_path, features, columns | {"site": [f"h{p}" for p in columns["patient"]]})
    page = page_of(tmp_path, done)
    assert "who knows nothing of a tile but its 'site' names its class with a balanced accuracy of 1.00" in page.text
    assert page.row("study-e")  # the page is whole


def test_uneven_classes_of_pixels_are_said(tmp_path):
    table = pd.DataFrame({"encoder": ["a"], "key": ["t"], "group": ["p"], "fold": [0]})
    each = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"name": "a", "encoder": "a", "variant": "", "fingerprint": {"name": "a"}, "details": {}}
    row |= {"metrics": {"dice": each, "iou": each, "pixel_accuracy": each}}
    row |= {"classes": {name: {"n": 1, "clusters": 1, "dice": each} for name in ("stroma", "nucleus")}}
    results = {
        "protocol": "dense-linear",
        "parameters": {"patches": 9, "seed": 0},
        "primary": "dice",
        "masks": "masks",
        **{"label": "masks", "group": "patient", "unit": "tile", "n": 1, "groups": 1, "left_out": {}},
        **{"classes": ["stroma", "nucleus"], "class_counts": [900, 100], "chance": {"dice": 0.5}},
        **{"encoders": [row], "comparisons": [], "verdict": [], "notes": []},
    }
    write_results(tmp_path / "dense.json", results, table)
    text = page_of(tmp_path, TaskDone("nuclei", "", None, [], [tmp_path / "dense.json"], [])).text
    assert "stroma 900 90.0 % nucleus 100 10.0 %" in text
    assert "'stroma' has 9.0 times as many as 'nucleus'" in text
    assert "so Dice is what to read" in text


def test_a_leak_is_refused_or_allowed_in_sight(write, cohort, tmp_path, capsys):
    features, columns = cohort(3.0)
    columns["box"] = [f"b{i % 20}" for i in range(320)]
    path = write("e", features, **columns)
    asked = ["eval", "knn", str(path), "--label", "label", "--group", "box"]
    assert main([*asked, "--out", str(tmp_path / "r.json")]) == 2
    reason = capsys.readouterr().err.strip()
    assert main([*asked, "--out", str(tmp_path / "a.json"), "--allow-leak", f"to see {HOSTILE}"]) == 0
    refused = TaskDone("refused", "", None, [path], [], [("knn", reason), ("mlp", "one class"), ("linear", reason)])
    allowed = TaskDone("allowed", "", None, [path], [tmp_path / "a.json"], [])
    page = page_of(tmp_path, refused, allowed)
    assert f"refused: knn, linear were refused: {' '.join(reason.split())} refused: mlp was refused" in page.text
    assert page.row("Encoder")[1:] == ["knn", "mlp", "linear"]
    assert page.row("e")[1:] == ["refused"] * 3
    assert page.row("Encoder", "kNN: balanced accuracy (leak allowed)")
    assert "kNN was scored in spite of a leak: 40 of 'patient'" in page.text
    assert f"Reason given: to see {' '.join(HOSTILE.split())}" in page.text
    assert "no box on both sides" not in page.text
    assert "<script" not in page.raw


def encoder(name: str, value: float | None, variant: str = "", metric: str = "balanced_accuracy") -> dict:
    found = None if value is None else {"value": value, "low": value - 0.05, "high": value + 0.05}
    row = {"name": f"{name} + {variant}" if variant else name, "encoder": name, "variant": variant}
    return row | {"fingerprint": {"name": name, "weights": "0"}, "metrics": {metric: found}, "details": {}}


def pair(a: str, b: str, value: float, sure: bool, metric: str = "balanced_accuracy") -> dict:
    return {"a": a, "b": b, "metric": metric, "value": value, "low": value - 0.1, "high": value, "excludes_zero": sure}


def made_up(path: Path, encoders: list[dict], comparisons: list[dict], **more: object) -> Path:
    frame = {"protocol": "x-probe", "parameters": {"seed": 0}, "label": "l", "group": "g", "n": 9, "groups": 3}
    frame |= {"unit": "tile", "classes": [], "chance": {"balanced_accuracy": 0.5}, "notes": []} | more
    said = pd.DataFrame({"encoder": [e["name"] for e in encoders], "key": "t0", "group": "g0", "said": 1.0})
    write_results(path, frame | {"encoders": encoders, "comparisons": comparisons}, said)
    return path


def test_table_marks_the_best_and_those_that_cannot_be_told_from_it(tmp_path):
    rows = [encoder(n, v) for n, v in (("color", 0.6), ("random:m", 0.55), ("a", 0.8), ("b", 0.78), ("c", 0.7))]
    pairs = [pair("a", "b", 0.02, False), pair("c", "a", -0.1, True), pair("color", "a", -0.2, True)]
    page = page_of(tmp_path, TaskDone("t", "", None, [], [made_up(tmp_path / "r.json", rows, pairs)], []))
    top = [[c for c, _ in row] for row in page.rows[:7]]
    assert [row[0] for row in top] == ["Encoder", "a", "b", "c", "random:m", "color", "chance"]
    styles = {row[0][0]: row[1][1].get("class", "").strip() for row in page.rows[1:7]}
    assert styles == {"a": "best", "b": "level", "c": "", "random:m": "", "color": "", "chance": ""}
    assert top[1][1] == ".80 [.75, .85]"
    assert "a has the highest balanced accuracy, .80 [.75, .85], and cannot be told from b." in page.text


def test_other_kinds_of_results_are_shown(tmp_path):
    rows = [encoder("a", 0.4, metric="pearson"), encoder("b", None, metric="pearson")]
    rows[0]["metrics"]["mae"] = {"value": 1.5, "low": 1.25, "high": 1.75}
    path = made_up(tmp_path / "r.json", rows, [], primary="pearson", chance={"pearson": 0.0, "mae": None})
    page = page_of(tmp_path, TaskDone("t", "", None, [], [path], []))
    assert page.row("Encoder", "x-probe: Pearson r")
    assert page.row("Encoder", "Pearson r", "MAE in deviations")
    assert page.row("a", ".40 [.35, .45]", "1.50 [1.25, 1.75]")
    assert page.row("b", "–", "–")
    assert page.row("chance", ".00", "–")
    assert "a has the highest Pearson r, .40 [.35, .45]" in page.text


def test_variants_that_differ_in_a_number_become_a_curve(tmp_path):
    rows = [encoder(n, 0.6 + s / 100, f"{s} shot{'s' * (s > 1)}") for n in "ab" for s in (1, 4, 16)]
    page = page_of(tmp_path, TaskDone("t", "", None, [], [made_up(tmp_path / "r.json", rows, [])], []))
    assert page.row("Encoder")[1:] == ["x-probe, 16 shots: balanced accuracy"]
    assert len(page.pictures("the compared metric against the number")) == 1
    assert page.row("b + 4 shots", ".64 [.59, .69]")


def test_confusions_are_those_of_scikit_learn(tinted, page):
    data, said = read_results(tinted.results[0])
    said = said[said["encoder"] == "color"]
    truth = confusion_matrix(said["label"], said["predicted"], labels=data["classes"])
    shaded = [(c, a) for row in page.rows for c, a in row if "shaded" in str(a.get("class"))]
    counts = [int(str(a["title"]).split(" of ")[0]) for _, a in shaded[4:8]]  # the second encoder's
    assert counts == truth.flatten().tolist()
    shares = (truth / truth.sum(axis=1, keepdims=True)).flatten()
    assert [c for c, _ in shaded[4:8]] == [findings.number(s) for s in shares]


def test_without_tiles_there_are_numbers_and_no_pictures_of_tiles(tinted, tmp_path):
    gone = TaskDone("t", "", tmp_path / "gone", tinted.embeddings, tinted.results, [])
    page = page_of(tmp_path, gone)
    assert not page.pictures("the tiles nearest")
    assert page.row("Encoder", "same class", "same site")
    assert "No pictures of tiles" in page.text


def test_pictures_stay_within_their_bound(tinted, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "PICTURE_BYTES", 150_000)
    page = page_of(tmp_path, tinted)
    sizes = [len(str(a["src"])) for tag, a in page.tags if tag == "img"]
    assert 0 < sum(sizes) <= 150_000
    assert re.search(r"\d+ pictures are left out, since the page has a bound", page.text)


def test_a_folder_is_no_page_and_nothing_is_left_behind(tinted, tmp_path):
    with pytest.raises(comparison.UserError, match="is a folder"):
        write_comparison(tmp_path, "t", [tinted])
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(comparison.UserError, match="holds no results"):
        write_comparison(tmp_path / "p.html", "t", [TaskDone("t", "", None, [], [tmp_path / "r.json"], [])])
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.slow
def test_a_browser_shows_it_without_errors_or_requests(page, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no Chromium is installed")
    (tmp_path / "page.html").write_text(page.raw, encoding="utf-8")
    said, asked = [], []
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        for width in (1400, 390):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto((tmp_path / "page.html").as_uri())
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_encoders_of_one_role_have_colors_of_their_own():
    roles = {"a": "trained", "b": "other", "random:a": "random", "random:b": "random", "color": "color"}
    colors = comparison_plots.colors_of(roles)
    assert len({*colors.values()}) == len(roles)
    grays = [tuple(int(colors[n][i : i + 2], 16) for i in (1, 3, 5)) for n in ("random:a", "random:b")]
    assert all(max(gray) - min(gray) < 16 for gray in grays)
    assert abs(grays[0][0] - grays[1][0]) > 40
