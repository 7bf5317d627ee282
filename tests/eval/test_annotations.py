"""Annotations against areas in closed form, matplotlib's point-in-polygon test, and files that are broken."""

import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardWriter
from eosin.eval.annotations import IGNORED, open_annotations, tile_labels, tile_places
from eosin.eval.task import load_task
from eosin.launch.cli import main


def places(n=4, slide="s", extent=100.0, size=(400, 100), **more):
    """Tiles side by side on a slide of 400 x 100 pixels."""
    columns = {"key": [f"{slide}_{i}" for i in range(n)], "slide": slide, "x": 100 * np.arange(n), "y": 0}
    columns |= {"extent": extent, "width": size[0], "height": size[1]}
    return pd.DataFrame(columns | more)


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(name, *rings, kind="annotation", many=False):
    geometry = {"type": "MultiPolygon", "coordinates": [[r] for r in rings]} if many else None
    properties = {"objectType": kind} | ({"classification": {"name": name}} if name else {})
    return {
        "type": "Feature",
        "geometry": geometry or {"type": "Polygon", "coordinates": list(rings)},
        "properties": properties,
    }


def geojson(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))


def asap(path, *areas, head="<?xml version='1.0'?>"):
    rows = []
    for number, (kind, group, ring) in enumerate(areas):
        points = [f"<Coordinate Order='{i}' X='{x}' Y='{y}' />" for i, (x, y) in enumerate(ring)]
        rows.append(
            f"<Annotation Name='a{number}' Type='{kind}' PartOfGroup='{group}' Color='#F4FA58'><Coordinates>"
            f"{''.join(points[::2] + points[1::2])}</Coordinates></Annotation>"
        )
    groups = "<AnnotationGroups><Group Name='tumor' PartOfGroup='None'><Attributes/></Group></AnnotationGroups>"
    path.write_text(f"{head}<ASAP_Annotations><Annotations>{''.join(rows)}</Annotations>{groups}</ASAP_Annotations>")


def refusal(path, table):
    with pytest.raises(UserError) as caught:
        annotations, _ = open_annotations(path, table)
        for tile in range(len(table)):
            annotations.mask(tile, 10)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_outlines_become_masks_of_tiles(tmp_path):
    geojson(
        tmp_path / "s.geojson",
        feature("stroma", box(0, 0, 200, 100)),
        feature("tumor", box(50, 20, 150, 80), box(60, 40, 90, 60)),  # with a hole, over stroma
        feature("fat", box(200, 0, 220, 100), box(280, 0, 300, 100), many=True),
        feature("Ignore*", box(0, 90, 400, 100)),
        feature("Region*", box(0, 0, 400, 100)),
        feature("", box(300, 0, 400, 100)),
        feature("core", box(0, 0, 400, 100), kind="tma core"),
        feature("stroma", box(210, 50, 220, 100)),  # over fat, and under what is ignored
    )
    annotations, notices = open_annotations(tmp_path, places())
    assert annotations.classes == ["fat", "stroma", "tumor"]
    whole = np.full((100, 400), IGNORED)
    whole[:, :200] = 1
    whole[20:80, 50:150] = 2
    whole[40:60, 60:90] = 1
    whole[:, 200:220] = whole[:, 280:300] = 0
    whole[50:, 210:220] = 1
    whole[90:] = IGNORED
    for tile in range(4):
        np.testing.assert_array_equal(annotations.mask(tile, 100), whole[:, 100 * tile : 100 * tile + 100])
    # Every second pixel of a mask twice as fine has its center inside the same pixel.
    np.testing.assert_array_equal(annotations.mask(0, 200)[::2, ::2], whole[:, :100])
    assert any("they have no class" in notice for notice in notices)
    assert any("'Region*'" in notice for notice in notices)


def test_any_outline_agrees_with_matplotlib(tmp_path):
    from matplotlib.path import Path

    rng = np.random.default_rng(0)
    turn = np.sort(rng.uniform(0, 2 * np.pi, 40))
    ring = np.stack([200 + 180 * np.cos(turn) * rng.uniform(0.4, 1, 40), 50 + 45 * np.sin(turn)], axis=1)
    ring = np.concatenate([ring, ring[:1]])
    geojson(tmp_path / "s.geojson", feature("tumor", ring.tolist()))
    asap(tmp_path / "t.xml", ("Polygon", "tumor", ring[:-1].tolist()))
    table = pd.concat([places(), places(slide="t")], ignore_index=True)
    annotations, _ = open_annotations(tmp_path, table)
    for tile in range(4):
        y, x = np.mgrid[0:64, 0:64] + 0.5
        points = np.stack([100 * tile + x.ravel() * 100 / 64, y.ravel() * 100 / 64], axis=1)
        expected = np.where(Path(ring).contains_points(points), 0, IGNORED).reshape(64, 64)
        np.testing.assert_array_equal(annotations.mask(tile, 64), expected)
        np.testing.assert_array_equal(annotations.mask(4 + tile, 64), expected)


