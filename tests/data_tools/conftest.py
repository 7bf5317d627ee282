"""Small painted slides whose every pixel is known, and a local HTTP server that fails as it is told."""

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

GLASS = 244
SERVED_BLOCK = 64 << 10
SERVED_BLOCK = 64 << 10


@functools.cache
def paint_section(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A section on glass: an ellipse over the middle with nuclei about ten pixels wide, with edges of four."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 3.5)
    nuclei = np.clip(noise / noise.std() - 0.5, 0, 1)
    y, x = np.mgrid[0:height, 0:width]
    inside = ((x - width / 2) / (0.4 * width)) ** 2 + ((y - height / 2) / (0.4 * height)) ** 2 < 1
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)
    amounts = np.stack([1.3 * nuclei, np.full_like(nuclei, 0.35)], axis=-1) * inside[..., None]
    image = GLASS * np.exp(-(amounts.astype(np.float32) @ stains))
    result = np.clip(image + rng.normal(0, 0.7, image.shape), 0, 255).round().astype(np.uint8)
    result.flags.writeable = False
    return result


def write_pyramid(
    path: Path, image: np.ndarray, mpp: float | None, sizes: Sequence[tuple[int, int]] = (), **kwargs: object
) -> Path:
    """Write a tiled TIFF that OpenSlide reads, uncompressed; ``sizes`` are (width, height) of the coarser levels."""
    import tifffile

    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    common = {"tile": (256, 256), "photometric": "rgb", "metadata": None} | kwargs
    with tifffile.TiffWriter(path) as tiff:
        for number, size in enumerate([(image.shape[1], image.shape[0]), *sizes]):
            level = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if number else image
            tiff.write(level, subfiletype=int(number > 0), **common, **(resolution if number == 0 else {}))
    return path


@pytest.fixture(scope="session")
def section() -> Callable[..., np.ndarray]:
    """:func:`paint_section`."""
    return paint_section


@pytest.fixture(scope="session")
def pyramid() -> Callable[..., Path]:
    """:func:`write_pyramid`."""
    return write_pyramid


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder of 18 phantoms with all nuisances; the seventh to ninth patients carry pen on their second slides."""
    from eosin.data_tools.phantom import write_phantoms

    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=9, workers=2).parent


class Server(ThreadingHTTPServer):
    """Serves ``content`` with ranges. Each GET takes the next of ``faults``, then all goes well."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.faults: list[str] = []
        self.down: str = ""  # the fault of every GET
        self.latency = 0.0
        self.ranges: list[str] = []  # of the GETs
        self.heads = 0
        self.sent = 0
        self.now = self.most = 0  # GETs being answered at once
        self.url = f"http://127.0.0.1:{self.server_address[1]}/set"
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        with self.server.lock:
            self.server.heads += 1
        self._answer(body=False)

    def do_GET(self):
        with self.server.lock:
            self.server.ranges.append(self.headers.get("Range", ""))
            fault = self.server.down or (self.server.faults.pop(0) if self.server.faults else "")
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.latency)
        with self.server.lock:
            self.server.now -= 1
        self._answer(body=True, fault=fault)

    def _answer(self, body, fault=""):
        name = self.path.partition("?")[0].removeprefix("/set/")
        data = self.server.content.get(name)
        if fault == "closed":
            self.close_connection = True
            return
        if data is None or fault.isdigit():
            self._headers(int(fault or 404), {"Content-Length": "5"})
            self.wfile.write(b"sorry" if body else b"")
            return
        headers = {"ETag": self.server.tags[name]} if name in self.server.tags else {}
        status, first, total = 200, 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and fault != "no ranges":
            first = int(asked[1]) + (1 if fault == "shifted" else 0)
            data = data[first : int(asked[2]) + 1 + first - int(asked[1])]
            status, headers["Content-Range"] = 206, f"bytes {first}-{first + len(data) - 1}/{total}"
        length = len(data) - 7 if fault == "short" else len(data)
        self._headers(status, headers | {"Content-Length": str(length)})
        if not body:
            return
        if fault in ("cut", "short"):  # fewer bytes than announced; fewer than asked
            data = data[: len(data) // 2] if fault == "cut" else data[:length]
        if fault == "stalled":
            self.wfile.flush()
            time.sleep(0.5)
        for start in range(0, len(data), SERVED_BLOCK):
            self.wfile.write(data[start : start + SERVED_BLOCK])
            with self.server.lock:
                self.server.sent += len(data[start : start + SERVED_BLOCK])
        self.close_connection = self.close_connection or fault == "cut"

    def _headers(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("eosin.data_tools.store.FIRST_WAIT", 0.005)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.content["a.tar"] = np.random.default_rng(0).bytes(10 * SERVED_BLOCK + 12_345)
        running.tags["a.tar"] = '"one"'
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def run(capsys) -> Callable[..., str]:
    """Runs ``eosin pack`` and says what it said, after its exit code was checked; an error is one line."""
    from eosin.data_tools.errors import USER_ERROR
    from eosin.launch.cli import main

    def said(*arguments: object, code: int) -> str:
        assert main(["pack", *map(str, arguments)]) == code
        heard = capsys.readouterr()
        lines = [line for line in heard.err.splitlines() if not line.startswith("pack: ")]
        assert len(lines) == (code == USER_ERROR)
        return heard.err if lines else heard.out

    return said
