"""Where the bytes of a shard set lie: a local folder, or a URL read through fsspec. This module never writes to either.

Both kinds answer the same few questions by file name. Remote bytes come in whole blocks, kept in a
:class:`~eosin.data_tools.block_cache.BlockCache`; whatever goes wrong on the way is tried again and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import responses
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from eosin.data_tools.block_cache import BlockCache
from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError

DESCRIPTORS = 256
BLOCK = 4 << 20  # bytes
THREADS = 16
TRIES = 5
FIRST_WAIT = 0.1  # seconds before the second try; doubles with each
RETRY = purpose("retry")
TIMEOUT = 30.0  # seconds without a byte
# What servers call the version of a file, the surest first.
VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "mtime")
OF_EXTRA = ("http", "https", "s3", "s3a")  # schemes that `pip install 'eosin[remote]'` brings

CREDENTIALS = re.compile(r"^([^/?#]*@|[^/@]*:(?!\d+(/|$|\?))[^@]*@)")

T = TypeVar("T")
_counting = threading.Lock()


def open_store(root: Path | str) -> Local | Remote:
    """The store at ``root``: a folder's path, or a URL of a scheme that fsspec knows (http, https, s3, gs, ...).

    Raises UserError for an unknown scheme and for a scheme whose package is not installed. Nothing is read yet.
    """
    scheme, separator, rest = str(root).partition("://")
    if isinstance(root, Path) or not separator:
        return Local(root)
    if scheme == "file":
        return Local(rest.removeprefix("localhost"))
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ValueError:
        raise UserError(
            f"{without_credentials(str(root))} has a scheme '{scheme}' that nothing here reads; "
            "give a folder, or a URL that begins with https, http, s3, gs or another scheme of fsspec"
        ) from None
    except ImportError as error:
        how = "pip install 'eosin[remote]'" if scheme in OF_EXTRA else " ".join(str(error).split())
        raise UserError(f"{without_credentials(str(root))} needs a package that is not installed: {how}") from None
    return Remote(str(root))


class Local:
    """Files of a folder, read by ``pread`` on a bounded number of open descriptors."""

    def __init__(self, root: Path | str) -> None:
        self.folder = Path(root)
        self.name = str(root)
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``.

        Raises EOFError when the file ends before, ValueError for a negative number, OSError otherwise.
        """
        opened = self._open
        if file in opened:
            opened.move_to_end(file)
            descriptor = opened[file]
        else:
            descriptor = self._descriptor(file)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError:
            _check_span(offset, size)
            raise
        return data if len(data) == size else self._rest(file, descriptor, offset, size, data)

    def read_all(self, file: str) -> bytes:
        """A whole file. Raises FileNotFoundError where there is none."""
        return (self.folder / _checked(file)).read_bytes()

    def files(self) -> dict[str, int | None]:
        """Names of the folder's files; the sizes are not looked up. Raises FileNotFoundError where there is none."""
        with os.scandir(self.folder) as entries:
            return {entry.name: None for entry in entries if entry.is_file()}

    def size(self, file: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return (self.folder / _checked(file)).stat().st_size

    def prefetch(self, wanted: list[tuple[str, int, int]]) -> None:
        """Nothing: the bytes are here."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _descriptor(self, file: str) -> int:
        descriptor = os.open(self.folder / _checked(file), os.O_RDONLY)
        if len(self._open) >= DESCRIPTORS:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = descriptor
        return descriptor

    def _rest(self, file: str, descriptor: int, offset: int, size: int, data: bytes) -> bytes:
        """What a first ``pread`` left: some file systems give less than is asked, and none gives over 2 GiB."""
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise EOFError(f"{self.name}/{file} ends {len(data)} bytes after byte {offset}, before {size}")
            data += more
        return data


@dataclass(frozen=True)
class _File:
    size: int
    key: str  # of its blocks in the cache: another version of the file has another


@dataclass
class _Connection:
    """What belongs to one process."""

    filesystem: Any
    path: str
    threads: ThreadPoolExecutor
    process: int = field(default_factory=os.getpid)


class Remote:
    """Files below a URL, read in whole blocks that are kept on local disk.

    A file's size and version are looked up once; a copy in another process keeps what is known by then. A file that
    changes later is another one to the next store that is opened. Where the server names no version (no ETag and no
    time), blocks are shared by the copies of one store only. ``retries`` and ``failures`` count, in this process, the
    requests tried again and those given up. Credentials for HTTP may lie in ``~/.netrc``.

    Args:
        root: the URL of the folder.
        cache: where blocks are kept; None is the default cache.
        block: bytes of a request.
    """

    def __init__(self, root: str, cache: BlockCache | None = None, block: int = BLOCK) -> None:
        self.name = without_credentials(root)
        self.block = block
        self.cache = cache or BlockCache()
        self.retries = 0
        self.failures = 0
        self._root = root
        self._scheme = root.partition("://")[0]
        self._opening = os.urandom(16).hex()
        self._known: dict[str, _File] = {}
        self._connection: _Connection | None = None

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``.

        Raises EOFError when the file ends before, ValueError for a negative number, FileNotFoundError where there is no
        such file, PermissionError where the server refuses it, and OSError, in one line, after the last try.
        """
        known = self._look_up(file)
        _check_span(offset, size)
        stop = int(offset) + int(size)
        if stop > known.size:
            raise EOFError(f"{self.name}/{file} ends at byte {known.size}, before byte {stop}")
        pieces = []
        for number in range(offset // self.block, -(-stop // self.block)):
            first = number * self.block
            pieces.append(self._piece(file, known, number, max(offset - first, 0), min(stop - first, self.block)))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_all(self, file: str) -> bytes:
        """A whole file. Raises FileNotFoundError where there is none."""
        size = self.size(file)
        if size > self.block:
            self.prefetch([(file, 0, size)])
        return self.read(file, 0, size)

    def files(self) -> dict[str, int | None] | None:
        """Names and sizes of the folder's files; None where listing is not offered, as over HTTP."""
        if self._scheme in ("http", "https"):
            return None
        filesystem, path = self._connect().filesystem, self._connect().path
        entries = self._tried("", 0, lambda: filesystem.ls(path, detail=True))
        return {e["name"].rsplit("/", 1)[-1]: e["size"] for e in entries if e["type"] == "file"}

    def size(self, file: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return self._look_up(file).size

    def prefetch(self, wanted: Iterable[tuple[str, int, int]]) -> None:
        """Bring what is missing of each (file, offset, size), cut at the file's end, in parallel, each block once.

        A size of 0 only looks the file up. What cannot be brought is left for :meth:`read` to say.
        """
        wanted = list(wanted)
        for _, offset, size in wanted:
            _check_span(offset, size)
        self._in_parallel(self._look_up, {_checked(file) for file, _, _ in wanted})
        blocks = set()
        for file, offset, size in wanted:
            if file in self._known:
                stop = min(offset + size, self._known[file].size)
                blocks |= {(file, number) for number in range(offset // self.block, -(-stop // self.block))}
        self._in_parallel(lambda block: self._piece(block[0], self._known[block[0]], block[1], 0, 0), blocks)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None, "retries": 0, "failures": 0}

    def _piece(self, file: str, known: _File, number: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a block; the block is in the cache afterwards, even for none of its bytes."""
        first = number * self.block
        size = min(self.block, known.size - first)
        name = f"{known.key}-{number:06d}"
        data = self.cache.get(name, size, start, stop)
        if data is None:
            data = self.cache.fill(name, size, lambda: self._fetch(file, first, size))[start:stop]
        return data

    def _fetch(self, file: str, offset: int, size: int) -> bytes:
        filesystem, path = self._connect().filesystem, self._path(file)

        def once() -> bytes:
            data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
            if len(data) != size:
                raise EOFError(f"{len(data)} of {size} bytes came")
            return data

        return self._tried(file, offset, once)

    def _look_up(self, file: str) -> _File:
        if file not in self._known:
            filesystem, path = self._connect().filesystem, self._path(_checked(file))
            self._known[file] = self._identify(file, self._tried(file, 0, lambda: filesystem.info(path)))
        return self._known[file]

    def _identify(self, file: str, info: dict[str, Any]) -> _File:
        if info["type"] == "directory":
            raise FileNotFoundError(f"{self.name}/{file} is a folder")
        if info["size"] is None:
            raise OSError(f"{self.name}/{file}: the server does not say how large the file is")
        version = next((f"{key} {info[key]}" for key in VERSIONS if info.get(key)), self._opening)
        words = f"{self.name}/{file}\n{info['size']}\n{version}\n{self.block}"
        return _File(int(info["size"]), hashlib.sha256(words.encode()).hexdigest()[:32])

    def _path(self, file: str) -> str:
        path = self._connect().path
        if self._scheme in ("http", "https"):
            parts = urlsplit(path)  # a query, such as a signature for the whole folder, stays behind the file
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(file)}", fragment=""))
        return f"{path.rstrip('/')}/{file}"

    def _connect(self) -> _Connection:
        """This process's own connection: no event loop, socket or thread survives a fork or a pickle."""
        if self._connection is None or self._connection.process != os.getpid():
            from fsspec.core import url_to_fs

            options = _http_options() if self._scheme in ("http", "https") else {}
            filesystem, path = url_to_fs(self._root, skip_instance_cache=True, **options)
            if self._scheme in ("s3", "s3a"):
                # Tries are made and counted here, not in two layers below.
                filesystem.retries = 1
                filesystem.config_kwargs = {"retries": {"total_max_attempts": 1}} | filesystem.config_kwargs
            # A file system without an event loop (FTP, SFTP) has one connection, which threads cannot share.
            threads = THREADS if filesystem.async_impl else 1
            self._connection = _Connection(filesystem, path, ThreadPoolExecutor(threads, "store"))
        return self._connection

    def _in_parallel(self, call: Callable[[Any], Any], items: Iterable[Any]) -> None:
        def quietly(item: Any) -> None:
            with contextlib.suppress(OSError):  # counted; read() tries again and raises it for the tile that needs it
                call(item)

        list(self._connect().threads.map(quietly, sorted(items)))

    def _tried(self, file: str, offset: int, call: Callable[[], T]) -> T:
        """The result of ``call``, tried again with growing waits where another try may help."""
        where = f"{self.name}/{file} at byte {offset}" if file else self.name
        for attempt in range(TRIES):
            try:
                return call()
            except UserError:  # no other try can mend it
                raise
            # The libraries below fsspec raise errors that share no base. None is chained to ours, since their texts
            # hold URLs with the credentials in them.
            except Exception as error:
                status, cause = _cause(error)
            if status in (404, 410):
                raise FileNotFoundError(f"{self.name}/{file}".rstrip("/") + " does not exist")
            last = attempt == TRIES - 1 or (400 <= status < 500 and status not in (408, 425, 429))
            with _counting:
                self.failures += last
                self.retries += not last
            if last:
                break
            jitter = 0.5 + uniform(RETRY, zlib.crc32(file.encode()), offset, attempt)
            time.sleep(FIRST_WAIT * 2**attempt * jitter)
        message = f"{where} cannot be read: {cause} ({attempt + 1} {'try' if attempt == 0 else 'tries'})"
        raise PermissionError(message) if status in (401, 403) else OSError(message)


def _http_options() -> dict[str, Any]:
    import aiohttp
    from fsspec.config import conf

    ours = {
        "headers": {"Accept-Encoding": "identity"},  # ranges and sizes are of the file's own bytes
        "timeout": aiohttp.ClientTimeout(total=10 * TIMEOUT, sock_connect=TIMEOUT, sock_read=TIMEOUT),
        "trust_env": True,  # proxies, and ~/.netrc
        "raise_for_status": _refuse_other_bytes,
    }
    return {"client_kwargs": conf.get("http", {}).get("client_kwargs", {}) | ours}


async def _refuse_other_bytes(response: Any) -> None:
    """Raise, before the body is read, where the server is about to send other bytes than the range asked for."""
    asked = response.request_info.headers.get("Range")
    if asked is None:
        return
    first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
    length, sent = response.content_length, response.headers.get("Content-Range", "")
    if response.status == 200 and (length is None or length > last - first + 1):
        response.close()
        where = without_credentials(str(response.url))
        raise UserError(f"{where}: the server ignores Range; serve it by one that reads ranges")
    if response.status == 206 and not sent.startswith(f"bytes {first}-"):
        response.close()
        raise OSError(f"the server sends '{sent}' where '{asked}' was asked")


def _cause(error: BaseException) -> tuple[int, str]:
    """The HTTP status of an error (0: none) and what it says, in one line and without credentials."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404, ""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, "response", None)  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        status = status or getattr(link, "status", None)  # aiohttp's
        if isinstance(status, int):
            return status, f"HTTP {status} {responses.get(status, '')}".strip()
        error, link = link, link.__cause__
    if isinstance(error, PermissionError):
        return 403, "the server refuses it"
    text = re.sub(r"//[^/\s]*@", "//", re.sub(r"\?[^\s'\")]*", "", " ".join(str(error).split())))
    return 0, f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def without_credentials(url: str) -> str:
    """A URL without user, password, query and fragment; what is no URL stays as it is."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    # A password may hold any sign, by mistake a slash too; what follows a colon and is no port is taken for one.
    rest = CREDENTIALS.sub("", rest, count=1)
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0].rstrip('/')}"


def _checked(file: str) -> str:
    if "/" in file or ".." in file or "\0" in file or file in ("", "."):
        raise ValueError(f"{file!r} is no name of a file of this folder")
    return file


def _check_span(offset: int, size: int) -> None:
    if offset < 0 or size < 0:
        raise ValueError(f"{size} bytes at byte {offset}: neither may be negative")
