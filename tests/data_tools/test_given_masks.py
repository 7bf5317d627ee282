"""Given masks against point-in-polygon tests of two libraries, areas in closed form, and broken files."""

import json
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from eosin.data_tools import given_masks
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.given_masks import find_masks, read_mask
from eosin.data_tools.sources import Source, find_slides

SIZE = (4000, 3200)  # of the slide
SHAPE = (400, 500)  # of its thumbnail, 8 pixels of the slide a pixel


def sources(*files: str) -> list[Source]:
    return [Source(Path(file).stem, Path("/slides") / file, Path(file).name) for file in files]


def circle(x: float, y: float, radius: float, corners: int = 720) -> list[list[float]]:
    angle = 2 * np.pi * np.append(np.arange(corners), 0) / corners
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1).tolist()


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def polygon(*rings: list[list[float]]) -> dict[str, object]:
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry: object, **properties: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def read(tmp_path: Path, value: object, size: tuple[int, int] = SIZE, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    path = tmp_path / "a.geojson"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return read_mask(path, size, shape)


def centers(shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Middles of a thumbnail's pixels in pixels of the slide, [H * W, 2] as x, y."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    return np.stack([x.ravel() * size[0] / shape[1], y.ravel() * size[1] / shape[0]], axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_outlines_agree_with_two_libraries(tmp_path, seed):
    from matplotlib.path import Path as Outline
    from skimage.draw import polygon2mask

    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 40))
    radius = rng.uniform(300, 1500, 40)
    ring = np.stack([2000 + radius * np.cos(angle), 1600 + radius * np.sin(angle)], axis=1)
    mask = read(tmp_path, polygon(ring.tolist()))
    np.testing.assert_array_equal(mask, Outline(ring).contains_points(centers(SHAPE, SIZE)).reshape(SHAPE))
    rows_columns = ring[:, ::-1] / 8 - 0.5  # scikit-image puts pixels' middles on whole numbers
    np.testing.assert_array_equal(mask, polygon2mask(SHAPE, rows_columns))


def test_a_self_crossing_outline_is_even_odd(tmp_path):
    # A star of five points, whose inner pentagon even-odd leaves out.
    angle = np.pi * (4 * np.arange(6) / 5 - 0.5)
    star = np.stack([2000 + 1500 * np.cos(angle), 1600 + 1500 * np.sin(angle)], axis=1)
    mask = read(tmp_path, polygon(star.tolist()))
    assert not mask[200, 250]
    # Of ten triangles from the middle, each between a tip and a notch; the pentagon of the notches is left out.
    tip, inner = 1500.0, 1500 * np.sin(np.pi / 10) / np.sin(7 * np.pi / 10)
    hull = 5 * tip * inner * np.sin(np.pi / 5)
    pentagon = 2.5 * inner**2 * np.sin(2 * np.pi / 5)
    assert mask.sum() * 64 == pytest.approx(hull - pentagon, rel=2e-3)


def test_areas_of_rings_in_closed_form_and_a_known_offset(tmp_path):
    def rings(x: float, y: float) -> list[list[list[float]]]:
        return [circle(x, y, 700), circle(x - 100, y, 300), circle(x + 400, y, 40)]

    # The second lies 225 by 138 pixels of the thumbnail away.
    mask = read(tmp_path, {"type": "MultiPolygon", "coordinates": [rings(1000, 900), rings(2800, 2004)]})
    first, second = mask[:, :225], mask[:, 225:450]
    area = 700**2 - 300**2 - 40**2
    assert first.sum() * 64 == pytest.approx(np.pi * area, rel=3e-3)
    y, x = (8 * (axis.mean() + 0.5) for axis in np.nonzero(first))
    assert x == pytest.approx((1000 * 700**2 - 900 * 300**2 - 1400 * 40**2) / area, abs=2)
    assert y == pytest.approx(900, abs=2)
    assert not first[112, 171:179].any()  # the narrow hole is open from edge to edge
    np.testing.assert_array_equal(first[:250], second[138:388])
    assert mask.sum() == first.sum() + second.sum()