def test_groups_of_asap(tmp_path):
    asap(
        tmp_path / "s.xml",
        ("Polygon", "tumor", box(0, 0, 100, 100)),
        ("Rectangle", "stroma", box(100, 0, 200, 100)),
        ("Spline", "_2", box(50, 0, 150, 100)),
        ("Dot", "tumor", [[350, 50]]),
        ("Polygon", "None", box(300, 0, 400, 100)),
    )
    annotations, _ = open_annotations(tmp_path / "s.xml", places())
    assert annotations.classes == ["_2", "stroma", "tumor"]
    assert [set(np.unique(annotations.mask(t, 10))) for t in range(4)] == [{0, 2}, {0, 1}, {IGNORED}, {IGNORED}]
    # A legend merges, names what has no group, and cuts out what it gives no class.
    (tmp_path / "legend.csv").write_text("value,class\nstroma,tumor\ntumor,tumor\n_2,\n,other\n")
    annotations, _ = open_annotations(tmp_path, places())
    assert annotations.classes == ["tumor", "other"]
    row = np.concatenate([annotations.mask(t, 10)[0] for t in range(4)])
    np.testing.assert_array_equal(row, [0] * 5 + [IGNORED] * 10 + [0] * 5 + [IGNORED] * 10 + [1] * 10)


@pytest.mark.parametrize("form", ["gray", "palette", "color", "tiff", "pyramid"])
def test_masks_are_stretched_onto_their_slide(tmp_path, form):
    index = np.zeros((50, 200), np.uint8)  # half as fine as the slide
    index[11:31, 21:121] = 2
    index[31:, 101:] = 1
    colors = np.array([[0, 0, 0], [0, 255, 0], [255, 0, 16]], np.uint8)
    names = ["1", "2"]
    if form == "color":
        Image.fromarray(colors[index]).save(tmp_path / "s_mask.png")
        names = ["#00ff00", "#ff0010"]
    elif form == "palette":
        image = Image.fromarray(index, "P")
        image.putpalette(colors.ravel().tolist() + [0] * 759)
        image.save(tmp_path / "s.png")
    elif form == "tiff":
        tifffile.imwrite(tmp_path / "s.tif", index)
    elif form == "pyramid":
        with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
            tiff.write(index.repeat(2, 0).repeat(2, 1), subifds=1, tile=(16, 16))
            tiff.write(index, subfiletype=1, tile=(16, 16))
    else:
        Image.fromarray(index).save(tmp_path / "s.png")
    annotations, _ = open_annotations(tmp_path, places())
    assert annotations.classes == names
    whole = np.array([IGNORED, 0, 1])[index]
    for tile in range(4):
        np.testing.assert_array_equal(annotations.mask(tile, 50), whole[:, 50 * tile : 50 * tile + 50])
        np.testing.assert_array_equal(annotations.mask(tile, 25), whole[1::2, 50 * tile + 1 : 50 * tile + 51 : 2])


def test_classes_of_a_pyramid_are_those_of_the_level_that_is_read(tmp_path):
    """Its coarsest level lacks a small class, and has mixtures of its neighbors' numbers."""
    fine = np.repeat([[1, 9]], 100, 0).repeat([200, 200], 1).astype(np.uint8)
    fine[40:44, 50:54] = 4
    coarse = np.full((25, 100), 5, np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(fine, subifds=1, tile=(16, 16))
        tiff.write(coarse, subfiletype=1, tile=(16, 16))
    annotations, _ = open_annotations(tmp_path, places())
    assert annotations.classes == ["1", "4", "9"]
    assert set(np.unique(annotations.mask(0, 100))) == {0, 1}
    assert open_annotations(tmp_path, places(), 10)[0].classes == ["5"]


def test_masks_of_tiles_go_before_those_of_slides(tmp_path):
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((10, 10), 7, np.uint8)).save(tmp_path / "masks" / "s_1.png")
    Image.fromarray(np.full((10, 40), 3, np.uint8)).save(tmp_path / "masks" / "s.png")
    annotations, _ = open_annotations(tmp_path, places())
    assert [annotations.classes[annotations.mask(t, 5)[0, 0]] for t in range(4)] == ["3", "7", "3", "3"]
    # Of a set of pictures nothing is known of slides but their names.
    alone = places(size=(np.nan, np.nan), extent=np.nan, slide=[f"s_{i}" for i in range(4)], x=0)
    annotations, _ = open_annotations(tmp_path, alone)
    assert annotations.classes == ["7"]
    assert [int((annotations.mask(t, 5) == 0).sum()) for t in range(4)] == [0, 25, 0, 0]


