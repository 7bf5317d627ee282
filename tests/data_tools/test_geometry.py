"""Where a tile lies and what it covers, against closed forms: slides painted with ramps and waves, so that a pixel's
value is the integral of a known function over the box it should cover, at any resolution and with no image between.

The pyramids are odd, as scanners leave them: levels 1.9993 and 3.9987 apart, of JPEGs, in
the containers of each reader.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from eosin.data_tools.errors import Refusal
from eosin.data_tools.grids import grid
from eosin.data_tools.jpeg_tiles import JpegPixels
from eosin.data_tools.slide import HALF_TOLERANCE, MAX_UPSAMPLING, Slide, _shrink

WIDTH, HEIGHT = 4443, 2223
LEVELS = [(WIDTH, HEIGHT), (2222, 1112), (1111, 556)]
# (period in pixels of the finest level, amplitude) of the waves along x and along y, in the blue channel.
WAVES = ((61.0, 60.0), (47.0, 40.0))
CONTAINERS = ("generic jpeg", "aperio jpeg", "generic raw", "ome raw")
OWN = (0.2527, 0.265, 0.4990)
ASKED = (0.25, 0.5, 1.0)
PAIRS = [(own, asked) for own, asked in itertools.product(OWN, ASKED) if own <= asked * MAX_UPSAMPLING]
SIZE = 192


def covered(x: float, y: float, width: int, height: int, scale: float) -> np.ndarray:
    """What each of [height, width, 3] pixels of ``scale`` finest pixels shows: means over its box, in closed form."""
    lefts, tops = x + scale * np.arange(width), y + scale * np.arange(height)
    (period_x, amplitude_x), (period_y, amplitude_y) = WAVES
    red = 25 + 200 * (lefts + scale / 2) / WIDTH
    green = 25 + 200 * (tops + scale / 2) / HEIGHT
    blue = 128 + amplitude_x * wave(lefts, scale, period_x) + amplitude_y * wave(tops, scale, period_y)[:, None]
    red, green = np.broadcast_to(red, blue.shape), np.broadcast_to(green[:, None], blue.shape)
    return np.stack([red, green, blue], axis=-1)


def wave(starts: np.ndarray, length: float, period: float) -> np.ndarray:
    """Mean of a sine over intervals."""
    pace = 2 * np.pi / period
    return (np.cos(pace * starts) - np.cos(pace * (starts + length))) / (pace * length)


def ycbcr(image: np.ndarray) -> np.ndarray:
    """The color space in which tifffile takes what it shall store as YCbCr."""
    return np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> dict[str, Path]:
    """A slide in each container; its resolution is given when it is opened."""
    folder, paths = tmp_path_factory.mktemp("geometry"), {}
    images = []
    for width, height in LEVELS:
        downsample = (WIDTH / width + HEIGHT / height) / 2  # as OpenSlide has it
        images.append(covered(0, 0, width, height, downsample).round().astype(np.uint8))
    jpeg = {"compression": "jpeg", "compressionargs": {"level": 95}, "photometric": "ycbcr", "subsampling": (1, 1)}
    described = {"description": f"Aperio Image Library v10.0.51\r\n{WIDTH}x{HEIGHT} (256x256) JPEG/RGB Q=95"}
    for container in CONTAINERS:
        kind, _, coding = container.partition(" ")
        args = {"tile": (256, 256)} | (jpeg if coding == "jpeg" else {"photometric": "rgb"})
        paths[container] = folder / f"{container.replace(' ', '_')}{'.ome' if kind == 'ome' else ''}.tif"
        with tifffile.TiffWriter(paths[container], ome=kind == "ome") as tiff:
            for number, image in enumerate(images):
                first = {"subifds": 2, "metadata": {"axes": "YXS"}} if kind == "ome" else {"metadata": None}
                first |= described if kind == "aperio" else {}
                image = ycbcr(image) if coding == "jpeg" else image
                tiff.write(image, subfiletype=int(number > 0), **args, **({"metadata": None} if number else first))
    return paths


def opened(slides: dict[str, Path]) -> Iterator[tuple[str, Slide, float]]:
    for container, (own, asked) in itertools.product(CONTAINERS, PAIRS):
        with Slide(slides[container], mpp_override=own) as slide:
            yield f"{container}, {own} to {asked}", slide, asked


def places(slide: Slide, asked: float, stride: float) -> np.ndarray:
    """About five of a grid with tiles ``stride`` of their side apart, and the corners of the slide, [n, 2]."""
    scale = asked / slide.mpp
    side, downsample = SIZE * scale, slide.downsamples[slide.level(scale)]
    xs, ys = (grid(length, side, downsample, stride * side) for length in slide.size)
    inner = list(itertools.product(xs.tolist(), ys.tolist()))
    right, bottom = (int(length - side) for length in slide.size)
    return np.array([*inner[1 :: math.ceil(len(inner) / 5)], (right, bottom), (0, bottom), (right, 0)])


def as_shown(tile: np.ndarray) -> np.ndarray:
    """After the JPEG of quality 95 that a shard holds, [size, size, 3]."""
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(tile, 95, "RGB", "444")).astype(float)


def displacements(tile: np.ndarray, x: int, y: int, scale: float) -> np.ndarray:
    """How far the halves of a tile show waves from where they should be, [2 axes, 2 halves], in finest pixels."""
    found = []
    for start, (period, _), profile in zip((x, y), WAVES, (tile[..., 2].mean(0), tile[..., 2].mean(1))):
        turns = 2 * np.pi / period * (start + scale * (np.arange(SIZE) + 0.5))
        basis = np.stack([np.ones(SIZE), np.sin(turns), np.cos(turns)], axis=1)
        for half in (slice(0, SIZE // 2), slice(SIZE // 2, SIZE)):
            _, sine, cosine = np.linalg.lstsq(basis[half], profile[half], rcond=None)[0]
            found.append(np.arctan2(cosine, sine) * period / (2 * np.pi))
    return np.array(found).reshape(2, 2)


def test_the_closed_form_is_the_mean_over_the_box():
    fine = covered(101.3, 57.2, 400, 320, 0.1)
    coarse = fine.reshape(16, 20, 20, 20, 3).mean((1, 3))
    np.testing.assert_allclose(covered(101.3, 57.2, 20, 16, 2.0), coarse, atol=1e-9)


def test_each_container_has_a_reader_of_its_own(slides):
    seen = {}
    for container, path in slides.items():
        with Slide(path) as slide:
            seen[container] = (slide.vendor, isinstance(slide._pixels, JpegPixels))
            assert slide.downsamples == pytest.approx((1, 1.99933, 3.99866), abs=1e-3)
    vendors = ("generic-tiff", "aperio", "generic-tiff", "ome-tiff")
    assert seen == {c: (vendor, c.endswith("jpeg")) for c, vendor in zip(CONTAINERS, vendors)}


def test_field_of_view_and_place_are_exact(slides):
    checked = 0
    for name, slide, asked in opened(slides):
        scale = asked / slide.mpp
        for x, y in places(slide, asked, stride=1.0).tolist():
            tile = slide.read(x, y, SIZE, asked).astype(float)
            moved = displacements(tile, x, y, scale)
            stretched = (moved[:, 1] - moved[:, 0]) / (SIZE / 2 * scale)
            assert np.abs(stretched).max() < 0.002, name  # a fifth of a percent of the field of view
            assert np.abs(moved).max() < 0.3 * max(1, scale), name
            # The waves repeat; the ramps say that it is the right one.
            assert np.abs(tile[..., 0].mean() - covered(x, y, SIZE, SIZE, scale)[..., 0].mean()) < 0.5, name
            assert np.abs(tile[..., 1].mean() - covered(x, y, SIZE, SIZE, scale)[..., 1].mean()) < 0.5, name
            checked += 1
    assert checked > 150


def test_tiles_that_overlap_show_the_mean_over_the_boxes_they_cover(slides):
    for name, slide, asked in opened(slides):
        spots = places(slide, asked, stride=0.61)
        for (x, y), tile in zip(spots.tolist(), slide.tiles(spots, SIZE, asked)):
            error = np.abs(as_shown(tile) - covered(x, y, SIZE, SIZE, asked / slide.mpp))
            assert error.mean() < 1.2, name
            # Not a row or column at the border is made of what lies outside.
            assert max(error.mean((0, 2)).max(), error.mean((1, 2)).max()) < 4, name


def test_nothing_outside_is_read(slides, monkeypatch):
    for name, slide, asked in opened(slides):
        asked_for, region = [], slide._pixels.region
        monkeypatch.setattr(slide._pixels, "region", lambda *a, r=region, s=asked_for: s.append(a) or r(*a))
        for _ in slide.tiles(places(slide, asked, 1.0)[-3:], SIZE, asked):
            pass
        for level, x, y, width, height in asked_for:
            limit, downsample = LEVELS[level], slide.downsamples[level]
            assert x >= 0 <= y, name
            assert x / downsample + width <= limit[0] + 1e-6, name
            assert y / downsample + height <= limit[1] + 1e-6, name
        assert len(asked_for) == 3
        side = SIZE * asked / slide.mpp
        for x, y in ((-1, 0), (0, -1), (int(WIDTH - side) + 2, 0), (0, int(HEIGHT - side) + 2)):
            with pytest.raises(ValueError, match="outside"):
                next(slide.tiles(np.array([(x, y)]), SIZE, asked))


@pytest.mark.parametrize("own", [0.265, 0.4990])
def test_what_would_invent_detail_is_refused(slides, own):
    with (
        Slide(slides["generic jpeg"], mpp_override=own) as slide,
        pytest.raises(Refusal, match="coarser than the asked"),
    ):
        slide.require(0.25)


def box_means(image: np.ndarray, x: float, y: float, size: int, scale: float) -> np.ndarray:
    """Means over boxes by the share of each pixel in each box, as matrices: [size, size, 3]."""

    def shares(length: int, start: float) -> np.ndarray:
        lefts = start + scale * np.arange(size)[:, None]
        pixels = np.arange(length)
        return np.clip(np.minimum(lefts + scale, pixels + 1) - np.maximum(lefts, pixels), 0, None) / scale

    left, top, extent = int(x), int(y), math.ceil(size * scale) + 1
    image = image[top : top + extent, left : left + extent]
    rows, columns = shares(image.shape[0], y - top), shares(image.shape[1], x - left)
    return np.stack([rows @ image[..., channel] @ columns.T for channel in range(3)], axis=-1)


@pytest.fixture(scope="module")
def tissue(section) -> np.ndarray:
    """Nuclei about 20 pixels wide: 5 µm at the finest resolution here."""
    return cv2.resize(section(700, 550), (1337, 1031), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("divisors", [(), (2, 4)])
@pytest.mark.parametrize("coding", ["jpeg", "raw"])
def test_tissue_is_a_direct_read_of_the_finest_level_averaged(tissue, pyramid, tmp_path, divisors, coding):
    sizes = [(1337 // divisor, 1031 // divisor) for divisor in divisors]
    jpeg = {"compression": "jpeg", "compressionargs": {"level": 95}, "photometric": "ycbcr", "subsampling": (1, 1)}
    args = (ycbcr(tissue), 0.5, sizes) if coding == "jpeg" else (tissue, 0.5, sizes)
    path = pyramid(tmp_path / "a.tif", *args, **(jpeg if coding == "jpeg" else {}))
    with openslide.OpenSlide(path) as direct:
        finest = np.asarray(direct.read_region((0, 0), 0, (1337, 1031)))[..., :3].astype(float)
    for own, asked in PAIRS:
        with Slide(path, mpp_override=own) as slide:
            spots = places(slide, asked, stride=0.61)
            for (x, y), tile in zip(spots.tolist(), slide.tiles(spots, SIZE, asked)):
                assert np.abs(as_shown(tile) - box_means(finest, x, y, SIZE, asked / own)).mean() < 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_many_at_once_are_the_same_as_one_by_one(slides, container):
    rng = np.random.default_rng(0)
    with (
        Slide(slides[container], mpp_override=0.2527) as slide,
        Slide(slides[container], mpp_override=0.2527) as single,
    ):
        for asked in (0.2527, 0.5, 1.0, 0.61):
            side = SIZE * asked / 0.2527
            spots = np.stack([rng.integers(0, int(length - side), 12) for length in slide.size], axis=1)
            spots = spots[np.lexsort(spots.T)] if asked == 0.5 else spots
            tiles = list(slide.tiles(spots, SIZE, asked))
            assert len(tiles) == 12
            for (x, y), tile in zip(spots.tolist(), tiles):
                np.testing.assert_array_equal(tile, single.read(x, y, SIZE, asked))


def test_near_halving_is_as_good_as_the_exact_mean(tissue):
    image = np.ascontiguousarray(tissue[300:800, 400:900])
    for ratio in np.linspace(2 - 2 * HALF_TOLERANCE, 2 + 2 * HALF_TOLERANCE, 9).tolist():
        size = int(500 / ratio)
        truth = box_means(image.astype(float), 0, 0, size, ratio)
        error = np.abs(_shrink(image, ratio, (0.0, 0.0), size, size) - truth)
        area = cv2.resize(image, None, fx=1 / ratio, fy=1 / ratio, interpolation=cv2.INTER_AREA)[:size, :size]
        assert error.mean() < np.abs(area - truth).mean() + 0.03
        assert error.max() < 4


@pytest.mark.parametrize("ratio", [1.0, 1.0013, 1.9786, 2.036, 2.4, 3.96])
def test_a_region_between_pixels_is_shown_where_it_is(ratio):
    size, shift = 100, (0.4, 0.7)
    extent = math.ceil(size * ratio) + 1
    image = covered(0, 0, extent, extent, 1.0).round().astype(np.uint8)
    seen = _shrink(image, ratio, shift, size, size)
    assert np.abs(seen - covered(*shift, size, size, ratio)).mean() < 0.6
    assert np.abs(seen - covered(0, 0, size, size, ratio)).mean() > 1
