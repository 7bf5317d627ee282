"""``eosin export``: the release bundle of a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``eosin export``."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the release")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="results for the model card")
    parser.add_argument("--name", help="the model's name in the card (default: the run folder's name)")
    parser.epilog = (
        "example:\n  eosin export run --out release --results knn.json linear.json\n"
        "  python -c 'import timm; timm.create_model(\"local-dir:release\", pretrained=True)'"
    )


def main(args: argparse.Namespace) -> int:
    """Export and say where."""
    from eosin.data_tools.errors import DONE
    from eosin.launch.export import export

    export(args.run, args.out, results=args.results, name=args.name or args.run.resolve().name)
    print(f"{args.out} is ready: timm.create_model('local-dir:{args.out}', pretrained=True)")
    return DONE
