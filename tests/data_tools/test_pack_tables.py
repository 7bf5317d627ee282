"""Packing from HDF5 and Parquet in the layouts that are in use: pixels, columns, what is broken, memory."""

import io
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from eosin.data_tools import pack_tables
from eosin.data_tools.errors import DONE_WITH_REFUSALS, USER_ERROR
from eosin.data_tools.pack import pack_images
from eosin.data_tools.pack_sources import open_source
from eosin.data_tools.shards import ShardSet

SIDE = 32


def pixels(number: int, shape: tuple[int, ...] = (SIDE, SIDE, 3), dtype: type = np.uint8) -> np.ndarray:
    """Smooth enough for JPEG, and different for each number."""
    small = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize(shape[1::-1], Image.Resampling.BICUBIC))
    return image.astype(dtype) if len(shape) == 3 else image[..., 0].astype(dtype)


def encoded(number: int, kind: str = "PNG", size: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number, (size, size, 3))).save(file, kind)
    return file.getvalue()


def stored(shards: ShardSet, tile: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(shards.image(tile)))).astype(int)


# HDF5


def test_pcam_pairs(tmp_path, monkeypatch):
    """Images in one file, labels in another, in the shapes PCam has; read in blocks smaller than the file."""
    for part, first in (("train", 0), ("valid", 10)):
        images = np.stack([pixels(n) for n in range(first, first + 10)])
        with h5py.File(tmp_path / f"pcam_{part}_x.h5", "w") as file:
            file.create_dataset("x", data=images, chunks=(2, SIDE, SIDE, 3), compression="gzip")
        with h5py.File(tmp_path / f"pcam_{part}_y.h5", "w") as file:
            file.create_dataset("y", data=np.arange(first, first + 10, dtype=np.uint8).reshape(10, 1, 1, 1) % 2)
    monkeypatch.setattr(pack_tables, "BLOCK_BYTES", 5 * SIDE * SIDE * 3)
    pack_images(tmp_path, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == 20
    for n in range(20):
        assert np.abs(stored(shards, n) - pixels(n)).mean() < 2
        assert shards.meta(n)["label"] == n % 2
        assert shards.meta(n)["slide"] == f"pcam_{'train' if n < 10 else 'valid'}_x/{n % 10}"


def test_clam_patches_are_one_slide_a_file(tmp_path):
    for name in ("TCGA-AA-0001-01Z-00-DX1", "s2"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["imgs"] = np.stack([pixels(n) for n in range(4)])
            file["coords"] = np.array([[256 * n, 512] for n in range(4)])
            file["names"] = [f"n{n}" for n in range(4)]
            file["embedding"] = np.zeros((4, 16), np.float32)
            file["elsewhere"] = h5py.ExternalLink("s2.h5", "imgs")
    pack_images(sorted(tmp_path.glob("*.h5")), tmp_path / "out", mpp=0.25)
    shards = ShardSet(tmp_path / "out")
    assert shards.slides()["slide"].tolist() == ["TCGA-AA-0001-01Z-00-DX1", "s2"]
    assert shards.slides()["patient"].tolist() == ["TCGA-AA-0001", "s2"]
    assert shards.column("x").tolist() == [0, 256, 512, 768] * 2
    assert shards.column("y").tolist() == [512] * 8
    assert shards.meta(2)["names"] == "n2"
    assert "embedding" not in shards.meta(2)
    assert np.abs(stored(shards, 7) - pixels(3)).mean() < 2


def test_hdf5_mistakes(tmp_path, run):
    def write(name: str, **datasets: object) -> Path:
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, value in datasets.items():
                file[key] = value
        return tmp_path / f"{name}.h5"

    images = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    coords = write("coords", coords=np.zeros((5, 2), int), features=np.zeros((5, 1024), np.float32))
    several = write("several", a=images, b=images)
    good = write("good", x=images, grade=np.arange(4))
    lonely = write("labels", y=np.zeros(3))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(images.shape, np.uint8)
        layout[:] = h5py.VirtualSource(good, "x", images.shape)
        file.create_virtual_dataset("x", layout)
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        file.create_dataset("x", (1 << 10, 1 << 10, 1 << 10, 3), np.uint8, chunks=(1 << 10, 1 << 10, 1 << 10, 1))
    (tmp_path / "cut.h5").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "text.h5").write_bytes(b"no")
    for files, options, said in (
        ([coords], [], f"coords.h5 holds coordinates, no images; 'eosin tile SLIDES --coords {coords}' reads"),
        ([several], [], "holds several sets of images: a, b"),
        ([good], ["--label=grad"], "has no column 'grad'; did you mean 'grade'?"),
        ([good, lonely], [], "holds columns of 3 rows, no images, and fits none"),
        ([tmp_path / "virtual.h5"], [], "lie in other files"),
        ([tmp_path / "chunk.h5"], [], "1073741824 bytes must be unpacked to read one image"),
        ([tmp_path / "cut.h5"], [], "is not readable as HDF5, or cut"),
        ([tmp_path / "text.h5"], [], "is not readable as HDF5, or cut"),
        ([good, good], [], "is given twice"),
        ([write("short", x=images, y=np.zeros(3))], [], "holds 3 labels in 'y' for 4 images"),
        ([write("none", x=images[:0])], [], "none.h5 holds no image"),
        ([tmp_path / "none.h5"], ["--modality=xray"], "none.h5 holds no image"),
        ([good], ["--manifest=m.csv"], "carry their own columns"),
        ([write("deep", x=images.astype(np.uint16))], [], "its values are uint16; 8 bits a channel are read"),
    ):
        assert said in run(*files, "--out", tmp_path / "out", *options, code=USER_ERROR)
        assert not (tmp_path / "out").exists()


def test_broken_chunk_costs_its_own_rows(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (40, SIDE, SIDE, 3), dtype=np.uint8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        set_x = file.create_dataset("x", data=images, chunks=(2, SIDE, SIDE, 3), compression="gzip", fletcher32=True)
        chunk = set_x.id.get_chunk_info(3)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(data)
    summary = pack_images(path, tmp_path / "out")
    assert [name for name, _ in summary.refused] == ["a.h5 [6]", "a.h5 [7]"]
    assert len(ShardSet(tmp_path / "out")) == 38


# Parquet


def write_parquet(path: Path, columns: dict[str, object], schema: pa.Schema | None = None, rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows)
    return path


def tcga(numbers: range, folder: str) -> dict[str, object]:
    """The columns of medarc's TCGA-12K, in their types."""
    n = len(numbers)
    return {
        "task_id": pa.array([f"{folder}-7"] * n),
        "slide_path": pa.array([f"/data/{folder}/TCGA-AA-000{i % 2}-01Z-00-DX1.uid.svs" for i in numbers]),
        "x": pa.array([224 * i for i in numbers], pa.int32()),
        "y": pa.array([448] * n, pa.int32()),
        "level": pa.array([i % 2 for i in numbers], pa.int32()),
        "tile_size": pa.array([224] * n, pa.int32()),
        "level_downsample": pa.array([4.0] * n, pa.float32()),
        "image_dtype": pa.array(["uint8"] * n),
        "image_bytes": pa.array([encoded(i, "JPEG") for i in numbers], pa.binary()),
    }


def test_tcga_12k(tmp_path):
    for folder, first in (("1", 0), ("2", 5)):
        write_parquet(tmp_path / "set" / folder / "part.parquet", tcga(range(first, first + 5), folder))
    pack_images(tmp_path / "set", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    names = [f"TCGA-AA-000{n}-01Z-00-DX1.uid" for n in (0, 1)]
    # The same file name in another folder is another slide.
    assert shards.slides()["slide"].tolist() == [*names, *(f"/data/2/{name}.svs" for name in reversed(names))]
    assert shards.slides()["patient"].tolist() == [f"TCGA-AA-000{n}" for n in (0, 1, 1, 0)]
    assert shards.slides()["site"].tolist() == ["TCGA-AA"] * 4
    assert shards.slides()["task_id"].tolist() == ["1-7", "1-7", "2-7", "2-7"]
    for n in range(10):
        meta = shards.meta(n)
        assert shards.image(n) == encoded(n, "JPEG")
        assert (meta["x"], meta["y"], meta["level"], meta["level_downsample"]) == (224 * n, 448, n % 2, 4.0)
    assert [shards.meta(n)["key"] for n in (4, 5)] == ["1=2fpart=2f4", "2=2fpart=2f0"]
    assert len(shards.slides().columns) == len(set(shards.slides().columns))


def test_hub_structs(tmp_path, run):
    images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in range(12)]
    images[5], images[6] = {"bytes": None, "path": "away.png"}, None
    columns = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "mask": pa.array([b"x"] * 12),
        "label": pa.array([n % 2 for n in range(12)]),
        "organ": pa.array(["lung", None] * 6).dictionary_encode(),
        "age": pa.array([float("nan")] + [3.5] * 11),
        "when": pa.array([pd.Timestamp("2020-01-02")] * 12),
        "embedding": pa.array([[1.0, 2.0]] * 12),
        "key": pa.array([f"k{n}" for n in range(12)]),
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    said = run(path, "--out", tmp_path / "out", "--group=organ", code=DONE_WITH_REFUSALS)
    assert "a.parquet [5]: only a path is in the file ('away.png'), no bytes" in said
    assert "a.parquet [6]: no bytes" in said
    shards = ShardSet(tmp_path / "out")
    kept = [n for n in range(12) if n not in (5, 6)]
    assert [shards.image(i) for i in range(10)] == [encoded(n) for n in kept]
    assert [shards.meta(i)["label"] for i in range(10)] == [n % 2 for n in kept]
    assert [shards.meta(i)["slide"] for i in range(2)] == ["lung", "a/1"]
    assert shards.meta(0)["age"] is None
    assert shards.meta(1)["age"] == 3.5
    assert shards.meta(1)["when"] == "2020-01-02 00:00:00"
    assert shards.meta(1)["given_key"] == "k1"
    assert not {"embedding", "mask", "image"} & shards.meta(1).keys()


def test_parquet_mistakes(tmp_path, run):
    good = write_parquet(tmp_path / "good.parquet", {"jpg": [encoded(1)], "grade": [1]})
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-9])
    for path, options, said in (
        (write_parquet(tmp_path / "none.parquet", {"a": [1], "b": ["x"]}), [], "has no column of image bytes"),
        (write_parquet(tmp_path / "two.parquet", {"a": [b"1"], "b": [b"2"]}), [], "several columns of bytes: a, b"),
        (write_parquet(tmp_path / "both.parquet", {"jpg": [b"1"], "png": [b"2"]}), [], "columns of bytes: jpg, png"),
        (good, ["--group=grad"], "has no column 'grad'; did you mean 'grade'?"),
        (tmp_path / "cut.parquet", [], "is not readable as Parquet, or cut"),
        (write_parquet(tmp_path / "empty.parquet", {"jpg": pa.array([], pa.binary())}), [], "holds no rows"),
    ):
        assert said in run(path, "--out", tmp_path / "out", *options, code=USER_ERROR)
        assert not (tmp_path / "out").exists()


def test_broken_page_costs_its_row_group(tmp_path):
    noise = [np.random.default_rng(n).bytes(3000) for n in range(12)]
    images = [encoded(n) + noise[n] for n in range(12)]
    path = tmp_path / "a.parquet"
    table = pa.table({"jpg": images, "n": list(range(12))})
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False, write_page_checksum=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = place.data_page_offset
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    summary = pack_images(path, tmp_path / "out")
    assert [name for name, _ in summary.refused] == [f"a.parquet [{n}]" for n in (3, 4, 5)]
    assert [ShardSet(tmp_path / "out").meta(i)["n"] for i in range(9)] == [0, 1, 2, *range(6, 12)]


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """Of 98 MB in one row group, Arrow holds a few pages of 1024 rows."""
    path = tmp_path / "a.parquet"
    images = pa.chunked_array([pa.array([np.random.default_rng(n).bytes(16 << 10) for n in range(6000)])])
    pq.write_table(pa.table({"jpeg": images}), path, row_group_size=6000, use_dictionary=False)
    del images
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_source([path]).images()]
    assert len(held) == 6000
    assert max(held) < 50 << 20
