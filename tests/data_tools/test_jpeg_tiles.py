"""JPEG tiles decoded directly, against OpenSlide's own pixels; odd tiles of every kind are left for OpenSlide."""

import itertools
import struct
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from eosin.data_tools import jpeg_tiles
from eosin.data_tools.errors import Refusal
from eosin.data_tools.jpeg_tiles import JpegPixels
from eosin.data_tools.slide import Slide

MPP = 0.25
APERIO = f"Aperio Image Library v10.0.51\r\n700x650 (128x128) JPEG/RGB Q=90|AppMag = 40|MPP = {MPP}"
# A tile of the 6 by 6 at 128 px of a section of 700 x 650 px that lies inside it, and where it begins.
INNER, LEFT, TOP = 14, 256, 256


def ycbcr(image: np.ndarray) -> np.ndarray:
    """The color space in which tifffile takes what it shall store as YCbCr."""
    return np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])


@pytest.fixture
def jpeg(section, pyramid, tmp_path):
    """A pyramid of JPEG tiles of 128 px: the path."""

    def write(sizes=((350, 325),), photometric="ycbcr", subsampling=(2, 2), **kwargs) -> Path:
        args = {"compressionargs": {"level": 90}, "compression": "jpeg", "tile": (128, 128)}
        args |= {"photometric": photometric} | kwargs
        if photometric == "ycbcr":
            args |= {"subsampling": subsampling}
        image = section(700, 650) if photometric == "rgb" else ycbcr(section(700, 650))
        return pyramid(tmp_path / "a.tif", image, MPP, sizes, **args)

    return write


def openslides(path: Path, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), level, (width, height)))[..., :3]


def forbid_other(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each level be proven, then fail where the other reader is asked."""
    for level in range(len(slide.downsamples)):
        slide._pixels.region(level, 0, 0, 8, 8)

    def region(*args):
        raise AssertionError("the other reader was asked")

    monkeypatch.setattr(slide._pixels._other, "region", region)


def edit_tag(path: Path, tag: str, change) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        found = tiff.pages[0].tags[tag]
        found.overwrite(change(found.value))


def edit_tile(path: Path, change, number: int = INNER) -> None:
    """Put other bytes in a tile's place, no more than there were."""
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    data = bytearray(path.read_bytes())
    new = change(bytes(data[offset : offset + count]))
    assert len(new) <= count
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("photometric", "subsampling", "description"),
    [
        ("ycbcr", (2, 2), None),
        ("ycbcr", (2, 1), APERIO),
        ("ycbcr", (1, 1), None),
        ("rgb", None, None),
        ("rgb", None, APERIO),
    ],
)
def test_pixels_are_openslides_own(jpeg, section, monkeypatch, photometric, subsampling, description):
    kwargs = {"description": description} if description else {}
    path = jpeg(photometric=photometric, subsampling=subsampling, **kwargs)
    with Slide(path) as slide:
        assert slide.vendor == ("aperio" if description else "generic-tiff")
        forbid_other(slide, monkeypatch)
        seen = slide.read(0, 0, 650, MPP)
        assert np.abs(seen.astype(int) - section(700, 650)[:, :650]).mean() < 5  # and the colors are right
        for x, y, size in [(0, 0, 700), (128, 256, 128), (101, 57, 300), (572, 522, 128), (699, 649, 1)]:
            size = min(size, 700 - x, 650 - y)
            np.testing.assert_array_equal(slide.read(x, y, size, MPP), openslides(path, 0, x, y, size, size))
        for x, y, size in [(0, 0, 325), (256, 128, 128), (202, 102, 100), (444, 394, 128)]:
            np.testing.assert_array_equal(slide.read(x, y, size, 2 * MPP), openslides(path, 1, x, y, size, size))


@pytest.mark.parametrize("size", [(350, 325), (349, 324), (175, 163)])
def test_between_pixels_it_interpolates_as_openslide(jpeg, monkeypatch, size):
    path = jpeg(sizes=[size])
    worst = []
    with Slide(path) as slide:
        forbid_other(slide, monkeypatch)
        for x, y in [(1, 0), (101, 57), (103, 256), (200, 201)]:
            seen = slide.read(x, y, 80, MPP * slide.downsamples[1])
            difference = cv2.absdiff(seen, np.ascontiguousarray(openslides(path, 1, x, y, 80, 80)))
            assert difference.mean() < 0.6
            worst.append(difference.max())
    # Both round their weights, to 1/32 here and to 1/128 there, and OpenSlide rounds each tile's share by itself.
    assert max(worst) <= 4


