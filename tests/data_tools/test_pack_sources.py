"""Packing from zips, and what all sources have in common: found by what is there, same bytes, nothing guessed."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, USER_ERROR
from eosin.data_tools.pack import pack_images
from eosin.data_tools.shards import ShardSet
from eosin.launch.cli import main


def encoded(number: int, kind: str = "PNG") -> bytes:
    """Another image for each number."""
    small = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def write_tar(path: Path, samples: list[dict[str, object]]) -> Path:
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_parquet(path: Path, columns: dict[str, object], schema: pa.Schema | None = None, rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows)
    return path


def test_zip_is_packed_as_the_folder_in_it(tmp_path):
    members = {f"set/{('benign', 'tumor')[n // 3]}/t.{n}.png": encoded(n) for n in range(6)}
    for name, data in members.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    other = {"__MACOSX/set/._t.0.png": b"x", "set/README.txt": b"read me"}
    summary = pack_images(write_zip(tmp_path / "set.zip", members | other), tmp_path / "zip")
    pack_images(tmp_path / "set", tmp_path / "folder")
    zipped, plain = ShardSet(tmp_path / "zip"), ShardSet(tmp_path / "folder")
    assert [zipped.image(i) for i in range(6)] == list(members.values()) == [plain.image(i) for i in range(6)]
    assert [zipped.meta(i)["label"] for i in range(6)] == ["benign"] * 3 + ["tumor"] * 3
    assert "members that are no images: 2, __MACOSX/set/._t.0.png, set/README.txt" in str(summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "set", "set.zip", "zip"]


def test_zip_with_a_manifest_and_several_zips(tmp_path):
    one = write_zip(tmp_path / "one.zip", {"a/1.png": encoded(1), "b/2.png": encoded(2)})
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,grade,case\nb/2.png,3,c\na/1.png,1,c\na/gone.png,1,c\n")
    summary = pack_images(one, tmp_path / "out", manifest=manifest, label="grade", group="case")
    shards = ShardSet(tmp_path / "out")
    assert [(shards.image(i), shards.meta(i)["label"]) for i in (0, 1)] == [(encoded(2), "3"), (encoded(1), "1")]
    assert shards.slides()[["slide", "tiles", "dropped_refused"]].values.tolist() == [["c", 2, 1]]
    assert summary.refused == [("a/gone.png", "no such file")]
    two = write_zip(tmp_path / "two.zip", {"a/1.png": encoded(3), "b/2.png": encoded(4)})
    pack_images([one, two], tmp_path / "both")
    both = ShardSet(tmp_path / "both")
    assert [both.meta(i)["key"] for i in range(4)] == ["one=2fa=2f1", "one=2fb=2f2", "two=2fa=2f1", "two=2fb=2f2"]
    assert both.image(3) == encoded(4)


def test_zip_members_that_cannot_be_trusted_are_refused(tmp_path, run):
    """A declared size over the bound, a false one, encryption, a method without bound, names that lead out, a cut."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"good{number}.png", encoded(number))
        for name in ("../out.png", "/abs.png", "crypt.png", "false.png", "huge.png", "png.png"):
            archive.writestr(name, b"\x89PNG" + bytes(3 << 20))
        archive.writestr("lzma.png", encoded(1), zipfile.ZIP_LZMA)
    data = bytearray(path.read_bytes())
    for name, offset, value in (("crypt.png", 8, 1), ("false.png", 24, 1000), ("huge.png", 24, (1 << 32) - 2)):
        entry = data.rindex(name.encode()) - 46  # of the central directory, which is what is read
        struct.pack_into("<H" if offset == 8 else "<I", data, entry + offset, value)
        if offset == 8:
            local = data.index(name.encode()) - 30
            struct.pack_into("<H", data, local + 6, value)
    path.write_bytes(data)
    tracemalloc.start()
    said = run(path, "--out", tmp_path / "out", code=DONE_WITH_REFUSALS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for name, reason in (
        ("../out.png", "its name leads out of the archive"),
        ("/abs.png", "its name leads out of the archive"),
        ("crypt.png", "encrypted"),
        ("false.png", "cannot be unpacked: Bad CRC-32"),
        ("huge.png", "4294967294 bytes in one member, over the bound"),
        ("lzma.png", "compressed by method 14"),
        ("png.png", "not readable as an image"),
    ):
        assert f"  {name}: {reason}" in said
    assert len(ShardSet(tmp_path / "out")) == 8
    assert peak < 20 << 20
    again = run(path, "--out", tmp_path / "out", code=DONE_WITH_REFUSALS)
    assert "nothing to do" in again
    assert again[again.index("refused: 7") :] == said[said.index("refused: 7") :]
    run(write_zip(tmp_path / "text.zip", {"a.txt": b""}), "--out", tmp_path / "no", code=USER_ERROR)


def test_a_false_size_unpacks_no_more_than_declared(tmp_path):
    """Two hundred megabytes of zeros that call themselves 1000 bytes cost no memory."""
    path = write_zip(tmp_path / "bomb.zip", {"bomb.png": bytes(200 << 20), "good.png": encoded(1)})
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"bomb.png") - 46 + 24, 1000)
    path.write_bytes(data)
    tracemalloc.start()
    summary = pack_images(path, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [name for name, _ in summary.refused] == ["bomb.png"]
    assert peak < 20 << 20


def test_zips_broken_as_a_whole_are_one_line(tmp_path, run):
    good = write_zip(tmp_path / "good.zip", {"a.png": encoded(1), "b.png": encoded(2)})
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "empty.zip").touch()
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", encoded(1))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", encoded(2))
    data = bytearray(good.read_bytes())
    first, second = (data.rindex(name) - 46 for name in (b"a.png", b"b.png"))
    struct.pack_into("<I", data, first + 20, len(data) - 100)
    data[second + 42 : second + 46] = bytes(4)
    (tmp_path / "overlap.zip").write_bytes(data)
    for name, said in (
        ("cut", "is not a readable zip, or cut"),
        ("empty", "is not a readable zip"),
        ("twice", "two images of one name"),
        ("overlap", "its members overlap"),
    ):
        assert said in run(tmp_path / f"{name}.zip", "--out", tmp_path / "out", code=USER_ERROR)
        assert not (tmp_path / "out").exists()


