import io
import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture, Sampling
from eosin.data_tools.shards import INDEX, ShardSet, ShardWriter, write_slides
from eosin.data_tools.stream import batches, decode

TILES, SIZE = 23, 16
NAMES = ["a", "b", "c"]


def write(folder, tiles=TILES, size=SIZE, site=("x", "x", "y"), slide_of=lambda i: i % 3):
    """Two shards of gray tiles; tile i has gray level 10·i and lies on slide i % 3."""
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes=20_000)
    for i in range(tiles):
        image = np.full((size, size, 3), 10 * i % 256, dtype=np.uint8)
        meta = {"x": i, "y": 0, "mpp": 0.5}
        writer.add(f"t{i}", simplejpeg.encode_jpeg(image, 95), "jpg", meta, slide=slide_of(i))
    writer.finish(pd.DataFrame({"slide": NAMES, "site": list(site)}), tile_size=size, mpp=0.5, config={})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "s")


@pytest.fixture
def shards(folder):
    return Mixture({str(folder): 1.0})


def gray(batch):
    return (batch["images"].float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


def overwrite(folder, tile, data):
    """Put other bytes where the image of a tile is."""
    shards = ShardSet(folder)
    row = shards.row(tile)
    with shards.tars[int(np.searchsorted(shards.starts, tile, side="right")) - 1].open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(data.ljust(int(row["size"]), b"\0")[: int(row["size"])])


@pytest.mark.parametrize(
    ("ranks", "workers", "block"), [(1, 0, 1), (2, 0, 1), (3, 0, 1), (1, 0, 4), (3, 0, 4), (2, 2, 4)]
)
def test_global_batches_do_not_depend_on_ranks_or_workers(shards, ranks, workers, block):
    sampling = Sampling(block=block, window=12)
    expected = shards.order(4, sampling)(np.arange(6 * 5)).reshape(5, 6).tolist()  # crosses the epoch's edge
    parts = [
        list(batches(shards, batch=6, steps=range(5), seed=4, sampling=sampling, rank=r, ranks=ranks, workers=workers))
        for r in range(ranks)
    ]
    for step in range(5):
        assert list(itertools.chain(*(gray(parts[r][step]) for r in range(ranks)))) == expected[step]


@pytest.mark.parametrize("shares", [{"a": 1.0}, {"a": 3.0, "b": 1.0}])
def test_stopped_anywhere_and_continued_otherwise_it_is_the_same_stream(tmp_path, shares):
    mixture = Mixture({str(write(tmp_path / name)): share for name, share in shares.items()})
    batch, steps = 24, 9  # several epochs of 23 tiles

    def run(plan):
        """Tiles in stream order, read by one (steps, ranks) after the other."""
        seen = []
        for part, ranks in plan:
            streams = [batches(mixture, batch=batch, steps=part, seed=1, rank=r, ranks=ranks) for r in range(ranks)]
            for parts in zip(*streams, strict=True):  # every rank has the same count
                seen += itertools.chain(*(b["tile"].tolist() for b in parts))
        return seen

    whole = run([(range(steps), 1)])
    for first, second in ((1, 2), (4, 7)):
        plan = [(range(first), 1), (range(first, second), 2), (range(second, steps), 3)]
        assert run(plan) == whole
    assert run([(range(5), 8), (range(5, steps), 4)]) == whole


def test_slide_and_position_belong_to_the_tile(shards):
    (batch,) = batches(shards, batch=6, steps=range(2, 3), seed=1)
    assert batch["position"].tolist() == list(range(12, 18))
    assert batch["slide"].tolist() == [g % 3 for g in gray(batch)]
    assert batch["tile"].tolist() == gray(batch)


def test_tiles_and_slides_of_a_mixture_are_numbered_on(tmp_path):
    mixture = Mixture({str(write(tmp_path / "a")): 1.0, str(write(tmp_path / "b", tiles=7)): 1.0})
    (batch,) = batches(mixture, batch=400, steps=range(1), seed=1)
    for tile, slide, level in zip(batch["tile"].tolist(), batch["slide"].tolist(), gray(batch)):
        inside = tile if tile < TILES else tile - TILES
        assert level == inside
        assert slide == inside % 3 + (0 if tile < TILES else 3)
    assert len(mixture.slides()) == 6
    assert mixture.column("slide")[TILES + 1] == 4
    assert abs((batch["tile"] < TILES).sum().item() - 200) < 60


def test_a_batch_that_does_not_divide_names_the_nearest(shards):
    with pytest.raises(UserError, match=r"data\.batch 7 does not divide by 2 processes.* 8"):
        batches(shards, batch=7, steps=range(1), seed=0, ranks=2)


def test_what_cannot_be_mixed_is_one_line(tmp_path):
    sets = {str(write(tmp_path / "a")): 1.0, str(write(tmp_path / "b", size=32)): 1.0}
    with pytest.raises(UserError, match=r"has tiles of 32 px and .* of 16"):
        Mixture(sets)
    with pytest.raises(UserError, match="holds no tiles"):
        Mixture({str(write(tmp_path / "none", tiles=0)): 1.0}).order(0, Sampling())
    with pytest.raises(UserError, match="no shard set is given"):
        Mixture({})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder, tile: overwrite(folder, tile, b"\xff\xd8broken"), "crc32 differs"),
        (lambda folder, tile: truncate(folder, tile), "cut|ends"),
        (lambda folder, tile: resize(folder, tile), "is 8×8 px, not 16×16"),
        (lambda folder, tile: replace_indexed(folder, tile, b"not an image"), "not a JPEG or PNG"),
    ],
    ids=["other bytes", "missing member", "wrong size", "no image"],
)
def test_a_bad_tile_is_replaced_by_that_of_the_next_position_and_reported(folder, harm, said):
    last = TILES - 1
    harm(folder, last)
    order = Mixture({str(folder): 1.0}).order(0, Sampling())
    (batch,) = batches(Mixture({str(folder): 1.0}), batch=TILES, steps=range(1), seed=0)
    ((tile, reason),) = batch["bad"]
    assert tile == last
    assert pd.Series([reason]).str.contains(said).all()
    expected = order(np.arange(TILES + 1))
    place = int(np.flatnonzero(expected[:TILES] == last)[0])
    expected[place] = expected[place + 1]
    assert batch["tile"].tolist() == expected[:TILES].tolist() == gray(batch)
    # Split over ranks and workers, the replacement is the same.
    parts = [
        next(batches(Mixture({str(folder): 1.0}), batch=TILES + 1, steps=range(1), seed=0, rank=r, ranks=2))
        for r in (0, 1)
    ]
    assert [*parts[0]["tile"].tolist(), *parts[1]["tile"].tolist()][:TILES] == expected[:TILES].tolist()


