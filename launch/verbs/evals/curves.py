"""``eosin eval curves``: a probe's accuracy as tiles are made worse, or labels fewer."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples:
  eosin eval curves run random:run color shards --label label --group patient --out curves.json
  eosin eval curves run color shards --label label --group patient --probe linear --jpeg 90 50 20 --out curves.json
  eosin eval curves run color shards --label label --group patient --fit degraded --max-tiles 2000 --out left.json

Magnification shows the middle of a tile larger (less field), downsampling takes the mean over squares and brings the
tile back to its size (less detail), JPEG and blur speak for themselves; an option without values leaves a curve out.
The probe is fitted on clean tiles and scored on degraded ones; --fit degraded fits it on tiles degraded alike. OUT.png
is the picture. OUT.cache keeps the features: the same command, killed or with other points, goes on from there."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("encoders", nargs="+", metavar="ENCODER", help="as of 'eosin embed'")
    add("shards", metavar="SHARDS", help="a shard set")
    add("--label", required=True, metavar="COLUMN", help="what is to be told")
    add("--group", required=True, metavar="COLUMN", help="what must not stand on both sides of a split, e.g. patient")
    add("--out", type=Path, required=True, metavar="R.json", help="the results")
    add("--labels", type=Path, metavar="CSV", help="labels kept elsewhere, joined by --key")
    add("--key", choices=("tile", "slide", "patient"), default="slide", help="what a row of --labels speaks of")
    add("--magnification", type=float, nargs="*", default=[1.5, 2, 3, 4], metavar="X", help="of the tile's middle")
    add("--downsample", type=float, nargs="*", default=[2, 4, 8], metavar="X", help="px that become one")
    add("--jpeg", type=float, nargs="*", default=[95, 75, 50, 30, 10], metavar="Q", help="quality")
    add("--blur", type=float, nargs="*", default=[0.5, 1, 2, 4], metavar="PX", help="standard deviation")
    add("--share", type=float, nargs="*", default=[0.5, 0.25, 0.1, 0.05], metavar="S", help="of the labels, as 0.1")
    add(
        "--probe",
        dest="classifier",
        choices=("knn", "linear"),
        default="knn",
        help="k nearest neighbors, or logistic regression",
    )
    add("--k", type=int, default=20, metavar="K", help="neighbors")
    add("--fit", choices=("clean", "degraded"), default="clean", help="what the probe is fitted on")
    add("--max-tiles", type=int, metavar="N", help="draw so many tiles evenly")
    add("--split", choices=("kfold", "leave-one-group-out", "monte-carlo", "fixed"), default="kfold", help="as of knn")
    add("--folds", type=int, default=5, metavar="N", help="folds")
    add("--repeats", type=int, default=10, metavar="N", help="passes of a Monte Carlo split")
    add("--side", default="split", metavar="COLUMN", help="column that says train, val or test, for --split fixed")
    add("--cluster", metavar="COLUMN", help="what the bootstrap draws as a whole; the group if not given")
    add("--allow-leak", metavar="REASON", help="score a split with something on both sides; say why")
    add("--pooling", choices=("auto", "cls", "mean", "cls+mean"), default="auto", help="as of 'eosin embed'")
    add("--pretrained", action="store_true", help="released weights for timm: and torchvision:")
    add("--seed", type=int, default=0, metavar="N", help="of tiles, folds and bootstrap")
    add("--device", default="auto", help="auto, cpu or cuda")


def main(args: argparse.Namespace) -> int:
    """Draw the curves; return the exit code."""
    from eosin.data_tools.errors import DONE, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.curves import Plan, picture_path, run_curves
    from eosin.eval.curves_frame import curve_lines, draw
    from eosin.eval.degrade import KINDS, Degradation
    from eosin.eval.encoders import load_encoder, pick_device
    from eosin.eval.question import Question

    points = tuple(Degradation(kind, amount) for kind in KINDS for amount in dict.fromkeys(getattr(args, kind)))
    if not points and not args.share:
        raise UserError(
            "no curve is left; give values to one of --magnification, --downsample, --jpeg, --blur, --share"
        )
    device = pick_device(args.device)
    encoders = [
        load_encoder(name, pooling=args.pooling, pretrained=args.pretrained, device=device) for name in args.encoders
    ]
    question = Question(
        [],
        args.label,
        args.group,
        args.out,
        labels=args.labels,
        key=args.key,
        folds=args.folds,
        seed=args.seed,
        split=args.split,
        repeats=args.repeats,
        side=args.side,
        allow_leak=args.allow_leak,
        cluster=args.cluster,
    )
    plan = Plan(points, tuple(dict.fromkeys(args.share)), args.classifier, args.k, args.fit, args.max_tiles)
    results = run_curves(encoders, ShardSet(args.shards), question, plan, str(device))
    draw(results, picture_path(args.out))
    print("\n".join(curve_lines(results)))
    return DONE
