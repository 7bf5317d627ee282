"""Time tiling end to end, slide to shards, beside histolab and wsi-patching; print rows of docs/benchmarks.md.

    python benchmarks/tiling.py --work FOLDER --histolab PYTHON --wsi-patching PYTHON
    python benchmarks/tiling.py --work FOLDER --runs 9 processes mask

``tissue`` leaves each tool its own search for tissue, ``every`` has all of them write the same 6,400 tiles;
``processes`` is four slides in two processes of ours against one; ``mask`` is the tissue mask alone. The peers' pins
exclude one another and ours, so each is given as the interpreter of an environment of its own.

The slide is a phantom's scene of 4 x 4 mm, mirrored to 8 x 8 mm with glass around it: 20,480 x 20,480 px of 0.5 µm. It
is made once in FOLDER. A run is a fresh process bound to one core, from its start to its exit, with the slide in the
page cache; runs alternate. Tiles are counted in what was written; memory is the peak of the largest process. Every run
becomes a line of FOLDER/runs.jsonl, with its processor time.
"""

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SIDE = 20_480
MPP = 0.5
TILE = 256
# Of an Aperio file: the thumbnail's 8 µm/px is the last.
DOWNSAMPLES = (1, 4, 16)
SCENE_UM = 4096.0
IMAGES = (".jpg", ".png")
COLUMNS = "| work | peer | ours | theirs | ratio | machine | date | command |\n|---|---|---|---|---|---|---|---|"


def eosin(slides: list[Path], out: Path, every: bool, workers: int) -> None:
    """Our shards: JPEG of quality 90, 4:4:4; ``every`` place of the grid is given as coordinates."""
    from eosin.data_tools.tile import tile_slides

    coords = None
    if every:
        coords = out.with_suffix(".csv")
        starts = range(0, SIDE, TILE)
        places = [f"{slide.stem},{x},{y}" for slide in slides for y in starts for x in starts]
        coords.write_text("\n".join(["slide,x,y", *places]) + "\n", encoding="utf-8")
    summary = tile_slides(slides, out, mpp=MPP, tile_size=TILE, workers=workers, coords=coords)
    if summary.refused:
        sys.exit(str(summary))


