"""The cache of remote blocks against a local HTTP server, damage, other processes and killed ones."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from eosin.data_tools import block_cache
from eosin.data_tools.block_cache import BlockCache
from eosin.data_tools.errors import UserError
from eosin.data_tools.store import Remote

KB = 1024
BLOCK = 64 * KB


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def remote(server, folder: Path, bound: int = 1 << 30) -> Remote:
    return Remote(server.url, BlockCache(folder, bound), BLOCK)


def blocks(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "blocks").iterdir() if p.name != "lock")


def test_a_second_opening_reads_from_the_cache(server, tmp_path):
    truth = server.content["a.tar"]
    assert remote(server, tmp_path).read_all("a.tar") == truth
    asked = len(server.ranges)
    again = remote(server, tmp_path)
    assert again.read_all("a.tar") == truth
    assert len(server.ranges) == asked == 11
    signed = Remote(server.url + "?sig=new", BlockCache(tmp_path), BLOCK)
    assert signed.read_all("a.tar") == truth
    assert len(server.ranges) == asked


def test_files_of_one_size_and_version_are_two_files(server, tmp_path):
    far = remote(server, tmp_path)
    for name in ("x", "y"):
        server.content[name], server.tags[name] = name.encode() * 100, '"first"'
    assert [far.read_all(name) for name in ("x", "y")] == [b"x" * 100, b"y" * 100]


@pytest.mark.parametrize("how", ["tag", "size", "unversioned"])
def test_a_changed_file_is_not_served_stale(how, server, tmp_path):
    if how == "unversioned":
        del server.tags["a.tar"]
    assert remote(server, tmp_path).read_all("a.tar") == server.content["a.tar"]
    server.content["a.tar"] = noise(len(server.content["a.tar"]) + (how == "size"), seed=1)
    if how == "tag":
        server.tags["a.tar"] = '"two"'
    assert remote(server, tmp_path).read_all("a.tar") == server.content["a.tar"]


@pytest.mark.parametrize("where", [0, 100, BLOCK - 1, BLOCK, -1])
def test_a_damaged_block_is_noticed_and_fetched_again(where, server, tmp_path):
    far = remote(server, tmp_path)
    truth = server.content["a.tar"]
    far.read("a.tar", 0, BLOCK)
    (block,) = blocks(tmp_path)
    data = bytearray(block.read_bytes())
    data[where] ^= 1
    block.write_bytes(data)
    assert far.read("a.tar", 0, BLOCK) == truth[:BLOCK]
    assert (far.cache.damaged, len(server.ranges)) == (1, 2)
    assert far.read("a.tar", 0, BLOCK) == truth[:BLOCK]
    assert len(server.ranges) == 2


HARMS = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_cut_or_emptied_block_is_noticed(harm, server, tmp_path):
    far = remote(server, tmp_path)
    far.read("a.tar", 0, 1)
    (block,) = blocks(tmp_path)
    block.write_bytes(HARMS[harm](block.read_bytes()))
    assert far.read("a.tar", 10, 100) == server.content["a.tar"][10:110]
    assert far.cache.damaged == 1


def test_a_block_evicted_by_somebody_else_is_a_miss(server, tmp_path):
    far = remote(server, tmp_path)
    far.read("a.tar", 0, 1)
    blocks(tmp_path)[0].unlink()
    assert far.read("a.tar", 10, 100) == server.content["a.tar"][10:110]
    assert (far.cache.damaged, len(server.ranges)) == (0, 2)


def test_the_bound_is_kept_and_the_unused_go_first(server, tmp_path):
    server.content["big"] = noise(60 * BLOCK)
    server.tags["big"] = '"big"'
    bound = 10 * (BLOCK + KB)
    far = remote(server, tmp_path, bound)
    far.read("big", 0, 1)
    for i in range(1, 60):
        assert far.read("big", i * BLOCK, 1) == server.content["big"][i * BLOCK : i * BLOCK + 1]
        assert sum(p.stat().st_size for p in blocks(tmp_path)) <= bound
        os.utime(far.cache.folder / f"{far._known['big'].key}-000000")  # used all the time
        time.sleep(0.002)  # a file system's clock is coarse
    kept = {int(p.name[-6:]) for p in blocks(tmp_path)}
    assert kept == {0, *range(60 - len(kept) + 1, 60)}
    assert len(kept) >= 8


def test_a_use_is_noted_once_a_minute(server, tmp_path):
    far = remote(server, tmp_path)
    far.read("a.tar", 0, 1)
    (block,) = blocks(tmp_path)
    for age, noted in [(30, False), (90, True)]:
        os.utime(block, (time.time() - age,) * 2)
        far.read("a.tar", 0, 1)
        assert (time.time() - block.stat().st_mtime < 10) == noted


def test_nothing_foreign_is_evicted(server, tmp_path):
    cache = tmp_path / "blocks"
    cache.mkdir()
    foreign = [cache / "thesis.tar", cache / "notes.partial", tmp_path / ("0" * 32 + "-000000")]
    for file in foreign:
        file.write_bytes(bytes(BLOCK))
        os.utime(file, (0, 0))
    far = remote(server, tmp_path, 2 * (BLOCK + KB))
    far.read_all("a.tar")
    assert all(file.exists() for file in foreign)


READER = """
import sys
from eosin.data_tools.block_cache import BlockCache
from eosin.data_tools.store import Remote
url, folder, bound, block, seed, rounds = sys.argv[1:]
far = Remote(url, BlockCache(folder, int(bound)), int(block))
import hashlib, numpy as np
truth = {f"{i}": np.random.default_rng(i).bytes(20 * int(block)) for i in range(3)}
rng = np.random.default_rng(int(seed))
for _ in range(int(rounds)):
    name, start = str(rng.integers(3)), int(rng.integers(0, 19 * int(block)))
    if rng.random() < 0.2:
        far.prefetch([(name, start, 3 * int(block))])
    assert far.read(name, start, 5000) == truth[name][start : start + 5000]
    print("read", flush=True)
