"""``eosin eval knn``, ``linear``, ``mlp`` and ``mil``: probes that tell classes apart, on embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eosin.eval.question import Question

# Probe -> the family of its presets.
FAMILIES = {"knn": "knn", "linear": "logistic"}
EPILOG = """\
examples:
  eosin eval knn trained.safetensors random.safetensors color.safetensors --label label --group patient --out knn.json
  eosin eval linear *.safetensors --label grade --labels grades.csv --key slide --group patient --out linear.json
  eosin eval linear *.safetensors --label label --group patient --preset thunder-linear --out thunder.json
  eosin eval linear *.safetensors --label label --group patient --ratios .01 .1 .5 1 --out shares.json
  eosin eval mil *.safetensors --label label --group patient --out mil.json
  eosin eval knn *.safetensors --label label --group site --split leave-one-group-out --by scanner --out sites.json
  eosin eval linear *.safetensors --label label --group patient --split fixed --side split --out fixed.json

Every sample is scored by a probe that never saw its group. Intervals and paired differences come from a bootstrap over
groups, or over what --cluster names. A split with a patient, slide or image on both sides is refused.
OUT.predictions.parquet holds what was said of each sample."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments of one probe."""
    from eosin.eval.presets import names

    parser.epilog = EPILOG
    add_question(parser)
    if name == "knn":
        parser.add_argument(
            "--k", type=int, nargs="+", metavar="K", help="neighbors, 20 if not given; several in one pass"
        )
    if name in FAMILIES:
        valid = ", ".join(names(FAMILIES[name]))
        parser.add_argument("--preset", metavar="NAME", help=f"a published protocol in its place: {valid}")
        parser.add_argument(
            "--ratios",
            type=float,
            nargs="+",
            default=[],
            metavar="R",
            help="shares of the labels, in turn: .01 .1 .5 1",
        )
    if name == "mlp":
        parser.add_argument("--width", type=int, default=256, metavar="N", help="of the hidden layer")
    if name == "mil":
        parser.add_argument("--bag", default="slide", metavar="COLUMN", help="what a bag is")


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE, UserError
    from eosin.eval import probe
    from eosin.eval.describe import describe
    from eosin.eval.encoders import pick_device

    question, device = the_question(args), str(pick_device(args.device))
    if args.probe == "knn" and args.preset and args.k:
        raise UserError(f"preset '{args.preset}' has its own k; give --k or --preset, not both")
    if args.probe in FAMILIES and args.preset:
        results = probe.run_preset(question, args.preset, FAMILIES[args.probe], device, args.ratios)
    elif args.probe == "linear":
        results = probe.run_linear(question, device, args.ratios)
    elif args.probe == "knn":
        results = probe.run_knn(question, args.k or [20], device, args.ratios)
    elif args.probe == "mlp":
        results = probe.run_mlp(question, args.width, device)
    else:
        results = probe.run_mil(question, args.bag, device)
    print(describe(results))
    return DONE


def the_question(args: argparse.Namespace) -> Question:
    """The :class:`~eosin.eval.question.Question` that the arguments of :func:`add_question` ask."""
    from eosin.eval.question import Question

    return Question(
        args.embeddings,
        args.label,
        args.group,
        args.out,
        args.labels,
        args.key,
        args.folds,
        args.seed,
        args.split,
        args.repeats,
        args.side,
        tuple(dict.fromkeys(args.by)),
        args.allow_leak,
        args.cluster,
    )


def add_question(parser: argparse.ArgumentParser) -> None:
    """Declare what every probe of classes is asked."""
    add_label(parser, "what must not stand on both sides of a split, e.g. patient")
    add_split(parser)
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="give the metrics for each value too, e.g. of site"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds, bootstrap and training")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def add_label(parser: argparse.ArgumentParser, group: str) -> None:
    """Declare embeddings, their labels, results, and the group, of which is told what it is for."""
    parser.add_argument("embeddings", nargs="+", type=Path, metavar="E", help="embeddings of the same tiles")
    parser.add_argument("--label", required=True, metavar="COLUMN", help="what is to be told")
    parser.add_argument("--group", required=True, metavar="COLUMN", help=group)
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="the results")
    parser.add_argument(
        "--labels", type=Path, metavar="L", help="labels kept elsewhere: a CSV joined by --key, or annotations"
    )
    parser.add_argument(
        "--key", choices=("tile", "slide", "patient"), default="slide", help="what a row of --labels speaks of"
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    """Declare how sides are made, what must not stand on both, and what is drawn."""
    parser.add_argument(
        "--split",
        choices=("kfold", "leave-one-group-out", "monte-carlo", "fixed"),
        default="kfold",
        help="how sides are made: grouped and stratified folds; each group alone; drawn anew --repeats times; --side",
    )
    parser.add_argument(
        "--folds", type=int, default=5, metavar="N", help="folds; a Monte Carlo pass scores one in N of the groups"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="passes of a Monte Carlo split")
    parser.add_argument(
        "--side", default="split", metavar="COLUMN", help="column that says train, val or test, for --split fixed"
    )
    add_leaks(parser)


def add_leaks(parser: argparse.ArgumentParser) -> None:
    """Declare what is drawn as a whole, and the reason for a leak."""
    parser.add_argument(
        "--cluster", metavar="COLUMN", help="what the bootstrap draws as a whole, e.g. patient; the group if not given"
    )
    parser.add_argument(
        "--allow-leak", metavar="REASON", help="score a split with a patient, slide or image on both sides; say why"
    )
