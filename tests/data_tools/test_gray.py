"""Fluorescence and X-ray images: the channel that was asked, one window for the whole set, and what is refused."""

import io
import json
import struct
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.data_tools.errors import DONE, USER_ERROR, Refusal, UserError
from eosin.data_tools.gray import Window, measure_window, read_plane, to_8_bits
from eosin.data_tools.pack import pack_images
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode_tile
from eosin.launch.cli import main

SIDE = 64


def smooth(number: int, low: float, high: float, dtype: type = np.uint16) -> np.ndarray:
    """[64, 64], from low to high."""
    small = np.random.default_rng(number).uniform(0, 1, (5, 5)).astype(np.float32)
    image = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    image = (image - image.min()) / (image.max() - image.min())
    return (low + image * (high - low)).astype(dtype)


def encode(kind: str, pixels: np.ndarray, **kwargs: object) -> bytes:
    file = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(file, pixels, **kwargs)
    elif pixels.dtype == np.uint16 and pixels.ndim == 3:
        return cv2.imencode(f".{kind}", pixels[..., [2, 1, 0, 3][: pixels.shape[2]]])[1].tobytes()
    else:
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, images: list[bytes], ending: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(images):
        (folder / f"{number}.{ending}").write_bytes(data)
    return folder


def seen(shards: ShardSet, tile: int) -> np.ndarray:
    """A tile as training sees it, one of three equal channels."""
    image = decode_tile(shards.image(tile), int(shards.row(tile)["crc32"]), shards.tile_size)
    assert (image == image[..., :1]).all()
    return image[..., 0].astype(float)


