"""Look for tissue on labeled images and say whether what was found fits their labels; time it.

    python benchmarks/tissue.py FOLDER --mpp 1 level0=.5 level2=4 thumb=30

FOLDER holds manifest.csv with the columns path, content, and, where known, mpp. In `content`, words decide what is
expected: "no tissue" and "almost white" no tissue at all, "blank" some or none, else some; "pen" and "ink" a pen, and
where colors are named in the content or the file's name, these. Printed per content:

    n               images
    as labeled      of these, the ones where all was as expected
    tissue          smallest and largest share of an image that is tissue
    rejected        reasons, each with its largest share
    CPU             seconds of one core, median and largest of the images, each enlarged to 2500 x 1900 px (8 µm/px)
"""

import argparse
import csv
import re
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np

from eosin.data_tools.slide import read_image
from eosin.data_tools.tissue import THUMBNAIL_MPP, Tissue, find_tissue

SLIDE = (2500, 1900)
# Images of less than a slide are looked at in at least so many pixels.
SMALLEST = 256


def main() -> None:
    """Print a row a kind of image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--mpp",
        nargs="+",
        default=["2"],
        metavar="[TEXT=]MPP",
        help="µm/px where the manifest has none, and of paths that hold a text (default: 2)",
    )
    args = parser.parse_args()
    cv2.setNumThreads(1)
    guesses = {"": "2"} | dict(word.rpartition("=")[::2] for word in args.mpp)
    rows = defaultdict(list)
    with (args.folder / "manifest.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            named = [value for text, value in guesses.items() if text and text in row["path"]]
            mpp = float(row.get("mpp") or [*named, guesses[""]][0])
            image = read_image(args.folder / row["path"])
            target = max(mpp, min(THUMBNAIL_MPP, max(image.shape) * mpp / SMALLEST))
            small = cv2.resize(image, None, fx=mpp / target, fy=mpp / target, interpolation=cv2.INTER_AREA)
            tissue = find_tissue(small, target)
            good = as_labeled(tissue, row["content"].lower(), row["path"].lower())
            rows[row["content"]].append((tissue, good, seconds(cv2.resize(image, SLIDE))))
    print("| image | n | as labeled | tissue | rejected | CPU, s |\n|---|---|---|---|---|---|")
    for content, found in sorted(rows.items()):
        shares = [float(tissue.mask.mean()) for tissue, _, _ in found]
        reasons: dict[str, float] = defaultdict(float)
        for tissue, _, _ in found:
            for reason, area in tissue.rejected.items():
                reasons[reason] = max(reasons[reason], float(area.mean()))
        times = [took for _, _, took in found]
        cells = (
            *(content, len(found), sum(good for _, good, _ in found)),
            f"{min(shares):.2f}–{max(shares):.2f}" if len(found) > 1 else f"{shares[0]:.2f}",
            ", ".join(f"{reason.replace('_', ' ')} {share:.2f}" for reason, share in reasons.items() if share >= 0.005),
            f"{np.median(times):.3f}, {max(times):.3f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def as_labeled(tissue: Tissue, content: str, path: str) -> bool:
    """Whether tissue and pens are what the words say."""
    if re.search("no tissue|almost white", content):
        right = not bool(tissue.mask.any())
    else:
        right = bool(tissue.mask.any()) or "mostly blank" in content
    pen = re.search("pen|ink", content) is not None
    colors = {color for color in ("red", "green", "blue", "black") if pen and color in content + path}
    found = {reason.removeprefix("pen_") for reason in tissue.rejected if reason.startswith("pen")}
    return right and (found == colors if colors else bool(found) == pen)


def seconds(image: np.ndarray) -> float:
    """CPU seconds of one search, the smallest of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        find_tissue(image, THUMBNAIL_MPP)
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
