"""``eosin stain``: what is done to a shard set's stain."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``eosin stain``."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fit = verbs.add_parser("fit", help="fit every H&E slide (Macenko) and write the fits into the slides table")
    fit.add_argument("shards", help="folder of a shard set")
    fit.add_argument("--tiles", type=int, default=32, help="tiles a slide to fit on (default: 32)")
    fit.add_argument("--seed", type=int, default=0, help="seed of the choice of tiles (default: 0)")
    parser.epilog = "example:\n  eosin stain fit shards"


def main(args: argparse.Namespace) -> int:
    """Fit and say what came of it."""
    from eosin.data_tools.errors import DONE, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.ssl.stain.normalizer import fit_slides

    if args.tiles < 1:
        raise UserError(f"--tiles {args.tiles} is not a number of tiles; give 1 or more")
    table = fit_slides(ShardSet(args.shards), tiles_per_slide=args.tiles, seed=args.seed)
    fitted = int((table["stain_fit"] != "").sum())
    print(f"{fitted} of {len(table)} slides fitted; the fits are in {args.shards}/slides.parquet")
    for reason, count in table.loc[table["stain_fit"] == "", "stain_reason"].value_counts().items():
        print(f"  {count} without a fit, left as they are: {reason}")
    return DONE
