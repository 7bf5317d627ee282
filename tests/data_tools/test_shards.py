"""The shard set on disk: readable by tar and webdataset, one pread a tile, and the same bytes for the same input."""

import io
import json
import pickle
import string
import subprocess
import tarfile
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet, ShardWriter, members, samples, slide_key, tile_key

SLIDES = pd.DataFrame({"slide": ["a", "b.c"], "patient": ["p", "q"], "label": ["x", "y"], "tiles": [3, 2]})
TILES = [("a", 0, 0), ("a", 7, 0), ("a", 0, 9), ("b.c", 1, 1), ("b.c", 2**31 - 1, 5)]


def image_of(number: int) -> bytes:
    """Bytes that stand for an image; no reader of shards looks into them."""
    return bytes([number]) * (500 * number + 1)


def write(folder, shard_bytes=10_000):
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for number, (slide, x, y) in enumerate(TILES):
        meta = {"slide": slide, "x": x, "y": y, "mpp": None if number == 4 else 0.5, "é": "ü"}
        writer.add(tile_key(slide, x, y, 0.5), image_of(number), "jpg", meta, slide=["a", "b.c"].index(slide))
    return writer.finish(SLIDES, tile_size=32, mpp=0.5, config={"verb": "test"})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set", shard_bytes=3000)
    return tmp_path / "set"


def test_written_is_read(folder):
    shards = ShardSet(folder)
    assert len(shards) == 5
    assert len(shards.tars) > 1
    for number, (slide, x, y) in enumerate(TILES):
        assert shards.image(number) == image_of(number)
        row = shards.row(number)
        assert (int(row["x"]), int(row["y"]), int(row["slide"])) == (x, y, ["a", "b.c"].index(slide))
        assert row["crc32"] == zlib.crc32(image_of(number))
        mpp = None if number == 4 else 0.5
        assert shards.meta(number) == {
            "key": tile_key(slide, x, y, 0.5), "slide": slide, "x": x, "y": y, "mpp": mpp, "é": "ü",
        }  # fmt: skip
    assert shards.column("x").tolist() == [x for _, x, _ in TILES]
    assert np.isnan(shards.column("mpp")).tolist() == [False] * 4 + [True]
    table = shards.table()
    assert table["label"].tolist() == list("xxxyy")
    assert table["patient"].tolist() == list("pppqq")
    assert table["slide"].tolist() == [slide for slide, _, _ in TILES]
    pd.testing.assert_frame_equal(shards.slides(), SLIDES)


def test_tar_and_webdataset_read_it(folder):
    import webdataset

    listed = []
    for tar in ShardSet(folder).tars:
        listed += subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout.splitlines()
    assert listed == [f"{tile_key(s, x, y, 0.5)}.{e}" for s, x, y in TILES for e in ("jpg", "json")]
    urls = [str(tar) for tar in ShardSet(folder).tars]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in seen] == [tile_key(s, x, y, 0.5) for s, x, y in TILES]
    assert [sample["jpg"] for sample in seen] == [image_of(number) for number in range(5)]
    assert [json.loads(sample["json"])["x"] for sample in seen] == [x for _, x, _ in TILES]


def test_bytes_are_webdatasets_own(folder, tmp_path):
    """Its writer at mtime 0 gives the same file, member for member and byte for byte."""
    import webdataset

    ours = ShardSet(folder).tars[0]
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), mtime=0) as writer:
        for key, parts in samples(ours):
            writer.write({"__key__": key, "jpg": parts["jpg"], "json": parts["json"]})
    assert (tmp_path / "theirs.tar").read_bytes() == ours.read_bytes()


def test_same_input_same_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


names = st.text(st.sampled_from(string.ascii_letters + string.digits + "._-/= éß\\"), max_size=90)


@given(names, names)
def test_keys_are_injective(first, second):
    assert (slide_key(first) == slide_key(second)) == (first == second)


@given(names, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.floats(0.05, 20))
def test_keys_fit_a_tar_and_hold_no_dot(name, x, y, mpp):
    key = tile_key(name, x, y, mpp)
    assert len(f"{key}.json".encode()) <= 100
    assert not set("./\\") & set(key)
    assert key.rsplit("_", 3) == [slide_key(name), str(x), str(y), str(round(mpp * 1000))]


def test_tiles_of_different_slides_never_share_a_key():
    assert tile_key("a", 1, 2, 0.5) != tile_key("a_1", 2, 500, 0.5)
    assert tile_key("a.b", 1, 2, 0.5) != tile_key("a=2eb", 1, 2, 0.5)
    assert slide_key("a" * 80 + "1") != slide_key("a" * 80 + "2")  # cut, yet different


def test_empty_set(tmp_path):
    writer = ShardWriter(tmp_path)
    dataset = writer.finish(SLIDES[:0], tile_size=32, mpp=None, config={})
    assert dataset["tiles"] == 0
    assert len(ShardSet(tmp_path)) == 0
    assert ShardSet(tmp_path).column("x").shape == (0,)
    assert len(ShardSet(tmp_path).table()) == 0


