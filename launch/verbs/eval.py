"""``eosin eval``: finds the probe and runs it."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# Probe -> (module with add_arguments(parser, name) and main(args), what it does).
PROBES = {
    "knn": ("classes", "k nearest neighbors by cosine (dinov2-knn)"),
    "linear": ("classes", "logistic regression, its strength chosen by grouped folds inside the training side"),
    "mlp": ("classes", "a hidden layer, its weight decay and epoch chosen on a grouped fold inside the training side"),
    "fewshot": ("fewshot", "SimpleShot: a few samples a class, over many episodes"),
    "mil": ("classes", "bags of tiles: mean pooling and gated attention"),
    "regress": ("regress", "ridge regression of numbers, such as the expression of genes"),
    "retrieval": ("retrieval", "each tile asks for its like among the tiles of other groups"),
    "cluster": ("cluster", "k-means against the classes: ARI, NMI, matched accuracy"),
    "dense": ("dense", "patch tokens against masks: Dice and IoU of classes, or maps of values"),
    "curves": ("curves", "accuracy against magnification, downsampling, JPEG, blur and share of the labels"),
    "data": ("data", "public tile sets: how to get each, and into a shard set"),
    "suite": ("suite", "many tasks x encoders into one page; or the checkpoints of a training run, watched"),
    "label": ("label", "labels of tiles from annotations of slides: GeoJSON, ASAP, masks"),
}
EPILOG = """\
examples:
  eosin eval knn trained.safetensors random.safetensors color.safetensors --label label --group patient --out knn.json
  eosin eval suite tiles --encoders run random:run color --data lc25000=LC25000 pbc=PBC --out results

Each explains itself: eosin eval knn --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    probes = parser.add_subparsers(dest="probe", required=True, metavar="PROBE")
    for name, (module, summary) in PROBES.items():
        probe = probes.add_parser(name, help=summary, description=summary, formatter_class=parser.formatter_class)
        probe.add_argument("--debug", action="store_true", help="show the traceback of an error")
        _module(module).add_arguments(probe, name)


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    code: int = _module(PROBES[args.probe][0]).main(args)
    return code


def _module(name: str) -> Any:
    return importlib.import_module(f"eosin.launch.verbs.evals.{name}")
