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
    table = pd.DataFrame({"slide": ["s0", "s1"], "tiles": [8, 8]})
    writer.finish(table, tile_size=32, mpp=0.5, config={})
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


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
    assert verify_shards(folder) == ([], 16)
    assert verify_shards(folder, sample=5) == ([], 5)
    assert main(["verify", str(folder)]) == DONE
    assert "whole; 16 tiles decoded" in capsys.readouterr().out


def test_cut_tar_is_one_line(folder, capsys):
    tar = folder / "tiles-000001.tar"
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(size - 3000)
    assert main(["verify", str(folder)]) == USER_ERROR
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
    (problem,) = verify_shards(folder)[0]
    assert problem.startswith("tiles-000001.tar: ")


def test_flipped_byte_in_an_image(folder):
    tar = folder / "tiles-000000.tar"
    offset = int(ShardSet(folder).row(1)["offset"]) + 700
    data = bytearray(tar.read_bytes())
    data[offset] ^= 0xFF
    tar.write_bytes(data)
    problems, _ = verify_shards(folder)
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
    problems, _ = verify_shards(folder)
    assert len(problems) == 1
    assert problems[0].startswith("tiles-000000.tar: s0_2_0_500: ")
    assert said in problems[0]


def test_index_of_another_kind(folder):
    np.save(folder / "tiles-000000.index.npy", np.zeros(3))
    assert "tiles-000000.index.npy: not an index of this schema" in verify_shards(folder)[0]
    (folder / "tiles-000000.index.npy").write_bytes(b"x")
    assert verify_shards(folder)[0][0].startswith("tiles-000000.index.npy: not readable")


def test_missing_and_unlisted_shards(folder):
    (folder / "tiles-000000.tar").rename(folder / "extra.tar")
    problems, _ = verify_shards(folder)
    assert problems == ["tiles-000000.tar: missing", "extra.tar: not listed in dataset.json"]


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
    assert verify_shards(folder)[0] == ["key s0_0_0_500: 2 tiles have it"]


def test_tile_that_cannot_be_decoded_or_is_of_another_size(folder):
    small = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))

    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, {"s0_0_0_500.jpg": b"not a jpeg", "s0_1_0_500.jpg": small}.get(name, data)

    rewrite(folder, "tiles-000000.tar", change)
    problems, _ = verify_shards(folder)
    assert len(problems) == 2
    assert problems[0].startswith("tiles-000000.tar: s0_0_0_500: cannot be decoded")
    assert problems[1] == "tiles-000000.tar: s0_1_0_500: is 16 x 16 px, not 32 x 32"


def test_slides_table_that_does_not_fit(folder):
    table = pd.read_parquet(folder / "slides.parquet")
    table.assign(tiles=[8, 7]).to_parquet(folder / "slides.parquet")
    assert verify_shards(folder)[0] == ["slides.parquet: slide s1 should have 7 tiles and has 8"]
    table[:1].to_parquet(folder / "slides.parquet")
    assert verify_shards(folder)[0] == [
        "slides.parquet: 1 slides where dataset.json says 2",
        "slides.parquet: 8 tiles belong to slides that are not in it",
    ]
    (folder / "slides.parquet").write_bytes(b"x")
    assert verify_shards(folder)[0][0].startswith("slides.parquet: not readable")


def test_a_stranger_in_the_tar(folder):
    with tarfile.open(folder / "tiles-000000.tar", "a") as archive:
        archive.add(folder / "dataset.json", "../../evil.txt")
    forgive(folder, "tiles-000000.tar")
    (problem,) = verify_shards(folder)[0]
    assert "a member '../../evil.txt' that is neither an image nor its JSON" in problem


def test_what_is_no_shard_set(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        verify_shards(tmp_path / "gone")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="expected the description of a shard set"):
        verify_shards(tmp_path / "other")
    change_dataset(folder, tiles=17)
    assert verify_shards(folder)[0] == ["dataset.json: says 17 tiles where its shards have 16"]
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
    pd.DataFrame({"slide": [f"s{i}" for i in range(40)], "tiles": 1}).to_parquet(writer)
    assert main(["verify", str(folder)]) == USER_ERROR
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 22
    assert "more" in said[-2]