def truncate(folder, tile):
    shards = ShardSet(folder)
    shards.row(tile)
    with shards.tars[-1].open("r+b") as file:
        file.truncate(int(shards.row(tile)["offset"]) + 10)
    # The size is part of the description, so that a cut file is refused at once; here it is cut and described as such.
    text = (folder / "dataset.json").read_text()
    size = shards.tars[-1].stat().st_size
    (folder / "dataset.json").write_text(
        text.replace(f'"bytes": {shards.dataset["shards"][-1]["bytes"]}', f'"bytes": {size}')
    )


def replace_indexed(folder, tile, data):
    """Other bytes whose checksum the index knows."""
    import zlib

    overwrite(folder, tile, data)
    shards = ShardSet(folder)
    row = shards.row(tile)
    shard = int(np.searchsorted(shards.starts, tile, side="right")) - 1
    path = folder / shards.dataset["shards"][shard]["file"].replace(".tar", ".index.npy")
    index = np.load(path).copy()
    index[tile - shards.starts[shard]]["crc32"] = zlib.crc32(data.ljust(int(row["size"]), b"\0"))
    np.save(path, index)


def resize(folder, tile):
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    replace_indexed(folder, tile, small.getvalue())


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_read_it_is_one_line(folder, workers):
    for tile in range(TILES):
        overwrite(folder, tile, b"gone")
    with pytest.raises(UserError, match=r"17 tiles of .* in a row cannot be used.*run 'eosin verify'") as error:
        next(batches(Mixture({str(folder): 1.0}), batch=4, steps=range(1), seed=0, workers=workers))
    assert "\n" not in str(error.value)


