"""An index rebuilt from its tar is the one that was written, byte for byte; what cannot be proved is not rebuilt."""

import csv
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from PIL import Image

from eosin.data_tools.errors import DONE, USER_ERROR, Refusal
from eosin.data_tools.files import sha256
from eosin.data_tools.pack import pack_images
from eosin.data_tools.repair import rebuild_index
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.data_tools.verify import verify_shards
from eosin.launch.cli import main
from eosin.ssl.config import Stain
from eosin.ssl.stain.convert import normalize_shards
from eosin.ssl.stain.normalizer import describe


@functools.cache
def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, 90)


def make_set(folder: Path, **lacking: str) -> Path:
    """Three slides of six tiles, dealt over shards, with places, two resolutions and one that is unknown."""
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes=12_000)
    for tile in range(18):
        slide = tile % 3
        meta = {"slide": ["a", "µ, 2", "a.svs"][slide], "x": 100_000 * tile, "y": 3 * tile}
        meta["mpp"] = (0.2527, 0.499, None)[tile // 6]
        writer.add(f"k{tile}", noise(tile), "jpg", {k: v for k, v in meta.items() if k not in lacking}, slide)
    table = pd.DataFrame({"slide": ["a", "µ, 2", "a.svs"], "stain": "H&E", "tiles": 6})
    writer.finish(table, tile_size=32, mpp=None, config={})
    return folder


def indices(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.index.npy")}


def everything_else(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if not path.name.endswith(".index.npy")}


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    np.save(path, np.zeros(3))


def fewer(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def of_another(path: Path) -> None:
    shutil.copy(path.with_name("tiles-000001.index.npy"), path)


def wrong(column: str):
    def change(path: Path) -> None:
        index = np.load(path)
        index[column][1] += 1
        np.save(path, index)

    change.__name__ = column
    return change


HARM = [remove, cut, lengthen, empty, other, fewer, of_another]
HARM += [wrong(c) for c in ("offset", "size", "meta_offset", "meta_size", "crc32", "slide", "x", "y", "mpp")]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_rebuilt_index_is_the_one_that_was_written(tmp_path, harm, capsys):
    folder = make_set(tmp_path / "set")
    written, others = indices(folder), everything_else(folder)
    harm(folder / "tiles-000000.index.npy")
    assert main(["verify", str(folder), "--workers", "1"]) == USER_ERROR
    assert f"'eosin verify {folder} --repair' rebuilds" in capsys.readouterr().out
    assert indices(folder) != written
    assert main(["verify", str(folder), "--repair", "--workers", "1"]) == DONE
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith("tiles-000000.index.npy: rebuilt from its tar; it was wrong: ")
    assert said[0].count("tiles-000000.index.npy") == 1
    assert said[1] == f"{folder}: whole; 18 tiles decoded; indices rebuilt: 1"
    assert indices(folder) == written
    assert everything_else(folder) == others
    assert main(["verify", str(folder), "--repair", "--workers", "1"]) == DONE
    assert capsys.readouterr().out.splitlines() == [f"{folder}: whole; 18 tiles decoded"]


def test_all_indices_at_once_by_two_processes(tmp_path):
    folder = make_set(tmp_path / "set")
    written = indices(folder)
    assert len(written) >= 3
    for name in written:
        (folder / name).unlink()
    verdict = verify_shards(folder, repair=True, workers=2)
    assert (verdict.problems, len(verdict.repaired)) == ([], len(written))
    assert indices(folder) == written
    assert len(ShardSet(folder).table()) == 18


def test_what_is_whole_is_not_written_again(tmp_path):
    folder = make_set(tmp_path / "set")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    assert verify_shards(folder, repair=True, workers=1).repaired == []
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before


def test_a_tar_that_is_lost_proves_nothing(tmp_path, capsys):
    folder = make_set(tmp_path / "set")
    (folder / "tiles-000000.index.npy").unlink()
    (folder / "tiles-000001.index.npy").unlink()
    tar = folder / "tiles-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 0xFF
    tar.write_bytes(data)
    assert main(["verify", str(folder), "--repair", "--workers", "1"]) == USER_ERROR
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("tiles-000001.index.npy: rebuilt")
    assert said[1] == "tiles-000000.index.npy: missing"
    assert said[2] == "tiles-000000.tar: its bytes are not those that were written (sha256 differs)"
    assert "tiles-000000.tar: copy again from where the set is whole, or make the shard set again" in said[-1]
    assert len(said) == 4
    assert not (folder / "tiles-000000.index.npy").exists()
    assert (folder / "tiles-000001.index.npy").exists()
    shard = ShardSet(make_set(tmp_path / "whole")).dataset["shards"][0]
    with pytest.raises(Refusal, match=r"tiles-000000.tar is not what was written"):
        rebuild_index(tar, shard, {"a": 0, "µ, 2": 1, "a.svs": 2})


@pytest.mark.parametrize("name", ["slides.parquet", "of two rows", "renamed"])
def test_a_slide_that_the_table_does_not_number(tmp_path, name):
    folder = make_set(tmp_path / "set")
    (folder / "tiles-000000.index.npy").unlink()
    table = pd.read_parquet(folder / "slides.parquet")
    if name == "slides.parquet":
        (folder / name).unlink()
        said = "slides.parquet, which numbers the slides, is not readable"
    else:
        names = ["a", "a", "a.svs"] if name == "of two rows" else ["b", "µ, 2", "a.svs"]
        table.assign(slide=names).to_parquet(folder / "slides.parquet")
        said = "slides.parquet does not have just one row for slide 'a' of k0"
    problems = verify_shards(folder, repair=True, workers=1).problems
    assert problems[:2] == ["tiles-000000.index.npy: missing", f"tiles-000000.index.npy: cannot be rebuilt: {said}"]
    assert not (folder / "tiles-000000.index.npy").exists()


def test_json_without_the_slide(tmp_path):
    folder = make_set(tmp_path / "set", slide="")
    assert verify_shards(folder, workers=1).problems == []
    (folder / "tiles-000000.index.npy").unlink()
    assert verify_shards(folder, repair=True, workers=1).problems == [
        "tiles-000000.index.npy: missing",
        "tiles-000000.index.npy: cannot be rebuilt: the JSON of k0 does not name its slide, which only the index knew",
    ]


def test_more_tiles_than_were_written(tmp_path):
    folder = make_set(tmp_path / "set")
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["shards"][0]["tiles"] += 1
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "tiles-000000.index.npy").unlink()
    problems = verify_shards(folder, repair=True, workers=1).problems
    assert "cannot be rebuilt: tiles-000000.tar has" in problems[2]
    assert not (folder / "tiles-000000.index.npy").exists()


def test_sets_of_pack_and_their_normalized_copies_are_repaired(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    with (tmp_path / "m.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "slide", "grade"])
        for i in range(6):
            Image.fromarray(simplejpeg.decode_jpeg(noise(i))).save(images / f"{i}.png")
            rows.writerow([f"{i}.png", f"slide.{i % 2}", i])
    packed, single, normalized = tmp_path / "packed", tmp_path / "single", tmp_path / "normalized"
    pack_images(images, packed, manifest=tmp_path / "m.csv")
    pack_images(images, single)
    description = describe(Stain(normalize="tile", method="reinhard", reference="eosin"))
    normalize_shards(ShardSet(packed), normalized, description)
    for folder in (packed, single, normalized):
        written = indices(folder)
        assert written
        for name in written:
            (folder / name).unlink()
        verdict = verify_shards(folder, repair=True, workers=1)
        assert (verdict.problems, verdict.decoded) == ([], 6)
        assert indices(folder) == written
