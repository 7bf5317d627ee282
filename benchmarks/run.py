"""Time Eosin beside a peer on the same work in the same process, alternately, and print one table row a comparison.

    python benchmarks/run.py                   every comparison but those that need a GPU, a checkout or more packages
    python benchmarks/run.py stain read        some of them
    python benchmarks/run.py --runs 15 stain

A row holds work, peer, ours and theirs (median and range of items a second), the ratio of medians, machine, date and
command; it belongs in docs/benchmarks.md. Threads are pinned to one. Peers are test dependencies.
"""

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from machine import machine


class Case(NamedTuple):
    """Two functions that do the same work on ``items`` items."""

    work: str
    peer: str
    items: int
    ours: Callable[[], object]
    theirs: Callable[[], object]


@contextmanager
def read() -> Iterator[Case]:
    """Raw samples of a shard set in shuffled order, against webdataset's sequential iteration."""
    import webdataset

    with _many_tiles() as shards:

        def ours() -> None:
            for _ in _shuffled(shards):
                pass

        def theirs() -> None:
            for _ in webdataset.WebDataset([str(t) for t in shards.tars], shardshuffle=False):
                pass

        yield Case("read raw samples, shuffled", _version("webdataset", "sequential"), len(shards), ours, theirs)


@contextmanager
def decode() -> Iterator[Case]:
    """Read and decode, against webdataset with Pillow."""
    import webdataset

    from eosin.data_tools.stream import decode

    with _many_tiles() as shards:

        def ours() -> None:
            for image in _shuffled(shards):
                decode(image)

        def theirs() -> None:
            for _ in webdataset.WebDataset([str(t) for t in shards.tars], shardshuffle=False).decode("rgb8"):
                pass

        yield Case("read and decode 256-px JPEGs", _version("webdataset", "Pillow"), len(shards), ours, theirs)


@contextmanager
def decoder(library: str) -> Iterator[Case]:
    """JPEG bytes to RGB by simplejpeg, which the stream uses, against another library."""
    import cv2
    import numpy as np
    import torch
    from torchvision.io import decode_jpeg

    from eosin.data_tools.stream import decode

    cv2.setNumThreads(1)
    peers: dict[str, tuple[str, Callable[[bytes], object]]] = {
        "opencv": (
            "opencv-python-headless",
            lambda data: cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB),
        ),
        "torchvision": ("torchvision", lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))),
    }
    package, theirs = peers[library]
    with _tiles() as shards:
        files = [shards.image(tile) for tile in range(len(shards))]
    yield Case(
        "decode 256-px JPEGs",
        _version(package, "in memory"),
        len(files),
        lambda: [decode(data) for data in files],
        lambda: [theirs(data) for data in files],
    )


@contextmanager
def litdata(jpeg: bool) -> Iterator[Case]:
    """Shuffled samples, raw or decoded, against litdata's StreamingDataset over its own format, without workers."""
    import litdata
    from peers import write_litdata

    with _many_tiles() as shards:
        folder = shards.tars[0].parents[1] / "litdata"
        write_litdata(shards, folder, jpeg)
        peer = litdata.StreamingDataset(str(folder), shuffle=True)
        yield _stream_case(shards, jpeg, _version("litdata", "torchvision" if jpeg else "bytes"), lambda: iter(peer))


@contextmanager
def mosaic(jpeg: bool) -> Iterator[Case]:
    """Shuffled samples, raw or decoded, against mosaicml-streaming's StreamingDataset over its own format."""
    import numpy as np
    import streaming
    from peers import write_mosaic

    with _many_tiles() as shards:
        folder = shards.tars[0].parents[1] / "mosaic"
        write_mosaic(shards, folder, jpeg)
        streaming.base.util.clean_stale_shared_memory()
        peer = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=256)

        def theirs() -> Iterator[object]:
            for sample in peer:
                yield np.asarray(sample["image"]) if jpeg else sample["image"]

        yield _stream_case(shards, jpeg, _version("mosaicml-streaming", "Pillow" if jpeg else "bytes"), theirs)