print(far.cache.damaged, far.retries, far.failures)
"""


def reader(server, folder: Path, bound: int, seed: int, rounds: int) -> subprocess.Popen:
    for i in range(3):
        server.content[f"{i}"], server.tags[f"{i}"] = noise(20 * BLOCK, seed=i), f'"{i}"'
    words = [server.url, folder, bound, BLOCK, seed, rounds]
    command = [sys.executable, "-c", READER, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_keep_one_bound(server, tmp_path):
    bound = 12 * (BLOCK + KB)
    readers = [reader(server, tmp_path, bound, seed, 100) for seed in (1, 2)]
    most = 0
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(r.communicate) for r in readers]
        while not all(e.done() for e in ends):
            total = 0
            if (tmp_path / "blocks").is_dir():
                for entry in os.scandir(tmp_path / "blocks"):
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat().st_size
            most = max(most, total)
            time.sleep(0.002)
    assert [e.result()[0].splitlines()[-1] for e in ends] == ["0 0 0"] * 2
    # A watcher that lists while files come and go may count one that went and the one that took its room.
    assert 8 * BLOCK < most <= bound + 2 * BLOCK
    assert sum(p.stat().st_size for p in blocks(tmp_path)) <= bound
    assert len(server.ranges) > 60  # there was something to evict


def test_processes_that_want_one_block_fetch_it_once(server, tmp_path):
    server.latency = 0.3
    readers = [reader(server, tmp_path, 1 << 30, 1, 2) for _ in range(3)]
    assert [r.communicate()[0].splitlines()[-1] for r in readers] == ["0 0 0"] * 3
    assert len(server.ranges) == len(blocks(tmp_path))


def test_a_killed_process_leaves_a_usable_cache(server, tmp_path):
    bound = 12 * (BLOCK + KB)
    for seed in range(3):
        victim = reader(server, tmp_path, bound, seed, 10_000)
        for _ in range(10 + 7 * seed):
            assert victim.stdout.readline() == "read\n"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    after = reader(server, tmp_path, bound, 9, 60)
    assert after.communicate()[0].splitlines()[-1] == "0 0 0"
    assert sum(p.stat().st_size for p in blocks(tmp_path)) <= bound


def test_a_kill_between_any_two_steps_of_writing_is_mended(server, tmp_path):
    """The child dies at each of the calls that write a block, in turn; the next reader finds nothing wrong."""
    code = """
