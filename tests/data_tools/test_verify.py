"""Every kind of harm done to a shard set is seen, named in one line, and nothing else is."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg

from eosin.data_tools.errors import DONE, USER_ERROR, UserError
from eosin.data_tools.files import sha256
from eosin.data_tools.shards import INDEX, ShardSet, ShardWriter
from eosin.data_tools.verify import verify_shards
from eosin.launch.cli import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two slides of eight tiles in shards of a few tiles each."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes=12_000)
    rng = np.random.default_rng(0)
    for slide in range(2):
        for x in range(8):
            image = simplejpeg.encode_jpeg(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8), 90)
            writer.add(f"s{slide}_{x}_0_500", image, "jpg", {"x": x, "y": 0, "mpp": 0.5, "slide": f"s{slide}"}, slide)
    table = pd.DataFrame({"slide": ["s0", "s1"], "stain": "H&E", "tiles": [8, 8]})
    writer.finish(table, tile_size=32, mpp=0.5, config={})
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


def problems_of(folder: Path) -> list[str]:
    return verify_shards(folder, workers=1).problems


def change_dataset(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forgive(folder: Path, name: str) -> None:
    """Make dataset.json agree with a shard's bytes, so that only deeper checks can see the harm."""
    dataset = json.loads((folder / "dataset.json").read_text())
    for shard in dataset["shards"]:
        if shard["file"] == name:
            shard |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "dataset.json").write_text(json.dumps(dataset))


def test_whole(folder, capsys):
    assert len(ShardSet(folder).tars) >= 3
    assert verify_shards(folder, workers=1) == ([], 16, [], [], [])
    assert verify_shards(folder, sample=5, workers=1) == ([], 5, [], [], [])
    assert verify_shards(folder, sample=1000, workers=1).decoded == 16
    assert main(["verify", str(folder), "--workers", "1"]) == DONE
    assert "whole; 16 tiles decoded" in capsys.readouterr().out


def test_cut_tar_is_one_line(folder, capsys):
    tar = folder / "tiles-000001.tar"
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(size - 3000)
    assert main(["verify", str(folder), "--workers", "1"]) == USER_ERROR
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"tiles-000001.tar: cut: {size - 3000} of {size} bytes"
    assert len(said) == 2
    with pytest.raises(UserError, match=r"tiles-000001.tar has .* bytes where .* were written"):
        ShardSet(folder).column("x")


def test_cut_tar_with_a_matching_dataset(folder):
    tar = folder / "tiles-000001.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size - 12_000)
    forgive(folder, tar.name)
    (problem,) = problems_of(folder)
    assert problem.startswith("tiles-000001.tar: ")


def test_flipped_byte_in_an_image(folder):
    tar = folder / "tiles-000000.tar"
    offset = int(ShardSet(folder).row(1)["offset"]) + 700
    data = bytearray(tar.read_bytes())
    data[offset] ^= 0xFF
    tar.write_bytes(data)
    problems = problems_of(folder)
    assert problems == [
        "tiles-000000.tar: its bytes are not those that were written (sha256 differs)",
        "tiles-000000.tar: s0_1_0_500: its image is not what was written (crc32 differs)",
    ]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("offset", "the index says"),
        ("size", "the index says"),
        ("crc32", "crc32 differs"),
        ("x", "differ in x, y or mpp"),
    ],
)
def test_index_that_lies(folder, column, said):
    path = folder / "tiles-000000.index.npy"
    index = np.load(path)
    index[column][2] += 1
    np.save(path, index)
    problems = problems_of(folder)
    assert len(problems) == 1
    assert problems[0].startswith("tiles-000000.tar: s0_2_0_500: ")
    assert said in problems[0]


def test_index_of_another_kind(folder):
    np.save(folder / "tiles-000000.index.npy", np.zeros(3))
    assert "tiles-000000.index.npy: not an index of this schema" in problems_of(folder)
    (folder / "tiles-000000.index.npy").write_bytes(b"x")
    assert problems_of(folder)[0].startswith("tiles-000000.index.npy: not readable")