@contextmanager
def stain() -> Iterator[Case]:
    """Macenko normalization with fits at hand, against torchstain, which fits each tile."""
    from eosin.ssl.stain import macenko
    from eosin.ssl.stain.density import mix
    from eosin.ssl.stain.reference import BUILT_IN

    images = _images(32)
    fits = macenko.fit(images)
    matrices = macenko.transform(fits.vectors, fits.maxima, *BUILT_IN["eosin"].tensors()[:2])
    yield _stain_case("Macenko with a slide's fit", images, lambda: mix(images, matrices))


@contextmanager
def stain_fit() -> Iterator[Case]:
    """Macenko with a fit for each tile, against torchstain."""
    import torch

    from eosin.ssl.config import Stain
    from eosin.ssl.stain.normalizer import describe, make_normalizer

    images = _images(32)
    normalizer = make_normalizer(describe(Stain(normalize="tile")), None)
    assert normalizer is not None
    slides = torch.zeros(len(images), dtype=torch.long)
    yield _stain_case("Macenko, fitted for each tile", images, lambda: normalizer(images, slides))


@contextmanager
def stain_gpu() -> Iterator[Case]:
    """Macenko normalization with fits at hand on a GPU, against torchstain on the same GPU."""
    import torch

    from eosin.ssl.stain import macenko
    from eosin.ssl.stain.density import mix
    from eosin.ssl.stain.reference import BUILT_IN

    if not torch.cuda.is_available():
        sys.exit("stain-gpu: there is no CUDA device")
    images = _mixtures(32).cuda().repeat(16, 1, 1, 1)
    fits = macenko.fit(images)
    matrices = macenko.transform(fits.vectors, fits.maxima, *BUILT_IN["eosin"].tensors("cuda")[:2])

    def ours() -> None:
        mix(images, matrices)
        torch.cuda.synchronize()

    case = _stain_case(f"Macenko with a slide's fit on {torch.cuda.get_device_name()}", images, ours)
    yield case._replace(theirs=lambda: (case.theirs(), torch.cuda.synchronize()))


@contextmanager
def randstainna() -> Iterator[Case]:
    """RandStainNA in Lab, against its authors' class (a checkout of yiqings/RandStainNA, MIT, in RANDSTAINNA)."""
    import torch
    from torchvision.transforms.functional import to_pil_image

    from eosin.ssl.stain import augment, lab

    where = Path(os.environ.get("RANDSTAINNA", ""))
    if not (where / "randstainna.py").is_file():
        sys.exit("randstainna: set RANDSTAINNA to a checkout of github.com/yiqings/RandStainNA")
    sys.path.insert(0, str(where))
    import cv2
    from randstainna import RandStainNA

    cv2.setNumThreads(1)
    peer = RandStainNA(str(where / "CRC_LAB_randomTrue_n0.yaml"))
    images = _images(32)
    pictures = [to_pil_image(image) for image in images]
    keys, on = torch.arange(len(images)), torch.ones(len(images), dtype=torch.bool)
    means = torch.tensor([62.0, -11.0, 23.0]) + torch.randn(20, 3)
    deviations = torch.tensor([14.0, 6.0, 8.0]) + 0.1 * torch.randn(20, 3)
    yield Case(
        "RandStainNA, 256-px tiles, statistics included",
        "RandStainNA 4897b03 (OpenCV, 8-bit Lab)",
        len(images),
        lambda: augment.randstainna(images, keys, lab.statistics(images), means, deviations, 1.0, on),
        lambda: [peer(picture) for picture in pictures],
    )


