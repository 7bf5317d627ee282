"""A bounded folder of blocks of remote files on local disk, shared by any number of processes.

    CACHE/blocks/
      lock                      total of the bytes below, written under flock
      <key>-<number>            a block's bytes, then one crc32 for each 8 KiB page of them
      <key>-<number>.partial    being brought; whoever holds its flock brings it, everybody else waits for the block

A block whose bytes do not fit their checksums is dropped, so nothing here is synced: what a crash of the machine loses
or garbles is fetched again. This module never touches a network, and never removes a file it did not name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from eosin.data_tools.errors import UserError

BOUND_GB = 20.0
PAGE = 8 << 10  # bytes under one checksum: a tile is verified without reading its whole block
TOUCH = 60.0  # seconds; a block's last use is noted at most so often
ROOM = 0.9  # of the bound is left after an eviction, so that not every block calls for one
NAME = re.compile(r"[0-9a-f]{32}-\d{6,}(\.partial)?")


class BlockCache:
    """Blocks by name in ``folder``, at most ``bound`` bytes of them; those unused for longest go first.

    The defaults are ``$EOSIN_CACHE`` (else ``~/.cache/eosin``) and ``$EOSIN_CACHE_GB`` (else 20 GiB). The folder should
    be on a disk of this machine. ``damaged`` counts the blocks dropped for a wrong checksum.

    Raises:
        UserError: the bound is no positive number, or the folder cannot be written.
    """

    def __init__(self, folder: Path | str | None = None, bound: int | None = None) -> None:
        home = folder or os.environ.get("EOSIN_CACHE") or "~/.cache/eosin"
        try:
            self.folder = Path(home).expanduser().absolute() / "blocks"
        except RuntimeError:
            raise UserError(
                f"EOSIN_CACHE is {str(home)!r}, the home of nobody known; give the path of a folder"
            ) from None
        self.bound = _bound_from_environment() if bound is None else bound
        self.damaged = 0
        with self._mendable():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # slides may be confidential

    def get(self, name: str, size: int, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the block ``name`` of ``size`` bytes; None where it is absent or damaged."""
        path = f"{self.folder}/{name}"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            state = os.fstat(descriptor)
            first, last = start // PAGE, -(-stop // PAGE)
            data = os.pread(descriptor, min(last * PAGE, size) - first * PAGE, first * PAGE)
            sums = os.pread(descriptor, 4 * (last - first), size + 4 * first)
            if state.st_size != _stored(size) or sums != _checksums(data):
                self.damaged += 1
                Path(path).unlink(missing_ok=True)
                return None
            if time.time() - state.st_mtime > TOUCH:
                os.utime(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return data[start - first * PAGE : stop - first * PAGE]

    def fill(self, name: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The whole block: from the folder where another process has brought it meanwhile, else fetched and kept.

        Errors of ``fetch`` pass through and leave nothing behind.
        """
        path, partial = self.folder / name, self.folder / f"{name}.partial"
        with self._mendable():
            descriptor = _own(partial)
        try:
            data = self.get(name, size, 0, size)
            if data is None:
                data = fetch()
                with self._mendable():
                    self._make_room(descriptor, _stored(size))
                    if os.pwrite(descriptor, data + _checksums(data), 0) != _stored(size):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    partial.replace(path)
                return data
            partial.unlink()
            return data
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _make_room(self, partial: int, size: int) -> None:
        """Give the open partial block its size, after removing what the bound then does not hold."""
        if size > self.bound:
            raise UserError(
                f"the cache {self.folder} may hold {self.bound} bytes, less than a block of {size}: allow more"
            )
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The total is written before the block is, so a killed process leaves it too high, never too low; the next
            # eviction counts again.
            text = os.pread(descriptor, 32, 0)
            total = int(text) if text.isdigit() else self.bound
            if total + size > self.bound:
                total = self._evict(min(int(ROOM * self.bound), self.bound - size))
            os.ftruncate(partial, size)
            os.pwrite(descriptor, b"%020d" % (total + size), 0)
        finally:
            os.close(descriptor)

    def _evict(self, keep: int) -> int:
        """Remove partial blocks that nobody holds, then the blocks unused for longest; return the bytes left."""
        found: list[tuple[float, int, str]] = []
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    if not entry.name.endswith(".partial"):
                        found.append((state.st_mtime, state.st_size, entry.path))
                        total += state.st_size
                    elif not _remove_unowned(entry.path):
                        total += state.st_size
        for _, size, path in sorted(found):
            if total <= keep:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    @contextlib.contextmanager
    def _mendable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} cannot be written ({error.strerror}); "
                "set EOSIN_CACHE to a folder on a local disk, EOSIN_CACHE_GB to what it may hold"
            ) from None


def _bound_from_environment() -> int:
    text = os.environ.get("EOSIN_CACHE_GB", str(BOUND_GB))
    try:
        bound = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        bound = 0
    if bound <= 0:
        raise UserError(f"EOSIN_CACHE_GB is {text!r}; give the gigabytes that the cache may hold, e.g. 20")
    return bound


def _stored(size: int) -> int:
    return size + 4 * -(-size // PAGE)


def _checksums(data: bytes) -> bytes:
    view = memoryview(data)
    return b"".join(zlib.crc32(view[i : i + PAGE]).to_bytes(4, "little") for i in range(0, len(data), PAGE))


def _own(partial: Path) -> int:
    """Open ``partial`` and wait until this process alone holds it."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if partial.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner renamed or removed it while we waited


def _remove_unowned(partial: str) -> bool:
    descriptor = os.open(partial, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(partial).unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