def histolab(slides: list[Path], out: Path, every: bool, jpeg: bool) -> None:
    """Files of one slide: its own tissue mask and check of tiles, or neither.

    GridTiler saves RGBA, which JPEG refuses; ``jpeg`` converts before saving.
    """
    import numpy as np
    from histolab.masks import BinaryMask, TissueMask
    from histolab.slide import Slide
    from histolab.tile import Tile
    from histolab.tiler import GridTiler

    class Whole(BinaryMask):
        def _mask(self, slide: Slide) -> np.ndarray:
            return np.ones((SIDE // 32, SIDE // 32), bool)

    if jpeg:
        Tile.save = lambda tile, path: tile.image.convert("RGB").save(path)
    (slide,) = slides
    out.mkdir()
    tiler = GridTiler((TILE, TILE), level=0, check_tissue=not every, suffix=".jpg" if jpeg else ".png")
    tiler.extract(Slide(slide, out), Whole() if every else TissueMask(), log_level="ERROR")


def wsi_patching(slides: list[Path], out: Path, every: bool, jpeg: bool) -> None:
    """WebDataset shards as in its README, with its filter of tiles without contrast, or none.

    It has an encoder for PNG only; ``jpeg`` puts Pillow's JPEG of quality 90, 4:4:4, in its place. Its import asks for
    PyTorch, which nothing here needs; to its advantage the two modules that do are left out.
    """
    import io
    from types import SimpleNamespace

    from PIL import Image

    for module in ("stream_writers.torch_stream_writer", "materialize_writers.webdataset.webdataset_loader"):
        left_out: Any = SimpleNamespace(TorchStreamWriter=None, WebDatasetLoader=None)
        sys.modules[f"wsi_patching.writers.{module}"] = left_out
    from wsi_patching import LowContrastBackgroundFilter, PatchExtractor, PNGEncoder, WebDatasetWriter, WSIGrid

    class JPEGEncoder(PNGEncoder):
        def _encode_one(self, patch: Any) -> bytes:
            file = io.BytesIO()
            Image.fromarray(patch).save(file, "JPEG", quality=90, subsampling=0)
            return file.getvalue()

    pipeline = WSIGrid(slides=[str(slide) for slide in slides], resolution=MPP, unit="mpp")
    pipeline = pipeline.then(PatchExtractor(tile_size=TILE, stride=TILE))
    if not every:
        pipeline = pipeline.then(LowContrastBackgroundFilter())
    encoder = JPEGEncoder(threads=1) if jpeg else PNGEncoder(threads=1)
    pipeline.then(encoder).to(WebDatasetWriter(outdir=out)).materialize(num_workers=1)


TOOLS: dict[str, Callable[[list[Path], Path, bool], None]] = {
    "eosin": partial(eosin, workers=1),
    "eosin-two": partial(eosin, workers=2),
    "histolab": partial(histolab, jpeg=False),
    "histolab-jpeg": partial(histolab, jpeg=True),
    "wsi-patching": partial(wsi_patching, jpeg=False),
    "wsi-patching-jpeg": partial(wsi_patching, jpeg=True),
}
NOTES = {
    "histolab": "PNG files, as GridTiler can",
    "histolab-jpeg": "its tiles converted, JPEG files of Pillow's quality 75",
    "wsi-patching": "PNG shards, as it can",
    "wsi-patching-jpeg": "a JPEG encoder given to it",
}


def measure(tool: str, python: str, slides: list[Path], work: Path, every: bool) -> dict[str, Any]:
    """Run a tool in a process of its own; return tiles, seconds of wall and processor, and peak memory in MiB."""
    out = work / "out"
    for left in (out, out.with_name("out.unfinished")):
        shutil.rmtree(left, ignore_errors=True)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: 2 if tool.endswith("-two") else 1]))
    command = [python, __file__, "--one", tool, cores, str(int(every)), str(out), *map(str, slides)]
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    tiles = count(out)
    if process.returncode or not tiles:
        sys.exit(f"{tool}: exit code {process.returncode}, {tiles} tiles; see {work / 'log.txt'}")
    run = {"tool": tool, "every": every, "slides": len(slides), "tiles": tiles, "wall_s": round(wall, 3)}
    run |= {"cpu_s": round(used.ru_utime + used.ru_stime, 3), "peak_mib": round(used.ru_maxrss / 1024)}
    with (work / "runs.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(run), file=file)
    print(json.dumps(run), file=sys.stderr)
    shutil.rmtree(out)
    return run


def count(out: Path) -> int:
    """Images under a folder, as files or in tars."""
    tiles = 0
    for path in out.rglob("*"):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                tiles += sum(name.endswith(IMAGES) for name in tar.getnames())
        elif path.parent.name != "qc":
            tiles += path.suffix in IMAGES
    return tiles


def make_slide(path: Path) -> None:
    """Write the slide as Aperio's scanners do, of JPEG tiles; its tissue is a phantom's."""
    import cv2
    import numpy as np
    import simplejpeg
    import tifffile

    from eosin.data_tools.phantom import WHITE, render
    from eosin.data_tools.phantom_scene import scene

    def tiles(image: np.ndarray):
        for top in range(0, image.shape[0], TILE):
            for left in range(0, image.shape[1], TILE):
                tile = np.ascontiguousarray(image[top : top + TILE, left : left + TILE])
                yield simplejpeg.encode_jpeg(tile, 85, "RGB", "420")

    drawn = render(scene("cribriform", seed=0, side_um=SCENE_UM), MPP)
    image = np.concatenate([drawn, drawn[:, ::-1]], axis=1)
    image = np.concatenate([image, image[::-1]])
    glass = (SIDE - len(image)) // 2
    image = np.pad(image, ((glass, glass), (glass, glass), (0, 0)), constant_values=int(WHITE))
    temporary = path.with_suffix(".part")
    with tifffile.TiffWriter(temporary) as tiff:
        for downsample in DOWNSAMPLES:
            size = (SIDE // downsample, SIDE // downsample)
            level = image if downsample == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            tiff.write(
                tiles(level),
                shape=level.shape,
                dtype=level.dtype,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                subsampling=(2, 2),
                description=f"Aperio Image Library (SYNTHETIC, eosin phantom)\n{SIDE}x{SIDE}|AppMag = 20|MPP = {MPP}",
                metadata=None,
            )
    temporary.rename(path)


def version(python: str, package: str) -> str:
    """Of an installed package, asked of its interpreter."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def beside_peers(slide: Path, work: Path, every: bool, pythons: dict[str, str], runs: int, command: str) -> None:
    """Print a row for each way of each peer; ours is measured once a round."""
    tools = [tool for tool in TOOLS if tool.removesuffix("-jpeg") in pythons]
    made = {tool: [] for tool in ["eosin", *tools]}  # type: dict[str, list[dict[str, Any]]]
    for _ in range(runs):
        for tool in made:
            python = pythons.get(tool.removesuffix("-jpeg"), sys.executable)
            made[tool].append(measure(tool, python, [slide], work, every))
    for tool in tools:
        peer = tool.removesuffix("-jpeg")
        what = "all tiles of a slide" if every else "the tissue of a slide"
        peer = f"{peer} {version(pythons[peer], peer)} ({NOTES[tool]})"
        show(f"{what} of 20,480 x 20,480 px to shards", peer, made["eosin"], made[tool], command)


def processes(slide: Path, work: Path, runs: int, command: str) -> None:
    """Print a row of ours in two processes against one, on four slides."""
    slides = [slide.with_name(f"{slide.stem}-{number}.svs") for number in range(4)]
    for number, copy in enumerate(slides):
        # Slides of the same bytes count as one; a TIFF's reader never sees what is behind its end.
        copy.write_bytes(slide.read_bytes() + bytes([number]))
    two: list[dict[str, Any]] = []
    one: list[dict[str, Any]] = []
    for _ in range(runs):
        for tool, made in (("eosin-two", two), ("eosin", one)):
            made.append(measure(tool, sys.executable, slides, work, False))
    show("the tissue of four such slides, in two processes", "Eosin in one process", two, one, command)


def mask(slide: Path, runs: int, command: str) -> None:
    """Print a row of the tissue mask of a slide of 20 x 20 mm at 8 µm/px, 2560 x 2560 px, against its aim."""
    import cv2
    import numpy as np
    from run import Case, row

    from eosin.data_tools.slide import Slide
    from eosin.data_tools.tissue import find_tissue

    cv2.setNumThreads(1)
    with Slide(slide) as opened:
        thumbnail = np.tile(opened.thumbnail(8.0), (2, 2, 1))
    rates = []
    for _ in range(runs):
        began = time.perf_counter()
        find_tissue(thumbnail, 8.0)
        rates.append(1 / (time.perf_counter() - began))
    case = Case("tissue mask of 20 x 20 mm at 8 µm/px", "the aim, 0.2 s a slide", 1, lambda: None, lambda: None)
    print(row(case, (rates, [5.0]), command), flush=True)


def show(work: str, peer: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], command: str) -> None:
    """Print runs of ours and a peer's as a row: tiles a second over the tiles that each wrote."""
    from run import Case, row

    rates = tuple([run["tiles"] / run["wall_s"] for run in made] for made in (ours, theirs))
    tiles, peaks = (
        [f"{statistics.median(run[what] for run in made):,.0f}" for made in (ours, theirs)]
        for what in ("tiles", "peak_mib")
    )
    work += f"; {tiles[0]} tiles against {tiles[1]}, peak memory {peaks[0]} MiB against {peaks[1]}"
    print(row(Case(work, peer, 1, lambda: None, lambda: None), rates, command), flush=True)


def main() -> None:
    """Run the named comparisons and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("tissue", "every", "processes", "mask")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the slide and what is written")
    parser.add_argument("--histolab", metavar="PYTHON", help="an interpreter that has histolab")
    parser.add_argument("--wsi-patching", metavar="PYTHON", help="an interpreter that has wsi-patching")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(names)):
        sys.exit(f"there is no comparison '{unknown[0]}'; valid: {', '.join(names)}")
    args.work.mkdir(parents=True, exist_ok=True)
    slide = args.work / "synthetic.svs"
    if not slide.exists():
        make_slide(slide)
    slide.read_bytes()  # into the page cache
    peers = {"histolab": args.histolab, "wsi-patching": args.wsi_patching}
    pythons = {peer: python for peer, python in peers.items() if python}
    print(COLUMNS)
    for name in args.names or names:
        command = f"python benchmarks/tiling.py {name}"
        if name == "processes":
            processes(slide, args.work, args.runs, command)
        elif name == "mask":
            mask(slide, args.runs, command)
        else:
            beside_peers(slide, args.work, name == "every", pythons, args.runs, command)


def one(tool: str, cores: str, every: str, out: str, *slides: str) -> None:
    """A run, in the process that :func:`measure` starts."""
    os.sched_setaffinity(0, set(map(int, cores.split(","))))
    TOOLS[tool]([Path(slide) for slide in slides], Path(out), bool(int(every)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        main()
