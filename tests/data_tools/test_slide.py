"""Slides against independent geometry: exact box averages of the finest level, and direct OpenSlide reads."""

import itertools
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from eosin.data_tools import slide as slide_module
from eosin.data_tools.errors import Refusal
from eosin.data_tools.grids import grid
from eosin.data_tools.slide import Slide, read_image


def box_average(image: np.ndarray, x: float, y: float, size: int, scale: float) -> np.ndarray:
    """Each pixel the mean over its own box of the finest level, from a summed-area table in float64."""
    left, top, extent = int(x), int(y), int(size * scale) + 3
    x, y, image = x - left, y - top, image[top : top + extent, left : left + extent]
    sums = np.zeros((image.shape[0] + 1, image.shape[1] + 1, 3))
    sums[1:, 1:] = image.cumsum(0, dtype=np.float64).cumsum(1)

    def at(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        low = np.minimum(positions.astype(int), len(values) - 2)
        part = (positions - low).reshape(-1, *[1] * (values.ndim - 1))
        return values[low] * (1 - part) + values[low + 1] * part

    rows = at(sums, y + scale * np.arange(size + 1))
    corners = at(rows.swapaxes(0, 1), x + scale * np.arange(size + 1)).swapaxes(0, 1)
    return (corners[1:, 1:] - corners[1:, :-1] - corners[:-1, 1:] + corners[:-1, :-1]) / scale**2


# Odd pyramids (1.998, 4.003), scanners' resolutions, and what is asked of them.
GEOMETRIES = [
    (0.2527, [], 0.5),
    (0.2527, [(601, 552)], 0.5),
    (0.2527, [(601, 552), (300, 276)], 1.0),
    (0.265, [(601, 552)], 0.53),
    (0.265, [(600, 551)], 0.61),
    (0.4990, [(301, 276)], 0.5),
    (0.4990, [(301, 276)], 1.7),
    (0.51, [], 0.5),
]


def displacement(seen: np.ndarray, truth: np.ndarray, x: int, y: int) -> np.ndarray:
    """How far a window of 96 px is moved, in pixels (x, y), by phase correlation."""
    window = np.s_[y : y + 96, x : x + 96, 1]
    hanning = cv2.createHanningWindow((96, 96), cv2.CV_64F)
    return np.array(cv2.phaseCorrelate(truth[window], seen[window], hanning)[0])


@pytest.mark.parametrize(("own", "sizes", "asked"), GEOMETRIES)
def test_field_of_view_is_exact(section, pyramid, tmp_path, own, sizes, asked):
    image = section(1201, 1103)
    path = pyramid(tmp_path / "a.tif", image, own, sizes)
    scale, size = asked / own, 160
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx(own, rel=1e-6)
        level = slide.level(scale)
        x, y = (int(grid(side, size * scale, slide.downsamples[level])[-1]) for side in slide.size)
        seen = slide.read(x, y, size, asked).astype(float)
    assert seen.shape == (size, size, 3)
    truth = box_average(image, x, y, size, scale)
    near, far = displacement(seen, truth, 0, 0), displacement(seen, truth, 64, 64)
    assert max(np.abs(near).max(), np.abs(far).max()) < 0.2
    assert np.abs(far - near).max() / 64 < 0.002  # a fifth of a percent of the field of view


@pytest.mark.parametrize(("own", "sizes", "asked"), GEOMETRIES)
def test_tiles_of_the_grid_show_what_the_finest_level_shows(section, pyramid, tmp_path, own, sizes, asked):
    image = section(1201, 1103)
    scale, size = asked / own, 160
    errors = []
    with Slide(pyramid(tmp_path / "a.tif", image, own, sizes)) as slide:
        downsample = slide.downsamples[slide.level(scale)]
        xs, ys = (grid(side, size * scale, downsample) for side in slide.size)
        for x, y in itertools.product(xs.tolist(), ys.tolist()):
            errors.append(np.abs(slide.read(x, y, size, asked) - box_average(image, x, y, size, scale)).mean())
    # Between the pixels of a coarser odd level OpenSlide interpolates, which blurs a little.
    assert max(errors) < (0.6 if downsample == 1 and scale > 1 else 3)


def test_level_is_never_truncated(section, pyramid, tmp_path):
    image = section(1201, 1103)
    with Slide(pyramid(tmp_path / "a.tif", image, 0.25, [(601, 552), (300, 276)])) as slide:
        assert slide.downsamples == pytest.approx((1.0, 1.9983, 3.9998), abs=1e-4)
        assert [slide.level(scale) for scale in (1.0, 1.99, 1.998, 2.0, 3.9, 4.0, 64)] == [0, 0, 1, 1, 1, 2, 2]


def test_reads_at_native_resolution_are_openslides_own(section, pyramid, tmp_path):
    image = section(900, 700)
    with Slide(pyramid(tmp_path / "a.tif", image, 0.5)) as slide:
        np.testing.assert_array_equal(slide.read(131, 77, 300, 0.5), image[77:377, 131:431])


def test_nothing_outside_is_read(section, pyramid, tmp_path, monkeypatch):
    image = section(1000, 900)
    with Slide(pyramid(tmp_path / "a.tif", image, 0.5, [(500, 450)])) as slide:
        asked = []
        region = slide._pixels.region
        monkeypatch.setattr(slide._pixels, "region", lambda *args: asked.append(args) or region(*args))
        for mpp in (0.5, 0.77, 1.0, 1.9):
            extent = 200 * mpp / 0.5
            slide.read(int(1000 - extent), int(900 - extent), 200, mpp)
        for level, x, y, width, height in asked:
            limit, downsample = slide._pixels.sizes[level], slide.downsamples[level]
            assert x / downsample + width <= limit[0] + 1e-6
            assert y / downsample + height <= limit[1] + 1e-6
        for x, y in ((-1, 0), (0, -1), (801, 0), (0, 701)):
            with pytest.raises(ValueError, match="outside"):
                slide.read(x, y, 200, 0.5)


def test_thumbnail_is_the_average_whatever_its_blocks(section, pyramid, tmp_path, monkeypatch):
    image = section(1337, 1031)
    with Slide(pyramid(tmp_path / "a.tif", image, 0.5)) as slide:
        whole = slide.thumbnail(4.0)
        monkeypatch.setattr(slide_module, "BLOCK", 256)
        blocks = slide.thumbnail(4.0)
    assert whole.shape == (1031 // 8, 1337 // 8, 3)
    truth = image[: 1031 // 8 * 8, : 1337 // 8 * 8].reshape(1031 // 8, 8, 1337 // 8, 8, 3).mean((1, 3))
    np.testing.assert_allclose(whole, truth, atol=0.51)
    np.testing.assert_array_equal(whole, blocks)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_ome_tiff_is_read_with_its_own_resolution(section, tmp_path, planar):
    image = section(700, 600)
    data = image if planar == "contig" else np.moveaxis(image, -1, 0)
    metadata = {"axes": "YXS" if planar == "contig" else "SYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(data, tile=(128, 128), photometric="rgb", planarconfig=planar, metadata=metadata)
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "property")
        np.testing.assert_array_equal(slide.read(101, 57, 300, 0.25), image[57:357, 101:401])
        error = np.abs(slide.read(101, 57, 200, 0.5) - box_average(image, 101, 57, 200, 2.0))
        assert error.max() <= 0.51


def test_ome_tiff_pyramid_between_pixels(section, tmp_path):
    image = cv2.GaussianBlur(section(1200, 1000), (0, 0), 4)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tile = {"tile": (128, 128), "photometric": "rgb"}
        tiff.write(image, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **tile)
        tiff.write(cv2.resize(image, (600, 500), interpolation=cv2.INTER_AREA), subfiletype=1, **tile)
    with Slide(path) as slide:
        assert slide.vendor == "ome-tiff"
        assert slide.downsamples == (1.0, 2.0)
        for x in (100, 101):  # on and between the pixels of the second level
            seen = slide.read(x, 201, 200, 1.0)
            assert np.abs(seen - box_average(image, x, 201, 200, 2.0)).mean() < 0.6
        wrong = np.abs(slide.read(102, 201, 200, 1.0) - box_average(image, 101, 201, 200, 2.0)).mean()
        assert wrong > 1.2


def test_openslide_goes_on_after_a_broken_tile(section, tmp_path):
    import simplejpeg

    image = section(512, 512)
    tiles = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(image[y : y + 256, x : x + 256]), 95)
        for y in (0, 256)
        for x in (0, 256)
    ]
    tiles[1] = b"\xff\xd8" + bytes(500)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter(tiles),
            shape=(512, 512, 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    dead = openslide.OpenSlide(path)
    for x in (256, 0):
        with pytest.raises(openslide.OpenSlideError):
            dead.read_region((x, 0), 0, (256, 256))
    with Slide(path) as slide:
        with pytest.raises(Refusal, match="cannot be decoded at 256, 0"):
            slide.read(256, 0, 256, 0.5)
        assert np.abs(slide.read(0, 256, 256, 0.5).astype(int) - image[256:, :256]).mean() < 3


def test_transparent_areas_take_the_background_color(section, pyramid, tmp_path, monkeypatch):
    path = pyramid(tmp_path / "a.tif", section(300, 300), 0.5)
    rgba = np.full((10, 10, 4), 200, np.uint8)
    rgba[..., 3] = 255
    rgba[:5, :, 3] = 0
    rgba[5, :, 3] = 51
    with Slide(path) as slide:
        monkeypatch.setattr(slide._pixels, "_region", lambda *_: rgba)
        monkeypatch.setattr(slide._pixels, "_background", np.array([10, 20, 30], np.uint8))
        seen = slide.read(0, 0, 10, 0.5)
    assert seen[0, 0].tolist() == [10, 20, 30]
    assert seen[5, 0].tolist() == [48, 56, 64]  # a fifth of 200 over four fifths of the background
    assert seen[9, 9].tolist() == [200, 200, 200]


def test_a_handle_that_failed_is_reopened(section, pyramid, tmp_path, monkeypatch):
    image = section(600, 600)
    places = np.array([(0, 0), (300, 0), (0, 300), (300, 300)])
    with Slide(pyramid(tmp_path / "a.tif", image, 0.5)) as slide:
        region, calls = slide._pixels._region, []

        def fails_twice(*args):
            calls.append(args)
            if len(calls) in (2, 3):
                raise OSError("a read error\nin two lines")
            return region(*args)

        monkeypatch.setattr(slide._pixels, "_region", fails_twice)
        handles = [slide._pixels._slide]
        tiles = []
        for tile in slide.tiles(places, 256, 0.5):
            tiles.append(tile)
            handles.append(slide._pixels._slide)
    assert [handle is handles[0] for handle in handles] == [True, True, False, False, False]
    assert isinstance(tiles[1], Refusal)
    assert str(tiles[1]) == "cannot be decoded at 300, 0: a read error in two lines"
    for (x, y), tile in zip(places[[0, 2, 3]].tolist(), [tiles[0], *tiles[2:]]):
        np.testing.assert_array_equal(tile, image[y : y + 256, x : x + 256])


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.ome.tif"])
def test_many_tiles_are_those_of_single_reads_in_the_order_given(section, pyramid, tmp_path, name):
    image, path = section(800, 700), tmp_path / name
    if name == "a.tif":
        pyramid(path, image, 0.5, [(400, 350)])
    elif name == "a.png":
        Image.fromarray(image).save(path)
    else:
        tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
    places = np.array([(400, 300), (0, 0), (131, 77), (0, 0), (399, 1)])
    with Slide(path, mpp_override=0.5) as slide:
        assert list(slide.tiles(np.zeros((0, 2), np.int64), 256, 0.5)) == []
        for mpp in (0.5, 0.61, 0.73):
            tiles = list(slide.tiles(places, 256, mpp))
            assert len(tiles) == len(places)
            for (x, y), tile in zip(places.tolist(), tiles):
                np.testing.assert_array_equal(tile, slide.read(x, y, 256, mpp))
                assert (tile.shape, tile.dtype) == ((256, 256, 3), np.uint8)
        np.testing.assert_array_equal(tiles[1], tiles[3])
        with pytest.raises(ValueError, match="outside"):
            list(slide.tiles(np.array([(0, 0), (545, 0)]), 256, 0.5))


def test_plain_image_needs_a_resolution_and_takes_one(section, tmp_path):
    image = section(400, 300)
    Image.fromarray(image).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png") as slide:
        assert slide.mpp is None
        with pytest.raises(Refusal, match=r"no resolution .* --mpp-override"):
            slide.require(0.5)
    with Slide(tmp_path / "a.png", mpp_override=0.5) as slide:
        slide.require(0.5)
        assert (slide.mpp, slide.mpp_source, slide.vendor) == (0.5, "override", "image")
        np.testing.assert_array_equal(slide.read(20, 30, 200, 0.5), image[30:230, 20:220])


@pytest.mark.parametrize(
    ("resolution", "asked", "said"),
    [
        ({}, 0.5, "no resolution"),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, 0.5, "no believable resolution .*352.8"),
        ({"resolution": (20000, 25000), "resolutionunit": "CENTIMETER"}, 0.5, "not square"),
        ({"resolution": (10000, 10000), "resolutionunit": "CENTIMETER"}, 0.5, "1 µm/px, coarser than the asked 0.5"),
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.47, "0.5 µm/px, coarser than the asked"),
    ],
)
def test_resolution_that_does_not_serve(section, tmp_path, resolution, asked, said):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, section(300, 300), tile=(256, 256), photometric="rgb", metadata=None, **resolution)
    with Slide(path) as slide, pytest.raises(Refusal, match=said):
        slide.require(asked)