@contextmanager
def crops() -> Iterator[Case]:
    """DINOv2's ten crops of JPEGs, against its class (a checkout of facebookresearch/dinov2 in DINOV2_CHECKOUT)."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from eosin.data_tools.stream import decode
    from eosin.ssl.augment import multi_crop
    from eosin.ssl.config import load_config

    where = Path(os.environ.get("DINOV2_CHECKOUT", ""))
    if not (where / "dinov2/data/augmentations.py").is_file():
        sys.exit("crops: set DINOV2_CHECKOUT to a checkout of github.com/facebookresearch/dinov2")
    sys.path.insert(0, str(where))
    from dinov2.data.augmentations import DataAugmentationDINO

    config = load_config("dinov2", ["data.shards=s", "run.dir=r"])
    peer = DataAugmentationDINO(config.crops.global_scale, config.crops.local_scale, config.crops.local_count)
    with _tiles() as shards:
        files = [shards.image(tile) for tile in np.linspace(0, len(shards) - 1, 32).astype(int).tolist()]
    positions = torch.arange(len(files))

    def ours() -> None:
        images = np.stack([decode(file) for file in files])
        multi_crop(torch.from_numpy(images).permute(0, 3, 1, 2), positions, config)

    def theirs() -> None:
        for file in files:
            peer(Image.open(io.BytesIO(file)).convert("RGB"))

    yield Case(
        "2 × 224 + 8 × 96 px crops from a 256-px JPEG",
        "DINOv2 DataAugmentationDINO (Pillow)",
        len(files),
        ours,
        theirs,
    )


@contextmanager
def training(ready: bool, drop_path: float) -> Iterator[Case]:
    """Training steps of ViT-Ti/16 on two threads, crops made in the step or ahead, against lightly's DINOv2 example."""
    import step
    import torch

    from eosin.ssl.config import load_config

    torch.set_num_threads(2)
    config = load_config(
        "dinov2",
        [
            *("data.shards=s", "run.dir=r", "run.device=cpu", "data.batch=32"),
            *("model.architecture=vit_tiny_patch16_224", f"model.drop_path={drop_path}"),
            *("crops.global_size=112", "crops.local_size=48", "crops.local_count=4", "augment.solarize=0.2"),
            *("objective.prototypes=4096", "objective.hidden=1024"),
        ],
    )
    images = _mixtures(config.data.batch)
    yield Case(
        f"training step{' without its crops' if ready else ''}, ViT-Ti/16, 2 × 112 + 4 × 48 px, drop path {drop_path}",
        _version("lightly", "its DINOv2 example"),
        len(images),
        step.eosin(config, images, ready=ready),
        step.lightly(config, images, ready=ready),
    )
    torch.set_num_threads(1)


CASES = {
    "read": read,
    "decode": decode,
    "decode-opencv": partial(decoder, "opencv"),
    "decode-torchvision": partial(decoder, "torchvision"),
    "read-litdata": partial(litdata, jpeg=False),
    "decode-litdata": partial(litdata, jpeg=True),
    "read-mosaic": partial(mosaic, jpeg=False),
    "decode-mosaic": partial(mosaic, jpeg=True),
    "stain": stain,
    "stain-fit": stain_fit,
    "stain-gpu": stain_gpu,
    "randstainna": randstainna,
    "crops": crops,
    "step-cpu": partial(training, ready=False, drop_path=0.1),
    "step-cpu-ready": partial(training, ready=True, drop_path=0.1),
    "step-cpu-dropping": partial(training, ready=False, drop_path=0.3),
}


# What needs a GPU, a checkout or packages that the tests do not (pip install litdata mosaicml-streaming lightly).
ON_REQUEST = {
    *("stain-gpu", "randstainna", "crops", "read-litdata", "decode-litdata", "read-mosaic", "decode-mosaic"),
    *("step-cpu", "step-cpu-ready", "step-cpu-dropping"),
}


def compare(case: Case, runs: int) -> tuple[list[float], list[float]]:
    """Items a second of ours and of the peer's, ``runs`` each, alternately, after one run of each to warm up."""
    rates: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for side, function in enumerate((case.ours, case.theirs)):
            began = time.perf_counter()
            function()
            if run:
                rates[side].append(case.items / (time.perf_counter() - began))
    return rates


def row(case: Case, rates: tuple[list[float], list[float]], command: str) -> str:
    """The comparison as a row of docs/benchmarks.md."""
    import torch

    digits = 0 if min(map(min, rates)) >= 100 else 1
    ours, theirs = (f"{statistics.median(r):,.{digits}f}/s [{min(r):,.{digits}f}–{max(r):,.{digits}f}]" for r in rates)
    ratio = statistics.median(rates[0]) / statistics.median(rates[1])
    cells = [case.work, case.peer, ours, theirs, f"{ratio:.2f}", machine(torch.get_num_threads())]
    cells += [f"{datetime.date.today()}", f"`{command}`"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the named comparisons and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each side (default: 7)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(CASES)):
        sys.exit(f"there is no comparison '{unknown[0]}'; valid: {', '.join(CASES)}")
    if args.runs < 5:
        sys.exit(f"--runs {args.runs} is too few for a median and a range; give 5 or more")
    import torch

    torch.set_num_threads(1)
    print("| work | peer | ours | theirs | ratio | machine | date | command |\n|---|---|---|---|---|---|---|---|")
    for name in args.names or [n for n in CASES if n not in ON_REQUEST]:
        with CASES[name]() as case:
            print(row(case, compare(case, args.runs), f"python benchmarks/run.py {name}"), flush=True)


