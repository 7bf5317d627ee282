import io
import itertools

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.data_tools.stream import batches, decode, order

TILES, SIZE = 23, 16


@pytest.fixture
def shards(tmp_path):
    """Two shards of gray tiles; tile i has gray level 10·i and lies on slide i % 3."""
    writer = ShardWriter(tmp_path / "s", shard_bytes=20_000)
    (tmp_path / "s").mkdir()
    for i in range(TILES):
        image = np.full((SIZE, SIZE, 3), 10 * i, dtype=np.uint8)
        writer.add(f"t{i}", simplejpeg.encode_jpeg(image, 95), "jpg", {"x": i, "y": 0, "mpp": 0.5}, slide=i % 3)
    writer.finish(pd.DataFrame({"slide": ["a", "b", "c"]}), tile_size=SIZE, mpp=0.5, config={})
    return ShardSet(tmp_path / "s")


def gray(batch):
    return (batch["images"].float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


def test_an_epoch_holds_every_tile_once_and_epochs_differ():
    seen = order(np.arange(3 * TILES), TILES, seed=0).reshape(3, TILES)
    assert all(sorted(epoch) == list(range(TILES)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 3


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_global_batches_do_not_depend_on_ranks_or_workers(shards, ranks, workers):
    expected = order(np.arange(6 * 5), TILES, seed=4).reshape(5, 6).tolist()  # crosses the epoch's edge
    parts = [
        list(batches(shards, batch=6, steps=range(5), seed=4, rank=r, ranks=ranks, workers=workers))
        for r in range(ranks)
    ]
    for step in range(5):
        assert list(itertools.chain(*(gray(parts[r][step]) for r in range(ranks)))) == expected[step]


def test_resuming_at_a_step_is_the_rest_of_the_run(shards):
    whole = [gray(b) for b in batches(shards, batch=6, steps=range(8), seed=1)]
    rest = [gray(b) for b in batches(shards, batch=6, steps=range(3, 8), seed=1, ranks=1)]
    assert rest == whole[3:]


def test_slide_and_position_belong_to_the_tile(shards):
    (batch,) = batches(shards, batch=6, steps=range(2, 3), seed=1)
    assert batch["position"].tolist() == list(range(12, 18))
    assert batch["slide"].tolist() == [g % 3 for g in gray(batch)]


def test_a_batch_that_does_not_divide_names_the_nearest(shards):
    with pytest.raises(UserError, match=r"data\.batch 7 does not divide by 2 processes.* 8"):
        batches(shards, batch=7, steps=range(1), seed=0, ranks=2)


def test_a_broken_tile_is_replaced_by_the_next_and_reported(shards):
    row = shards.row(5)
    tar = shards.tars[0]
    data = bytearray(tar.read_bytes())
    data[row["offset"] : row["offset"] + row["size"]] = b"\0" * int(row["size"])
    tar.write_bytes(data)
    broken = ShardSet(shards.folder)
    (batch,) = batches(broken, batch=TILES, steps=range(1), seed=0)
    assert [tile for tile, _ in batch["bad"]] == [5]
    assert sorted(gray(batch)) == sorted([*range(5), 6, *range(6, TILES)])


def test_a_huge_image_is_refused_before_decoding():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="over the bound"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 20])
def test_what_is_no_image_is_a_value_error(data):
    with pytest.raises(ValueError):
        decode(data)
