"""The sheet tells what was put into a shard set: known colors, shares and counts, and tiles of all slides."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.data_tools.shards_picture import CAPTION, COLUMNS, GAP, MARGIN, panels
from eosin.data_tools.shards_sheet import SHOWN, circular_median, locate, spread, survey, words, write_sheet

SIZES = (6, 1, 3)  # tiles a slide


def png(color: tuple[int, int, int], side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def make_set(folder: Path, table: pd.DataFrame, colors: list[tuple[int, int, int]], **facts: float) -> ShardSet:
    """``SIZES`` tiles a slide, all of a slide in its color, dealt over shards."""
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes=6000)
    for turn in range(max(SIZES)):
        for slide, tiles in enumerate(SIZES):
            if turn < tiles:
                meta = {"x": 16 * turn, "y": 0, "mpp": None} | {name: v * (turn + 1) for name, v in facts.items()}
                writer.add(f"s{slide}_{turn}", png(colors[slide]), "png", meta, slide)
    writer.finish(table, tile_size=16, mpp=facts.get("mpp"), config={})
    return ShardSet(folder)


COLORS = [(200, 100, 150), (150, 100, 200), (90, 30, 60)]
TILED = {
    "slide": ["a", "b", "c", "d"],
    "stain": ["H&E", "H&E", "IHC", "H&E"],
    "site": ["x", "", "x", "y"],
    "tissue_mm2": [2.0, 1.0, 3.0, 0.0],
    "tiles": [6, 1, 3, 0],
    "mpp": [0.25, 0.5, 0.25, np.nan],
    "mpp_source": "tag",
    "dropped_pen": [1, 2, 0, 0],
    "dropped_blank": 5,
    "dropped_blur": 0,
    "state": ["done", "done", "done", "refused"],
}


@pytest.fixture(scope="module")
def tiled(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("sheet") / "tiled"
    return make_set(folder, pd.DataFrame(TILED), COLORS, tissue=0.1, mpp=0.5)


def test_a_draw_shows_as_many_slides_as_can_be_and_no_tile_twice():
    counts = np.array([5, 0, 1, 900, 40, 3])
    whole = spread(counts, 10_000)
    assert len(whole) == counts.sum()
    assert len(np.unique(whole, axis=0)) == counts.sum()
    assert (whole[:, 1] < counts[whole[:, 0]]).all()
    assert (whole >= 0).all()
    for most in (1, 4, 5, 6, 20):
        drawn = spread(counts, most)
        assert (drawn == whole[:most]).all()
        of_slide = np.bincount(drawn[:, 0], minlength=6)
        # As even as can be: a slide is short of another by more than one only where it has no more tiles.
        assert all(n == counts[s] or n >= of_slide.max() - 1 for s, n in enumerate(of_slide))


def test_drawn_tiles_are_spread_within_a_slide():
    ranks = spread(np.array([1000]), 100)[:, 1]
    assert abs(ranks.mean() - 499.5) < 4 * 1000 / math.sqrt(12 * 100)
    assert len(set(ranks // 100)) == 10


def test_a_rank_is_found_among_the_tiles_of_its_slide():
    slide = np.random.default_rng(0).integers(0, 9, 500).astype(np.int32)
    drawn = spread(np.bincount(slide), 60)
    brute = [[t for t in range(500) if slide[t] == s][rank] for s, rank in drawn.tolist()]
    assert locate(slide, drawn).tolist() == brute


@pytest.mark.parametrize(
    ("degrees", "median"),
    [([350, 10, 20], 10), ([300, 310, 330, 340, 350], 330), ([355, 5], 0), ([np.nan, 40], 40), ([np.nan], np.nan)],
)
def test_the_median_of_angles(degrees, median):
    found = circular_median(np.array(degrees, float))
    assert found == pytest.approx(median, nan_ok=True) or found == pytest.approx(median + 360)


def test_colors_tissue_and_counts_are_those_that_were_stored(tiled):
    content = survey(tiled, 5)
    sample = content.sample
    assert len(sample.images) == 5
    assert np.bincount(sample.slides).tolist() == list(SIZES)
    for slide, (red, green, blue) in enumerate(COLORS):
        mine = sample.slides == slide
        assert sample.colors[mine] == pytest.approx(np.tile([red, green, blue], (mine.sum(), 1)) / 255)
        density = -sum(math.log10(v / 255) for v in (red, green, blue)) / 3
        assert sample.density[mine] == pytest.approx(density)
    # By the definition of hue: from red (0°) away from green toward blue, and so on.
    assert sorted({round(h) for h in content.hue.tolist()}) == [270, 330]
    assert sorted(sample.tissue) == pytest.approx(sorted(0.1 * (i + 1) for n in SIZES for i in range(n)))
    assert content.mpps == {0.5: 3, 1.0: 2, 1.5: 2, 2.0: 1, 2.5: 1, 3.0: 1}
    assert content.dropped == {"blank": 20, "pen": 3}
    assert content.groups("site") == {"x": 2, "not given": 1, "y": 1}


def test_the_words(tiled):
    said = words(survey(tiled, 5))
    assert said[0].startswith(f"{tiled.name}: 10 tiles of 16 px at 0.5 µm/px of 4 slides, in ")
    assert [" ".join(line.split()) for line in said[1:]] == [
        "slides 4, of which 3 have tiles",
        "by state done 3, refused 1",
        "by stain H&E 3, IHC 1",
        "by site x 2, not given 1, y 1",
        "tiles a slide median 3, 1 to 6",
        "tiles by µm/px 0.5 3, 1 2, 1.5 2, 2 1, 2.5 1, 3 1",
        "tissue a slide median 2 mm², 6 mm² in all",
        "tiles dropped blank 20, pen 3",
        "tissue a tile median 25%, of 10 tiles drawn",
        "color median hue 330°, median optical density 0.25, of 10 tiles drawn",
    ]


def cells(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """Insides of the tiles of a sheet, counted from its lower end."""
    rows, pitch = -(-count // COLUMNS), SHOWN + CAPTION + GAP
    top = len(picture) - MARGIN + GAP - rows * pitch
    corners = [(top + n // COLUMNS * pitch, MARGIN + n % COLUMNS * (SHOWN + GAP)) for n in range(count)]
    return [picture[y + 2 : y + SHOWN - 2, x + 2 : x + SHOWN - 2] for y, x in corners]


@pytest.mark.parametrize(("tiles", "of_slide"), [(2, 2), (3, [1, 1, 1]), (5, [2, 1, 2]), (9, [5, 1, 3]), (64, SIZES)])
def test_the_picture_shows_the_tiles_slide_by_slide(tiled, tmp_path, tiles, of_slide):
    write_sheet(tiled, tmp_path / "p.png", tiles)
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    shown = []
    for cell in cells(picture, min(tiles, sum(SIZES))):
        assert (cell == cell[0, 0]).all()
        shown.append(COLORS.index(tuple(cell[0, 0].tolist())))
    assert shown == sorted(shown)
    counts = np.bincount(shown, minlength=3)
    assert (counts > 0).sum() == of_slide if isinstance(of_slide, int) else counts.tolist() == list(of_slide)


def test_the_same_picture_again(tiled, tmp_path):
    for name in "ab":
        write_sheet(tiled, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_a_set_does_not_know_has_no_chart(tiled, tmp_path):
    assert [panel.title for panel in panels(survey(tiled, 1))] == [
        *("Tiles a slide", "Tissue in a tile", "Mean hue of a tile", "Mean optical density of a tile"),
        *("Finest µm/px of a slide", "Tiles by µm/px", "Tiles dropped"),
        *("Slides by state", "Slides by stain", "Slides by site"),
    ]
    packed = pd.DataFrame({"slide": ["a", "b", "c"], "stain": "none", "site": "", "tiles": SIZES})
    gray = make_set(tmp_path / "gray", packed, [(v, v, v) for v in (0, 128, 255)])
    content = survey(gray, 1)
    assert [panel.title for panel in panels(content)] == [
        "Tiles a slide",
        "Mean optical density of a tile",
        "Slides by stain",
    ]
    assert "  color           gray, median optical density" in "\n".join(words(content))
    assert np.isfinite(content.sample.density).all()
    write_sheet(gray, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_names_of_any_letters(tmp_path):
    names = ["乳腺 標本 ✂️ 🔬", "$\\frac{$ x_{ \n\x00\t", "عينة " + 60 * "ü"]
    table = pd.DataFrame({"slide": names, "stain": names, "site": names[::-1], "tiles": SIZES, "state": "$x^$"})
    odd = make_set(tmp_path / "$a$ \\frac 乳", table, COLORS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = write_sheet(odd, tmp_path / "p.png")
    assert all(line.isprintable() for line in said)
    assert "$\\frac{$ x_{ ��� 1" in said[3]


def test_a_slide_with_very_many_tiles_among_small_ones_has_a_logarithmic_axis(tiled):
    import dataclasses

    from matplotlib.figure import Figure

    for counts, scale in ((np.array([2, 3, 5000, 0]), "log"), (np.array([6, 1, 3, 0]), "linear")):
        axes = Figure().subplots()
        panels(dataclasses.replace(survey(tiled, 1), tiles_of_slide=counts))[0].chart(axes)
        assert axes.get_xscale() == scale
        assert sum(bar.get_height() for bar in axes.patches) == 3


def test_tiles_that_cannot_be_read_are_counted_and_left_out(tmp_path):
    table = pd.DataFrame({"slide": ["a", "b", "c"], "stain": "H&E", "tiles": SIZES})
    shards = make_set(tmp_path / "s", table, COLORS)
    tar = shards.tars[0]
    row = shards.row(0)
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + 30] ^= 0xFF
    tar.write_bytes(data)
    said = write_sheet(shards, tmp_path / "p.png")
    assert f"  cannot be read  1 of 10 tiles drawn; run 'eosin verify {shards.name}'" in said


def test_what_cannot_be_drawn_is_one_line(tiled, tmp_path):
    for out, tiles, said in (
        ("p.jpg", 1, "p.jpg is not a PNG"),
        ("p.png", 0, "--tiles 0 is not a number of tiles"),
        ("p.png", 401, "give 1 to 400"),
    ):
        with pytest.raises(UserError, match=said):
            write_sheet(tiled, tmp_path / out, tiles)
    empty = tmp_path / "empty"
    empty.mkdir()
    ShardWriter(empty).finish(pd.DataFrame({"slide": ["a"]}), tile_size=16, mpp=None, config={})
    with pytest.raises(UserError, match="has no tile to look at"):
        write_sheet(ShardSet(empty), tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()