@pytest.fixture
def served(folder, server, monkeypatch, tmp_path):
    """The shard set behind HTTP, with a cache of its own."""
    monkeypatch.setenv("EOSIN_CACHE", str(tmp_path / "cache"))
    server.content |= {path.name: path.read_bytes() for path in folder.iterdir()}
    server.tags |= dict.fromkeys(server.content, '"one"')
    return server


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_behind_a_url_is_the_same_stream(served, shards, workers):
    far = Mixture({served.url: 1.0})
    assert far.identity == shards.identity
    here, there = (
        list(batches(s, batch=9, steps=range(4), seed=1, workers=w)) for s, w in ((shards, 0), (far, workers))
    )
    for ours, theirs in zip(here, there, strict=True):
        assert ours["images"].equal(theirs["images"])
        assert ours["tile"].equal(theirs["tile"])
        assert theirs["bad"] == []
    sent = served.sent
    again = list(batches(Mixture({served.url: 1.0}), batch=9, steps=range(4), seed=1))
    assert served.sent == sent  # from the cache
    assert [b["tile"].tolist() for b in again] == [b["tile"].tolist() for b in here]


def test_faults_on_the_way_change_nothing(served, shards):
    far = Mixture({served.url: 1.0})
    served.faults += ["503", "cut", "closed", "short"]
    (theirs,) = batches(far, batch=TILES, steps=range(1), seed=1)
    (ours,) = batches(shards, batch=TILES, steps=range(1), seed=1)
    assert theirs["images"].equal(ours["images"])
    assert not served.faults
    assert far.sets[0].store.retries >= 3  # a closed connection may be opened again below us