def _stream_case(shards, jpeg: bool, peer: str, theirs: Callable[[], Iterator[object]]) -> Case:
    from eosin.data_tools.stream import decode

    def ours() -> Iterator[object]:
        return map(decode, _shuffled(shards)) if jpeg else _shuffled(shards)

    def count(samples: Callable[[], Iterator[object]]) -> Callable[[], None]:
        def run() -> None:
            if (found := sum(1 for _ in samples())) != len(shards):
                sys.exit(f"{peer}: {found} of {len(shards)} samples")

        return run

    work = "read and decode 256-px JPEGs, shuffled" if jpeg else "read raw samples, shuffled"
    return Case(work, peer, len(shards), count(ours), count(theirs))


def _stain_case(work: str, images, ours: Callable[[], object]) -> Case:
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    peer = TorchMacenkoNormalizer()
    peer.HERef, peer.maxCRef = peer.HERef.to(images.device), peer.maxCRef.to(images.device)
    return Case(
        f"{work}, 256-px tiles",
        _version("torchstain", "torch"),
        len(images),
        ours,
        lambda: [peer.normalize(image, stains=False) for image in images],
    )


def _images(count: int):
    """Tiles of a phantom, [count, 3, 256, 256] uint8."""
    import numpy as np
    import torch

    with _tiles() as shards:
        from eosin.data_tools.stream import decode

        images = [decode(shards.image(i % len(shards))) for i in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _mixtures(count: int):
    """Squares of two stains in amounts drawn for each of 16 px, [count, 3, 256, 256] uint8: they need no slide."""
    import torch
    from torch.nn.functional import interpolate

    amounts = torch.rand(count, 2, 16, 16, generator=torch.Generator().manual_seed(0)) ** 2
    stains = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # densities of Ruifrok and Johnston
    density = torch.einsum("nshw,sc->nchw", interpolate(amounts, scale_factor=16.0, mode="bilinear"), stains)
    return (255 * torch.exp(-density)).to(torch.uint8)


def _shuffled(shards) -> Iterator[bytes]:
    """Images of an epoch as the stream reads them, by the batch."""
    import numpy as np

    from eosin.data_tools.order import Order, Source

    order = Order([Source(0, len(shards))], [1.0], seed=0)
    for positions in np.array_split(np.arange(len(shards)), -(-len(shards) // 256)):
        tiles = order(positions)
        yield from shards.images(tiles, shards.rows(tiles))


@contextmanager
def _many_tiles():
    """The tiles of :func:`_tiles`, each twelve times, so that a pass takes long enough to be timed."""
    from eosin.data_tools.shards import ShardSet, ShardWriter

    with _tiles() as few:
        folder = few.tars[0].parents[1] / "many"
        folder.mkdir()
        writer = ShardWriter(folder, shard_bytes=16 << 20)
        for tile in range(12 * len(few)):
            original = tile % len(few)
            key, meta = f"tile_{tile:06d}", few.meta(original)
            writer.add(key, few.image(original), "jpg", meta, int(few.row(original)["slide"]))
        writer.finish(few.slides(), tile_size=few.tile_size, mpp=few.mpp, config={})
        yield ShardSet(folder)


@contextmanager
def _tiles():
    """A shard set of a few phantom slides."""
    from eosin.data_tools.phantom import write_phantoms
    from eosin.data_tools.shards import ShardSet
    from eosin.data_tools.tile import tile_slides

    with tempfile.TemporaryDirectory() as folder:
        table = write_phantoms(Path(folder) / "phantoms", patients=6, seed=0)
        tile_slides([table.parent / "slides"], Path(folder) / "shards", slides_csv=table)
        yield ShardSet(Path(folder) / "shards")


def _version(package: str, note: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)} ({note})"


if __name__ == "__main__":
    main()
