"""A pyramid's JPEG tiles decoded straight from the file, several times faster than through OpenSlide.

OpenSlide draws every tile onto a transparent canvas, which costs more than decoding it. Where the tiles of a level are
plain JPEGs on a plain grid, their bytes are decoded here instead, to the same pixels. Whatever is unusual - a tile that
is missing or does not decode without a warning, a header that contradicts the TIFF's - is left to the reader that would
read the file otherwise, so that this one never refuses a region itself. Only the pixels are read here: what a file says
of itself is that reader's part.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from eosin.data_tools.errors import Refusal

if TYPE_CHECKING:
    from eosin.data_tools.pyramids import Pixels

# Of OpenSlide's formats those whose levels are each one TIFF directory, with tiles that meet without overlap.
PLAIN_VENDORS = ("aperio", "generic-tiff", "ome-tiff", "tiff")
MAX_DIRECTORIES = 64
MAX_TILE_PIXELS = 1 << 22
# Mean difference in gray levels from the other reader, on the tile with most detail, above which a level is left to it:
# more than half a pixel makes, less than wrong colors or another picture do.
MAX_DIFFERENCE = 3.0
SPACES = {2: "RGB", 6: "YCbCr"}  # of the TIFF tag PhotometricInterpretation


@dataclass(frozen=True)
class JpegLevel:
    """Where the JPEG tiles of a level lie.

    Attributes:
        tile: width and height of a tile.
        across: tiles in a row.
        offsets: of each tile in the file, row by row, int64.
        counts: bytes of each tile, int64; 0 where it is missing.
        space: of its colors, "RGB" or "YCbCr".
        head: what a tile's bytes need before them: color transform and the tables shared by all.
    """

    tile: tuple[int, int]
    across: int
    offsets: np.ndarray
    counts: np.ndarray
    space: str
    head: bytes


class JpegPixels:
    """The pixels of another reader, those of JPEG tiles decoded directly.

    Args:
        path: a TIFF.
        other: the reader that opened it, which reads all that is not on plain JPEG tiles.
        levels: as :func:`jpeg_levels` finds them.
        cache_bytes: of decoded tiles kept at most; the least recently used go first.
    """

    def __init__(self, path: Path, other: Pixels, levels: list[JpegLevel | None], cache_bytes: int) -> None:
        self.sizes, self.downsamples = other.sizes, other.downsamples
        self.vendor, self.stated = other.vendor, other.stated
        self._other = other
        self._levels = levels
        self._unproven = {number for number, level in enumerate(levels) if level}
        self._file = path.open("rb")
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._free = cache_bytes

    def region(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """See :class:`~eosin.data_tools.pyramids.Pixels`."""
        if level in self._unproven:
            self._unproven.discard(level)
            if not self._agrees(level):
                self._levels[level] = None
        if self._levels[level]:
            try:
                return self._direct(level, x, y, width, height)
            except Refusal:
                pass
        return self._other.region(level, x, y, width, height)

    def close(self) -> None:
        """Release the file."""
        self._cache.clear()
        self._file.close()
        self._other.close()

    def _direct(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        def read(left: int, top: int, wide: int, high: int) -> np.ndarray:
            return self._assemble(level, left, top, wide, high)

        return from_whole_pixels(read, self.sizes[level], self.downsamples[level], x, y, width, height)

    def _assemble(self, number: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        level = self._levels[number]
        assert level is not None
        result = np.empty((height, width, 3), np.uint8)
        for row, column in itertools.product(
            range(top // level.tile[1], (top + height - 1) // level.tile[1] + 1),
            range(left // level.tile[0], (left + width - 1) // level.tile[0] + 1),
        ):
            tile = self._tile(number, level, row * level.across + column)
            y, x = row * level.tile[1] - top, column * level.tile[0] - left
            part = tile[max(0, -y) : height - y, max(0, -x) : width - x]
            result[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
        return result

    def _tile(self, number: int, level: JpegLevel, place: int) -> np.ndarray:
        tile = self._cache.get((number, place))
        if tile is not None:
            self._cache.move_to_end((number, place))
            return tile
        tile = self._decode(level, place)
        self._free -= tile.nbytes
        while self._free < 0 and self._cache:
            self._free += self._cache.popitem(last=False)[1].nbytes
        self._cache[number, place] = tile
        return tile

    def _decode(self, level: JpegLevel, place: int) -> np.ndarray:
        import simplejpeg

        offset, count = int(level.offsets[place]), int(level.counts[place])
        if not 4 < count <= 4 * math.prod(level.tile):
            raise Refusal("a missing tile")
        try:
            self._file.seek(offset)
            data = self._file.read(count)
            if len(data) < count or data[:2] != b"\xff\xd8":
                raise Refusal("a cut tile")
            # Decoding allocates whatever the header asks for, and takes the colors for what the header says.
            height, width, space, _ = simplejpeg.decode_jpeg_header(level.head + data[2:])
            if (width, height, space) != (*level.tile, level.space):
                raise Refusal("an unexpected tile")
            return simplejpeg.decode_jpeg(level.head + data[2:])
        except (OSError, ValueError):
            raise Refusal("a damaged tile") from None

    def _agrees(self, number: int) -> bool:
        """Whether the level's most detailed tile is what the other reader shows there, coarsely."""
        level = self._levels[number]
        assert level is not None
        row, column = divmod(int(level.counts.argmax()), level.across)
        corner = (column * level.tile[0], row * level.tile[1])
        x, y = (math.floor(start * self.downsamples[number]) for start in corner)
        limits = zip(level.tile, self.sizes[number], corner)
        width, height = (min(side, limit - start) for side, limit, start in limits)
        try:
            # The corner may fall between pixels, where the other reader may interpolate.
            ours, theirs = (
                cv2.resize(pixels, (8, 8), interpolation=cv2.INTER_AREA).astype(float)
                for pixels, _ in (read(number, x, y, width, height) for read in (self._direct, self._other.region))
            )
        except Refusal:
            return False
        return float(np.abs(ours - theirs).mean()) <= MAX_DIFFERENCE


