"""Images that exist already to a shard set. JPEGs of the right size are stored byte for byte, and so are 8-bit PNGs;
everything else is scaled and encoded. What cannot be decoded is refused and listed. No file but those given is read.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import Refusal, UserError
from eosin.data_tools.files import atomic_dir, read_csv, read_json, sha256
from eosin.data_tools.gray import Encoded, Window, measure_window, read_plane, to_8_bits
from eosin.data_tools.pack_sources import DICOM, Image, Source, open_source
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import MAX_SIDE, ShardWriter, slide_key
from eosin.data_tools.slide import MPP_RANGE, read_image
from eosin.data_tools.slide_names import facts_of
from eosin.data_tools.sources import Summary, already_made, fingerprint, shorten

if TYPE_CHECKING:
    import pandas as pd

# An image's bytes as stored, their ending, and its (width, height) as it came.
Encoding = tuple[bytes, str, tuple[int, int]]
MODALITIES = ("brightfield", "fluorescence", "xray")
QUALITY = 95
SUBSAMPLING = "444"
# More bad images than this share mean that something else is wrong than a few files.
MAX_REFUSED = 0.5
SAMPLED_IMAGES = 256  # over which a window is measured, spread evenly
ENOUGH_SIZES = 1000  # images after which different sizes are reported without looking at the rest
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def pack_images(
    given: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    manifest: Path | str | None = None,
    label: str | None = None,
    group: str | None = None,
    tile_size: int | None = None,
    mpp: float | None = None,
    stain: str | None = None,
    modality: str = "brightfield",
    channel: int | None = None,
    window: tuple[float, float] | None = None,
) -> Summary:
    """Pack images into a new shard set; the same input gives the same bytes.

    Columns come from a manifest, or from the source itself: ``slide`` (else each image is a slide of its own),
    ``patient``, ``site``, ``stain``, ``label``; ``x``, ``y`` and ``mpp`` of containers are those of the tile. In
    folders and zips without a manifest the first folder on an image's way is its label. Memory grows with the number of
    slides, not of images.

    Args:
        given: a folder of images, or files or folders of zips, HDF5, Parquet or WebDataset tars; several of one kind.
        out: a new folder; a finished one of the same input and settings is left as it is.
        manifest: CSV with the column ``path``, relative to the one folder or zip; further columns are kept, as text.
        label: the column that is the label, kept as ``label`` beside its own name.
        group: the column whose value is the slide's name.
        tile_size: scale the shorter side to it, then cut the middle; by default all images must have one size.
        mpp: µm/px of the tiles as stored, None where unknown.
        stain: of all images that have no column ``stain``; by default "H&E", and "none" in other modalities.
        modality: "brightfield" is 8-bit RGB. "fluorescence" and "xray" are one channel of any depth, stored as 8-bit
            gray: images of 8 bits as they are, others through one window of values for the whole set.
        channel: which, from 0, where an image has several that differ.
        window: values that become 0 and 255; by default the percentiles 0.1 and 99.9 over a sample of the set.

    Raises:
        UserError: bad arguments, a source that is broken as a whole, a path that leaves its folder, different sizes
            without ``tile_size``, or mostly bad images; then nothing is left behind.
    """
    out = Path(out)
    gray = modality != "brightfield"
    _check(tile_size, mpp, modality, channel, window)
    paths = [Path(path) for path in ([given] if isinstance(given, (str, Path)) else given)]
    source = open_source(paths, Path(manifest) if manifest else None, label, group)
    if not source.count:
        raise UserError(f"{source.what} holds no image; nothing was written")
    config: dict[str, Any] = {
        "verb": "pack",
        "label": label,
        "group": group,
        "tile_size": tile_size,
        "mpp": mpp,
        "stain": stain or ("none" if gray else "H&E"),
        "quality": QUALITY,
        "subsampling": SUBSAMPLING,
        "manifest": sha256(manifest) if manifest else None,
        "input": fingerprint(source.files),
    }
    if gray:
        asked = list(window) if window else "measured"
        config |= {"modality": modality, "channel": channel, "window": asked, "measured_window": _measured_before(out)}
    if already_made(out, config):
        done = f"{out} holds these tiles already, of the same images and settings; nothing to do"
        return Summary([done], _refused_before(out))
    scale = Window(*window) if window else _measure(source, channel) if gray else None
    if gray:
        config["measured_window"] = [scale.low, scale.high] if scale and scale.measured else None
    encode: Callable[[Image], Encoding] = partial(_encode, tile_size=tile_size)
    if gray:
        encode = partial(_encode_gray, tile_size=tile_size, channel=channel, window=scale)
    with atomic_dir(out) as temporary:
        dataset, refused = _write(temporary, source, encode, config)
    lines = [f"{out}: {dataset['tiles']} tiles of {dataset['tile_size']} px of {dataset['slides']} slides"]
    if scale:
        lines.append(f"values from {scale.low:g} to {scale.high:g} are stored as 0 to 255")
    if refused:
        lines.append(f"the refused are listed in {out / 'refused.csv'}")
    return Summary(lines, refused, source.notices)


def scale_to_tile(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to ``size`` with antialiasing and cut the middle: [H, W, 3] or [H, W] of uint8."""
    import cv2

    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if scale != 1:
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        pixels = cv2.resize(pixels, target, interpolation=method)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _check(
    tile_size: int | None, mpp: float | None, modality: str, channel: int | None, window: tuple[float, float] | None
) -> None:
    if tile_size is not None and not 16 <= tile_size <= 4096:
        raise UserError(f"--tile-size {tile_size} is out of range; valid: 16 to 4096 px")
    if mpp is not None and not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(f"--mpp {mpp} is out of range; valid: {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px")
    if modality not in MODALITIES:
        raise UserError(f"--modality {modality} is unknown; valid: {', '.join(MODALITIES)}")
    for option, value in (("--channel", channel), ("--window", window)):
        if value is not None and modality == "brightfield":
            raise UserError(f"{option} goes with --modality fluorescence or xray; brightfield is 8-bit RGB")
    if channel is not None and channel < 0:
        raise UserError(f"--channel {channel} is out of range; channels count from 0")
    if window is not None and not (np.isfinite(window).all() and window[0] < window[1]):
        raise UserError(f"--window {window[0]:g} {window[1]:g} is not a range; give LOW and a greater HIGH")


