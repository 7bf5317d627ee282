"""Time Eosin beside a peer on the same work in the same process, alternately, and print one table row a comparison.

    python benchmarks/run.py                   every comparison but those that need a GPU or a checkout
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
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


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
    import numpy as np
    import webdataset

    from eosin.data_tools.stream import order

    with _tiles() as shards:
        positions = order(np.arange(len(shards)), len(shards), seed=0)

        def ours() -> None:
            for tile in positions:
                shards.image(int(tile))

        def theirs() -> None:
            for _ in webdataset.WebDataset([str(t) for t in shards.tars], shardshuffle=False):
                pass

        yield Case("read raw samples, shuffled", _version("webdataset", "sequential"), len(shards), ours, theirs)


@contextmanager
def decode() -> Iterator[Case]:
    """Read and decode, against webdataset with Pillow."""
    import numpy as np
    import webdataset

    from eosin.data_tools.stream import decode, order

    with _tiles() as shards:
        positions = order(np.arange(len(shards)), len(shards), seed=0)

        def ours() -> None:
            for tile in positions:
                decode(shards.image(int(tile)))

        def theirs() -> None:
            for _ in webdataset.WebDataset([str(t) for t in shards.tars], shardshuffle=False).decode("rgb8"):
                pass

        yield Case("read and decode 256-px JPEGs", _version("webdataset", "Pillow"), len(shards), ours, theirs)


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
    images = _images(32).cuda().repeat(16, 1, 1, 1)
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
    """DINOv2's ten crops of decoded 256-px tiles, against the same made by torchvision's transforms one by one."""
    import torch
    from torchvision import transforms as T
    from torchvision.transforms.functional import to_pil_image

    from eosin.ssl.augment import multi_crop
    from eosin.ssl.config import load_config

    config = load_config("dinov2", ["data.shards=s", "run.dir=r"])
    images = _images(16)
    positions = torch.arange(len(images))
    pictures = [to_pil_image(image) for image in images]

    def crop(size: int, scale: tuple[float, float], blur: float) -> T.Compose:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                jitter,
                T.RandomGrayscale(0.2),
                T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
                T.ToTensor(),
                T.Normalize(config.augment.mean, config.augment.std),
            ]
        )

    views = [crop(224, (0.32, 1), 1.0), crop(224, (0.32, 1), 0.1), *[crop(96, (0.05, 0.32), 0.5)] * 8]
    yield Case(
        "2 × 224 + 8 × 96 px crops of a tile",
        _version("torchvision", "DINOv2's list"),
        len(images),
        lambda: multi_crop(images, positions, config),
        lambda: [view(picture) for picture in pictures for view in views],
    )


@contextmanager
def knn() -> Iterator[Case]:
    """Weighted kNN with four values of k, 500 queries in 20,000 features of 384, against scikit-learn."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    from eosin.eval.knn import knn_probabilities

    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, 384)).astype(np.float32) for n in (20_000, 500))
    labels = rng.integers(0, 9, len(bank))
    ks = (10, 20, 100, 200)

    def theirs() -> None:
        for k in ks:
            model = KNeighborsClassifier(
                k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
            )
            model.fit(bank, labels).predict_proba(queries)

    yield Case(
        "kNN, k = 10, 20, 100, 200",
        _version("scikit-learn", "brute force, cosine"),
        len(queries),
        lambda: knn_probabilities(queries, bank, labels, 9, ks),
        theirs,
    )


CASES = {
    "read": read,
    "decode": decode,
    "stain": stain,
    "stain-fit": stain_fit,
    "stain-gpu": stain_gpu,
    "randstainna": randstainna,
    "crops": crops,
    "knn": knn,
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
    ours, theirs = (f"{statistics.median(r):,.0f}/s [{min(r):,.0f}–{max(r):,.0f}]" for r in rates)
    ratio = statistics.median(rates[0]) / statistics.median(rates[1])
    cells = [case.work, case.peer, ours, theirs, f"{ratio:.2f}", _machine(), f"{datetime.date.today()}", f"`{command}`"]
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
    # What needs a GPU or a checkout runs when it is named.
    for name in args.names or [n for n in CASES if n not in ("stain-gpu", "randstainna")]:
        with CASES[name]() as case:
            print(row(case, compare(case, args.runs), f"python benchmarks/run.py {name}"), flush=True)


def _stain_case(work: str, images, ours: Callable[[], object]) -> Case:
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    peer = TorchMacenkoNormalizer()
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


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, 1 thread"


if __name__ == "__main__":
    main()
