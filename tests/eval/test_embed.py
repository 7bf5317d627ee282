import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.eval import embed as module
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
    assert "holds other embeddings (of 'color', with other name, pooling, " in capsys.readouterr().err
    assert main(["embed", "color", "--stain", "tile", *arguments]) == 2
    assert "(of 'color', with other normalizer, stain)" in capsys.readouterr().err
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
    assert "2 left out" in said


def test_too_many_bad_tiles_are_refused_and_nothing_is_written(shards, tmp_path, capsys):
    spoil(shards, [1, 2, 3, 4])
    out = tmp_path / "new" / "e.safetensors"
    assert main(["embed", "color", str(shards), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "4 tiles of" in lines[-1]
    assert "of 48 that were looked at" in lines[-1]
    assert not out.exists()


def test_bad_arguments(tiny_shards, tmp_path, capsys):
    out = str(tmp_path / "e.safetensors")
    for arguments, said in [
        (["color", str(tmp_path / "absent"), "--out", out], "does not exist"),
        (["color", str(tiny_shards), "--out", out, "--batch-size", "0"], "--batch-size 0"),
        (["color", str(tiny_shards), "--out", out, "--device", "abacus"], "no device"),
        (["nothing", str(tiny_shards), "--out", out], "no encoder 'nothing'"),
        (["color", str(tiny_shards), "--out", out, "--layers", "4"], "--layers is for networks, and 'color' is"),
        (["color", str(tiny_shards), "--out", out, "--pooling", "mean"], "--pooling is for networks, and 'color' is"),
    ]:
        assert main(["embed", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def count_calls(encoder, stop_at=None):
    """The encoder, and a list that grows by each batch's size; it dies at batch number ``stop_at``."""
    sizes = []

    def function(tiles):
        if len(sizes) == stop_at:
            raise KeyboardInterrupt
        sizes.append(len(tiles))
        return encoder.function(tiles)

    return replace(encoder, function=function), sizes


def test_stopped_it_goes_on_after_its_last_part_with_the_same_bytes(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 10)
    color, shards = load_encoder("color"), ShardSet(tiny_shards)
    embed(color, shards, tmp_path / "whole.safetensors", 4)
    out = tmp_path / "e.safetensors"
    dying, _ = count_calls(color, stop_at=7)  # in the third part of ten tiles: 4 + 4 + 2
    with pytest.raises(KeyboardInterrupt):
        embed(dying, shards, out, 4)
    assert sorted(p.name for p in (tmp_path / "e.safetensors.unfinished").glob("part-*")) == [
        "part-000000.npz",
        "part-000001.npz",
    ]
    with pytest.raises(UserError, match=r"unfinished work of other settings \(name: 'color' there, "):
        embed(load_encoder("timm:test_vit"), shards, out, 4)
    rest, sizes = count_calls(color)
    assert embed(rest, shards, out, 4).tiles == 48
    assert sizes == [4, 4, 2, 4, 4, 2, 4, 4]
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.safetensors", "whole.safetensors"]


def test_told_to_stop_it_says_that_it_is_to_be_continued(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 10)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    real, done = module.features_of, []

    def told(*given):
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(module, "features_of", told)
    command = ["embed", "color", str(tiny_shards), "--out", str(tmp_path / "e.safetensors"), "--device", "cpu"]
    try:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 75
        assert main(command) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(done) == 3 + 3  # two of the five parts were there


def test_an_error_late_in_the_work_keeps_what_is_finished(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 10)
    spoil(shards, [1, 22, 23, 24])
    out = tmp_path / "e.safetensors"
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=r"4 tiles of .* of 28 that were looked at.*finished parts are kept in") as kept:
        embed(load_encoder("color"), ShardSet(shards), out, 4)
    # The error that is kept holds no threads: whichever thread cleared it away later could wait for itself.
    assert set(threading.enumerate()) <= before
    assert kept.tb is not None
    assert len(list((tmp_path / "e.safetensors.unfinished").glob("part-*"))) == 2
    # Refusals of parts that were finished before count too.
    with pytest.raises(UserError, match=r"4 tiles of .* of 8 that were looked at"):
        embed(load_encoder("color"), ShardSet(shards), out, 4)
    assert not out.exists()


def test_the_largest_batch_that_fits():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert module.largest_that_fits(attempt, 512) == 64
    assert tried == [512, 256, 128, 64]
    assert module.fitting_batch(torch.device("cpu"), None, 256) == 64


# Ranks of one embedding whose parts are of 6 tiles and take a while.
RANKS = """
import functools, sys, time

def rank(argv, pause):
    from eosin.eval import embed
    from eosin.launch.ranks import run_verb
    real = embed.features_of
    def slowly(*given):
        time.sleep(pause)
        return real(*given)
    embed.PART, embed.features_of = 6, slowly
    return run_verb(argv)
"""
START = """
import functools, sys, ranks_of_an_embedding as ranks
from eosin.launch.torchrun import torchrun
if __name__ == "__main__":
    nproc, pause, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    sys.exit(torchrun(functools.partial(ranks.rank, argv, pause), nproc) if nproc > 1 else ranks.rank(argv, pause))
"""


@pytest.mark.slow
def test_two_ranks_after_a_kill_write_the_bytes_of_one(tiny_shards, tmp_path, monkeypatch):
    (tmp_path / "ranks_of_an_embedding.py").write_text(RANKS)
    (tmp_path / "start.py").write_text(START)
    out = tmp_path / "e.safetensors"
    verb = ["embed", "timm:test_vit", str(tiny_shards), "--device", "cpu", "--batch-size", "4", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(nproc, pause):
        command = [sys.executable, str(tmp_path / "start.py"), str(nproc), str(pause), *verb]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True, text=True)

    parts = tmp_path / "e.safetensors.unfinished"
    with start(1, 0.3) as killed:
        while killed.poll() is None and len(list(parts.glob("part-*"))) < 3:
            time.sleep(0.01)
        os.killpg(killed.pid, signal.SIGKILL)
    there = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert killed.returncode == -signal.SIGKILL
    assert 3 <= len(there) < 8
    assert not out.exists()
    with start(2, 0) as ranks:
        printed, _ = ranks.communicate(timeout=120)
    assert ranks.returncode == 0
    assert printed.count("48 tiles x 64 features") == 1  # by the first rank alone
    assert not parts.exists()
    monkeypatch.setattr(module, "PART", 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        embed(load_encoder("timm:test_vit"), ShardSet(tiny_shards), tmp_path / "one.safetensors", 4)
    finally:
        torch.set_num_threads(threads)
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