def _measured_before(out: Path) -> list[float] | None:
    """The window that a finished set was packed with, so that the same command need not measure it again."""
    if not (out / "dataset.json").is_file():
        return None
    config = read_json(out / "dataset.json", "the description of a shard set").get("config")
    return config.get("measured_window") if isinstance(config, dict) else None


def _refused_before(out: Path) -> list[tuple[str, str]]:
    listed = out / "refused.csv"
    rows = read_csv(listed, ["path", "reason"]) if listed.is_file() else []
    return [(row["path"], row["reason"]) for row in rows]


def _measure(source: Source, channel: int | None) -> Window | None:
    """The window of a set, over images that are spread evenly."""
    step = -(-source.count // SAMPLED_IMAGES)
    sample = islice(source.images(), 0, None, step)

    def planes() -> Iterator[np.ndarray]:
        for image in progress(sample, total=-(-source.count // step), desc="window", unit="images"):
            try:
                yield read_plane(_read(image), channel)
            except Refusal:
                continue  # it will be listed when its turn comes

    return measure_window(planes(), source.what)


def _write(
    folder: Path, source: Source, encode: Callable[[Image], Encoding], config: dict[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Write the shard set; return what ``dataset.json`` says, and (name, reason) of each image that was refused."""
    tile_size, mpp = config["tile_size"], config["mpp"]
    writer, slides = ShardWriter(folder), _Slides()
    refused: list[tuple[str, str]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    scales: set[float | None] = set()
    for image in progress(source.images(), total=source.count, desc="pack", unit="images"):
        name, facts, place = _place(image, config["label"], config["group"])
        slide = slides.note(name, facts)
        try:
            data, extension, size = encode(image)
        except Refusal as refusal:
            refused.append((image.listed, str(refusal)))
            slides.refused[slide] += 1
            continue
        sizes[size] += 1
        if tile_size is None and (len(sizes) > 1 or size[0] != size[1]):
            if sizes.total() >= ENOUGH_SIZES:
                break
            continue  # nothing will be written; sizes are to be named
        if place["mpp"]:
            place["mpp"] *= min(size) / (tile_size or min(size))
        if mpp is not None:
            place["mpp"] = mpp
        scales.add(place["mpp"])
        writer.add(slide_key(image.name), data, extension, facts | {"slide": name} | place, slide)
        slides.add(slide, place["mpp"])
    if not sizes or len(refused) > max(MAX_REFUSED * source.count, 10):
        listed = shorten([f"{path}: {reason}" for path, reason in refused], limit=3)
        bad = f"{len(refused)} of {source.count} images of {source.what}"
        raise UserError(f"{bad} cannot be used, so nothing was written; {listed}")
    side = tile_size or _one_size(source.what, sizes)
    if refused:
        with (folder / "refused.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *refused])
    common = scales.pop() if len(scales) == 1 else None
    return writer.finish(slides.table(config["stain"]), tile_size=side, mpp=common, config=config), refused


def _place(image: Image, label: str | None, group: str | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An image's slide, its facts, and its x, y and mpp; a fact whose name the tile owns goes on as ``given_...``."""
    facts = dict(image.facts)
    if label is not None and label in facts:
        facts["label"] = facts[label]
    slide = facts.get(group or "slide")
    place: dict[str, Any] = {"x": 0, "y": 0, "mpp": None}
    at = [facts.get(axis) for axis in "xy"]
    if all(type(value) is int and abs(value) < 1 << 31 for value in at):
        place |= {axis: facts.pop(axis) for axis in "xy"}
    if type(facts.get("mpp")) in (int, float) and MPP_RANGE[0] <= facts["mpp"] <= MPP_RANGE[1]:
        place["mpp"] = facts.pop("mpp")
    if group in (None, "slide"):
        facts.pop("slide", None)
    facts = {f"given_{name}" if name in ("key", "slide", *place) else name: value for name, value in facts.items()}
    return image.name if slide in (None, "") else str(slide), facts, place


def _read(image: Image) -> bytes | np.ndarray:
    """An image's pixels, or bytes that begin as those of an image."""
    data = image.read()
    if isinstance(data, np.ndarray):
        return data
    if not data:
        raise Refusal("an empty file (0 bytes)")
    if data[128:132] == b"DICM":
        raise Refusal(DICOM)
    if not data.startswith(MAGIC):
        raise Refusal("not readable as an image: neither BMP, JPEG, PNG nor TIFF")
    return data


def _encode(image: Image, tile_size: int | None) -> Encoding:
    """An image as 8-bit RGB, or as it is."""
    import simplejpeg

    data = _read(image)
    pixels = _rgb(data) if isinstance(data, np.ndarray) else read_image(Encoded(data))  # type: ignore[arg-type]
    height, width = pixels.shape[:2]
    as_it_is = tile_size is None or height == width == tile_size
    extension = _storable(data, ("RGB",)) if as_it_is and isinstance(data, bytes) else None
    if extension and isinstance(data, bytes):
        return data, extension, (width, height)
    tile = pixels if as_it_is else scale_to_tile(pixels, tile_size or 0)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(tile), QUALITY, "RGB", SUBSAMPLING)
    return data, "jpg", (width, height)


def _encode_gray(image: Image, tile_size: int | None, channel: int | None, window: Window | None) -> Encoding:
    """One channel of an image as 8-bit gray, or as it is."""
    import simplejpeg

    data = _read(image)
    plane = read_plane(data, channel)
    tile = to_8_bits(plane, window)
    height, width = plane.shape
    as_it_is = tile_size is None or height == width == tile_size
    extension = _storable(data, ("L",)) if as_it_is and window is None and isinstance(data, bytes) else None
    if extension and isinstance(data, bytes):
        return data, extension, (width, height)
    tile = tile if as_it_is else scale_to_tile(tile, tile_size or 0)
    return (
        simplejpeg.encode_jpeg(np.ascontiguousarray(tile)[..., None], QUALITY, "GRAY", "Gray"),
        "jpg",
        (width, height),
    )


def _storable(data: bytes, png: tuple[str, ...]) -> str | None:
    """The ending under which a file can be stored as it is: an upright JPEG, or a PNG of such a mode; else None."""
    from PIL import Image as Pillow

    with Pillow.open(Encoded(data)) as image:
        if image.format == "JPEG" and image.mode in ("L", *png) and image.getexif().get(0x0112, 1) == 1:
            return "jpg"
        return "png" if image.format == "PNG" and image.mode in png and "transparency" not in image.info else None


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels of an array as 8-bit RGB, [H, W, 3]."""
    if pixels.dtype != np.uint8:
        raise Refusal(f"its values are {pixels.dtype}; 8 bits a channel are read, and gray of any with --modality")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] not in (1, 3):
        raise Refusal(f"it has {pixels.shape[2]} channels; RGB and gray are read, and one of many with --modality")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _one_size(what: str, sizes: Counter[tuple[int, int]]) -> int:
    """The side that all images have."""
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        found = shorten([f"{width} x {height} ({n})" for (width, height), n in sizes.most_common()])
        raise UserError(f"{what} holds images of different sizes or not square: {found}; give --tile-size")
    ((side, _),) = sizes
    if side > MAX_SIDE:
        raise UserError(f"{what} holds images of {side} px, above {MAX_SIDE}; give --tile-size")
    return side


class _Slides:
    """Collects the slides table, one row a slide in order of appearance."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.refused: Counter[int] = Counter()
        self._tiles: Counter[int] = Counter()
        self._mpp: dict[int, float] = {}
        self._facts: list[dict[str, Any]] = []
        self._columns: dict[str, bool] = {}  # whether a column is the same for all images of each slide

    def note(self, name: str, facts: dict[str, Any]) -> int:
        """The slide's number. What is not the same for all its images is no fact of a slide."""
        number = self.names.setdefault(name, len(self.names))
        if number == len(self._facts):
            self._facts.append(facts)
        first = self._facts[number]
        for column in facts if first is facts else {**first, **facts}:
            same = column in first and column in facts and first[column] == facts[column]
            self._columns[column] = self._columns.get(column, True) and same
        return number

    def add(self, number: int, mpp: float | None) -> None:
        """Count a tile."""
        self._tiles[number] += 1
        mpp = np.nan if mpp is None else mpp
        self._mpp[number] = mpp if self._mpp.get(number, mpp) == mpp else np.nan

    def table(self, stain: str) -> pd.DataFrame:
        """One row a slide."""
        import pandas as pd

        kept = [column for column, same in self._columns.items() if same]
        rows = []
        for name, number in self.names.items():
            facts = self._facts[number]
            known = facts_of(name) | {c: facts[c] for c in kept if isinstance(facts.get(c), (str, int, float))}
            mpp = self._mpp.get(number, np.nan)
            done = self._tiles[number] > 0
            ours = {
                "slide": name,
                "source": name,
                "patient": str(known.pop("patient", "") or name),
                "site": str(known.pop("site", "") or ""),
                "stain": str(known.pop("stain", "") or stain),
                "mpp": mpp,
                "mpp_source": "" if np.isnan(mpp) else "override",
                "tiles": self._tiles[number],
                "dropped_refused": self.refused[number],
                "state": "done" if done else "refused",
                "reason": "" if done else "none of its images can be used",
            }
            rows.append(ours | {f"given_{column}" if column in ours else column: v for column, v in known.items()})
        table = pd.DataFrame(rows)
        for column in table:
            values = table[column].dropna()
            kinds = {"number" if type(value) in (int, float) else type(value).__name__ for value in values}
            if table[column].dtype == object and (len(kinds) > 1 or "number" in kinds):
                table[column] = values.map(str)  # a column of Parquet is of one type
        return table