def jpeg_levels(path: Path, sizes: Sequence[tuple[int, int]]) -> list[JpegLevel | None]:
    """Find the levels of a TIFF that are plain JPEG tiles.

    Args:
        path: of the TIFF.
        sizes: (width, height) of the levels.

    Returns:
        For each level where its tiles lie; None where it is anything else, or where two directories have its size.
    """
    import tifffile

    found: dict[tuple[int, int], list[JpegLevel | None]] = {}
    try:
        with tifffile.TiffFile(path) as tiff:
            first: Any = tiff.pages.first
            pages: Iterable[Any] = itertools.chain(tiff.pages, first.pages if first.subifds else ())
            for page in itertools.islice(pages, MAX_DIRECTORIES):
                if page.is_tiled:
                    found.setdefault((page.imagewidth, page.imagelength), []).append(_jpeg_level(page))
    except Exception:  # tifffile raises anything on broken input; the other reader goes its own way
        return [None for _ in sizes]
    return [found[size][0] if len(found.get(size, ())) == 1 else None for size in sizes]


def from_whole_pixels(
    read: Callable[[int, int, int, int], np.ndarray],
    limit: tuple[int, int],
    downsample: float,
    x: int,
    y: int,
    width: int,
    height: int,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Read a region that may begin between two pixels of a level; see :class:`~eosin.data_tools.pyramids.Pixels`.

    Args:
        read: gives the pixels [height, width, 3] at left, top, width and height in whole pixels of the level.
        limit: width and height of the level.
        downsample: of the level.
        x: left edge, in pixels of the finest level.
        y: upper edge.
        width: of the region, in pixels of the level.
        height: likewise.
    """
    corner = x / downsample, y / downsample
    left, top = (int(start + 1e-6) for start in corner)
    shift = tuple(offset if offset > 1e-3 else 0.0 for offset in (corner[0] - left, corner[1] - top))
    wide, high = (side + (offset > 0) for side, offset in zip((width, height), shift))
    return read(left, top, min(wide, limit[0] - left), min(high, limit[1] - top)), (shift[0], shift[1])


def _jpeg_level(page: Any) -> JpegLevel | None:
    tile, tables = (page.tilewidth, page.tilelength), page.jpegtables or b"\xff\xd8\xff\xd9"
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    plain = (
        page.compression == 7
        and page.photometric in SPACES
        and (page.samplesperpixel, page.bitspersample, page.planarconfig, page.fillorder) == (3, 8, 1, 1)
        and (page.imagedepth, page.tiledepth) == (1, 1)
        and 0 < math.prod(tile) <= MAX_TILE_PIXELS
        and len(page.dataoffsets) == len(page.databytecounts) == across * down
        and (tables[:2], tables[-2:]) == (b"\xff\xd8", b"\xff\xd9")
    )
    if not plain:
        return None
    space = SPACES[page.photometric]
    # Without Adobe's marker libjpeg guesses the color transform, and takes RGB for YCbCr.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([space == "YCbCr"])
    head = tables[:2] + adobe + tables[2:-2]
    offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    return JpegLevel(tile, across, offsets, counts, space, head)
