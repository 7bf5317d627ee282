"""``eosin eval dense``: what patch tokens know of the places in a tile."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
ENCODER is what 'eosin embed' takes: a run or release folder, random:FOLDER, timm:NAME, color, ...
MASKS is what 'eosin eval label' takes: GeoJSON, ASAP XML, or masks, of slides or of tiles, with a legend.csv.

examples:
  eosin eval dense run random:run color shards --masks annotations --group patient --out dense.json
  eosin eval dense run color shards --masks markers --regress --group patient --out markers.json

Segmentation: logistic regression of each patch's shares of classes, stretched to the tile's pixels; Dice and IoU. With
--regress, masks are images of values (8 or 16 bits, or floats), and ridge regression tells each patch's mean. Pixels
that are not annotated do not count. OUT.png shows tiles, truth and answers side by side."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.add_argument("encoders", nargs="+", metavar="ENCODER", help="what embeds")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of a shard set")
    parser.add_argument("--masks", type=Path, required=True, metavar="MASKS", help="annotations or masks")
    parser.add_argument("--regress", action="store_true", help="the masks hold values, not classes")
    parser.add_argument(
        "--group", required=True, metavar="COLUMN", help="what must not stand on both sides of a split, e.g. patient"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="the results")
    parser.add_argument(
        "--split",
        choices=("kfold", "leave-one-group-out", "monte-carlo", "fixed"),
        default="kfold",
        help="how sides are made, as of 'eosin eval knn'",
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="passes of a Monte Carlo split")
    parser.add_argument("--side", default="split", metavar="COLUMN", help="train, val or test, for --split fixed")
    parser.add_argument("--cluster", metavar="COLUMN", help="what the bootstrap draws; the group if not given")
    parser.add_argument("--allow-leak", metavar="REASON", help="score a split that shares a patient or image; say why")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds, bootstrap and drawn patches")
    parser.add_argument("--patches", type=int, metavar="N", help="at most so many patches to learn from (60,000)")
    parser.add_argument(
        "--tile-size", type=float, metavar="N", help="a tile's side in pixels of the slide's finest level, if not known"
    )
    parser.add_argument("--pretrained", action="store_true", help="released weights for timm:NAME")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="tiles at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(args: argparse.Namespace) -> int:
    """Run the probe; return its exit code."""
    from eosin.data_tools.errors import DONE, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.dense import MOST_PATCHES, run_dense
    from eosin.eval.dense_sheet import sheet_path
    from eosin.eval.describe import describe
    from eosin.eval.encoders import load_encoder, pick_device
    from eosin.eval.question import Question

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is not a number of tiles; give 1 or more")
    question = Question(
        [],
        args.masks.stem,
        args.group,
        args.out,
        folds=args.folds,
        seed=args.seed,
        split=args.split,
        repeats=args.repeats,
        side=args.side,
        allow_leak=args.allow_leak,
        cluster=args.cluster,
    )
    shards, device = ShardSet(args.shards), pick_device(args.device)
    encoders = [load_encoder(e, pretrained=args.pretrained, device=device) for e in args.encoders]
    patches = MOST_PATCHES if args.patches is None else args.patches
    results = run_dense(question, encoders, shards, args.masks, args.regress, patches, args.tile_size, args.batch_size)
    print(describe(results))
    print(f"tiles, truth and answers are in {sheet_path(args.out)}")
    return DONE