def test_overlapping_outlines_unite_and_holes_do_not_cut_others(tmp_path):
    features = [
        feature(polygon(box(0, 0, 1600, 1600), box(400, 400, 1200, 1200)), objectType="annotation"),
        feature(polygon(box(800, 800, 2400, 2400)), objectType="detection"),
    ]
    mask = read(tmp_path, {"type": "FeatureCollection", "features": features})
    truth = np.zeros(SHAPE, bool)
    truth[:200, :200] = True
    truth[50:150, 50:150] = False
    truth[100:300, 100:300] = True
    np.testing.assert_array_equal(mask, truth)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-40, 440), st.integers(-30, 330)), min_size=3, max_size=9),
    st.integers(3, 60),
    st.integers(3, 60),
)
@example([(5, 15), (395, 15), (395, 295), (5, 295)], 30, 40)
def test_any_ring_agrees_with_a_ray_to_the_right(tmp_path_factory, ring, height, width):
    """Vertices on pixels' middles, beyond the border, of no area: parity of the edges that a ray crosses."""
    size = (400, 300)
    mask = read(tmp_path_factory.getbasetemp(), polygon([list(point) for point in ring]), size, (height, width))
    points = np.array(ring) * [width / 400, height / 300]
    y, x = np.mgrid[0:height, 0:width] + 0.5
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        crossed = (y0 <= y) != (y1 <= y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crossed & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x)
    np.testing.assert_array_equal(mask, inside)


SQUARE = polygon(box(800, 800, 1600, 1600))


@pytest.mark.parametrize(
    "value",
    [
        SQUARE,
        feature(SQUARE),
        [feature(SQUARE, objectType="annotation", classification={"name": "Tissue", "color": [0, 0, 0]})],
        {"type": "GeometryCollection", "geometries": [SQUARE, {"type": "Point", "coordinates": [5, 5]}]},
        # As TRIDENT writes it.
        {
            "type": "FeatureCollection",
            "name": "a",
            "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}},
            "features": [feature(SQUARE, tissue_id=0)],
        },
        # As QuPath writes it: an open ring is closed, planes and measurements do not matter.
        feature(
            SQUARE | {"coordinates": [box(800, 800, 1600, 1600)[:-1]], "plane": {"c": -1, "z": 0}}, measurements=[]
        ),
        [
            feature(SQUARE, objectType="cell", classification={"names": ["Tumor", "Positive"]}),
            feature(polygon(box(0, 0, 9, 9)), classification={"name": "Ignore*"}),
            feature(polygon(box(0, 0, 9, 9)), classification={"name": "Artifact*"}),
            feature(polygon(box(0, 0, 9, 9)), classification={"name": "background"}),
            feature(polygon(box(0, 0, 9, 9)), classification={"name": "Tumor: Ignore*"}),
            feature(polygon(box(0, 0, 9, 9)), classification={"names": ["Tissue", "Background glass"]}),
            feature(polygon(box(0, 0, 9, 9)), classification="Region*"),
            feature(polygon(circle(50, 50, 40)), objectType="tma_core", name="A-1"),
            feature({"type": "LineString", "coordinates": [[0, 0], [4000, 3200]]}, objectType="annotation"),
            feature({"type": "Polygon", "coordinates": []}),
            feature(None),
        ],
    ],
)
def test_forms_of_geojson(tmp_path, value):
    truth = np.zeros(SHAPE, bool)
    truth[100:200, 100:200] = True
    np.testing.assert_array_equal(read(tmp_path, value), truth)
    np.testing.assert_array_equal(read(tmp_path, "\ufeff" + json.dumps(value)), truth)


