"""``eosin eval cluster``: whether k-means finds the classes without having been told of them."""

from __future__ import annotations

import argparse

from eosin.launch.verbs.evals.classes import add_label

EPILOG = """\
examples:
  eosin eval cluster trained.safetensors color.safetensors --label label --group patient --out clusters.json
  eosin eval cluster *.safetensors --label label --group patient --k 20 --starts 10 --out clusters.json

Nothing is learned from labels, so nothing is split; groups are what the bootstrap draws as a whole (--group key draws
tiles). OUT.predictions.parquet holds the cluster that each start gave each tile."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments of the probe."""
    parser.epilog = EPILOG
    add_label(parser, "what the bootstrap draws as a whole, e.g. patient")
    parser.add_argument("--k", type=int, metavar="K", help="clusters; as many as classes if not given")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="of k-means; values are means over them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of starts and bootstrap")


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval.clustering import run_cluster
    from eosin.eval.describe import describe
    from eosin.eval.question import Question

    question = Question(args.embeddings, args.label, args.group, args.out, args.labels, args.key, seed=args.seed)
    print(describe(run_cluster(question, args.k, args.starts)))
    return DONE
