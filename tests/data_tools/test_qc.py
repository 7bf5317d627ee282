"""The picture of a slide against drawn shapes, and the page of all slides in a real browser."""

import io
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from eosin.data_tools.qc import COLORS, GRID, OUTLINE, color_of, picture, write_page
from eosin.data_tools.shards import slide_key
from eosin.data_tools.tissue import REASONS, Tissue

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{7*7}} &amp; \u202eabc"


# Waits for a picture; `wait_for_function` would need eval, which the page forbids.
SEEN = """async n => {
    const image = document.images[n];
    if (!image.complete) await new Promise(done => image.addEventListener("load", done));
    if (!image.naturalWidth) throw new Error("no picture");
}"""


def row(slide: str, **facts: object) -> dict[str, object]:
    dropped = {f"dropped_{reason}": 0 for reason in ("background", "pen", "blur", "limit")}
    return {"slide": slide, "state": "done", "reason": "", "tiles": 0, "tissue_mm2": 0.0} | dropped | facts


def colored(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (image == color).all(axis=-1)


def test_every_reason_has_a_color_of_its_own():
    colors = [*map(color_of, REASONS), OUTLINE, GRID]
    assert set(REASONS) <= set(COLORS)
    apart = [max(abs(a - b) for a, b in zip(one, other)) for i, one in enumerate(colors) for other in colors[:i]]
    assert min(apart) > 40
    unheard_of = {color_of(reason) for reason in ("coverslip", "dust", "fold", "bubble", "fold", "")}
    assert len(unheard_of - set(colors)) == 5


def test_picture_shows_outline_holes_grid_and_each_rejected_area():
    image = np.full((200, 300, 3), 240, np.uint8)
    mask, pen, unknown = np.zeros((3, 100, 150), bool)  # half as fine as the picture
    mask[20:80, 20:80] = True
    mask[40:60, 40:60] = False
    pen[10:90, 100:110] = True
    unknown[10:90, 120:130] = True
    drawn = picture(image, Tissue(mask, {"pen_red": pen, "dust": unknown}), np.array([[46.0, 50, 74, 78]]))
    for reason, left in (("pen_red", 200), ("dust", 240)):
        tint = tuple(120 + c // 2 for c in color_of(reason))
        truth = np.zeros((200, 300), bool)
        truth[20:180, left : left + 20] = True
        np.testing.assert_array_equal(colored(drawn, tint), truth)
    edge = np.zeros((200, 300), bool)
    edge[50:78, 46:74] = True
    edge[51:77, 47:73] = False
    np.testing.assert_array_equal(colored(drawn, GRID), edge)
    outline = colored(drawn, OUTLINE)
    assert outline[40, 40:160].all()
    assert outline[100, [40, 159]].all()  # left and right
    assert outline[79:81, 90].any()  # the hole's upper edge
    assert outline.sum() < 2 * (4 * 120 + 4 * 44)
    assert (image == 240).all()


def test_tiles_at_given_places_are_drawn_without_a_tissue_mask():
    drawn = picture(np.full((60, 60, 3), 240, np.uint8), None, np.array([[10, 10, 30, 30]]))
    assert colored(drawn, GRID).sum() == 4 * 19


def test_names_stand_above_their_points_and_inside_the_picture():
    image = np.full((400, 600, 3), 200, np.uint8)
    places = {"A-1": (100.0, 100.0), "B-12": (300.0, 200.0), "corner": (599.0, 0.0), "low": (0.0, 399.0)}
    drawn = picture(image, None, np.zeros((0, 4)), places)
    changed = (drawn != image).any(axis=-1)
    count, _, stats, _ = cv2.connectedComponentsWithStats(
        cv2.dilate(changed.astype(np.uint8), np.ones((9, 9), np.uint8)), connectivity=8
    )
    assert count - 1 == 4
    boxes = {}
    for left, top, width, height, _ in stats[1:].tolist():
        x, y = left + width / 2, top + height / 2
        boxes[min(places, key=lambda name: np.hypot(places[name][0] - x, places[name][1] - y))] = (x, y, height)
    for name in ("A-1", "B-12"):
        x, y, height = boxes[name]
        assert x == pytest.approx(places[name][0], abs=4)
        assert places[name][1] - 25 < y < places[name][1] - 4
        assert height < 40
    assert set(boxes) == set(places)
    # What is moved inside is whole.
    for name, part in (("corner", drawn[:60, 400:]), ("low", drawn[340:, :200])):
        middle = picture(image, None, np.zeros((0, 4)), {name: (300, 200)})
        assert (part < 100).all(axis=-1).sum() == (middle < 100).all(axis=-1).sum() > 10


class Parsed(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.texts.append(data.strip())


def test_page_without_its_script(tmp_path):
    (tmp_path / "qc").mkdir()
    (tmp_path / "qc" / f"{slide_key(HOSTILE)}.png").touch()
    slides = [
        row(HOSTILE, tiles=1234, tissue_mm2=12.346, dropped_background=5000, dropped_pen=300, dropped_blur=6),
        row("b.1", state="refused", reason=f"damaged: {HOSTILE}"),
        row("c", state="refused", reason="damaged: 36 of 90 tiles cannot be decoded", dropped_pen=1),
        row("d", tiles=1000, tissue_mm2=2.0, dropped_limit=9, dropped_new=70),
    ]
    write_page(tmp_path / "qc.html", HOSTILE, slides)
    page = Parsed(tmp_path / "qc.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert tags.count("figure") == 4
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == [f"qc/{slide_key(HOSTILE)}.png"]
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    text = "\n".join(page.texts)
    assert text.count(HOSTILE) == 4  # title, heading, name, reason
    assert "49" not in text
    assert "http" not in (tmp_path / "qc.html").read_text().replace("http-equiv", "")
    for words in (
        "4 slides: 2 done, 2 refused",
        "2,234 tiles",
        "14.3 mm² of tissue",
        "tiles dropped: 5,000 background, 301 pen, 6 blur, 9 limit, 70 new",
        "1,234 tiles · 12.35 mm² of tissue",
        "19.9% of its tissue tiles dropped: 300 pen, 6 blur",
        "6.5% of its tissue tiles dropped: 70 new",
        "refused: damaged: 36 of 90 tiles cannot be decoded",
        "no picture",
        "damaged (2)",  # both refusals are one choice
        "pen (1)",
    ):
        assert words in text
    assert [reason for reason in REASONS if reason.replace("_", " ") not in text] == []


def test_rare_reasons_of_refusal_are_one_choice(tmp_path):
    letters = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    slides = [row(name, state="refused", reason=f"broken as {name}") for name in letters]
    slides += [row(f"more {i}", state="refused", reason=f"no mpp at {i}.5") for i in range(5)]
    write_page(tmp_path / "qc.html", "t", slides)
    page = (tmp_path / "qc.html").read_text()
    options = re.findall(r'<option value="(\d+)">(.*?)</option>', page)
    assert (options[1][1], options[-1][1]) == ("no mpp at … (5)", "another reason (35)")
    assert len(options) == 1 + 30 + 1
    marks = re.findall(r'data-marks="0 (\d+)"', page)
    assert [marks.count(value) for value, _ in options[1:]] == [5, *[1] * 29, 35]


def test_page_of_no_slides(tmp_path):
    write_page(tmp_path / "qc.html", "t", [])
    assert "0 slides: 0 done, 0 refused" in (tmp_path / "qc.html").read_text()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        yield playwright.chromium.launch(executable_path=path, args=options)


def many(count: int) -> list[dict[str, object]]:
    """Slides in no order, with ties, of which every seventh is refused."""
    rng = np.random.default_rng(0)
    slides = []
    for number in rng.permutation(count).tolist():
        if number % 7 == 3:
            reason = (
                f"damaged {chr(97 + number % 13)}: 9 of 99 tiles"
                if number % 2
                else f"the finest level is {number} µm/px; {HOSTILE}"
            )
            slides.append(row(f"Slide {number}", state="refused", reason=reason))
            continue
        pen, blur = (int(n) for n in rng.integers(0, 40, 2) * (rng.random(2) < 0.2))
        facts = {"tiles": int(rng.integers(1, 500)), "tissue_mm2": float(rng.integers(1, 9000)) / 7}
        slides.append(row(f"Slide {number}", **facts, dropped_background=800, dropped_pen=pen, dropped_blur=blur))
    slides[count // 2] |= {"slide": HOSTILE}
    return slides


@pytest.mark.slow
def test_ten_thousand_slides_in_a_browser(browser, tmp_path):
    slides = many(10_000)
    (tmp_path / "qc").mkdir()
    dot = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 100, 150)).save(dot, "png")
    for slide in slides:
        (tmp_path / "qc" / f"{slide_key(str(slide['slide']))}.png").write_bytes(dot.getvalue())
    start = time.perf_counter()
    write_page(tmp_path / "qc.html", HOSTILE, slides)
    written = time.perf_counter() - start
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    start = time.perf_counter()
    tab.goto((tmp_path / "qc.html").as_uri())
    tab.evaluate(SEEN, 0)
    print(f"written in {written:.2f} s, loaded in {time.perf_counter() - start:.2f} s")
    assert len(asked) < 1000  # pictures out of sight wait
    assert all(url.startswith("file:") or url == "data:," for url in asked)
    assert tab.title() == f"Tiling: {HOSTILE}"

    def shown() -> list[str]:
        return tab.evaluate("[...document.querySelectorAll('figure:not([hidden]) bdi')].map(e => e.textContent)")

    def choose(start: str) -> None:
        (label,) = [text for text in tab.locator("#show option").all_inner_texts() if text.startswith(start)]
        tab.select_option("#show", label=label)

    assert shown() == [slide["slide"] for slide in slides]
    # Filters against the rows.
    for choice, wanted in (
        ("refused (", [s for s in slides if s["state"] == "refused"]),
        ("damaged c (", [s for s in slides if str(s["reason"]).startswith("damaged c")]),
        ("the finest level is … µm/px (", [s for s in slides if str(s["reason"]).startswith("the finest")]),
        ("pen (", [s for s in slides if s["dropped_pen"]]),
        ("all slides", slides),
    ):
        choose(choice)
        assert shown() == [slide["slide"] for slide in wanted]
        assert tab.inner_text("output") == f"{len(wanted):,} of 10,000 slides"
    tab.fill("#find", " sLIDE 99")
    assert set(shown()) == {f"Slide {n}" for n in (99, *range(990, 1000), *range(9900, 10000))}
    choose("done (")
    assert set(shown()) == {f"Slide {n}" for n in (99, *range(990, 1000), *range(9900, 10000)) if n % 7 != 3}
    tab.fill("#find", "onerror=alert(2)> {{7*7}}")
    choose("all slides")
    hostile = [s["slide"] for s in slides if HOSTILE in (s["slide"], str(s["reason"]).split("; ", 1)[-1])]
    assert len(hostile) > 100
    assert shown() == hostile
    tab.fill("#find", "")

    # Orders against the rows; equal ones stay as in the table.
    def share(slide: dict) -> float:
        dropped = slide["dropped_pen"] + slide["dropped_blur"]
        return dropped / max(1, dropped + slide["tiles"])

    for value, key in (
        ("tiles -1", lambda s: -s["tiles"]),
        ("tissue 1", lambda s: s["tissue_mm2"]),
        ("share -1", lambda s: -share(s)),
        ("", lambda _: 0),
    ):
        tab.select_option("#sort", value)
        assert shown() == [slide["slide"] for slide in sorted(slides, key=key)]
    tab.select_option("#sort", "name")
    numbers = [int(name.removeprefix("Slide ")) for name in shown() if name != HOSTILE]
    assert numbers == sorted(numbers)
    # At the end of the page, its pictures come.
    tab.locator("figure").last.scroll_into_view_if_needed()
    tab.evaluate(SEEN, 9_999)
    assert len(asked) < 5000
    assert tab.evaluate("document.scripts.length") == 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    assert said == []


@pytest.mark.slow
def test_a_browser_without_scripts_shows_every_slide(browser, tmp_path):
    write_page(tmp_path / "qc.html", "t", many(50))
    tab = browser.new_page(java_script_enabled=False)
    tab.goto((tmp_path / "qc.html").as_uri())
    assert tab.locator("figure").count() == 50
    assert all(figure.is_visible() for figure in tab.locator("figure").all())
    assert not tab.locator("form").is_visible()