def test_open_files_do_not_travel_to_other_processes(folder):
    shards = ShardSet(folder)
    shards.image(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.image(4) == image_of(4)


@pytest.mark.parametrize("tile", [-1, 5, 100])
def test_tile_numbers_out_of_range(folder, tile):
    for read in (ShardSet(folder).row, ShardSet(folder).image, ShardSet(folder).meta):
        with pytest.raises(IndexError):
            read(tile)


def test_harm_is_named(folder, tmp_path):
    cases = {
        "tiles-000000.tar": "is missing",
        "tiles-000001.index.npy": "is missing",
        "dataset.json": "does not exist",
    }
    for name, said in cases.items():
        (folder / name).rename(tmp_path / "aside")
        with pytest.raises(UserError, match=said):
            ShardSet(folder)
        (tmp_path / "aside").rename(folder / name)
    (folder / "tiles-000000.index.npy").write_bytes(pickle.dumps({"evil": 1}))
    with pytest.raises(UserError, match="not readable as an index"):
        ShardSet(folder).row(0)
    np.save(folder / "tiles-000000.index.npy", np.zeros(3))
    with pytest.raises(UserError, match="does not fit"):
        ShardSet(folder).column("x")
    with pytest.raises(UserError, match="does not exist; make a shard set"):
        ShardSet(tmp_path / "gone")
    (folder / "dataset.json").write_text('{"schema": 2, "kind": "eosin shard set"}')
    with pytest.raises(UserError, match="this version reads 1"):
        ShardSet(folder)
    (folder / "dataset.json").write_text("[1]")
    with pytest.raises(UserError, match="not the description"):
        ShardSet(folder)
    (folder / "dataset.json").write_text('{"schema": 1, "kind": "eosin shard set"}')
    with pytest.raises(UserError, match="is incomplete"):
        ShardSet(folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        ShardSet(tmp_path / "file")


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_rows_of_large_sets_are_read_one_by_one_and_are_the_same(folder, monkeypatch, in_memory):
    expected = np.concatenate([np.load(path) for path in sorted(folder.glob("*.index.npy"))])
    monkeypatch.setattr("eosin.data_tools.shards.ROWS_IN_MEMORY", in_memory)
    shards = ShardSet(folder)
    some = np.array([4, 0, 0, 3])
    assert shards.rows(some).tobytes() == expected[some].tobytes()  # mpp may be NaN
    assert len(shards.rows(some[:0])) == 0
    gone = ShardSet(folder)
    gone.tars[-1].unlink()
    with pytest.raises(UserError, match=rf"{gone.tars[-1].name} is missing; run 'eosin verify"):
        gone.row(len(gone) - 1)


@pytest.mark.parametrize(
    ("key", "value"), [("tile_size", "96"), ("tile_size", -1), ("tile_size", 10**7), ("slides", None), ("slides", "x")]
)
def test_a_description_with_impossible_numbers_is_refused(folder, key, value):
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(UserError, match=f"{key} is {value!r}"):
        ShardSet(folder)


@pytest.mark.parametrize(("key", "value"), [("tiles", -5), ("bytes", None)])
def test_a_shard_with_impossible_numbers_is_refused(folder, key, value):
    about = json.loads((folder / "dataset.json").read_text())
    about["shards"][0][key] = value
    (folder / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"{key} is {value!r}"):
        ShardSet(folder)


def test_damaged_rows_of_the_index(folder):
    path = folder / "tiles-000000.index.npy"
    index = np.load(path).copy()
    harmed = index.copy()
    harmed["offset"][0] = -512
    np.save(path, harmed)
    with pytest.raises(ValueError, match="neither may be negative"):
        ShardSet(folder).image(0)
    harmed = index.copy()
    harmed["slide"][0] = 9999
    np.save(path, harmed)
    with pytest.raises(UserError, match="names slides that are not in the slides table"):
        ShardSet(folder).image(0)


def test_a_file_url_is_its_folder(folder):
    assert ShardSet(f"file://{folder}").image(0) == image_of(0)
    assert ShardSet(f"file://localhost{folder}").tars == ShardSet(folder).tars


def test_cut_tar_is_an_error_and_never_short_data(folder):
    tar = ShardSet(folder).tars[-1]
    shards = ShardSet(folder)
    with tar.open("r+b") as file:
        file.truncate(int(shards.row(len(shards) - 1)["offset"]) + 10)
    with pytest.raises(EOFError, match="cut"):
        shards.image(len(shards) - 1)
    with pytest.raises((EOFError, tarfile.TarError)):
        list(members(tar))


def test_samples_group_by_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("k1.jpg", "k1.json", "k2.seg.png", "k2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ab"))
    assert list(samples(tmp_path / "a.tar")) == [
        ("k1", {"jpg": b"ab", "json": b"ab"}),
        ("k2", {"seg.png": b"ab", "jpg": b"ab"}),
    ]
