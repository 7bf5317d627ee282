"""``eosin eval fewshot``: SimpleShot over many episodes, on embeddings."""

from __future__ import annotations

import argparse

from eosin.launch.verbs.evals.classes import add_question, the_question

EPILOG = """\
examples:
  eosin eval fewshot trained.safetensors random.safetensors color.safetensors --label label --group patient --out f.json
  eosin eval fewshot *.safetensors --label label --group patient --shots 1 4 16 --preset thunder-simpleshot --out f.json

In each fold every episode draws a few samples of each class from the training side and answers what is scored.
uni-simpleshot gives the mean over the episodes, thunder-simpleshot what their majority says: not comparable."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments."""
    from eosin.eval.presets import names

    parser.epilog = EPILOG
    add_question(parser)
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N", help="samples of a class, in turn"
    )
    parser.add_argument("--episodes", type=int, default=1000, metavar="N", help="draws of these samples")
    parser.add_argument(
        "--preset", default="uni-simpleshot", metavar="NAME", help=f"whose SimpleShot: {', '.join(names('simpleshot'))}"
    )


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval.describe import describe
    from eosin.eval.encoders import pick_device
    from eosin.eval.fewshot import run_fewshot

    device = str(pick_device(args.device))
    print(describe(run_fewshot(the_question(args), args.shots, args.preset, args.episodes, device)))
    return DONE