def test_outlines_are_clipped_at_the_slide(tmp_path):
    mask = read(tmp_path, polygon(box(-300, 1600, 2000, 3400)))
    truth = np.zeros(SHAPE, bool)
    truth[200:, :250] = True
    np.testing.assert_array_equal(mask, truth)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7", "not GeoJSON"),
        ('{"type": "Polygon"}', "not GeoJSON"),
        ('{"type": "FeatureCollection"}', "not GeoJSON: a list"),
        ('{"type": "Feature", "properties": 3}', "properties are no object"),
        ('{"type": "Feature", "properties": {"classification": {"names": 3}}}', "not GeoJSON: a list"),
        ('{"type": 3}', "'type' was expected"),
        ({"type": "FeatureCollection", "features": []}, "outlines no tissue"),
        ([feature(SQUARE, classification={"name": "Ignore*"})], "outlines no tissue; left out: Ignore*"),
        (polygon([[0, 0], [1, 1], [float("nan"), 3]]), "no list of finite positions"),
        (polygon([[0, 0], [1, 1], [float("inf"), 3]]), "no list of finite positions"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1e999, 3]]]}', "no list of finite positions"),
        (polygon([[0, 0], [1, 1], [None, 3]]), "no list of finite positions"),
        (polygon([[0, 0], [1], [2, 3]]), "no list of positions"),
        (polygon([[0, 0], ["x", 1], [2, 3]]), "no list of positions"),
        (polygon([[0, 0], [10**400, 1], [2, 3]]), "no list of positions"),
        (polygon([]), "no list of positions"),
        (polygon([[0], [1], [2]]), "no list of finite positions"),
        (polygon([3, 4]), "no list of positions"),
        (polygon(box(0, 0, 9000, 800)), "reaches 9000, 0 on a slide of 4000 x 3200"),
        (polygon(box(-900, 0, 10, 800)), "reaches -900, 0 on"),
        (polygon([[x, 3199 * (x % 2)] for x in range(4000)] * 12), "cross the thumbnail's rows"),
    ],
)
def test_geojson_that_is_wrong_is_refused_in_one_line(tmp_path, value, said):
    with pytest.raises(Refusal) as caught:
        read(tmp_path, value)
    text = str(caught.value)
    assert text.startswith("no usable mask: a.geojson")
    assert said in text
    assert "\n" not in text
    assert len(text) < 300


def test_large_geojson_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(given_masks, "MAX_GEOJSON_BYTES", 1 << 20)
    with pytest.raises(Refusal, match="2 MiB, above 1; outline the tissue alone"):
        read(tmp_path, "[" * (2 << 20))