def test_a_shard_that_went_out_of_reach_is_counted_and_ends_the_stream_in_one_line(served):
    far = Mixture({served.url: 1.0})
    far.rows(np.arange(TILES))
    for name in [n for n in served.content if n.endswith(".tar")]:
        del served.content[name]
    with pytest.raises(UserError, match=r"4 tiles of one batch .* are out of reach") as error:
        next(batches(far, batch=8, steps=range(1), seed=0))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"tiles-00000\d\.tar is missing"):
        Mixture({served.url: 1.0}).rows(np.arange(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_lost_on_the_way_is_not_waited_for_tile_by_tile(served, workers):
    far = Mixture({served.url: 1.0})
    far.rows(np.arange(TILES))
    served.down = "503"
    with pytest.raises(UserError, match=r"4 tiles of one batch .* are out of reach.*503"):
        next(batches(far, batch=TILES, steps=range(1), seed=0, workers=workers))


def test_a_server_that_ignores_ranges_is_refused_at_once(served):
    far = Mixture({served.url: 1.0})
    for shards in far.sets:
        shards.store.block = 4096  # smaller than a shard, as the default is for shards of the usual size
    served.down = "no ranges"
    asked = len(served.ranges)
    with pytest.raises(UserError, match="the server ignores Range"):
        next(batches(far, batch=TILES, steps=range(1), seed=0))
    assert len(served.ranges) - asked < 20  # those under way at once, none again


def test_a_server_that_is_down_is_one_line(served):
    served.down = "503"
    with pytest.raises(UserError, match=r"dataset\.json is not readable .*503"):
        Mixture({served.url: 1.0})


def drawn(mixture, sampling, epochs):
    order = mixture.order(0, sampling)
    return order(np.arange(epochs * order.sources[0].draws))


def test_balance_by_columns_and_clusters(tmp_path):
    # Slides a, b of site x and c of site y, with 3, 7 and 13 tiles.
    folder = write(tmp_path / "s", slide_of=lambda i: 0 if i < 3 else 1 if i < 10 else 2)
    clusters = np.array([0, 0, 1] + [0] * 6 + [5] + [0] * 12 + [2])
    np.save(folder / "clusters-k.npy", clusters)
    mixture = Mixture({str(folder): 1.0})
    slide = mixture.column("slide")
    tiles = drawn(mixture, Sampling(balance=["site", "slide"]), 400)
    assert np.bincount(slide[tiles]) / len(tiles) == pytest.approx([0.25, 0.25, 0.5], abs=0.01)
    tiles = drawn(mixture, Sampling(balance=["site", "cluster", "slide"], clusters="k"), 400)
    site = np.array([0, 0, 1])[slide[tiles]]
    assert np.bincount(site) / len(tiles) == pytest.approx([0.5, 0.5], abs=0.01)
    pairs = Counter(zip(site.tolist(), clusters[tiles].tolist(), slide[tiles].tolist()))
    # Site x has clusters 0, 1, 5, of which cluster 0 has two slides; site y has clusters 0 and 2.
    expected = {
        (0, 0, 0): 1 / 12,
        (0, 0, 1): 1 / 12,
        (0, 1, 0): 1 / 6,
        (0, 5, 1): 1 / 6,
        (1, 0, 2): 1 / 4,
        (1, 2, 2): 1 / 4,
    }
    assert {k: n / len(tiles) for k, n in pairs.items()} == pytest.approx(expected, abs=0.01)


def test_weights_of_tiles_and_a_cap_of_slides(tmp_path):
    folder = write(tmp_path / "s", slide_of=lambda i: 0 if i < 3 else 1 if i < 10 else 2)
    weights = np.r_[np.zeros(3), np.ones(7), np.full(13, 2.0)]
    np.save(folder / "weights-w.npy", weights)
    mixture = Mixture({str(folder): 1.0})
    counts = np.bincount(drawn(mixture, Sampling(weights="w"), 600), minlength=TILES)
    assert counts / counts.sum() == pytest.approx(weights / weights.sum(), abs=2e-3)
    capped = mixture.order(0, Sampling(cap=5))
    assert capped.sources[0].draws == 3 + 5 + 5
    slide = mixture.column("slide")
    seen = set()
    for epoch in range(12):
        tiles = capped(np.arange(13 * epoch, 13 * epoch + 13))
        assert len(set(tiles.tolist())) == 13
        assert np.bincount(slide[tiles]).tolist() == [3, 5, 5]
        seen |= set(tiles.tolist())
    assert len(seen) == TILES  # the tiles left out change from epoch to epoch


def test_slides_left_out_are_never_drawn_and_the_rest_as_before(tmp_path):
    mixture = Mixture({str(write(tmp_path / "a")): 3.0, str(write(tmp_path / "b")): 1.0})
    slide = mixture.column("slide")
    positions = np.arange(3 * 4096)
    for sampling in (Sampling(), Sampling(balance=["site"]), Sampling(cap=5), Sampling(block=4, window=12)):
        left = replace(sampling, leave_out=frozenset({1, 5}))
        tiles = mixture.order(0, left)(positions)
        assert set(tiles.tolist()) == set(np.flatnonzero((slide != 1) & (slide != 5)).tolist())
        assert (tiles < TILES).mean() == pytest.approx(0.75, abs=1e-3)
    counts = np.bincount(mixture.order(0, Sampling(leave_out=frozenset({1, 5})))(positions), minlength=2 * TILES)
    assert np.ptp(counts[:TILES][slide[:TILES] != 1]) <= 1  # evenly, as without
    nobody = Sampling(leave_out=frozenset({99}))
    assert (mixture.order(0, nobody)(positions) == mixture.order(0, Sampling())(positions)).all()
    with pytest.raises(UserError, match="b: no tile has a weight above 0 on the slides that are not held out"):
        mixture.order(0, Sampling(leave_out=frozenset({3, 4, 5})))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling(balance=["sit"]), r"no column 'sit'.*site"),
        (Sampling(balance=["cluster"]), "'cluster' needs data.clusters"),
        (Sampling(weights="w"), "weights-w.npy does not exist"),
        (Sampling(weights="short"), r"holds float64 of shape \[4\]; one number for each of 23 tiles"),
        (Sampling(weights="negative"), "negative or not finite"),
        (Sampling(weights="zero"), "no tile has a weight above 0"),
        (Sampling(weights="text"), "not readable as an array"),
        (Sampling(weights="pickle"), "one number for each"),
        (Sampling(weights="zip"), "not readable as an array"),
        (Sampling(weights="claims"), r"holds float64 of shape \[1000000000000\]"),
        (Sampling(balance=["cluster"], clusters="float"), "one integer for each"),
    ],
)
def test_what_sampling_cannot_use_is_one_line(folder, sampling, said):
    np.save(folder / "weights-short.npy", np.ones(4))
    np.save(folder / "weights-negative.npy", -np.ones(TILES))
    np.save(folder / "weights-zero.npy", np.zeros(TILES))
    (folder / "weights-text.npy").write_text("hello")
    np.save(folder / "weights-pickle.npy", np.array([{}] * TILES, dtype=object), allow_pickle=True)
    np.save(folder / "clusters-float.npy", np.ones(TILES))
    np.savez(folder / "zip.npz", np.ones(TILES))
    (folder / "zip.npz").rename(folder / "weights-zip.npy")
    with (folder / "weights-claims.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(UserError, match=said) as error:
        Mixture({str(folder): 1.0}).order(0, sampling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300, 1.7e308])
