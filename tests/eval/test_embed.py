import csv
import shutil

import numpy as np
import pytest
import torch

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.eval.embed import embed
from eosin.eval.encoders import load_encoder
from eosin.launch.cli import main
from eosin.ssl.stain.normalizer import make_normalizer


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def spoil(folder, tiles):
    """Overwrite the middle of some tiles' bytes, without touching the index."""
    shards = ShardSet(folder)
    with shards.tars[0].open("r+b") as file:
        for tile in tiles:
            row = shards.row(tile)
            file.seek(int(row["offset"]) + int(row["size"]) // 2)
            file.write(b"\0" * 40)


def test_features_and_table_row_for_row(tiny_shards, tmp_path):
    out = tmp_path / "e.safetensors"
    assert main(["embed", "color", str(tiny_shards), "--out", str(out), "--batch-size", "7"]) == 0
    found, shards = read_embeddings(out), ShardSet(tiny_shards)
    assert list(found.table["key"]) == [shards.meta(i)["key"] for i in range(48)]
    assert list(found.table["label"]) == list("xyxy" * 12)
    assert {"slide", "patient", "site", "x", "y", "mpp"} <= set(found.table.columns)
    assert found.features.dtype == np.float32
    for i in (0, 30, 47):
        pixels = decode(shards.image(i)).reshape(-1, 3) / 255
        np.testing.assert_allclose(found.features[i, :3], pixels.mean(axis=0), atol=1e-6)


def test_tiles_are_stain_normalized_as_the_run_asks(tiny_run, tiny_shards, tmp_path):
    encoder, shards = load_encoder(str(tiny_run)), ShardSet(tiny_shards)
    summary = embed(encoder, shards, tmp_path / "e.safetensors", batch_size=11)
    assert (summary.tiles, summary.dimension, summary.refused) == (48, 48, [])
    images = np.stack([decode(shards.image(i)) for i in range(48)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    slides = torch.from_numpy(shards.column("slide").astype(np.int64))
    expected = encoder(make_normalizer(encoder.stain, shards)(pixels, slides).images).numpy()
    found = read_embeddings(tmp_path / "e.safetensors")
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    assert np.abs(found.features - encoder(pixels).numpy()).max() > 1e-3
    assert found.encoder["normalizer"]["mode"] == "slide"


def test_done_is_done_and_nothing_is_written_over(tiny_shards, tmp_path, capsys):
    out = tmp_path / "e.safetensors"
    arguments = [str(tiny_shards), "--out", str(out)]
    assert main(["embed", "color", *arguments]) == 0
    before = out.stat().st_mtime_ns
    assert main(["embed", "color", *arguments]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["embed", "timm:test_vit", *arguments]) == 2
    assert "holds other embeddings (of 'color')" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before


def test_another_stain_fit_is_another_fingerprint(shards, tmp_path):
    embed(load_encoder("color"), ShardSet(shards), tmp_path / "e.safetensors")
    table = ShardSet(shards).slides()
    table["site"] = "elsewhere"
    table.to_parquet(shards / "slides.parquet", index=False)
    with pytest.raises(UserError, match="holds other embeddings"):
        embed(load_encoder("color"), ShardSet(shards), tmp_path / "e.safetensors")


def test_bad_tiles_are_left_out_and_listed(shards, tmp_path, capsys):
    spoil(shards, [3, 40])
    out = tmp_path / "e.safetensors"
    assert main(["embed", "color", str(shards), "--out", str(out), "--batch-size", "1"]) == 3
    keys = [ShardSet(shards).meta(i)["key"] for i in range(48)]
    found = read_embeddings(out)
    assert list(found.table["key"]) == [k for i, k in enumerate(keys) if i not in (3, 40)]
    with (tmp_path / "e.refused.csv").open(newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == [keys[3], keys[40]]
    said = capsys.readouterr().err
    assert f"left out: {keys[3]}: its bytes are not those that were written" in said
    assert "2 tiles left out" in said


def test_too_many_bad_tiles_are_refused_and_nothing_is_written(shards, tmp_path, capsys):
    spoil(shards, [1, 2, 3, 4])
    out = tmp_path / "new" / "e.safetensors"
    assert main(["embed", "color", str(shards), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "4 of the first 48 tiles" in lines[-1]
    assert not out.exists()


def test_bad_arguments(tiny_shards, tmp_path, capsys):
    out = str(tmp_path / "e.safetensors")
    for arguments, said in [
        (["color", str(tmp_path / "absent"), "--out", out], "does not exist"),
        (["color", str(tiny_shards), "--out", out, "--batch-size", "0"], "--batch-size 0"),
        (["color", str(tiny_shards), "--out", out, "--device", "abacus"], "no device"),
        (["nothing", str(tiny_shards), "--out", out], "no encoder 'nothing'"),
    ]:
        assert main(["embed", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
