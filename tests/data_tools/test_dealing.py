"""Shards of dealt tiles against the tars they were dealt from, read by webdataset and by tarfile."""

import hashlib
import json
import tarfile

import numpy as np
import pytest

from eosin.data_tools.dealing import Journal, Part, deal
from eosin.data_tools.shards import TarWriter, index_path, tile_key


@pytest.fixture
def parts(tmp_path):
    """Four slides with 40, 1, 25 and 14 tiles of random bytes."""
    rng, made = np.random.default_rng(0), []
    for row, count in enumerate((40, 1, 25, 14)):
        writer = TarWriter(tmp_path / f"slide{row}.tar")
        for x in range(count):
            meta = {"slide": f"s{row}", "x": x, "y": 7, "mpp": 0.5, "tissue": 0.9}
            writer.add(tile_key(f"s{row}", x, 7, 0.5), rng.bytes(int(rng.integers(100, 3000))), "jpg", meta)
        made.append(Part(writer.path, writer.close(), row))
    return made


def content(tar):
    with tarfile.open(tar) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


@pytest.mark.parametrize("key", [None, 5])
def test_every_tile_is_dealt_once_and_the_index_finds_it(parts, tmp_path, key):
    folder = tmp_path / "out"
    folder.mkdir()
    said = deal(folder, parts, 3, 4, key)
    assert [shard["file"] for shard in said] == [f"tiles-{n:06d}.tar" for n in (3, 4, 5, 6)]
    assert [shard["tiles"] for shard in said] == [20] * 4
    before = {name: data for part in parts for name, data in content(part.tar).items()}
    after = {}
    for shard in said:
        tar = folder / shard["file"]
        data = tar.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        found = content(tar)
        assert not after.keys() & found.keys()
        after |= found
        rows = []
        for row in np.load(index_path(tar)):
            meta = json.loads(data[row["meta_offset"] :][: row["meta_size"]])
            key_ = tile_key(meta["slide"], meta["x"], meta["y"], meta["mpp"])
            assert data[row["offset"] :][: row["size"]] == before[f"{key_}.jpg"]
            assert f"s{row['slide']}" == meta["slide"]
            rows.append(int(row["slide"]))
        assert (rows == sorted(rows)) == (key is None)
    assert after == before


def test_mixed_shards_hold_every_slide_in_its_share(parts, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for shard in deal(folder, parts, 0, 2, key=1):
        counts = np.bincount(np.load(index_path(folder / shard["file"]))["slide"], minlength=4)
        assert counts[0] == pytest.approx(20, abs=8)  # hypergeometric: standard deviation 2.2
        assert counts[2] == pytest.approx(12.5, abs=8)


def test_webdataset_reads_what_was_dealt(parts, tmp_path):
    import webdataset

    folder = tmp_path / "out"
    folder.mkdir()
    said = deal(folder, parts, 0, 2, key=1)
    names = [str(folder / shard["file"]) for shard in said]
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    truth = {name: data for part in parts for name, data in content(part.tar).items()}
    assert len(samples) == 80
    assert all(sample["jpg"] == truth[sample["__key__"] + ".jpg"] for sample in samples)


def test_the_journal_goes_on_where_it_was_and_drops_what_it_does_not_know(parts, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    size = parts[0].tar.stat().st_size
    journal = Journal(folder)
    journal.add(parts[:2], [{"tiles": 40}, {"tiles": 1}], size, 9)
    made = {path.name: path.read_bytes() for path in folder.glob("tiles-*")}
    (folder / "tiles-000001.tar").write_bytes(b"half a shard")  # what a kill may leave
    again = Journal(folder)
    assert again.facts == [{"tiles": 40}, {"tiles": 1}]
    assert {path.name: path.read_bytes() for path in folder.glob("tiles-*")} == made
    again.add(parts[2:], [{"tiles": 25}, {"tiles": 14}], size, 9)
    again.add([], [{"tiles": 0}], size, 9)
    assert sum(shard["tiles"] for shard in again.shards) == 80
    assert Journal(folder).shards == again.shards
    assert [facts["tiles"] for facts in Journal(folder).facts] == [40, 1, 25, 14, 0]


def test_a_part_that_was_cut_is_never_dealt(parts, tmp_path):
    data = parts[0].tar.read_bytes()
    parts[0].tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(EOFError, match="the shard is cut"):
        deal(tmp_path, parts[:1], 0, 1, None)
    assert not list(tmp_path.glob("tiles-*"))
