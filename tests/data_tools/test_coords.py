"""Positions written here by hand, as a table and as the files of TRIDENT and CLAM, and what is no list of positions."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from eosin.data_tools.coords import Coords, find_coords, read_coords
from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.sources import Source

# As the two tools describe them: level 0 is the finest, 256 px at half its magnification are 512 px.
TRIDENT = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
CLAM = {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0001, 4.0002]), "name": "b", "save_path": "out"}


def sources(*names: str) -> list[Source]:
    return [Source(name, Path(f"{name}.svs"), f"{name}.svs") for name in names]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_h5(path: Path, coords: object, attributes: dict[str, object] = {}, **kwargs: object) -> Path:  # noqa: B006
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=coords, **kwargs)
        for name, value in attributes.items():
            dataset.attrs[name] = value
    return path


def read(path: Path, *names: str) -> dict[str, Coords]:
    return {slide: read_coords(found) for slide, found in find_coords(path, sources(*names))[0].items()}


def test_a_table_gives_corners_rounded_and_keeps_its_further_columns(tmp_path):
    table = write(tmp_path / "t.csv", "slide,x,y,gene\na,10,20,3.5\nb,0,0,\na,-7.4,30.5000001,1\na.svs,1e3,2,9\n")
    found, notices = find_coords(table, sources("a", "b"))
    first = read_coords(found["a"])
    assert (first.places.tolist(), first.places.dtype) == ([[10, 20], [-7, 31], [1000, 2]], np.int64)
    assert (first.centers, first.size, first.facts) == (False, None, [{"gene": "3.5"}, {"gene": "1"}, {"gene": "9"}])
    assert read_coords(found["b"]).places.tolist() == [[0, 0]]
    assert notices == []


def test_a_table_of_centers_like_that_of_spots(tmp_path):
    table = write(tmp_path / "spots.csv", "barcode,slide,center_y,center_x\nAAAC-1,a,200,100\nAAAG-1,a,250,100\n")
    spots = read(table, "a")["a"]
    assert spots.places.tolist() == [[100, 200], [100, 250]]
    assert (spots.centers, spots.facts) == (True, [{"barcode": "AAAC-1"}, {"barcode": "AAAG-1"}])


def test_slides_without_positions_and_positions_without_a_slide_are_told(tmp_path):
    table = write(tmp_path / "t.csv", "slide,x,y\na,1,2\nzz,3,4\nzz,5,6\n")
    given = [*sources("a", "b"), Source("gone", None, "gone", refused="no such file")]
    assert find_coords(table, given)[1] == [
        "no positions in t.csv: b",
        "positions in t.csv of slides that were not given: zz",
    ]
    assert read(table, "a")["a"].facts == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("slide,x\na,1\n", "needs the columns x and y"),
        ("slide,x,y,center_x,center_y\na,1,2,3,4\n", "and not both"),
        ("path,x,y\na,1,2\n", "has no column 'slide'"),
        ("slide,x,y\n", "lists no position"),
        ("slide,x,y,mpp\na,1,2,3\n", "has a column 'mpp', which the tile itself owns"),
        ("slide,x,y\na,1,2\na,nan,2\n", "line 3: 'nan, 2' is no position"),
        ("slide,x,y\na,1,2\nzz,,\na,,2\n", "line 4: ', 2' is no position"),
        ("slide,x,y\na,1,2\na,1e18,2\n", "line 3: '1e18, 2' is no position"),
        ("slide,x,y\na,one,2\n", "line 2: 'one, 2' is no position"),
        ("slide,x,y\na,1,2\na,2,1\na,1.2,2\n", "line 4: this position of a is there already"),
        ("slide,x,y\nzz,1,2\n", "no positions of the given slides; it names zz"),
        ("slide,x,y\na,1\n", "line 2 does not have the header's 3 fields"),
        ("slide,x,y\na\0,1,2\n", "it holds a NUL byte"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(text, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as raised:
        find_coords(write(tmp_path / "t.csv", text), sources("a"))
    assert "\n" not in str(raised.value)


def test_slides_of_one_file_name_are_named_in_full(tmp_path):
    given = [Source(f"{case}/s", Path(f"{case}/s.svs"), "s.svs") for case in ("1", "2")]
    with pytest.raises(UserError, match="line 3: several slides are called 's'; name it in full"):
        find_coords(write(tmp_path / "t.csv", "slide,x,y\n1/s,1,2\ns,1,2\n"), given)
    assert list(find_coords(write(tmp_path / "t.csv", "slide,x,y\n1/s,1,2\n"), given)[0]) == ["1/s"]
    write_h5(tmp_path / "h" / "s.h5", [[1, 2]])
    with pytest.raises(UserError, match=r"s\.h5 could be of several slides that are called s"):
        find_coords(tmp_path / "h", given)


def test_files_of_trident_and_clam(tmp_path):
    write_h5(tmp_path / "patches" / "a_patches.h5", np.array([[768, 4096], [1280, 4096]], np.int64), TRIDENT)
    write_h5(tmp_path / "patches" / "b.h5", np.array([[5, 6]], np.int32), CLAM, maxshape=(None, 2), chunks=(1, 2))
    write_h5(tmp_path / "patches" / "c.h5", np.zeros((0, 2), np.int64))
    found = read(tmp_path, "a", "b", "c")
    assert found["a"].places.tolist() == [[768, 4096], [1280, 4096]]
    assert (found["a"].size, found["a"].centers, found["a"].facts) == (512, False, [])
    assert (found["b"].places.tolist(), found["b"].places.dtype, found["b"].size) == ([[5, 6]], np.int64, 1024)
    assert (found["c"].places.shape, found["c"].size) == ((0, 2), None)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 10}, 1024),
        ({"patch_size": 256, "downsample": 1.99955}, 512),
        ({"patch_size_level0": 512, "level0_magnification": -1}, 512),
        ({"patch_size": 256}, None),
    ],
)
def test_the_side_of_a_tile(attributes, size, tmp_path):
    assert read_coords(write_h5(tmp_path / "a.h5", [[1, 2]], attributes)).size == size


def test_a_position_listed_twice_is_one_tile(tmp_path):
    write_h5(tmp_path / "a.h5", [[9, 9], [0, 5], [9, 9], [5, 0], [0, 5]])
    assert read(tmp_path, "a")["a"].places.tolist() == [[9, 9], [0, 5], [5, 0]]


def test_files_of_nobody_and_slides_without_a_file_are_told(tmp_path):
    write_h5(tmp_path / "a.h5", [[1, 2]])
    write_h5(tmp_path / "q.h5", [[1, 2]])
    assert find_coords(tmp_path, sources("a", "b"))[1] == [
        f"no positions in {tmp_path.name}: b",
        f"positions in {tmp_path.name} of slides that were not given: q.h5",
    ]
    write_h5(tmp_path / "a_patches.h5", [[1, 2]])
    with pytest.raises(UserError, match=r"holds two files of a: a\.h5 and a_patches\.h5"):
        find_coords(tmp_path, sources("a"))
    with pytest.raises(UserError, match=r"is one HDF5 file; give the folder"):
        find_coords(tmp_path / "a.h5", sources("a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no HDF5 file; they are called as the slides"):
        find_coords(tmp_path / "empty", sources("a"))


def test_a_dataset_too_large_is_refused_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", shape=(10**9, 2), dtype="i8", chunks=(1024, 2))  # nothing of it is stored
    assert (tmp_path / "a.h5").stat().st_size < 1 << 20
    with pytest.raises(Refusal, match=r"a\.h5 has 1000000000 coords"):
        read_coords(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("coords", "attributes", "reason"),
    [
        ([[1, 2, 3]], {}, r"has coords of shape \(1, 3\)"),
        ([1, 2], {}, r"has coords of shape \(2,\)"),
        (b"text", {}, "has coords of shape"),
        ([[b"a", b"b"]], {}, r"of shape \(1, 2\) and type object; numbers"),
        ([[1.0, np.nan]], {}, "not finite or beyond any slide"),
        ([[1, 1 << 40]], {}, "not finite or beyond any slide"),
        (np.array([[1, 2**63]], np.uint64), {}, "not finite or beyond any slide"),
        ([[1, 2]], {"patch_size_level0": "512"}, "an attribute patch_size_level0 that is no size"),
        ([[1, 2]], {"patch_size_level0": -5}, "an attribute patch_size_level0 that is no size"),
        ([[1, 2]], {"patch_size": 256, "downsample": np.nan}, "an attribute downsample that is no size"),
        ([[1, 2]], {"patch_size": 256, "downsample": np.ones(5000)}, "an attribute downsample that is no size"),
        ([[1, 2]], {"patch_size": 0.001, "downsample": 1}, "states tiles of 0.001 px"),
    ],
)
def test_files_that_hold_something_else_are_refused(coords, attributes, reason, tmp_path):
    with pytest.raises(Refusal, match=reason) as raised:
        read_coords(write_h5(tmp_path / "a.h5", coords, attributes))
    assert "\n" not in str(raised.value)


def test_broken_files_are_refused(tmp_path):
    whole = write_h5(tmp_path / "whole.h5", np.arange(20_000).reshape(-1, 2), TRIDENT, compression="gzip").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("nothing")
    (tmp_path / "flipped.h5").write_bytes(whole[:-9_000] + bytes(byte ^ 0xFF for byte in whole[-9_000:]))
    for name in ("cut.h5", "text.h5", "flipped.h5", "absent.h5"):
        with pytest.raises(Refusal, match=f"{name} cannot be read as HDF5"):
            read_coords(tmp_path / name)


def test_nothing_outside_the_file_is_read(tmp_path):
    write_h5(tmp_path / "other.h5", [[1, 2]])
    np.array([[7, 8]], np.int64).tofile(tmp_path / "raw")
    layout = h5py.VirtualLayout(shape=(1, 2), dtype="i8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "coords", shape=(1, 2))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("coords", layout)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["coords"] = h5py.ExternalLink("other.h5", "coords")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("coords", (1, 2), "i8", external=[(str(tmp_path / "raw"), 0, 16)])
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("coords")
    for name in ("virtual", "external"):
        with pytest.raises(Refusal, match=f"{name}.h5 keeps its coords in another file"):
            read_coords(tmp_path / f"{name}.h5")
    for name in ("link", "group"):
        with pytest.raises(Refusal, match=f"{name}.h5 holds no dataset 'coords'"):
            read_coords(tmp_path / f"{name}.h5")