@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_one_window_keeps_a_dim_image_dim(tmp_path, kind):
    planes = [smooth(n, 200, high) for n, high in enumerate((1200, 4000, 9000, 60000))]
    pack_images(write(tmp_path / "in", [encode(kind, p) for p in planes], kind), tmp_path / "out", modality="xray")
    shards = ShardSet(tmp_path / "out")
    config = shards.dataset["config"]
    low, high = config["measured_window"]
    values = np.sort(np.concatenate([plane.ravel() for plane in planes]))
    # By other means than the code's: among the sorted values, an eighth of a percent from either end at most.
    assert values[0] <= low <= values[len(values) // 800]
    assert values[-(len(values) // 400)] <= high <= values[-1]
    for number, plane in enumerate(planes):
        assert np.abs(seen(shards, number) - (plane.clip(low, high) - low) / (high - low) * 255).mean() < 1.5
    assert seen(shards, 0).max() < 0.05 * seen(shards, 3).max()
    assert shards.slides()["stain"].unique().tolist() == ["none"]
    assert (config["modality"], config["window"]) == ("xray", "measured")


def test_window_is_as_told(tmp_path):
    folder = write(tmp_path / "in", [encode("tiff", smooth(1, -2, 3, np.float32))], "tif")
    pack_images(folder, tmp_path / "out", modality="fluorescence", window=(-1.0, 2.0), stain="DAPI", tile_size=32)
    shards = ShardSet(tmp_path / "out")
    expected = (cv2.resize(smooth(1, -2, 3, np.float32), (32, 32), interpolation=cv2.INTER_AREA) + 1) / 3 * 255
    assert np.abs(seen(shards, 0) - expected.clip(0, 255)).mean() < 2
    assert shards.dataset["config"]["window"] == [-1.0, 2.0]
    assert shards.slides()["stain"].tolist() == ["DAPI"]


def test_values_through_a_window_are_exact():
    plane = np.array([[0, 99, 100, 101, 200, 300, 301, 65535]], np.uint16)
    assert to_8_bits(plane, Window(100, 300)).tolist() == [[0, 0, 0, 1, 128, 255, 255, 255]]
    assert to_8_bits(plane.astype(np.uint8), Window(0, 510)).tolist() == [[0, 50, 50, 50, 100, 22, 22, 128]]
    assert to_8_bits(plane.astype(np.uint8), None).tolist() == [[0, 99, 100, 101, 200, 44, 45, 255]]
    for values, window in ((plane, None), (plane.astype(np.uint8), Window(0, 9, measured=True))):
        with pytest.raises(Refusal, match="unlike those of the rest"):
            to_8_bits(values, window)


CHANNELS = np.stack([smooth(n, 1000 * n + 100, 1000 * n + 900) for n in range(3)])  # [C, H, W]


@pytest.mark.parametrize(
    "data",
    [
        encode("tiff", CHANNELS, metadata={"axes": "CYX"}, photometric="minisblack"),
        encode("tiff", CHANNELS, metadata={"axes": "CYX"}, photometric="minisblack", compression="lzw"),
        encode("tiff", CHANNELS, photometric="minisblack", metadata=None),
        encode("tiff", CHANNELS, imagej=True, metadata={"axes": "CYX"}),
        encode("tiff", CHANNELS, ome=True, metadata={"axes": "CYX"}, photometric="minisblack"),
        encode("tiff", np.moveaxis(CHANNELS, 0, -1), photometric="rgb"),
        encode("png", np.moveaxis(CHANNELS, 0, -1)),
        encode("png", np.dstack([*CHANNELS, np.full((SIDE, SIDE), 65535, np.uint16)])),
        np.moveaxis(CHANNELS, 0, -1),
    ],
    ids=["tiff", "lzw", "pages", "imagej", "ome", "rgb tiff", "rgb png", "rgba png", "array"],
)
def test_channel_that_was_asked(data):
    for channel in range(3):
        assert (read_plane(data, channel) == CHANNELS[channel]).all()
    with pytest.raises(Refusal, match="it has 3 channels; say which with --channel, from 0 to 2"):
        read_plane(data, None)
    with pytest.raises(Refusal, match="it has no channel 3, but 3, counted from 0"):
        read_plane(data, 3)


def test_gray_that_says_it_is_color_needs_no_channel():
    plane = smooth(0, 0, 255, np.uint8)
    opaque = np.dstack([plane] * 3 + [np.full_like(plane, 255)])
    for data in (encode("png", np.dstack([plane] * 3)), encode("png", opaque), encode("tiff", plane), plane):
        assert (read_plane(data, None) == plane).all()
    inverted = encode("tiff", 65535 - CHANNELS[0], photometric="miniswhite")
    assert (read_plane(inverted, None) == CHANNELS[0]).all()


def test_8_bit_gray_is_stored_byte_for_byte(tmp_path):
    plane = smooth(0, 0, 255, np.uint8)
    jpeg, png, color = encode("jpeg", plane), encode("png", plane), encode("png", np.dstack([plane] * 3))
    write(tmp_path / "in", [jpeg], "jpg")
    write(tmp_path / "in", [png], "png")
    (tmp_path / "in" / "1.png").write_bytes(color)
    pack_images(tmp_path / "in", tmp_path / "out", modality="xray")
    shards = ShardSet(tmp_path / "out")
    assert [shards.image(i) for i in (0, 1)] == [jpeg, png]
    assert Image.open(io.BytesIO(shards.image(2))).mode == "L"
    assert np.abs(seen(shards, 2) - plane).mean() < 1.5
    assert shards.dataset["config"]["measured_window"] is None
    assert main(["verify", str(tmp_path / "out")]) == DONE


def huge_tiff() -> bytes:
    data = bytearray(encode("tiff", smooth(0, 0, 9), metadata=None))
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        for name in ("ImageWidth", "ImageLength"):
            tag = tiff.pages[0].tags[name]
            struct.pack_into("<I" if tag.dtype == 4 else "<H", data, tag.valueoffset, 60000)
    return bytes(data)


def huge_png() -> bytes:
    data = bytearray(encode("png", smooth(0, 0, 9)))
    struct.pack_into(">II", data, 16, 60000, 60000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode("tiff", smooth(0, 0, 9, np.float32) * np.float32("nan")), "some of its values are no numbers"),
        (encode("tiff", smooth(0, 0, 9))[:3000], "not readable as an image"),
        (encode("png", smooth(0, 0, 9000))[:900], "not readable as an image"),
        (encode("png", np.dstack([smooth(0, 0, 9, np.uint8)] * 4)), "parts of it are transparent"),
        (encode("tiff", np.stack([CHANNELS] * 2), metadata={"axes": "ZCYX"}, photometric="minisblack"), "ZCYX"),
        (encode("tiff", CHANNELS, metadata={"axes": "ZYX"}, photometric="minisblack"), "one plane of values is read"),
        (encode("tiff", smooth(0, 0, 9).astype(complex)), "some of its values are no numbers"),
        (huge_tiff(), "60000 x 60000 values in one piece, over the bound"),
        (huge_png(), "exceeds limit"),
    ],
    ids=["nan", "cut tiff", "cut png", "transparent", "stack", "z", "complex", "huge tiff", "huge png"],
)
def test_images_that_are_refused(data, said):
    with pytest.raises(Refusal, match=said):
        read_plane(data, None)


def test_other_files_that_an_ome_tiff_names_are_never_read(tmp_path, monkeypatch):
    """The first file holds the first plane, the second the other, as Bio-Formats may split a series."""
    monkeypatch.chdir(tmp_path)
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint16" SizeX="64" SizeY="64" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData IFD="0" FirstC="0"><UUID FileName="one.ome.tif">urn:uuid:one</UUID></TiffData>'
        '<TiffData IFD="0" FirstC="1"><UUID FileName="two.ome.tif">urn:uuid:two</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    for name, plane in (("one", CHANNELS[0]), ("two", CHANNELS[1])):
        tifffile.imwrite(
            f"{name}.ome.tif", plane, description=xml.replace("<OME ", f'<OME UUID="urn:uuid:{name}" '), metadata=None
        )
    assert tifffile.imread("one.ome.tif").shape == (2, 64, 64)  # the reference follows
    assert (read_plane(Path("one.ome.tif").read_bytes(), None) == CHANNELS[0]).all()


def test_sets_without_a_common_window():
    with pytest.raises(UserError, match="has images of uint16 and uint8; pack them apart, or give --window"):
        measure_window([smooth(0, 0, 9, np.uint8), smooth(0, 0, 9)], "it")
    with pytest.raises(UserError, match="the values of it are all 7; give --window LOW HIGH"):
        measure_window([np.full((9, 9), 7, np.uint16)], "it")


def test_finished_set_is_not_measured_again(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "in", [encode("png", smooth(n, 0, 9000)) for n in range(3)], "png")
    command = ["pack", str(folder), "--out", str(tmp_path / "out"), "--modality", "fluorescence"]
    assert main(command) == DONE
    measured = json.loads((tmp_path / "out" / "dataset.json").read_text())["config"]["measured_window"]
    assert f"values from {measured[0]:g} to {measured[1]:g} are stored as 0 to 255" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("eosin.data_tools.pack.measure_window", lambda *_: pytest.fail("measured again"))
        assert main(command) == DONE
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, "--window", "0", "9000"]) == USER_ERROR
    assert "is a shard set made otherwise" in capsys.readouterr().err
    assert main([*command, "--channel", "0"]) == USER_ERROR
    assert "made otherwise (channel: None there, 0 asked)" in capsys.readouterr().err


