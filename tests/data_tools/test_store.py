"""The store against files on disk, a local HTTP server that fails as told, a local S3 server, and killed processes."""

import importlib
import json
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from eosin.data_tools import store
from eosin.data_tools.block_cache import BlockCache
from eosin.data_tools.errors import UserError
from eosin.data_tools.store import Local, Remote, open_store

KB = 1024
BLOCK = 64 * KB


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def remote(server, folder: Path, bound: int = 1 << 30) -> Remote:
    return Remote(server.url, BlockCache(folder, bound), BLOCK)


def blocks(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "blocks").iterdir() if p.name != "lock")


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def spans(size: int) -> list[tuple[int, int]]:
    """Random (offset, size), those at the borders of blocks and pages, and those at the file's ends."""
    rng = np.random.default_rng(1)
    starts = rng.integers(0, size, 150)
    chosen = [(int(o), int(rng.integers(0, min(size - o, 3 * BLOCK) + 1))) for o in starts]
    chosen += [(b + i, 2) for b in (8 * KB, BLOCK, 3 * BLOCK) for i in (-2, -1, 0)]
    return [*chosen, (0, size), (size - 1, 1), (size, 0), (0, 0), (BLOCK, BLOCK), (0, 4 * BLOCK)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(noise(10 * BLOCK + 12_345))
    return tmp_path / "set"


def test_local_gives_the_files_bytes(folder):
    truth = (folder / "a.tar").read_bytes()
    local = open_store(str(folder))
    assert all(local.read("a.tar", o, n) == truth[o : o + n] for o, n in spans(len(truth)))
    assert local.read_all("a.tar") == truth
    assert local.size("a.tar") == len(truth)
    assert set(local.files()) == {"a.tar"}
    assert (local.name, open_store(f"file://{folder}").read("a.tar", 5, 3)) == (str(folder), truth[5:8])


def test_local_says_what_is_absent(folder):
    local = Local(folder)
    with pytest.raises(EOFError, match=r"a\.tar"):
        local.read("a.tar", local.size("a.tar") - 3, 4)
    for call in (local.size, local.read_all, lambda name: local.read(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            call("b.tar")
    with pytest.raises(ValueError, match="negative"):
        local.read("a.tar", -1, 4)


def test_local_puts_short_reads_together(folder, monkeypatch):
    truth, whole = (folder / "a.tar").read_bytes(), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: whole(fd, min(size, 1000), offset))
    assert Local(folder).read("a.tar", 7, 5500) == truth[7:5507]


def test_local_keeps_few_descriptors_open_and_the_used_ones(folder, monkeypatch):
    monkeypatch.setattr(store, "DESCRIPTORS", 8)
    for i in range(40):
        (folder / f"{i}.tar").write_bytes(bytes([i]))
    before, local, opened = descriptors(), Local(folder), []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(Path(path).name) or real(path, flags))
    for i in range(40):
        assert local.read(f"{i}.tar", 0, 1) == bytes([i])
        assert local.read("0.tar", 0, 1) == b"\0"
    assert opened.count("0.tar") == 1
    assert descriptors() == before + 8
    del local
    assert descriptors() == before


@pytest.mark.parametrize("name", ["../a.tar", "x/../a.tar", "sub/a.tar", "..", ".", "", "/etc/passwd", "a\0"])
def test_names_that_lead_elsewhere_are_refused(name, folder, server, tmp_path):
    for kept in (Local(folder), remote(server, tmp_path)):
        for call, more in ((kept.size, ()), (kept.read_all, ()), (kept.read, (0, 1))):
            with pytest.raises(ValueError, match="no name of a file"):
                call(name, *more)
    with pytest.raises(ValueError, match="no name of a file"):
        kept.prefetch([(name, 0, 1)])
    assert server.heads == 0


def test_remote_gives_the_files_bytes(server, tmp_path):
    truth = server.content["a.tar"]
    far = remote(server, tmp_path)
    assert all(far.read("a.tar", o, n) == truth[o : o + n] for o, n in spans(len(truth)))
    assert far.read_all("a.tar") == truth
    assert far.size("a.tar") == len(truth)
    assert far.files() is None
    assert far.read("a.tar", np.int64(BLOCK - 3), np.int32(9)) == truth[BLOCK - 3 : BLOCK + 6]
    assert sorted(server.ranges) == sorted(
        f"bytes={i * BLOCK}-{min((i + 1) * BLOCK, len(truth)) - 1}" for i in range(11)
    )
    assert (server.heads, far.retries, far.failures) == (1, 0, 0)


def test_remote_past_the_end_asks_for_nothing(server, tmp_path):
    far = remote(server, tmp_path)
    size = far.size("a.tar")
    for offset, count in [(size - 3, 4), (size, 1), (0, 1 << 40)]:
        with pytest.raises(EOFError, match=r"a\.tar"):
            far.read("a.tar", offset, count)
    with pytest.raises(ValueError, match="negative"):
        far.read("a.tar", -1, 4)
    assert server.ranges == []


def test_an_empty_file(server, tmp_path):
    server.content["e"] = b""
    assert remote(server, tmp_path).read_all("e") == b""


FAULTS = ["503", "500", "429", "cut", "short", "stalled", "shifted"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_counted(fault, server, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "TIMEOUT", 0.2)
    far = remote(server, tmp_path)
    far.size("a.tar")
    server.faults = [fault] * 3
    truth = server.content["a.tar"]
    assert far.read("a.tar", 2 * BLOCK + 5, BLOCK) == truth[2 * BLOCK + 5 : 3 * BLOCK + 5]
    assert (far.retries, far.failures) == (3, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_in_one_line(fault, server, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "TIMEOUT", 0.1)
    server.content["a.tar"] = noise(1 << 25)  # more than sockets hold
    far = remote(server, tmp_path)
    far.size("a.tar")
    server.down = fault
    with pytest.raises(OSError) as raised:
        far.read("a.tar", 3 * BLOCK, 10)
    said = str(raised.value)
    assert f"{server.url}/a.tar at byte {3 * BLOCK} cannot be read: " in said
    assert "5 tries" in said
    assert "\n" not in said
    assert fault != "503" or "HTTP 503 Service Unavailable" in said
    assert (far.retries, far.failures, len(server.ranges)) == (4, 1, 5)
    assert blocks(tmp_path) == []
    assert server.sent < 1 << 25  # five whole files would be five times that


def test_a_server_that_ignores_ranges_is_refused_before_it_sends_the_file(server, tmp_path):
    server.content["a.tar"] = noise(1 << 25)  # more than sockets hold
    far = remote(server, tmp_path)
    far.size("a.tar")
    server.down = "no ranges"
    with pytest.raises(UserError, match="the server ignores Range; serve it by one that reads ranges"):
        far.read("a.tar", 3 * BLOCK, 10)
    assert len(server.ranges) == 1
    assert server.sent < 1 << 25


def test_a_server_that_hangs_up_is_asked_again(server, tmp_path):
    far = remote(server, tmp_path)
    far.size("a.tar")
    server.faults = ["closed"] * 4
    assert far.read("a.tar", 0, BLOCK) == server.content["a.tar"][:BLOCK]
    assert 1 <= far.retries <= 4  # the HTTP client tries once itself where it reused a connection
    server.down = "closed"
    with pytest.raises(OSError, match=r"ServerDisconnectedError: Server disconnected \(5 tries\)"):
        far.read("a.tar", BLOCK, 1)
    assert far.failures == 1


def test_waits_double_and_are_the_same_each_time(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(store.time, "sleep", waits.append)
    server.content["b"] = b"x"
    for _ in range(2):
        far = remote(server, tmp_path)
        far.size("b")
        server.down = "503"
        with pytest.raises(OSError):
            far.read("b", 0, 1)
        server.down = ""
    waits = [w for w in waits if w]  # the server's own sleeps are of 0 s
    assert waits[:4] == waits[4:]
    for i, wait in enumerate(waits[:4]):
        assert 0.5 <= wait / (store.FIRST_WAIT * 2**i) < 1.5


def test_an_unreachable_server_ends_in_one_line(server, tmp_path):
    far = Remote("http://user:secret@127.0.0.1:9/set?X-Amz-Signature=secret", BlockCache(tmp_path), BLOCK)
    with pytest.raises(OSError, match=r"a\.tar at byte 0 cannot be read: ConnectionRefusedError: ") as raised:
        far.size("a.tar")
    assert not isinstance(raised.value, FileNotFoundError)
    assert (far.retries, far.failures) == (4, 1)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is raised.value.__context__ is None  # a traceback would show the URL


def test_whatever_an_error_says_credentials_are_left_out(server, tmp_path):
    far = remote(server, tmp_path)

    class Broken:
        def info(self, path):
            raise RuntimeError("cannot GET 'https://me:secret@host/a?sig=secret'\nagain")

    far._connect().filesystem = Broken()
    with pytest.raises(OSError, match=r"cannot be read: RuntimeError: cannot GET 'https://host/a' again \(5 tries\)"):
        far.size("a.tar")


@pytest.mark.parametrize(("status", "kind"), [("403", PermissionError), ("404", FileNotFoundError), ("416", OSError)])
def test_what_another_try_cannot_mend_is_not_tried_again(status, kind, server, tmp_path):
    far = Remote(server.url.replace("//", "//user:secret@") + "?sig=secret", BlockCache(tmp_path), BLOCK)
    far.size("a.tar")
    server.down = status
    with pytest.raises(kind) as raised:
        far.read("a.tar", 0, 10)
    assert type(raised.value) is kind
    assert "secret" not in str(raised.value)
    assert (len(server.ranges), far.retries, far.failures) == (1, 0, status != "404")


def test_absent_files(server, tmp_path):
    far = remote(server, tmp_path)
    for call in (far.size, far.read_all, lambda name: far.read(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"b\.tar does not exist"):
            call("b.tar")
    assert (far.retries, far.failures) == (0, 0)


def test_a_signature_follows_each_file_and_stays_unsaid(server, tmp_path, monkeypatch):
    paths = []
    handler = server.RequestHandlerClass
    answer = handler._answer
    monkeypatch.setattr(handler, "_answer", lambda self, **how: paths.append(self.path) or answer(self, **how))
    far = Remote(server.url + "/?sig=s3cret&v=2", BlockCache(tmp_path), BLOCK)
    assert far.read("a.tar", 0, 4) == server.content["a.tar"][:4]
    assert set(paths) == {"/set/a.tar?sig=s3cret&v=2"}
    assert far.name == server.url


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:pw@host:8/a/b/?X-Amz-Signature=x&y=1#z", "https://host:8/a/b"),
        ("http://a@b@host", "http://host"),
        ("http://u:s3/cret@host/x", "http://host/x"),
        ("http://u:s3?cr#et@host/x", "http://host/x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("http://u:12@host/x", "http://host/x"),
        ("ftp://me:p@host/x@y/", "ftp://host/x@y"),
        ("https://host/plain", "https://host/plain"),
    ],
)
def test_names_are_shown_without_credentials(url, name, tmp_path):
    assert Remote(url, BlockCache(tmp_path)).name == name


def test_prefetch_is_parallel_and_fetches_each_block_once(server, tmp_path):
    server.content["big"] = noise(32 * BLOCK)
    server.latency = 0.05
    far = remote(server, tmp_path)
    far.size("big")
    wanted = [("big", i * BLOCK + 9, 100) for i in range(32)]
    far.prefetch([*wanted, *wanted, ("big", 5 * BLOCK, 3 * BLOCK)])
    assert len(server.ranges) == len(set(server.ranges)) == 32
    assert all(far.read(*span) == server.content["big"][span[1] : span[1] + 100] for span in wanted)
    assert len(server.ranges) == 32
    assert 8 <= server.most <= store.THREADS
    server.most = 0
    one_by_one = remote(server, tmp_path / "other")
    for span in wanted[:8]:
        one_by_one.read(*span)
    assert server.most == 1


def test_prefetch_ends_at_the_files_end_and_leaves_errors_to_read(server, tmp_path):
    far = remote(server, tmp_path)
    far.prefetch([("a.tar", 10 * BLOCK, 1 << 40), ("absent", 0, 10), ("a.tar", 1 << 40, 10)])
    assert len(server.ranges) == 1 + 1  # the last block; and what asks for a file that HEAD does not find
    with pytest.raises(FileNotFoundError):
        far.read("absent", 0, 10)
    server.down = "503"
    far.prefetch([("a.tar", 0, 10)])
    assert (far.retries, far.failures) == (4, 1)
    server.down = ""
    assert far.read("a.tar", 0, 10) == server.content["a.tar"][:10]


def test_prefetch_of_no_bytes_looks_files_up(server, tmp_path):
    for i in range(8):
        server.content[f"{i}.tar"] = b"x" * i
    far = remote(server, tmp_path)
    far.prefetch([(f"{i}.tar", 0, 0) for i in range(8)])
    assert (server.heads, server.ranges) == (8, [])
    assert [far.size(f"{i}.tar") for i in range(8)] == list(range(8))
    assert server.heads == 8


def test_pickles_carry_no_connection(server, folder, tmp_path):
    local = Local(folder)
    local.read("a.tar", 0, 1)
    copy = pickle.loads(pickle.dumps(local))
    del copy  # must not close what is not its own
    assert local.read("a.tar", 0, 9) == server.content["a.tar"][:9]
    far = remote(server, tmp_path)
    far.prefetch([("a.tar", 0, 1)])
    copy = pickle.loads(pickle.dumps(far))
    assert copy._connection is None
    assert copy.read("a.tar", BLOCK, 9) == server.content["a.tar"][BLOCK : BLOCK + 9]
    assert (server.heads, copy.name) == (1, far.name)


def test_a_spawned_and_a_forked_worker_read(server, tmp_path):
    import multiprocessing

    far = remote(server, tmp_path)
    far.read("a.tar", 0, 1)
    truth = server.content["a.tar"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # takes the store through a pickle
        assert pool.apply_async(far.read, ("a.tar", 2 * BLOCK, 100)).get(timeout=20) == truth[2 * BLOCK :][:100]
    context = multiprocessing.get_context("fork")  # takes it as it is
    ours, theirs = context.Pipe()
    worker = context.Process(target=lambda: theirs.send(far.read("a.tar", 3 * BLOCK, 100)))
    worker.start()
    assert ours.poll(10)
    assert ours.recv() == truth[3 * BLOCK :][:100]
    worker.join()


def test_unknown_schemes_and_missing_packages_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="has a scheme 'gopher'") as raised:
        open_store("gopher://me:pw@host/x?sig=1")
    assert "pw" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"pip install 'eosin\[remote\]'"):
        open_store("s3://bucket/set")


@pytest.fixture
def s3(monkeypatch):
    """A bucket ``tiles`` on a local S3 server: its application, which counts requests and fails as told."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    asked, faults = [], []

    def watched(environ, start_response):
        asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if environ["REQUEST_METHOD"] == "GET" and faults:
            code = faults.pop(0)
            body = f"<Error><Code>{code[4:].replace(' ', '')}</Code><Message>no</Message></Error>".encode()
            start_response(code, [("Content-Length", str(len(body)))])
            return [body]
        return app(environ, start_response)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(store, "FIRST_WAIT", 0.005)
    running = make_server("127.0.0.1", 0, watched, threaded=True)
    url = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="tiles")
    client.put_object(Bucket="tiles", Key="set/a.tar", Body=noise(3 * BLOCK + 99))
    client.put_object(Bucket="tiles", Key="set/dataset.json", Body=json.dumps({"a": 1}).encode())
    client.put_object(Bucket="tiles", Key="set/below/c", Body=b"c")
    yield client, asked, faults
    running.shutdown()
    thread.join()


def test_s3(s3, tmp_path):
    client, asked, faults = s3
    truth = noise(3 * BLOCK + 99)

    def opened() -> Remote:
        return Remote("s3://tiles/set/", BlockCache(tmp_path), BLOCK)

    far = opened()
    assert far.name == "s3://tiles/set"
    assert all(far.read("a.tar", o, n) == truth[o : o + n] for o, n in spans(len(truth))[:40])
    assert far.read_all("a.tar") == truth
    assert json.loads(far.read_all("dataset.json")) == {"a": 1}
    assert far.files() == {"a.tar": len(truth), "dataset.json": 8}
    for name in ("b.tar", "below"):
        with pytest.raises(FileNotFoundError):
            far.read_all(name)
    # Listing first, or asking for each file, is one version of it.
    listing = opened()
    listing.files()
    asked.clear()
    assert listing.read_all("a.tar") == truth
    assert asked == []
    client.put_object(Bucket="tiles", Key="set/a.tar", Body=truth[::-1])
    assert opened().read_all("a.tar") == truth[::-1]
    # An error is tried again here and nowhere below.
    far = opened()
    far.size("dataset.json")
    for block in blocks(tmp_path):
        block.unlink()
    faults += ["503 Slow Down"] * 3
    asked.clear()
    assert far.read("dataset.json", 1, 3) == b'"a"'
    assert (far.retries, far.failures, len(asked)) == (3, 0, 4)
    (block,) = blocks(tmp_path)
    block.unlink()
    faults += ["500 Internal Server Error"] * 5
    with pytest.raises(OSError, match=r"s3://tiles/set/dataset.json at byte 0 cannot be read: HTTP 500") as raised:
        far.read("dataset.json", 1, 3)
    assert "hush" not in str(raised.value)
    faults += ["403 Forbidden"]
    with pytest.raises(PermissionError):
        far.read("dataset.json", 1, 3)
    assert (far.retries, far.failures) == (7, 2)
    with pytest.raises(FileNotFoundError):
        Remote("s3://nowhere/set", far.cache, BLOCK).files()
