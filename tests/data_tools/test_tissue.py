"""The tissue mask against phantoms with known masks, drawn shapes, and labeled real images; the cuts of a slide."""

import csv

import cv2
import numpy as np
import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.slide import Slide, read_image
from eosin.data_tools.tissue import Thresholds, find_tissue, is_dark, sections, white_point

GLASS = (244, 243, 241)
PINK = (215, 150, 190)
# As measured on real slides: core of a stroke.
INKS = {"red": (200, 30, 45), "green": (59, 169, 149), "blue": (53, 109, 200), "black": (30, 30, 34)}


def canvas(height: int = 400, width: int = 500, seed: int = 0) -> np.ndarray:
    """Empty glass with a camera's noise."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum())


def disk(shape: tuple[int, ...], x: int, y: int, radius: int) -> np.ndarray:
    return cv2.circle(np.zeros(shape[:2], np.uint8), (x, y), radius, 1, -1) > 0


def line(shape: tuple[int, ...], start: tuple[int, int], end: tuple[int, int], width: int) -> np.ndarray:
    return cv2.line(np.zeros(shape[:2], np.uint8), start, end, 1, width) > 0


def absorb(image: np.ndarray, area: np.ndarray, density: tuple[float, float, float]) -> np.ndarray:
    """Lay something of an optical density over an area, with a soft edge."""
    soft = cv2.GaussianBlur(area.astype(np.float32), (0, 0), 1.0)[..., None]
    return np.rint(image * np.exp(-soft * np.array(density))).astype(np.uint8)


def test_empty_glass_has_no_tissue():
    assert not find_tissue(canvas(), 8.0).mask.any()


@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 241, 235), (228, 219, 230)])
def test_glass_of_any_tint(glass):
    image = np.clip(canvas().astype(int) - GLASS + glass, 0, 255).astype(np.uint8)
    there = disk(image.shape, 250, 200, 120)
    image[there] = (np.array(PINK) * glass / 255).astype(np.uint8)
    assert overlap(find_tissue(image, 8.0).mask, there) > 0.97
    np.testing.assert_allclose(white_point(image), glass, atol=3)


def test_holes_stay_open_and_fat_is_closed():
    image = canvas()
    there = disk(image.shape, 250, 200, 150)
    hole = disk(image.shape, 200, 180, 30)  # a lumen of 480 µm
    image[there] = PINK
    image[hole] = GLASS
    # Fat: empty cells of 64 µm between membranes one pixel wide.
    image[260:320, 240:320] = GLASS
    image[260:320:8, 240:320] = PINK
    image[260:320, 240:320:8] = PINK
    mask = find_tissue(image, 8.0).mask
    assert mask[260:320, 240:320].mean() > 0.99
    assert mask[hole].mean() < 0.1
    assert overlap(mask, there & ~hole) > 0.97


@pytest.mark.parametrize("color", INKS)
def test_pen_is_not_tissue(color):
    image = canvas()
    there = disk(image.shape, 160, 200, 100)
    image[there] = PINK
    stroke = cv2.line(np.zeros(image.shape[:2], np.uint8), (200, 60), (420, 340), 1, 30) > 0
    ink = np.log(np.array(INKS[color]) / GLASS)
    image[stroke] = np.clip(image[stroke] * np.exp(ink), 0, 255).astype(np.uint8)  # over glass and over tissue
    image = cv2.GaussianBlur(image, (0, 0), 1.5)
    tissue = find_tissue(image, 8.0)
    largest = max(tissue.rejected, key=lambda reason: tissue.rejected[reason].sum())
    assert largest == f"pen_{color}"
    assert tissue.pen[stroke].mean() > 0.97
    assert (tissue.mask & stroke).sum() < 0.01 * stroke.sum()
    assert tissue.mask[there & (cv2.dilate(stroke.astype(np.uint8), np.ones((15, 15))) == 0)].mean() > 0.97


def test_a_dot_of_ink_is_not_filled_as_a_hole_is():
    image = canvas()
    image[disk(image.shape, 250, 200, 120)] = PINK
    dot = disk(image.shape, 250, 200, 6)  # of 96 µm
    image[dot] = INKS["blue"]
    tissue = find_tissue(image, 8.0, Thresholds(hole_um2=50_000))
    assert tissue.pen[dot].all()
    assert not tissue.mask[dot].any()


def test_debris_is_named():
    image = canvas()
    image[disk(image.shape, 100, 100, 6)] = PINK  # 0.007 mm²
    image[200:202, 50:450] = PINK  # a thread 16 µm wide
    tissue = find_tissue(image, 8.0)
    assert not tissue.mask.any()
    assert tissue.rejected["debris"][100, 100]


# Optical density of shadows at the edge of glass, and of one with a fringe of color.
SHADOWS = {"dark": (1.2, 1.25, 1.3), "gray": (0.5, 0.55, 0.6), "fringed": (0.55, 0.65, 0.66), "pale": (0.3, 0.3, 0.32)}


@pytest.mark.parametrize("shadow", SHADOWS)
def test_edges_of_glass_are_named_and_are_not_tissue(shadow):
    image = canvas(500, 600)
    there = disk(image.shape, 200, 250, 110)
    across = line(image.shape, (20, 60), (580, 470), 6)  # a coverslip's edge, 48 µm wide, over the section
    below = line(image.shape, (30, 480), (590, 490), 9)
    bubble = cv2.circle(np.zeros(image.shape[:2], np.uint8), (480, 120), 70, 1, 5) > 0
    image = absorb(image, there, (0.2, 0.6, 0.3))
    for edge in (across, below, bubble):
        image = absorb(image, edge, SHADOWS[shadow])
    tissue = find_tissue(image, 8.0)
    bare = (across & (cv2.dilate(there.astype(np.uint8), np.ones((25, 25))) == 0)) | below | bubble
    assert tissue.rejected["edge"][bare].mean() > 0.97
    assert not tissue.mask[bare].any()
    assert tissue.mask[there & (cv2.dilate(across.astype(np.uint8), np.ones((11, 11))) == 0)].mean() > 0.99
    assert not (tissue.rejected["edge"] & there & ~across)[140:360].sum() > 0.01 * there.sum()


def test_no_edge_is_seen_in_what_is_not_one():
    image = canvas(500, 600)
    there = disk(image.shape, 200, 250, 110)
    strand = line(image.shape, (330, 60), (580, 300), 12)  # hematoxylin alone, as on a section that DAB left bare
    short = line(image.shape, (400, 400), (440, 400), 4)  # a hair of 320 µm
    wide = disk(image.shape, 500, 430, 40)
    image = absorb(absorb(image, there, (0.2, 0.6, 0.3)), strand, (0.31, 0.32, 0.24))
    image = absorb(image, line(image.shape, (140, 200), (260, 300), 5), (0.6, 0.6, 0.6))  # a fold within the section
    image = absorb(absorb(image, short, (0.7, 0.7, 0.7)), wide, (0.5, 0.5, 0.5))
    tissue = find_tissue(image, 8.0)
    assert "edge" not in tissue.rejected
    assert find_tissue(image, 8.0, Thresholds(edge_um=300)).rejected["edge"][short].all()
    assert tissue.mask[strand].mean() > 0.97
    assert tissue.mask[there].mean() > 0.99


def test_mask_does_not_reach_for_the_border():
    image = canvas()
    image[4:396, 4:300] = PINK  # 32 µm of glass to the border
    mask = find_tissue(image, 8.0).mask
    assert not mask[:2].any()
    assert not mask[-2:].any()
    assert mask[8:392, 8:296].all()


def test_resolution_of_the_thumbnail_hardly_matters(section):
    image = section(1201, 1103)
    masks = {}
    for step in (2, 4, 8):
        small = cv2.resize(image, (1200 // step, 1096 // step), interpolation=cv2.INTER_AREA)
        masks[step] = find_tissue(small, float(step)).mask.astype(np.uint8)
    fine = masks[2] > 0
    for step in (4, 8):
        coarse = cv2.resize(masks[step], fine.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
        assert overlap(fine, coarse) > 0.96


def test_fluorescence_is_dark_and_clots_are_not():
    rng = np.random.default_rng(0)
    image = np.zeros((300, 300, 3), np.uint8)
    image[..., 2] = cv2.GaussianBlur(rng.standard_normal((300, 300)), (0, 0), 3) > 0.15
    image *= 255
    assert is_dark(image)
    slide = canvas()
    slide[:300] = (70, 20, 40)
    assert not is_dark(slide)
    assert find_tissue(slide, 8.0).mask[:290].mean() > 0.99


def test_dab_with_hematoxylin_is_tissue_and_not_pen():
    from skimage.data import immunohistochemistry

    tissue = find_tissue(cv2.resize(immunohistochemistry(), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), 2.0)
    assert tissue.mask.mean() > 0.97
    assert not tissue.pen.any()


def test_components_match_a_labeling():
    from scipy import ndimage

    from eosin.data_tools.tissue import _fill_holes, _keep_large

    for seed in range(15):
        rng = np.random.default_rng(seed)
        noise = cv2.GaussianBlur(rng.standard_normal((90, 110)), (0, 0), rng.uniform(0.6, 2.5))
        mask = np.pad((noise > np.quantile(noise, rng.uniform(0.2, 0.8))).astype(np.uint8), 8)
        area = int(rng.integers(5, 200))
        pieces, _ = ndimage.label(mask, np.ones((3, 3)))
        large = np.bincount(pieces.ravel()) >= area
        large[0] = False
        np.testing.assert_array_equal(_keep_large(mask, area), large[pieces])
        holes, count = ndimage.label(1 - mask)
        filled = mask > 0
        for number in range(1, count + 1):
            hole = ndimage.binary_fill_holes(holes == number)
            if hole.sum() < area:
                filled |= hole
        np.testing.assert_array_equal(_fill_holes(mask, area), filled)
    island = disk((100, 100), 50, 50, 20)
    ring = cv2.circle(np.zeros((100, 100), np.uint8), (50, 50), 30, 1, 1)  # 170 pixels around a larger island
    np.testing.assert_array_equal(_keep_large(ring | island, 300), island)


def test_thresholds_are_read_and_checked():
    assert Thresholds.of([]) == Thresholds()
    assert Thresholds.of(["close_um=40", "max_pen=.1"]) == Thresholds(close_um=40.0, max_pen=0.1)
    for word, said in {
        "closeum=40": "did you mean 'close_um'",
        "close_um=wide": "close_um=NUMBER",
        "close_um": "close_um=NUMBER",
        "close_um=nan": "valid: 0 to 1000",
        "max_pen=2": "valid: 0 to 1",
        "chroma_low=.5": "above chroma_high",
    }.items():
        with pytest.raises(UserError, match=said):
            Thresholds.of([word])


# A threshold, what of the picture it decides, and the share of that which is tissue without it and with it.
DECISIONS = {
    "hole_um2=60000": ("hole", 0, 1),
    "close_um=120": ("hole", 0, 1),
    "island_um2=5000": ("speck", 0, 1),
    "island_um2=1e6": ("there", 1, 0),
    "thread_um=600": ("there", 1, 0),
    "chroma_low=.08": ("pale", 1, 0),
    "pen_um2=1e6": ("ink", 0, 1),
    "smooth_um=90": ("hole", 0, 1),
}


@pytest.mark.parametrize("threshold", DECISIONS)
def test_thresholds_decide(threshold):
    image = canvas()
    areas = {
        "there": disk(image.shape, 250, 200, 70),  # 1 mm²
        "hole": disk(image.shape, 250, 200, 14),  # 0.04 mm²
        "speck": disk(image.shape, 60, 60, 6),
        "pale": disk(image.shape, 60, 340, 40),
        "ink": disk(image.shape, 430, 340, 40),  # 0.3 mm²
    }
    colors = {"there": PINK, "hole": GLASS, "speck": PINK, "pale": (244, 230, 241), "ink": INKS["blue"]}
    for name, area in areas.items():
        image[area] = colors[name]
    name, usual, changed = DECISIONS[threshold]
    inside = cv2.erode(areas[name].astype(np.uint8), np.ones((5, 5))) > 0
    inside &= (name == "hole") | ~disk(image.shape, 250, 200, 20)
    assert find_tissue(image, 8.0).mask[inside].mean() == pytest.approx(usual, abs=0.02)
    assert find_tissue(image, 8.0, Thresholds.of([threshold])).mask[inside].mean() == pytest.approx(changed, abs=0.02)


def test_sections_are_numbered_in_reading_order():
    mask = np.zeros((400, 900), bool)
    boxes = [(20, 90, 30, 200), (45, 150, 400, 520), (30, 100, 700, 880), (250, 330, 60, 300), (280, 390, 600, 800)]
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    mask[340:390, 100:200] = True  # a piece of the fourth, 88 µm below it
    labels = sections(mask, 8.0)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels > 0, mask)
    for number, (top, bottom, left, right) in enumerate(boxes, start=1):
        assert (labels[top:bottom, left:right] == number).all()
    assert (labels[340:390, 100:200] == 4).all()
    assert labels.max() == 5


@pytest.mark.parametrize(("gap_um", "count"), [(700, 2), (900, 1), (1100, 1)])
def test_sections_join_over_a_gap(gap_um, count):
    mask = np.zeros((200, 400), bool)
    mask[50:150, 50:150] = mask[50:150, 250:350] = True  # 800 µm of glass
    assert sections(mask, 8.0, Thresholds(section_gap_um=gap_um)).max() == count


def test_sections_of_nothing_and_of_everything():
    assert not sections(np.zeros((20, 30), bool), 8.0).any()
    assert (sections(np.ones((20, 30), bool), 8.0) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("mpp", [4.0, 8.0])
def test_phantoms(phantoms, mpp):
    found = []
    for row in csv.DictReader((phantoms / "slides.csv").open(encoding="utf-8")):
        with Slide(phantoms / row["path"]) as slide:
            tissue = find_tissue(slide.thumbnail(mpp), mpp)
        truth, pen = (
            cv2.resize(
                cv2.imread(str(phantoms / "truth" / f"{row['slide']}_{kind}.png"), cv2.IMREAD_GRAYSCALE),
                tissue.mask.shape[::-1],
                interpolation=cv2.INTER_AREA,
            )
            > 127
            for kind in ("tissue", "pen")
        )
        found.append((overlap(tissue.mask, truth & ~pen), (tissue.mask & pen).sum(), tissue.mask.sum(), pen.sum()))
        if pen.any():
            assert tissue.pen.any()
        else:
            assert not tissue.pen.any()
    overlaps, leaked, kept, pens = np.array(found).T
    assert sum(pens > 0) >= 2
    assert (leaked <= 0.005 * kept).all()
    assert leaked.sum() <= 0.01 * pens.sum()
    assert np.mean(overlaps) >= 0.955
    assert min(overlaps) >= 0.94


# µm/px of the picture (known or estimated by its nuclei), and the share of it that is tissue by eye.
REAL = {
    "histolab/almost-white-1.png": (2.0, 0.0, 0.0),
    "histolab/diagnostic-slide-thumb-rgb.png": (30.0, 0.36, 0.44),  # black rings on the section
    "histolab/high-nuclei-score-level2.png": (4.0, 0.12, 0.18),
    "histolab/high-nuclei-score-red-pen-level1.png": (1.0, 0.75, 0.9),
    "histolab/low-nuclei-score-level0.png": (0.5, 0.95, 1.0),
    "histolab/low-nuclei-score-level1.png": (1.0, 0.95, 1.0),
    "histolab/medium-nuclei-score-green-pen-level1.png": (1.0, 0.3, 0.45),
    "histolab/medium-nuclei-score-level1-2.png": (1.0, 0.99, 1.0),
    "histolab/medium-nuclei-score-level1.png": (1.0, 0.85, 1.0),  # an artery as red as ink
    "histolab/medium-nuclei-score-level2.png": (4.0, 0.75, 0.85),
    "histolab/no-tissue-green-pen.png": (1.0, 0.0, 0.0),
    "histolab/no-tissue-line.png": (1.0, 0.0, 0.0),
    "histolab/no-tissue-red-pen.png": (1.0, 0.0, 0.0),
    "histolab/no-tissue.png": (1.0, 0.0, 0.0),
    "histolab/no-tissue2.png": (1.0, 0.0, 0.0),
    "histolab/tcga-lung-rgb.png": (0.5, 0.9, 1.0),
    "histolab/tcga-red-pen.png": (4.0, 0.5, 0.65),
    "histolab/tissue-level2-1784-6289-5880-10386.png": (4.0, 0.68, 0.82),
    "histolab/tissue-level2-4640-4649-8736-8746.png": (4.0, 0.72, 0.84),
    "histolab/wsi-blue-pen.png": (30.0, 0.3, 0.5),
    "histoprep/slide.jpeg": (1.0, 0.85, 0.95),
    "histoprep/slide_with_ink.jpeg": (2.0, 0.25, 0.36),
    "histoprep/tma_spots.jpeg": (3.0, 0.06, 0.12),
}


@pytest.mark.parametrize("name", REAL)
def test_real_images(real_data, name):
    mpp, low, high = REAL[name]
    image = read_image(real_data / "qc" / name)
    target = max(mpp, min(8.0, max(image.shape) * mpp / 256))
    image = cv2.resize(image, None, fx=mpp / target, fy=mpp / target, interpolation=cv2.INTER_AREA)
    tissue = find_tissue(image, target)
    assert low <= tissue.mask.mean() <= high
    marked = [color for color in INKS if f"{color}-pen" in name or (color == "blue" and "ink" in name)]
    if "diagnostic" in name:
        marked = ["red", "green", "black"]
    assert ("edge" in tissue.rejected) == ("line" in name)
    for color in INKS:
        assert (f"pen_{color}" in tissue.rejected) == (color in marked)