def test_arrays_of_many_channels(tmp_path):
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file["images"] = np.stack([np.moveaxis(CHANNELS, 0, -1)] * 3)
    pack_images(tmp_path / "cells.h5", tmp_path / "out", modality="fluorescence", channel=2)
    shards = ShardSet(tmp_path / "out")
    low, high = shards.dataset["config"]["measured_window"]
    assert 2100 <= low < high <= 2900
    assert np.abs(seen(shards, 1) - (CHANNELS[2].astype(float).clip(low, high) - low) / (high - low) * 255).mean() < 1.5


def test_option_mistakes(tmp_path, capsys):
    folder = write(tmp_path / "in", [encode("png", smooth(0, 0, 9000))], "png")
    for options, said in (
        (["--modality", "xrays"], "--modality xrays is unknown; valid: brightfield, fluorescence, xray"),
        (["--channel", "1"], "--channel goes with --modality"),
        (["--window", "0", "1"], "--window goes with --modality"),
        (["--modality", "xray", "--window", "5", "5"], "--window 5 5 is not a range"),
        (["--modality", "xray", "--window", "nan", "5"], "is not a range"),
        (["--modality", "xray", "--channel", "-1"], "--channel -1 is out of range"),
        ([], "cannot be used"),
    ):
        assert main(["pack", str(folder), "--out", str(tmp_path / "out"), *options]) == USER_ERROR
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_on_gray_tiles(tmp_path, tiny_recipe):
    folder = write(tmp_path / "in", [encode("png", smooth(n, 0, 9000)) for n in range(48)], "png")
    pack_images(folder, tmp_path / "out", modality="fluorescence")
    where = [f"data.shards={tmp_path / 'out'}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *tiny_recipe, "stain.normalize=off", "stain.augment=none", *where]) == DONE
    embed = ["embed", str(tmp_path / "run"), str(tmp_path / "out"), "--out", str(tmp_path / "e.safetensors")]
    assert main(embed) == DONE
