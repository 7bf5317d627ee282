"""``eosin tile``: slides -> shard set."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
examples:
  eosin tile slides/ --out shards --mpp 0.5 --tile-size 256 --slides slides.csv
  eosin tile slides/ --out shards --plan
  eosin tile slides/ --out parts --part 3/8        then: eosin merge parts/* --out shards

slides.csv has a column path (or slide) and any of patient, site, scanner, stain, label, mpp; every further column is
kept. Killed at any moment, the same command goes on. Slides that cannot be used are listed with their reason and the
exit code is 3. Look at SHARDS/qc.html; docs/tiling.md has the rest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.usage = "eosin tile SLIDE ... --out SHARDS [options]"
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SLIDE", help="slides, or folders of slides")
    add("--out", type=Path, metavar="SHARDS", help="a new folder; with --part it holds the parts")
    add("--plan", action="store_true", help="only say tiles, bytes and CPU hours, from a few slides")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--mpp", type=float, nargs="+", metavar="M", help="µm per pixel, one or several (default: 0.5)")
    tiles.add_argument("--tile-size", type=int, default=256, metavar="PX", help="side of a tile")
    tiles.add_argument("--overlap", type=int, default=0, metavar="PX", help="that neighbors share")
    tiles.add_argument("--region", type=int, metavar="PX", help="store so large a region around each tile")
    tiles.add_argument("--min-tissue", type=float, default=0.5, metavar="SHARE", help="smallest share of tissue")
    tiles.add_argument("--max-tiles", type=int, metavar="N", help="at most N a slide and µm/px")
    tiles.add_argument("--sample", default="random", metavar="HOW", help="random or stratified")
    tiles.add_argument("--tissue", nargs="+", default=[], metavar="V", help="thresholds: close_um=40 max_pen=0 ...")
    tiles.add_argument("--tma", action="store_true", help="microarrays: tiles of cores, with the cores' names")
    tiles.add_argument("--masks", type=Path, metavar="DIR", help="tissue masks instead: PNG, TIFF, GeoJSON")
    tiles.add_argument("--coords", type=Path, metavar="P", help="places instead: a CSV, or HDF5 files in a folder")
    tiles.add_argument("--seed", type=int, default=0, help="of all draws")
    slides = parser.add_argument_group("slides")
    slides.add_argument("--slides", type=Path, metavar="CSV", help="what is known of the slides")
    slides.add_argument("--mpp-override", type=float, metavar="MPP", help="of the slides, whatever their files say")
    slides.add_argument("--stain", help='of slides of unknown stain (default: "H&E")')
    slides.add_argument("--frozen", action="store_true", help="keep frozen sections, known by table or file name")
    slides.add_argument("--pseudonymize", type=Path, metavar="KEY", help="replace ids by a key file, made if need be")
    work = parser.add_argument_group("shards and work")
    work.add_argument("--format", default="jpg", metavar="F", help="jpg or png")
    work.add_argument("--quality", type=int, default=90, metavar="Q", help="of the JPEGs")
    work.add_argument("--mix", type=int, default=4, metavar="N", help="deal the tiles of N shards; 0: none")
    work.add_argument("--shard-mib", type=int, default=256, metavar="MIB", help="target size of a shard")
    work.add_argument("--part", metavar="K/N", help="the K-th of N parts of the slides (a rank: its own)")
    work.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import UserError
    from eosin.data_tools.sources import parse_part
    from eosin.data_tools.tissue import Thresholds

    share = args.part
    if share is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        share = f"{int(os.environ['RANK']) + 1}/{os.environ['WORLD_SIZE']}"
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            *("tile_size", "overlap", "region", "min_tissue", "max_tiles", "sample", "tma", "masks"),
            *("coords", "seed", "mpp_override", "frozen", "format", "quality", "workers"),
        )
    }
    given["mpp"] = args.mpp or [0.5]
    given |= {"slides_csv": args.slides, "pseudonyms": args.pseudonymize, "share": share}
    given["thresholds"] = Thresholds.of(args.tissue)
    if args.plan:
        from eosin.data_tools.tile_plan import plan_tiles

        print(plan_tiles(args.sources, **given))
        return 0
    if args.out is None:
        raise UserError("--out is missing; give the path of a new folder, or --plan")
    from eosin.data_tools.tile import tile_slides

    out = args.out
    if share is not None:
        k, n = parse_part(share)
        out = out / f"part-{k:0{len(str(n))}d}-of-{n}"
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _stop)
    summary = tile_slides(args.sources, out, stain=args.stain, mix=args.mix, shard_mib=args.shard_mib, **given)
    print(summary)
    return summary.exit_code


def _stop(*_: object) -> None:
    """End at once, to be continued: what is on the disk is as good as after any kill."""
    from eosin.data_tools.errors import TO_BE_CONTINUED

    print("eosin: stopped; the same command goes on", file=sys.stderr, flush=True)
    raise SystemExit(TO_BE_CONTINUED)