def test_missing_and_unlisted_shards(folder):
    (folder / "tiles-000000.tar").rename(folder / "extra.tar")
    problems = problems_of(folder)
    assert problems == ["tiles-000000.tar: missing", "extra.tar: not listed in dataset.json; remove it"]


def rewrite(folder: Path, name: str, change) -> None:
    """Pass every member of a shard through ``change(name, data) -> (name, data)`` and mend index and dataset."""
    with tarfile.open(folder / name) as archive:
        members = [change(info.name, archive.extractfile(info).read()) for info in archive]
    from eosin.data_tools.shards import TarWriter, index_path

    old = np.load(index_path(folder / name))
    writer = TarWriter(folder / name)
    for (image_name, image), (_, text), row in zip(members[::2], members[1::2], old):
        key, extension = image_name.split(".")
        writer.add(key, image, extension, json.loads(text), int(row["slide"]))
    np.save(index_path(folder / name), writer.close())
    forgive(folder, name)


def test_twice_the_same_key(folder):
    rewrite(folder, "tiles-000000.tar", lambda name, data: (name.replace("s0_1_", "s0_0_"), data))
    assert problems_of(folder) == ["key s0_0_0_500: 2 tiles have it"]


def test_tile_that_cannot_be_decoded_or_is_of_another_size(folder):
    small = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))

    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, {"s0_0_0_500.jpg": b"not a jpeg", "s0_1_0_500.jpg": small}.get(name, data)

    rewrite(folder, "tiles-000000.tar", change)
    problems = problems_of(folder)
    assert len(problems) == 2
    assert problems[0].startswith("tiles-000000.tar: s0_0_0_500: cannot be decoded")
    assert problems[1] == "tiles-000000.tar: s0_1_0_500: is 16 x 16 px, not 32 x 32"


def test_slides_table_that_does_not_fit(folder):
    table = pd.read_parquet(folder / "slides.parquet")
    table.assign(tiles=[8, 7]).to_parquet(folder / "slides.parquet")
    assert problems_of(folder) == ["slides.parquet: slide s1 should have 7 tiles and has 8"]
    table[:1].to_parquet(folder / "slides.parquet")
    assert problems_of(folder) == [
        "slides.parquet: 1 slides where dataset.json says 2",
        "slides.parquet: 8 tiles belong to slides that are not in it",
    ]
    (folder / "slides.parquet").write_bytes(b"x")
    assert problems_of(folder)[0].startswith("slides.parquet: not readable")
    (folder / "slides.parquet").unlink()
    assert problems_of(folder) == ["slides.parquet: missing"]


def test_a_stranger_in_the_tar(folder):
    with tarfile.open(folder / "tiles-000000.tar", "a") as archive:
        archive.add(folder / "dataset.json", "../../evil.txt")
    forgive(folder, "tiles-000000.tar")
    (problem,) = problems_of(folder)
    assert "a member '../../evil.txt' that is neither an image nor its JSON" in problem


def test_what_is_no_shard_set(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        verify_shards(tmp_path / "gone")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="expected the description of a shard set"):
        verify_shards(tmp_path / "other")
    change_dataset(folder, tiles=17)
    assert problems_of(folder) == ["dataset.json: says 17 tiles where its shards have 16"]
    change_dataset(folder, shards=[{"file": "x"}])
    with pytest.raises(UserError, match="is incomplete"):
        verify_shards(folder)
    change_dataset(folder, schema=99)
    with pytest.raises(UserError, match="schema"):
        verify_shards(folder)


def test_many_problems_are_bounded(folder, capsys):
    for tar in folder.glob("*.index.npy"):
        index = np.load(tar)
        index["crc32"] += 1
        assert index.dtype == INDEX
        np.save(tar, index)
    writer = Path(folder / "slides.parquet")
    pd.DataFrame({"slide": [f"s{i}" for i in range(40)], "stain": "", "tiles": 1}).to_parquet(writer)
    assert main(["verify", str(folder), "--workers", "1"]) == USER_ERROR
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 22
    assert "more" in said[-2]