def test_values_of_a_legend(tmp_path):
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(5, 40)[:, ::-1].copy()).resize((400, 100), 0).save(
        tmp_path / "s.png"
    )
    assert "200 values, too many for classes; list those that count in a legend.csv" in refusal(tmp_path, places())
    (tmp_path / "legend.csv").write_text("value,class\n0,glass\n199,gland\n198,gland\n")
    annotations, _ = open_annotations(tmp_path, places())
    assert annotations.classes == ["glass", "gland"]
    counts = np.bincount(np.concatenate([annotations.mask(t, 100).ravel() for t in range(4)]), minlength=256)
    assert counts[[0, 1, IGNORED]].tolist() == [200, 400, 40000 - 600]
    (tmp_path / "legend.csv").write_text("value,class\n0,glass\n0,gland\n")
    assert "lists the value '0' twice" in refusal(tmp_path, places())


def test_a_tile_gets_the_class_that_covers_the_most_of_it(tmp_path):
    geojson(
        tmp_path / "s.geojson",
        feature("a", box(0, 0, 50, 100)),
        feature("a", box(100, 0, 149, 100)),
        feature("b", box(200, 0, 300, 60)),
        feature("a", box(200, 40, 300, 100)),
        feature("b", box(300, 0, 330, 100)),
        feature("a", box(330, 0, 370, 100)),
    )
    annotations, _ = open_annotations(tmp_path, places())
    labels, shares = tile_labels(annotations)
    assert labels.tolist() == ["a", "", "a", ""]
    np.testing.assert_allclose(shares, [0.5, 0.49, 0.6, 0.4], atol=1 / 128)
    assert tile_labels(annotations, 0.35)[0].tolist() == ["a", "a", "a", "a"]
    for cover in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="is no share of a tile"):
            tile_labels(annotations, cover)


BOMB = "<?xml version='1.0'?><!DOCTYPE lolz [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;'>]>"
OUTSIDE = "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>"


def test_xml_that_is_wrong_is_refused_in_one_line(tmp_path):
    path = tmp_path / "s.xml"
    for head in (BOMB, OUTSIDE):
        asap(path, ("Polygon", "tumor", box(0, 0, 10, 10)), head=head)
        assert "declares a document type" in refusal(path, places())
    asap(path, ("Polygon", "tumor", [["x", 1], [2, 3], [4, 5]]))
    assert "has no numbers Order, X and Y" in refusal(path, places())
    asap(path, ("Polygon", "tumor", [["nan", 1], [2, 3], [4, 5]]))
    assert "has no numbers Order, X and Y" in refusal(path, places())
    asap(path, ("Polygon", "tumor", box(0, 0, 9000, 10)))
    assert "reaches 9000, 0 on a slide of 400 x 100" in refusal(path, places())
    asap(path, ("Polygon", "None", box(0, 0, 10, 10)))
    assert "annotates no class; left out: 1 they have no class" in refusal(path, places())
    for text, said in [
        ("<a>", "not XML"),
        ("", "not XML"),
        ("<html></html>", "its root is <html>"),
    ]:
        path.write_text(text)
        assert said in refusal(path, places())


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent", places())
    assert "annotates no slide or tile of these; known endings: .png" in refusal(tmp_path, places())
    path = tmp_path / "s.geojson"
    path.write_text("{")
    assert "not JSON" in refusal(path, places())
    geojson(path, feature("tumor", box(0, 0, 10, 10)))
    assert "how large a tile is in the slide's own pixels is not known of slide 's'" in refusal(
        path, places(extent=np.nan)
    )
    assert "--tile-size PIXELS" in refusal(path, places().drop(columns="extent"))
    assert "its files are called s.geojson, and slides are called z" in refusal(path, places(slide="z"))
    asap(tmp_path / "s.xml", ("Polygon", "tumor", box(0, 0, 10, 10)))
    assert "are both annotations of slide s; remove one" in refusal(tmp_path, places())
    path.unlink()
    (tmp_path / "s.xml").unlink()
    Image.fromarray(np.ones((50, 50), np.uint8)).save(tmp_path / "s.png")
    assert "50 x 50 pixels, another shape than what it is of (400 x 100)" in refusal(tmp_path, places())
    assert "the width and height of slide 's', for s.png, are not known" in refusal(
        tmp_path, places(size=(np.nan, np.nan))
    )
    (tmp_path / "s.png").write_bytes(b"no image")
    assert "s.png cannot be read" in refusal(tmp_path, places())