def test_only_ratios_of_weights_count(folder, scale):
    np.save(folder / "weights-w.npy", np.r_[np.zeros(3), np.full(20, scale)])
    order = Mixture({str(folder): 1.0}).order(0, Sampling(weights="w"))
    assert order.sources[0].draws == 20
    assert sorted(order(np.arange(20)).tolist()) == list(range(3, 23))


def test_what_tiles_are_drawn_by_is_marked(folder):
    mixture = Mixture({str(folder): 1.0})
    assert mixture.marks(Sampling(block=4, cap=3)) == ""
    np.save(folder / "weights-w.npy", np.ones(TILES))
    first = mixture.marks(Sampling(weights="w"))
    assert first == Mixture({str(folder): 1.0}).marks(Sampling(weights="w"))
    np.save(folder / "weights-w.npy", np.full(TILES, 2.0))
    assert mixture.marks(Sampling(weights="w")) != first
    balanced = mixture.marks(Sampling(balance=["site"]))
    write_slides(folder, mixture.slides().assign(site=["x", "y", "y"]))
    assert mixture.marks(Sampling(balance=["site"])) != balanced


HUNDRED_MILLION = """
import json, os, resource, sys, time
import numpy as np
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.stream import batches
import eosin.data_tools.stream, torch  # what training has loaded anyway
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
before, begun = resident(), time.process_time()
mixture = Mixture({sys.argv[1]: 1.0})
order = mixture.order(0, __import__("eosin.data_tools.mixture").data_tools.mixture.EVENLY)
tiles = order(np.arange(7_000_000_123, 7_000_000_123 + 1024))
rows = mixture.rows(tiles)
took = time.process_time() - begun
for step in range(1, 40):
    mixture.rows(order(np.arange(7_000_000_123 + 1024 * step, 7_000_000_123 + 1024 * (step + 1))))
print(json.dumps({"took": took, "grown": resident() - before, "x": rows["x"].tolist(), "tiles": tiles.tolist()}))
"""


@pytest.mark.slow
def test_a_stream_of_a_hundred_million_tiles_starts_at_once_in_little_memory(tmp_path):
    import json

    shards, each = 10_000, 10_000
    index = np.zeros(each, dtype=INDEX)
    index["x"] = np.arange(each)
    np.save(tmp_path / "tiles.npy", index)
    listed = []
    for number in range(shards):  # one index on disk, under ten thousand names; tars of no bytes
        name = f"tiles-{number:06d}"
        (tmp_path / f"{name}.index.npy").hardlink_to(tmp_path / "tiles.npy")
        (tmp_path / f"{name}.tar").touch()
        listed.append({"file": f"{name}.tar", "tiles": each, "bytes": 0, "sha256": "0" * 64})
    about = {"schema": 1, "kind": "eosin shard set", "tile_size": 256, "mpp": 0.5, "slides": 1, "shards": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    done = subprocess.run([sys.executable, "-c", HUNDRED_MILLION, str(tmp_path)], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["x"] == [t % each for t in found["tiles"]]
    assert found["took"] < 2  # seconds of the processor: the bound, far above what is measured
    assert found["grown"] < 100  # MiB for 41,000 tiles of 10,000 shards


def test_a_huge_image_is_refused_before_decoding():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="over the bound"):
        decode(buffer.getvalue())


def test_a_bomb_is_refused_by_its_header():
    header = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + (20_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="is 20000×20000 px, over the bound"):
        decode(header + bytes(100))


def test_another_size_is_refused_before_decoding(monkeypatch):
    large = simplejpeg.encode_jpeg(np.zeros((800, 640, 3), np.uint8), 90)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)  # would raise another error
    with pytest.raises(ValueError, match="is 640×800 px, not 96×96"):
        decode(large, 96)


def test_bytes_behind_the_end_of_a_jpeg_are_no_harm():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    encoded = simplejpeg.encode_jpeg(image, 95)
    np.testing.assert_array_equal(decode(encoded + bytes(7)), decode(encoded))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 20])
def test_what_is_no_image_is_a_value_error(data):
    with pytest.raises(ValueError):
        decode(data)