def test_tables_shared_by_the_tiles_are_put_before_them(section, tmp_path, monkeypatch):
    image, shared, tiles = section(512, 512), b"", []
    for y, x in itertools.product((0, 256), (0, 256)):
        whole = simplejpeg.encode_jpeg(np.ascontiguousarray(image[y : y + 256, x : x + 256]), 90)
        at, shared, tile = 2, b"", b"\xff\xd8"
        while whole[at + 1] != 0xDA:
            end = at + 2 + struct.unpack(">H", whole[at + 2 : at + 4])[0]
            if whole[at + 1] in (0xDB, 0xC4):
                shared += whole[at:end]
            elif whole[at + 1] != 0xE0:
                tile += whole[at:end]
            at = end
        tiles.append(tile + whole[at:])
    path = tmp_path / "a.tif"
    tables = b"\xff\xd8" + shared + b"\xff\xd9"
    with tifffile.TiffWriter(path) as tiff:
        layout = {"shape": image.shape, "dtype": np.uint8, "tile": (256, 256), "photometric": "ycbcr"}
        extra = [(347, 7, len(tables), tables, True)]
        tiff.write(iter(tiles), compression="jpeg", subsampling=(1, 1), extratags=extra, metadata=None, **layout)
    with Slide(path, mpp_override=MPP) as slide:
        forbid_other(slide, monkeypatch)
        seen = slide.read(0, 0, 512, MPP)
    np.testing.assert_array_equal(seen, openslides(path, 0, 0, 0, 512, 512))
    assert np.abs(seen.astype(int) - image).mean() < 3


def test_ome_tiff_of_jpegs(section, tmp_path, monkeypatch):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    tile = {"tile": (128, 128), "photometric": "ycbcr", "compression": "jpeg"}
    image = ycbcr(section(700, 650))
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=1, metadata=metadata, **tile)
        tiff.write(cv2.resize(image, (350, 325), interpolation=cv2.INTER_AREA), subfiletype=1, **tile)
    with Slide(path) as slide:
        forbid_other(slide, monkeypatch)
        assert slide.vendor == "ome-tiff"
        np.testing.assert_array_equal(slide.read(101, 57, 300, MPP), tifffile.imread(path)[57:357, 101:401])
        second = tifffile.imread(path, level=1)
        np.testing.assert_array_equal(slide.read(102, 56, 200, 2 * MPP), second[28:228, 51:251])


def test_what_is_no_plain_jpeg_stays_with_the_other_reader(jpeg, section, tmp_path):
    with Slide(jpeg()) as slide:
        assert isinstance(slide._pixels, JpegPixels)
    with Slide(jpeg(compression="zlib", compressionargs={}, photometric="rgb")) as slide:
        assert not isinstance(slide._pixels, JpegPixels)
        np.testing.assert_array_equal(slide.read(101, 57, 300, MPP), section(700, 650)[57:357, 101:401])
    # Two directories of one size: nothing says which of them is the level.
    path = jpeg(sizes=[(350, 325), (350, 325)])
    assert [level is None for level in jpeg_tiles.jpeg_levels(path, [(700, 650), (350, 325), (1, 1)])] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("stored", ["ycbcr", "rgb"])
def test_a_wrong_color_tag_gives_what_openslide_gives(jpeg, stored):
    path = jpeg(sizes=(), photometric=stored, subsampling=(1, 1))
    right = openslides(path, 0, 101, 57, 300, 300)
    edit_tag(path, "PhotometricInterpretation", lambda _: 2 if stored == "ycbcr" else 6)
    with Slide(path) as slide:
        seen = slide.read(101, 57, 300, MPP)
    np.testing.assert_array_equal(seen, openslides(path, 0, 101, 57, 300, 300))
    if stored == "ycbcr":
        assert np.abs(seen.astype(int) - right).mean() > 5  # the tag does count


def test_a_level_that_openslide_shows_otherwise_is_left_to_it(jpeg, monkeypatch):
    path = jpeg(sizes=())
    with Slide(path) as slide:
        monkeypatch.setattr(slide._pixels._other, "region", lambda *args: (255 - openslides(path, *args), (0.0, 0.0)))
        np.testing.assert_array_equal(slide.read(0, 0, 300, MPP), 255 - openslides(path, 0, 0, 0, 300, 300))


def test_missing_tiles_show_the_background(jpeg):
    path = jpeg(sizes=())
    whole = openslides(path, 0, 0, 0, 700, 650).copy()
    for tag in ("TileByteCounts", "TileOffsets"):
        edit_tag(path, tag, lambda values: tuple(0 if n == INNER else v for n, v in enumerate(values)))
    with Slide(path) as slide:
        seen = slide.read(0, 0, 650, MPP)
        assert (slide.read(LEFT, TOP, 128, MPP) == 255).all()
    hole = np.s_[TOP : TOP + 128, LEFT : LEFT + 128]
    whole[hole] = 255
    np.testing.assert_array_equal(seen, whole[:650, :650])


