"""``eosin tile``: slides -> shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin tile slides/ --out shards --mpp 0.5 --tile-size 256 --slides slides.csv

slides.csv has a column path (or slide) and any of patient, site, scanner, stain, label, mpp; every further column is
kept. Slides that cannot be used are listed with their reason and the exit code is 3. Look at SHARDS/qc.html."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("sources", nargs="+", type=Path, metavar="SLIDE", help="slides, or folders of slides")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="a new folder")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm per pixel of the tiles")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PX", help="side of a tile")
    parser.add_argument("--min-tissue", type=float, default=0.5, metavar="SHARE", help="smallest share of tissue")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="at most N tiles a slide, drawn by --seed")
    parser.add_argument("--slides", type=Path, metavar="CSV", help="what is known of the slides")
    parser.add_argument(
        "--mpp-override", type=float, metavar="MPP", help="µm per pixel of the slides, instead of what their files say"
    )
    parser.add_argument("--stain", help='stain of the slides that the table does not know (default: "H&E")')
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--seed", type=int, default=0, help="decides which tiles --max-tiles keeps")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.tile import tile_slides

    summary = tile_slides(
        args.sources,
        args.out,
        mpp=args.mpp,
        tile_size=args.tile_size,
        min_tissue=args.min_tissue,
        slides_csv=args.slides,
        mpp_override=args.mpp_override,
        stain=args.stain,
        workers=args.workers,
        quality=args.quality,
        max_tiles=args.max_tiles,
        seed=args.seed,
    )
    print(summary)
    return summary.exit_code
