"""``eosin eval retrieval``: each tile asks for its like among the tiles of other groups."""

from __future__ import annotations

import argparse

from eosin.launch.verbs.evals.classes import add_label, add_leaks

EPILOG = """\
examples:
  eosin eval retrieval trained.safetensors color.safetensors --label label --group patient --out retrieval.json
  eosin eval retrieval *.safetensors --label label --group site --cluster patient --top 1 5 10 --out sites.json

Tiles of the query's own group are never ranked. OUT.predictions.parquet holds the average precision of each tile, the
rank of the first tile of its class, its nearest tile, and what its neighbors vote for."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments of the probe."""
    parser.epilog = EPILOG
    add_label(parser, "whose tiles a query of it never gets, e.g. patient")
    parser.add_argument(
        "--top", type=int, nargs="+", default=[1, 3, 5], metavar="K", help="is any of the first K alike; what they vote"
    )
    add_leaks(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval.describe import describe
    from eosin.eval.question import Question
    from eosin.eval.retrieval import run_retrieval

    question = Question(
        args.embeddings,
        args.label,
        args.group,
        args.out,
        args.labels,
        args.key,
        seed=args.seed,
        allow_leak=args.allow_leak,
        cluster=args.cluster,
    )
    print(describe(run_retrieval(question, args.top)))
    return DONE