def huge(data: bytes) -> bytes:
    """The same JPEG with 65,500 by 65,500 pixels in its header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xff\xd8" + bytes(300),
        lambda data: bytes(300),
        lambda data: b"\xff\xd8\xff" + b"\xff" * 300,
        huge,
        lambda data: simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8)),
    ],
    ids=["no header", "zeros", "fill bytes", "huge", "of another size"],
)
def test_a_damaged_tile_costs_only_the_squares_that_need_it(jpeg, monkeypatch, change):
    path = jpeg(sizes=())
    whole = openslides(path, 0, 0, 0, 700, 650)
    edit_tile(path, change)
    decode, headers = simplejpeg.decode_jpeg, set()

    def watched(data):
        headers.add(simplejpeg.decode_jpeg_header(data)[:2])
        return decode(data)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    places = np.array([(x, y) for y in range(0, 500, 64) for x in range(0, 500, 64)])
    with Slide(path) as slide:
        tiles = list(slide.tiles(places, 128, MPP))
    for (x, y), tile in zip(places.tolist(), tiles):
        if abs(x - LEFT) < 128 and abs(y - TOP) < 128:
            assert isinstance(tile, Refusal)
            assert f"cannot be decoded at {x}, {y}" in str(tile)
        else:
            np.testing.assert_array_equal(tile, whole[y : y + 128, x : x + 128])
    assert headers == {(128, 128)}  # nothing else was even begun


def test_a_tile_beyond_the_end_of_the_file_is_refused(jpeg):
    path = jpeg()
    whole = openslides(path, 0, 0, 0, 700, 650)
    edit_tag(path, "TileOffsets", lambda values: tuple(1 << 30 if n == INNER else v for n, v in enumerate(values)))
    with Slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 256, MPP), whole[:256, :256])
        with pytest.raises(Refusal, match="cannot be decoded at 300, 300"):
            slide.read(300, 300, 200, MPP)


def test_flipped_bytes_give_openslides_pixels_or_a_refusal(jpeg):
    path = jpeg(sizes=())
    good = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[0].dataoffsets[INNER], tiff.pages[0].databytecounts[INNER]
    rng = np.random.default_rng(0)
    outcomes = []
    for trial in range(60):
        data = bytearray(good)
        # Headers are a small part of a file, so that half of the flips are put there.
        begin, length = (start, 30 if trial % 4 == 1 else count) if trial % 2 else (0, min(start, 1200))
        for place in rng.integers(begin, begin + length, 2).tolist():
            data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            truth = openslides(path, 0, LEFT, TOP, 128, 128)
        except openslide.OpenSlideError:
            truth = None
        outcome: np.ndarray | str
        try:
            with Slide(path, mpp_override=MPP) as slide:
                outcome = slide.read(LEFT, TOP, 128, MPP) if slide.size == (700, 650) else "another size"
        except Refusal:
            outcome = "refused"
        outcomes.append("read" if isinstance(outcome, np.ndarray) else outcome)
        if truth is None:
            assert outcome == "refused"
        elif isinstance(outcome, np.ndarray):
            np.testing.assert_array_equal(outcome, truth)
    assert outcomes.count("read") > 10
    assert outcomes.count("refused") > 10


def test_memory_is_bounded_whatever_is_read(jpeg):
    path = jpeg(sizes=())
    with Slide(path) as slide:
        whole = slide.read(0, 0, 650, MPP)
    pixels = JpegPixels(path, Slide(path)._pixels, jpeg_tiles.jpeg_levels(path, [(700, 650)]), 3 * 128 * 128 * 3)
    for x, y in itertools.product(range(0, 500, 77), range(0, 500, 77)):
        np.testing.assert_array_equal(pixels.region(0, x, y, 150, 150)[0], whole[y : y + 150, x : x + 150])
        assert sum(tile.nbytes for tile in pixels._cache.values()) <= 3 * 128 * 128 * 3
    pixels.close()


def test_a_tile_that_squares_share_is_decoded_once(jpeg, monkeypatch):
    decode, decoded = simplejpeg.decode_jpeg, []
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: decoded.append(data) or decode(data))
    with Slide(jpeg(sizes=())) as slide:
        places = np.array([(x, y) for y in range(0, 550, 50) for x in range(0, 600, 50)])
        assert all(isinstance(tile, np.ndarray) for tile in slide.tiles(places, 100, MPP))
    assert len(decoded) == 30  # six by five cover 650 by 600 px


def test_real_slide(real_data, monkeypatch):
    path = real_data / "wsi" / "CMU-1-Small-Region.svs"
    with Slide(path) as slide:
        forbid_other(slide, monkeypatch)
        places = np.array([(x, y) for y in (0, 900, 2711) for x in (0, 700, 1964)])
        for (x, y), tile in zip(places.tolist(), slide.tiles(places, 256, 0.499)):
            np.testing.assert_array_equal(tile, openslides(path, 0, x, y, 256, 256))