import os, signal, sys
from eosin.data_tools import block_cache
from eosin.data_tools.store import Remote
step, url, folder, block = sys.argv[1:]
far = Remote(url, block_cache.BlockCache(folder), int(block))


def dying(real):
    def call(*args):
        if real is os.pwrite and len(args[1]) > 100:
            real(args[0], args[1][: len(args[1]) // 2], args[2])
        os.kill(os.getpid(), signal.SIGKILL)
    return call
from pathlib import Path
owner = Path if step == "replace" else os
setattr(owner, step, dying(getattr(owner, step)))
far.read("a.tar", 0, 10)
"""
    truth = server.content["a.tar"]
    for step in ("ftruncate", "pwrite", "replace"):
        command = [sys.executable, "-c", code, step, server.url, str(tmp_path / step), str(BLOCK)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        assert [p.suffix for p in blocks(tmp_path / step)] == [".partial"]
        far = remote(server, tmp_path / step)
        assert far.read("a.tar", 0, BLOCK) == truth[:BLOCK]
        assert far.cache.damaged == 0
        assert [p.suffix for p in blocks(tmp_path / step)] == [""]


def test_partial_blocks_of_the_dead_are_removed_and_those_of_the_living_kept(server, tmp_path):
    far = remote(server, tmp_path, 3 * (BLOCK + KB))
    dead, alive = (far.cache.folder / f"{c * 32}-000000.partial" for c in "ab")
    dead.write_bytes(bytes(BLOCK))
    descriptor = block_cache._own(alive)
    far.read_all("a.tar")
    assert (dead.exists(), alive.exists()) == (False, True)
    os.close(descriptor)


def test_room_is_made_by_one_process_at_a_time_and_taken_before_it_is_filled(server, tmp_path, monkeypatch):
    far = remote(server, tmp_path)
    sizes, real = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, *rest: sizes.append(os.fstat(fd).st_size) or real(fd, *rest))
    with (far.cache.folder / "lock").open("wb") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        got = pool.submit(far.read, "a.tar", 0, 1)
        time.sleep(0.3)
        assert server.ranges
        assert sizes == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert got.result(10) == server.content["a.tar"][:1]
    assert sizes == [0, BLOCK + 4 * BLOCK // block_cache.PAGE]  # of the total's file; of the block's, before its bytes


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="EOSIN_CACHE to a folder"):
        BlockCache(tmp_path / "file")
    with pytest.raises(UserError, match="less than a block"):
        remote(server, tmp_path, BLOCK).read("a.tar", 0, 1)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: BLOCK // 2], at))  # as on a full disk
    with pytest.raises(UserError, match="No space left on device"):
        remote(server, tmp_path).read("a.tar", 0, 1)
    assert blocks(tmp_path) == []


def test_the_environment_sets_folder_and_bound(tmp_path, monkeypatch):
    monkeypatch.setenv("EOSIN_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("EOSIN_CACHE_GB", "1.5")
    cache = BlockCache()
    assert (cache.folder, cache.bound) == (tmp_path / "c" / "blocks", 3 << 29)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for wrong in ("0", "-1", "much", "nan", "inf", ""):
        monkeypatch.setenv("EOSIN_CACHE_GB", wrong)
        with pytest.raises(UserError, match="EOSIN_CACHE_GB"):
            BlockCache()
    monkeypatch.delenv("EOSIN_CACHE")
    monkeypatch.delenv("EOSIN_CACHE_GB")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (BlockCache().folder, BlockCache().bound) == (tmp_path / ".cache" / "eosin" / "blocks", 20 << 30)