def tiles_table(folder: Path, **columns: object) -> None:
    table = pd.read_parquet(folder / "slides.parquet").assign(**columns)
    table.to_parquet(folder / "slides.parquet")


def change_index(folder: Path, name: str, column: str, row: int, value: float) -> None:
    index = np.load(folder / name)
    index[column][row] = value
    np.save(folder / name, index)


def rewrite_json(folder: Path, name: str, key: str, **changes: object) -> None:
    def change(member: str, data: bytes) -> tuple[str, bytes]:
        return member, json.dumps(json.loads(data) | changes).encode() if member == f"{key}.json" else data

    rewrite(folder, name, change)


@pytest.mark.parametrize("given", [["--sample", "0"], ["--sample", "-3"], ["--workers", "0"]])
def test_numbers_out_of_range_are_one_line(folder, capsys, given):
    assert main(["verify", str(folder), *given]) == USER_ERROR
    error = capsys.readouterr().err
    assert f"{given[0]} {given[1]} is out of range; valid: 1 or more" in error
    assert error.count("\n") == 1


def test_the_verdict_does_not_depend_on_the_number_of_processes(folder):
    (folder / "tiles-000001.tar").unlink()
    change_index(folder, "tiles-000000.index.npy", "x", 1, 7)
    data = bytearray((folder / "tiles-000002.tar").read_bytes())
    data[int(np.load(folder / "tiles-000002.index.npy")["offset"][0]) + 200] ^= 0xFF
    (folder / "tiles-000002.tar").write_bytes(data)
    alone = verify_shards(folder, sample=9, workers=1)
    assert len(alone.problems) == 4
    assert alone.lost == ["tiles-000001.tar", "tiles-000002.tar"]
    assert alone.mendable == ["tiles-000000.tar"]
    assert verify_shards(folder, sample=9, workers=2) == alone


def test_json_of_another_slide_than_the_index_says(folder):
    change_index(folder, "tiles-000000.index.npy", "slide", 2, 1)
    tiles_table(folder, tiles=[7, 9])  # so that the counts agree with the index
    assert problems_of(folder) == ["tiles-000000.tar: s0_2_0_500: of slide 's0' by its JSON, of 's1' by the index"]


@pytest.mark.parametrize(
    ("sizes", "outside"),
    [
        ({"width": 39, "height": 32, "mpp": 0.5}, 0),  # the last tile is 32 px from x = 7
        ({"width": 36, "height": 32, "mpp": 0.5}, 3),  # x = 5, 6 and 7 reach over it by 1, 2 and 3 px
        ({"width": 71, "height": 63, "mpp": 0.2517}, 0),  # a side of 63.57 px of the slide: to a whole pixel
        ({"width": 71, "height": 62, "mpp": 0.2517}, 8),
        ({"width": pd.NA, "height": pd.NA, "mpp": np.nan}, 0),
        ({"width": "1", "height": "1", "mpp": 0.5}, 0),  # a manifest's own columns
        ({}, 0),
    ],
)
def test_tiles_outside_their_slide(folder, sizes, outside):
    tiles_table(folder, **sizes)
    if "width" in sizes and not isinstance(sizes["width"], str):
        table = pd.read_parquet(folder / "slides.parquet").astype({"width": "Int64", "height": "Int64"})
        table.to_parquet(folder / "slides.parquet")
    problems = problems_of(folder)
    counts = [int(problem.split(": ")[1].split(" tiles lie outside their slide")[0]) for problem in problems]
    assert sum(counts) == 2 * outside  # of two slides


def test_tiles_left_of_their_slide(folder):
    rewrite_json(folder, "tiles-000000.tar", "s0_1_0_500", x=-1)
    assert problems_of(folder) == ["tiles-000000.tar: 1 tiles lie outside their slide, the first at x -1, y 0"]


