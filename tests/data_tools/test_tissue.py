"""The tissue mask against phantoms with known masks, drawn shapes, and labeled real images."""

import csv

import cv2
import numpy as np
import pytest

from eosin.data_tools.slide import Slide, read_image
from eosin.data_tools.tissue import find_tissue, is_dark, white_point

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


def test_debris_is_named():
    image = canvas()
    image[disk(image.shape, 100, 100, 6)] = PINK  # 0.007 mm²
    image[200:202, 50:450] = PINK  # a thread 16 µm wide
    tissue = find_tissue(image, 8.0)
    assert not tissue.mask.any()
    assert tissue.rejected["debris"][100, 100]


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


@pytest.mark.slow
def test_phantoms(phantoms):
    found = []
    for row in csv.DictReader((phantoms / "slides.csv").open(encoding="utf-8")):
        with Slide(phantoms / row["path"]) as slide:
            tissue = find_tissue(slide.thumbnail(4.0), 4.0)
        truth, pen = (
            cv2.imread(str(phantoms / "truth" / f"{row['slide']}_{kind}.png"), cv2.IMREAD_GRAYSCALE) > 127
            for kind in ("tissue", "pen")
        )
        found.append((overlap(tissue.mask & ~pen, truth & ~pen), (tissue.mask & pen).sum(), pen.sum()))
        if pen.any():
            assert tissue.pen.any()
        else:
            assert not tissue.pen.any()
    overlaps, leaked, pens = np.array(found).T
    assert sum(pens > 0) >= 2
    assert leaked.sum() <= 0.01 * pens.sum()
    assert np.mean(overlaps) > 0.94
    assert min(overlaps) > 0.85


# µm/px of the picture (known or estimated by its nuclei), and the share of it that is tissue by eye.
REAL = {
    "histolab/almost-white-1.png": (2.0, 0.0, 0.0),
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
    for color in INKS:
        assert (f"pen_{color}" in tissue.rejected) == (color in marked)