def test_a_little_enlarging_is_allowed(section, pyramid, tmp_path):
    with Slide(pyramid(tmp_path / "a.tif", section(300, 300), 0.5)) as slide:
        slide.require(0.48)
        assert slide.read(0, 0, 256, 0.48).shape == (256, 256, 3)


def test_broken_files_are_refused_with_one_line(section, pyramid, tmp_path):
    good = pyramid(tmp_path / "good.tif", section(600, 600), 0.5).read_bytes()
    Image.fromarray(section(50, 50)).save(tmp_path / "p.png")
    cases = {
        "empty.svs": (b"", "empty file"),
        "noise.svs": (bytes(range(256)) * 20, "not a slide of a known format"),
        "picture.svs": ((tmp_path / "p.png").read_bytes(), "a PNG image named .svs"),
        "cut.tif": (good[:400], "not readable|cannot be decoded"),
        "text.ndpi": (b"hello", "not a slide"),
        "notes.dcm": (bytes(128) + b"DICM" + b"not really", "not a slide|not readable"),
        "broken.png": (b"\x89PNG\r\n\x1a\nnothing", "not readable as an image"),
    }
    for name, (data, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refusal, match=said) as refused, Slide(tmp_path / name, mpp_override=0.5) as slide:
            slide.thumbnail(4)
        assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="No such file"):
        Slide(tmp_path / "absent.svs")