def test_tiles_of_a_resolution_that_the_set_does_not_have(folder):
    rewrite_json(folder, "tiles-000000.tar", "s0_1_0_500", mpp=0.25)
    said = "tiles-000000.tar: 1 tiles have another µm/px than the set's "
    assert problems_of(folder) == [f"{said}0.5, the first 0.25"]
    change_dataset(folder, mpp=None, config={"mpp": [0.5, 1]})
    assert problems_of(folder) == [f"{said}0.5, 1, the first 0.25"]
    change_dataset(folder, mpp=None, config={"mpp": [0.25, 0.5]})
    assert problems_of(folder) == []
    change_dataset(folder, mpp=None, config={})
    assert problems_of(folder) == []


def test_columns_that_a_slides_table_must_have(folder):
    pd.read_parquet(folder / "slides.parquet").drop(columns=["stain", "tiles"]).to_parquet(folder / "slides.parquet")
    assert problems_of(folder) == ["slides.parquet: has no column stain, tiles"]
    tiles_table(folder, stain="H&E", tiles=[8.0, np.nan])
    assert problems_of(folder) == ["slides.parquet: slide s1 should have nan tiles and has 8"]


@pytest.mark.parametrize(
    "text", ["[1]", '{"x": 0, "y": 0, "mpp": [1, 2]}', '{"x": 0, "y": 0, "mpp": 1e999}', "[" * 9999]
)
def test_json_of_any_content(folder, text):
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, text.encode() if name == "s0_1_0_500.json" else data

    with tarfile.open(folder / "tiles-000000.tar") as archive:
        members = [change(info.name, archive.extractfile(info).read()) for info in archive]
    from eosin.data_tools.shards import TarWriter

    writer = TarWriter(folder / "tiles-000000.tar")
    for name, data in members:
        writer._member(name, data)
    writer.close()
    forgive(folder, "tiles-000000.tar")
    assert any("s0_1_0_500: its JSON" in problem for problem in problems_of(folder))


def test_equal_keys_are_found_by_their_names_and_many_are_bounded(folder, monkeypatch):
    monkeypatch.setattr("eosin.data_tools.shard_check.hash_keys", lambda keys: np.array([7 for _ in keys], np.uint64))
    monkeypatch.setattr("eosin.data_tools.verify.hash_keys", lambda keys: np.array([7 for _ in keys], np.uint64))
    assert problems_of(folder) == []  # all hashes are equal, and no key is
    monkeypatch.undo()
    dataset = json.loads((folder / "dataset.json").read_text())
    change_dataset(folder, shards=3 * dataset["shards"], tiles=3 * 16)
    tiles_table(folder, tiles=3 * 8)
    assert sorted(problems_of(folder)) == sorted(
        f"key s{slide}_{x}_0_500: 3 tiles have it" for slide in (0, 1) for x in range(8)
    )
    monkeypatch.setattr("eosin.data_tools.verify.MOST_PROBLEMS", 5)
    problems = problems_of(folder)
    assert len(problems) == 6
    assert problems[-1] == "and 11 more keys that several tiles have"


def test_a_shard_elsewhere_is_none_of_the_set(folder):
    dataset = json.loads((folder / "dataset.json").read_text())
    change_dataset(folder, shards=[dataset["shards"][0] | {"file": "../tiles-000000.tar"}])
    with pytest.raises(UserError, match=r"is incomplete .*'\.\./tiles-000000.tar'"):
        verify_shards(folder)


def test_names_with_line_breaks_stay_in_one_line(folder, capsys):
    tiles_table(folder, slide=["s\n0", "s1"], tiles=[9, 8])
    assert main(["verify", str(folder), "--workers", "1"]) == USER_ERROR
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    assert "of slide 's0' by its JSON" in said[0]
    assert said[8] == "slides.parquet: slide s�0 should have 9 tiles and has 8"