@pytest.fixture
def shards(tmp_path):
    """Tiles of 16 px at 0.5 µm/px of two slides of 64 x 32 px at 0.25: each is 32 px of the slide wide."""
    import simplejpeg

    folder = tmp_path / "shards"
    folder.mkdir()
    writer, rng = ShardWriter(folder), np.random.default_rng(0)
    for slide in range(2):
        for x in (0, 32):
            image = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            meta = {"slide": f"s{slide}", "x": x, "y": 0, "mpp": 0.5}
            writer.add(f"s{slide}_{x}_0_500", simplejpeg.encode_jpeg(image, 95), "jpg", meta, slide)
    slides = {"slide": ["s0", "s1"], "patient": ["p", "q"], "mpp": 0.25, "width": 64, "height": 32, "tiles": 2}
    writer.finish(pd.DataFrame(slides), tile_size=16, mpp=0.5, config={})
    return folder


def test_from_a_shard_set_to_labels_that_a_probe_reads(shards, write, tmp_path, capsys):
    from eosin.data_tools.shards import ShardSet

    table = tile_places(ShardSet(shards))
    assert table["extent"].tolist() == [32.0] * 4
    assert tile_places(ShardSet(shards), 16)["extent"].tolist() == [16.0] * 4
    for size in (0, -5, np.nan, np.inf):
        with pytest.raises(UserError, match="is no side of a tile"):
            tile_places(ShardSet(shards), size)
    (tmp_path / "given").mkdir()
    geojson(tmp_path / "given" / "s0.geojson", feature("x", box(0, 0, 32, 32)), feature("y", box(32, 0, 64, 32)))
    geojson(tmp_path / "given" / "s1.geojson", feature("y", box(0, 0, 20, 32)), feature("x", box(50, 0, 64, 32)))
    out = tmp_path / "labels.csv"
    assert main(["eval", "label", str(shards), str(tmp_path / "given"), "--out", str(out)]) == 0
    assert "1 of 4 tiles stay unlabeled" in capsys.readouterr().out
    found = pd.read_csv(out, keep_default_na=False)
    assert main(["eval", "label", str(shards), str(tmp_path / "given"), "--out", str(out)]) == 0  # its own is replaced
    foreign = tmp_path / "slides.csv"
    foreign.write_text("slide,label\ns0,x\n")
    assert main(["eval", "label", str(shards), str(tmp_path / "given"), "--out", str(foreign)]) == 2
    assert "holds no labels of 'eosin eval label'; give another --out" in capsys.readouterr().err
    assert foreign.read_text() == "slide,label\ns0,x\n"
    assert found["label"].tolist() == ["x", "y", "y", ""]
    np.testing.assert_allclose(found["cover"], [1, 1, 20 / 32, 14 / 32], atol=1e-4)
    columns = {name: table[name].tolist() for name in ("key", "slide", "patient", "y", "extent", "width", "height")}
    path = write("e", np.eye(4), **columns | {"x": np.array([0, 32, 0, 32])})
    for labels, key in ((out, "tile"), (tmp_path / "given", "slide"), (tmp_path / "given" / "s0.geojson", "slide")):
        task = load_task([path], "label", "patient", labels, key)
        given = dict(zip(task.keys, np.array(task.classes)[task.labels]))
        expected = {"s0_0_0_500": "x", "s0_32_0_500": "y", "s1_0_0_500": "y"}
        assert given == {k: v for k, v in expected.items() if "s0.geo" not in labels.name or k.startswith("s0")}
    unknown = write("f", np.eye(4), **{k: v for k, v in columns.items() if k != "extent"})
    with pytest.raises(UserError, match="eosin eval label SHARDS ANNOTATIONS"):
        load_task([unknown], "label", "patient", tmp_path / "given")
