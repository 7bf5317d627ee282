"""``eosin eval regress``: numbers, such as the expression of genes, told from embeddings by ridge regression."""

from __future__ import annotations

import argparse
from pathlib import Path

from eosin.launch.verbs.evals.classes import add_split

EPILOG = """\
examples:
  eosin eval regress *.safetensors --targets-from genes.csv --key tile --group patient --out genes.json
  eosin eval regress *.safetensors --targets-from genes.csv --targets EGFR KRT5 --key tile --group patient --out r.json
  eosin eval regress *.safetensors --targets-from genes.csv --key tile --group patient --split leave-one-group-out \\
      --preset hest-ridge --out hest.json

Every sample is predicted by a fit that never saw its group. Rows that lack a target are left out and counted.
OUT.predictions.parquet holds the true and the predicted value of each sample and target."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments of the probe."""
    parser.epilog = EPILOG
    parser.add_argument("embeddings", nargs="+", type=Path, metavar="E", help="embeddings of the same tiles")
    parser.add_argument(
        "--targets", nargs="+", default=[], metavar="COLUMN", help="what is to be told; every numeric column of the CSV"
    )
    parser.add_argument("--targets-from", type=Path, metavar="CSV", help="targets kept elsewhere, joined by --key")
    parser.add_argument(
        "--key", choices=("tile", "slide", "patient"), default="slide", help="what a row of --targets-from speaks of"
    )
    parser.add_argument(
        "--group", required=True, metavar="COLUMN", help="what must not stand on both sides of a split, e.g. patient"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="the results")
    parser.add_argument(
        "--preset", choices=("hest-ridge",), help="a published protocol in place of a penalty chosen by inner folds"
    )
    add_split(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and bootstrap")


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval.describe import describe
    from eosin.eval.question import Question
    from eosin.eval.regress import run_regress

    if 0 < len(args.targets) <= 3:
        label = ", ".join(args.targets)
    else:
        label = f"targets of {args.targets_from.name}" if args.targets_from else "columns"
    question = Question(
        args.embeddings,
        label,
        args.group,
        args.out,
        args.targets_from,
        args.key,
        args.folds,
        args.seed,
        args.split,
        args.repeats,
        args.side,
        allow_leak=args.allow_leak,
        cluster=args.cluster,
    )
    print(describe(run_regress(question, args.targets, args.preset)))
    return DONE