# What all have in common


@pytest.mark.parametrize("kind", ["zip", "tar", "h5", "parquet"])
def test_same_input_same_bytes(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        write_zip(path, {f"{n}.png": encoded(n) for n in range(5)})
    elif kind == "tar":
        write_tar(path, [{"__key__": f"{n}", "png": encoded(n), "json": {"n": n}} for n in range(5)])
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["images"] = np.stack([np.full((32, 32, 3), 40 * n, np.uint8) for n in range(5)])
    else:
        write_parquet(path, {"image": [encoded(n) for n in range(5)], "n": list(range(5))})
    for name in ("one", "two"):
        pack_images(path, tmp_path / name, tile_size=16)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    before = (tmp_path / "one" / "dataset.json").stat().st_mtime_ns
    assert "nothing to do" in str(pack_images(path, tmp_path / "one", tile_size=16))
    assert (tmp_path / "one" / "dataset.json").stat().st_mtime_ns == before
    assert main(["verify", str(tmp_path / "one")]) == DONE


def test_several_kinds_are_never_guessed(tmp_path, run):
    one = write_zip(tmp_path / "a" / "one.zip", {"a.png": encoded(1)}) if (tmp_path / "a").mkdir() is None else None
    two = write_tar(tmp_path / "a" / "two.tar", [{"__key__": "k", "png": encoded(2)}])
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    for given, said in (
        ([tmp_path / "a"], "several kinds of sources: 1 zip, 1 tar; give those of one kind"),
        ([one, two], "several kinds of sources: 1 zip, 1 tar"),
        ([tmp_path / "scan.dcm"], "DICOM is not read; convert X-rays to PNG or TIFF"),
        ([tmp_path / "gone.zip"], "is not a folder of images, nor a file that holds images"),
        ([tmp_path / "a" / ".." / "a" / "one.zip", one], "is given twice"),
    ):
        assert said in run(*given, "--out", tmp_path / "out", code=USER_ERROR)
    (tmp_path / "a" / "lone.png").write_bytes(encoded(3))
    said = run(tmp_path / "a", "--out", tmp_path / "out", code=DONE)
    assert "also holds zip files, left alone: 1" in said
    assert ShardSet(tmp_path / "out").image(0) == encoded(3)


@pytest.mark.slow
def test_real_tissue_from_every_container(real_data, tmp_path):
    """The same 200 colon and lung tiles from a folder, a zip, a tar and Parquet: the same bytes in all."""
    manifest = pd.read_csv(real_data / "lc25000_224" / "manifest.csv", dtype=str)[::11]
    images = [(real_data / "lc25000_224" / path).read_bytes() for path in manifest["path"]]
    write_zip(tmp_path / "a.zip", dict(zip(manifest["path"], images)), zipfile.ZIP_STORED)
    columns = {name: manifest[name].tolist() for name in manifest.columns}
    write_parquet(tmp_path / "a.parquet", columns | {"image": images}, rows=50)
    samples = [
        {"__key__": f"{n:04d}", "jpg": image, "json": row}
        for n, (image, row) in enumerate(zip(images, manifest.to_dict("records")))
    ]
    write_tar(tmp_path / "a.tar", samples)
    for kind in ("parquet", "tar"):
        pack_images(tmp_path / f"a.{kind}", tmp_path / kind, label="label", group="pseudo_slide")
        shards = ShardSet(tmp_path / kind)
        assert [shards.image(i) for i in range(len(shards))] == images
        assert shards.table()["label"].tolist() == manifest["label"].tolist()
        assert len(shards.slides()) == manifest["pseudo_slide"].nunique()
    pack_images(tmp_path / "a.zip", tmp_path / "zip")
    shards = ShardSet(tmp_path / "zip")
    labels = dict(zip(images, manifest["path"].str.split("/").str[0]))
    assert all(labels[shards.image(i)] == shards.meta(i)["label"] for i in range(len(shards)))
