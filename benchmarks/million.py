"""A million embeddings of 1,024 numbers through `eosin eval knn` and `eosin eval linear`: the memory that each needs.

    python benchmarks/million.py --folder FOLDER                 4 GB of disk, half an hour on two cores
    python benchmarks/million.py --folder FOLDER --rows 100000   less of it

Ten classes in 1,000 made-up patients; 10,000 rows are scored and the others are learned from. Each verb is a process of
its own; its most memory is what the system says of it, pages that are mapped from the file included.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from eosin.data_tools.embeddings import Embeddings, write_embeddings

CLASSES, PATIENTS, SCORED, BLOCK = 10, 1000, 10_000, 10_000


def write(path: Path, rows: int, dimension: int) -> None:
    """Embeddings of ``rows`` tiles; the first patients are the test side."""
    rng = np.random.default_rng(0)
    patient = np.arange(rows) * PATIENTS // rows
    label = rng.integers(0, CLASSES, rows)
    centers = rng.standard_normal((CLASSES, dimension)).astype(np.float32) / 8
    features = np.empty((rows, dimension), dtype=np.float32)
    for low in range(0, rows, BLOCK):
        part = slice(low, min(low + BLOCK, rows))
        drawn = rng.standard_normal((part.stop - low, dimension), dtype=np.float32)
        np.add(drawn, centers[label[part]], out=features[part])
    tested = patient <= patient[min(SCORED, rows // 5)]
    table = {"key": [f"t{n}" for n in range(rows)], "patient": [f"p{p}" for p in patient]}
    table |= {"label": [f"c{n}" for n in label], "split": np.where(tested, "test", "train")}
    write_embeddings(path, Embeddings(features, pd.DataFrame(table), {"name": "made up", "shards": "none"}))


def measure(verb: list[str], path: Path) -> dict[str, float | str]:
    """Seconds and most memory of a verb, and what it said."""
    options = ["--label", "label", "--group", "patient", "--split", "fixed", "--out", str(path.parent / "results.json")]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "eosin.launch", "eval", *verb, str(path), *options])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"eosin eval {verb[0]} ended with {os.waitstatus_to_exitcode(status)}")
    said = json.loads((path.parent / "results.json").read_text())["encoders"][0]["metrics"]["balanced_accuracy"]
    seconds = time.perf_counter() - began
    return {"verb": " ".join(verb), "seconds": seconds, "GB": used.ru_maxrss * 1024 / 1e9, "accuracy": said["value"]}


def main() -> None:
    """Make the embeddings where they are not there yet, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=1024)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{args.rows}x{args.dimension}.safetensors"
    if not path.exists():
        write(path, args.rows, args.dimension)
    for verb in (["knn"], ["linear"], ["linear", "--preset", "uni-linear"]):
        print(json.dumps(measure(verb, path)), flush=True)


if __name__ == "__main__":
    main()
