"""Packing from WebDataset tars, written by webdataset: images and columns, members not to be trusted, cuts."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
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


def write_tar(path: Path, samples: list[dict[str, object]]) -> Path:
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def test_webdataset_tars(tmp_path):
    tars = [
        write_tar(
            tmp_path / "tars" / f"{name}.tar",
            [
                {
                    "__key__": f"case.{n}".replace(".", "/"),
                    "jpg": encoded(n, "JPEG"),
                    "json": {"slide": f"s{n % 2}", "x": 7 * n, "y": n, "mpp": 0.5, "stage": "II", "bad": float("nan")},
                    "cls": n % 3,
                    "txt": f"cells {n}",
                }
                for n in range(first, first + 3)
            ],
        )
        for name, first in (("b", 3), ("a", 0))
        if (tmp_path / "tars").mkdir(exist_ok=True) is None
    ]
    summary = pack_images(tmp_path / "tars", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert summary.exit_code == DONE
    for n in range(6):
        assert shards.image(n) == encoded(n, "JPEG")
        assert shards.meta(n) == {
            "key": f"{'ab'[n // 3]}=2fcase=2f{n}",
            **{"slide": f"s{n % 2}", "x": 7 * n, "y": n, "mpp": 0.5, "stage": "II", "bad": None},
            **{"label": str(n % 3), "text": f"cells {n}"},
        }
    slides = shards.slides()
    assert slides[["slide", "stage", "mpp", "tiles"]].values.tolist() == [["s0", "II", 0.5, 3], ["s1", "II", 0.5, 3]]
    assert "label" not in slides
    assert shards.mpp == 0.5
    assert main(["verify", str(tmp_path / "out")]) == DONE
    pack_images(list(reversed(tars)), tmp_path / "list", tile_size=16, group="stage", label="text")
    scaled = ShardSet(tmp_path / "list")
    assert scaled.mpp == 1.0  # pixels of twice the side
    assert scaled.meta(0) | {"slide": "II", "given_slide": "s0", "label": "cells 0"} == scaled.meta(0)


def test_own_shards_can_be_packed_again(tiny_shards, tmp_path):
    pack_images(sorted(tiny_shards.glob("*.tar")), tmp_path / "out")
    old, new = ShardSet(tiny_shards), ShardSet(tmp_path / "out")
    assert [new.image(i) for i in range(len(new))] == [old.image(i) for i in range(len(old))]
    assert (new.column("x") == old.column("x")).all()


def test_tar_members_that_cannot_be_used(tmp_path, run):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes = b"", **kwargs: object) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in kwargs.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        for n in range(12):
            add(f"good{n}.png", encoded(n))
        add("alone.json", b"{}")
        add("README", b"text")
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="good0.png")
        add("fifo.png", type=tarfile.FIFOTYPE)
        add("../out.png", encoded(1))
        add("/abs.png", encoded(1))
        add("two.png", encoded(1))
        add("two.jpg", encoded(1, "JPEG"))
        add("json.png", encoded(1))
        add("json.json", b"{")
        add("list.png", encoded(1))
        add("list.json", b"[1]")
        add("half.png", encoded(1))
        add("half.json", b'{"a": "\\ud800"}')
        add("bytes\udcff.png", b"\x89PNG")
        add("good0.png", encoded(3))
    said = run(path, "--out", tmp_path / "out", code=DONE_WITH_REFUSALS)
    for name, reason in (
        ("link", "'link.png' is a link"),
        ("hard", "'hard.png' is a link"),
        ("fifo", "'fifo.png' is no plain file"),
        ("../out", "its name leads out of the archive"),
        ("/abs", "its name leads out of the archive"),
        ("two", "it has 2 images: png, jpg"),
        ("json", "its json is not readable as JSON"),
        ("list", "its json is no JSON object"),
        ("half", "its json is not readable as JSON"),
        ("bytes\\xff", "not readable as an image"),
        ("good0", "a second sample of this key"),
    ):
        assert f"  set.tar: {name}: {reason}" in said
    assert "refused: 11" in said
    assert "members that go with no image: 2, alone.json, README" in said
    shards = ShardSet(tmp_path / "out")
    assert [shards.image(i) for i in range(12)] == [encoded(n) for n in range(12)]


def test_tars_broken_as_a_whole_are_one_line(tmp_path, run):
    with tarfile.open(tmp_path / "good.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        starts = []
        for number in range(3):
            starts.append(archive.offset)
            info = tarfile.TarInfo(f"k{number}.png")
            info.size = len(encoded(number))
            archive.addfile(info, io.BytesIO(encoded(number)))
        member = starts[1]
    good = (tmp_path / "good.tar").read_bytes()
    damaged = bytearray(good)
    damaged[member + 150] ^= 0xFF  # in a header, which tarfile takes for the end
    for name, data, said in (
        ("inside", good[: member + 700], "is cut or broken"),
        ("header", good[: member + 100], "is cut or broken"),
        ("between", good[:member], "is cut or broken"),
        ("damaged", bytes(damaged), "is cut or broken"),
        ("text", b"no tar" * 200, "is not a plain tar"),
        ("none", b"", "is not a plain tar"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        assert said in run(tmp_path / f"{name}.tar", "--out", tmp_path / "out", code=USER_ERROR)
        assert not (tmp_path / "out").exists()


def test_columns_that_a_tar_lacks(tmp_path, run):
    samples = [{"__key__": f"k{n}", "png": encoded(n), "json": {"grade": n} if n else {}} for n in range(3)]
    path = write_tar(tmp_path / "a.tar", samples)
    assert "a column 'stage'" in run(path, "--out", tmp_path / "o", "--label=stage", code=USER_ERROR)
    said = run(path, "--out", tmp_path / "o", "--label=grade", code=DONE_WITH_REFUSALS)
    assert "k0: nothing that goes with it has a column 'grade'" in said
    assert [ShardSet(tmp_path / "o").meta(i)["label"] for i in (0, 1)] == [1, 2]


def test_columns_of_mixed_types_become_text(tmp_path):
    facts = [{"grade": 1, "ok": True}, {"grade": "two", "ok": None}, {"grade": 1 << 70, "nested": {"a": 1}}]
    path = write_tar(
        tmp_path / "a.tar", [{"__key__": f"{n}", "png": encoded(n), "json": f} for n, f in enumerate(facts)]
    )
    pack_images(path, tmp_path / "out")
    slides = ShardSet(tmp_path / "out").slides()
    assert slides["grade"].tolist() == ["1", "two", str(1 << 70)]
    assert "nested" not in slides
    assert ShardSet(tmp_path / "out").meta(2)["nested"] == {"a": 1}
    assert json.loads(slides["ok"].to_json()) == {"0": True, "1": None, "2": None}