def painted(width: int, height: int) -> np.ndarray:
    """A disk off the middle, in the frame of the slide: uint8 [height, width], 0 and 1."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return (((x / width - 0.3) * 5) ** 2 + ((y / height - 0.6) * 4) ** 2 < 1).astype(np.uint8)


IMAGES = {
    "gray.png": lambda mask: Image.fromarray(mask),
    "white.png": lambda mask: Image.fromarray(mask * np.uint8(255)),
    "bits.png": lambda mask: Image.fromarray(mask > 0),
    "deep.png": lambda mask: Image.fromarray(mask.astype(np.uint16) * 256),
    "blue.png": lambda mask: Image.fromarray(np.stack([0 * mask, 0 * mask, 9 * mask], axis=-1)),
    "clear.png": lambda mask: Image.fromarray(
        np.stack([0 * mask + 200] * 3 + [mask * np.uint8(255)], axis=-1).astype(np.uint8)
    ),
    "palette.png": lambda mask: _palette(mask),
}


def _palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(1 - mask, "P")
    image.putpalette([200, 30, 90, 0, 0, 0])  # 0 is red, 1 is black
    return image


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("width", [250, 500, 2000])
def test_png_masks_of_any_size_and_mode(tmp_path, name, width):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        IMAGES[name](painted(width, width * 4 // 5)).save(tmp_path / name)
    mask = read_mask(tmp_path / name, SIZE, SHAPE)
    truth = painted(500, 400) > 0
    wrong = (mask != truth).sum()
    # The boundary is about 800 pixels long; a stretched pixel is at most two wide.
    assert wrong <= (0 if width == 500 else 350)
    middle = np.array([axis.mean() + 0.5 for axis in np.nonzero(mask)])
    np.testing.assert_allclose(middle, [240, 150], atol=0.3)


def test_each_pixel_takes_the_nearest(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.random((80, 100)) < 0.5
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", SIZE, SHAPE), np.kron(image, np.ones((5, 5))) > 0)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", SIZE, (16, 20)), image[2::5, 2::5])


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
def test_tiff_masks(tmp_path, photometric):
    import tifffile

    mask = painted(500, 400)
    pixels = {"minisblack": mask, "miniswhite": 255 - mask, "rgb": np.stack([0 * mask, mask, 0 * mask], axis=-1)}
    tifffile.imwrite(tmp_path / "a.tif", pixels[photometric], photometric=photometric)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", SIZE, SHAPE), mask > 0)


def test_of_a_pyramid_a_level_just_fine_enough_is_read(tmp_path, monkeypatch):
    import tifffile

    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        # Each level tells itself apart by a square of its own.
        for level, side in enumerate((4000, 2000, 1000, 500, 250)):
            mask = painted(side, side * 4 // 5)
            mask[: side // 10, level * side // 10 : (level + 1) * side // 10] = 1
            tiff.write(mask, tile=(64, 64), photometric="minisblack", metadata=None, subfiletype=int(level > 0))
    monkeypatch.setattr(given_masks, "MAX_IMAGE_PIXELS", 500 * 400)
    mask = read_mask(tmp_path / "a.tif", SIZE, SHAPE)
    truth = painted(500, 400) > 0
    truth[:50, 150:200] = True
    np.testing.assert_array_equal(mask, truth)
    with pytest.raises(Refusal, match="1000 x 800 pixels in one piece"):
        read_mask(tmp_path / "a.tif", SIZE, (700, 800))


@pytest.mark.parametrize(("width", "fits"), [(500, True), (492, True), (508, True), (489, False), (511, False)])
def test_aspect_ratio_within_two_percent(tmp_path, width, fits):
    Image.fromarray(np.ones((400, width), np.uint8)).save(tmp_path / "a.png")
    if fits:
        assert read_mask(tmp_path / "a.png", SIZE, SHAPE).all()
    else:
        with pytest.raises(
            Refusal, match=f"a.png has {width} x 400 pixels, another aspect ratio than the slide's 4000"
        ):
            read_mask(tmp_path / "a.png", SIZE, SHAPE)


def test_images_that_are_wrong_are_refused_in_one_line(tmp_path):
    import tifffile

    rng = np.random.default_rng(0)
    (tmp_path / "noise.png").write_bytes(rng.bytes(500))
    (tmp_path / "noise.tif").write_bytes(rng.bytes(500))
    (tmp_path / "empty.png").touch()
    Image.fromarray(painted(500, 400)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    Image.fromarray(painted(500, 400)).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.jpg").rename(tmp_path / "photo.png")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((400, 500), np.float32))
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 400, 500), np.uint8), photometric="minisblack")
    # A header alone that promises 100,000 x 80,000 pixels.
    huge = bytearray((tmp_path / "whole.png").read_bytes())
    huge[16:24] = (100_000).to_bytes(4, "big") + (80_000).to_bytes(4, "big")
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(huge)
    Image.fromarray(np.ones((2, 2), np.uint8)).save(tmp_path / "photo.jpeg")
    (tmp_path / "clam.pkl").write_bytes(pickle.dumps({"tissue": []}))
    (tmp_path / "clam.h5").touch()
    for name, said in (
        ("noise.png", "cannot be read"),
        ("noise.tif", "cannot be read"),
        ("empty.png", "cannot be read"),
        ("cut.png", "cannot be read"),
        ("photo.png", "cannot be read"),
        ("gone.png", "cannot be read"),
        ("gone.geojson", "cannot be read"),
        ("float.tif", "of float32; one image of integers"),
        ("stack.tif", "one image of integers"),
        ("huge.png", "pixels"),
        ("photo.jpeg", "a JPEG is no mask"),
        ("clam.pkl", "a pickle is never opened, as it may run code; write CLAM's contours to GeoJSON"),
        ("clam.h5", "holds the places of tiles"),
    ):
        with pytest.raises(Refusal) as caught:
            read_mask(tmp_path / name, SIZE, SHAPE)
        text = str(caught.value)
        assert text.startswith(f"no usable mask: {name}"), text
        assert said in text
        assert "\n" not in text


def test_masks_are_found_by_name(tmp_path):
    for name in (
        "a.png",
        "b.1.geojson",
        "more/c.svs.tif",
        "d_mask.png",
        "deep/er/e.svs-mask.png",
        "f_mask_mask.tiff",
        "unknown.png",
        "notes.txt",
        ".hidden.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    slides = sources("a.svs", "b.1.svs", "c.svs", "d.tif", "e.svs", "f_mask.ndpi", "g.svs", "h.svs")
    masks, notices = find_masks(tmp_path, slides)
    assert {slide: path.relative_to(tmp_path).as_posix() for slide, path in masks.items()} == {
        "a": "a.png",
        "b.1": "b.1.geojson",
        "c": "more/c.svs.tif",
        "d": "d_mask.png",
        "e": "deep/er/e.svs-mask.png",
        "f_mask": "f_mask_mask.tiff",
    }
    assert notices == [f"no mask in {tmp_path.name}: g, h", "no slide for these masks: unknown.png"]


def test_names_that_a_table_gives_and_the_file_s_own(tmp_path):
    slides = [Source("A1", Path("/s/a.svs"), "a.svs"), Source("b", Path("/s/c.svs"), "c.svs")]
    slides += [Source("z", Path("/s/b.svs"), "b.svs"), Source("lost", None, "lost.svs")]
    for name in ("A1", "b", "b.svs"):
        (tmp_path / f"{name}.png").touch()
    masks, notices = find_masks(tmp_path, slides)
    assert {slide: path.name for slide, path in masks.items()} == {"A1": "A1.png", "b": "b.png", "z": "b.svs.png"}
    assert notices == [f"no mask in {tmp_path.name}: lost"]


def test_slides_called_alike_need_folders(tmp_path):
    for folder in "xy":
        (tmp_path / "slides" / folder).mkdir(parents=True)
        (tmp_path / "slides" / folder / "a.svs").touch()
        (tmp_path / "masks" / folder).mkdir(parents=True)
        (tmp_path / "masks" / folder / "a.geojson").touch()
    slides = find_slides([tmp_path / "slides"])
    masks, notices = find_masks(tmp_path / "masks", slides)
    assert {slide: path.parent.name for slide, path in masks.items()} == {"x/a": "x", "y/a": "y"}
    assert notices == []
    (tmp_path / "masks" / "a.png").touch()
    with pytest.raises(UserError, match="fits the slides x/a, y/a; name it as one of them"):
        find_masks(tmp_path / "masks", slides)


def test_masks_beside_slides_and_in_trident_s_folder(tmp_path):
    for name in ("a.tif", "a.geojson", "b.tif"):
        (tmp_path / name).touch()
    masks, notices = find_masks(tmp_path, find_slides([tmp_path]))
    assert masks == {"a": tmp_path / "a.geojson"}
    assert notices == [f"no mask in {tmp_path.name}: b"]
    job = tmp_path / "job"
    for name in ("contours/a.jpg", "patches/a.h5", "contours_geojson/a.geojson", "wsi_states/a.json"):
        (job / name).parent.mkdir(parents=True)
        (job / name).touch()
    masks, _ = find_masks(job, find_slides([tmp_path / "a.tif"]))
    assert masks == {"a": job / "contours_geojson" / "a.geojson"}


def test_folders_of_masks_that_make_no_sense(tmp_path):
    slides = sources("a.svs")
    with pytest.raises(UserError, match="is no folder"):
        find_masks(tmp_path / "gone", slides)
    with pytest.raises(UserError, match=r"holds no mask; known endings: \.png \.tif \.tiff \.geojson \.json"):
        find_masks(tmp_path, slides)
    for name in ("a.png", "a_mask.geojson"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a.png and .*a_mask.geojson are both masks of slide 'a'; remove one"):
        find_masks(tmp_path, slides)