def test_huge_image_is_refused_before_decoding(tmp_path):
    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))))
        )
    )
    with pytest.raises(Refusal, match="12000 x 12000 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_what_is_not_8_bit_rgb_is_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((2, 300, 300), dtype), metadata={"axes": "CYX"})
    with pytest.raises(Refusal, match="8-bit RGB is read"):
        Slide(tmp_path / "a.ome.tif")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(Refusal, match="8 bits a channel"):
        read_image(tmp_path / "b.png")


def test_images_are_composited_on_white_and_turned_upright(tmp_path):
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:, 15:] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    seen = read_image(tmp_path / "a.png")
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[0, 29].tolist() == [200, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba[..., :3]).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (30, 20, 3)


def test_real_slides(real_data):
    with Slide(real_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert (slide.size, slide.mpp, slide.mpp_source, slide.vendor) == ((2220, 2967), 0.499, "property", "aperio")
        direct = np.asarray(openslide.OpenSlide(slide.path).read_region((700, 900), 0, (640, 640)))[..., :3]
        np.testing.assert_array_equal(slide.read(700, 900, 640, 0.499), direct)
        seen = slide.read(700, 900, 150, 2.0)
        assert np.abs(seen - box_average(direct, 0, 0, 150, 2.0 / 0.499)).mean() < 0.6
    with Slide(real_data / "wsi" / "instanseg_HE_example.ome.tif") as slide:
        assert slide.mpp == pytest.approx(0.50008, abs=1e-5)
        whole = tifffile.imread(slide.path)
        np.testing.assert_array_equal(slide.read(333, 222, 512, slide.mpp), whole[222:734, 333:845])
    coarse = r"finest level is 28\.97 µm/px, coarser than the asked 0\.5"
    with Slide(real_data / "wsi" / "camelyon_overview_jpeg2000.dcm") as slide, pytest.raises(Refusal, match=coarse):
        slide.require(0.5)


def test_import_does_not_open_the_slide_libraries():
    code = "import sys, eosin.data_tools.slide; print({'openslide', 'tiffslide', 'tifffile', 'PIL'} & set(sys.modules))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"


def test_a_slide_that_vanishes_is_refused(section, pyramid, tmp_path):
    path = pyramid(tmp_path / "a.tif", section(300, 300), 0.5)
    shutil.copy(path, tmp_path / "b.tif")
    Path(path).unlink()
    with pytest.raises(Refusal, match="No such file"):
        Slide(path)
