"""``eosin inspect``: pictures of what is in a shard set and of what training makes of it."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin inspect shards SHARDS --out shards.png
  eosin inspect crops SHARDS virchow2 stain.augment=none --out crops.png"""
TILES = {"shards": 64, "crops": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    text = (
        "shards: tiles of as many slides as can be, and histograms of tiles, tissue, color and resolution; "
        "crops: what the model sees, tile by tile: global crops with their masks, and local crops"
    )
    parser.add_argument("what", choices=list(TILES), help=text)
    parser.add_argument("shards", metavar="SHARDS", help="a shard set: its folder or URL")
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="crops: a shipped recipe or the path of a YAML file"
    )
    text = "crops: settings that go before the recipe's"
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=text)
    text = "tiles to show, of as many slides as can be (default: {shards} of shards, {crops} of crops)"
    parser.add_argument("--tiles", type=int, metavar="N", help=text.format(**TILES))
    parser.add_argument("--out", type=Path, required=True, metavar="P.png", help="the picture")


def main(args: argparse.Namespace) -> int:
    """Draw the picture."""
    tiles = TILES[args.what] if args.tiles is None else args.tiles
    return _shards(args, tiles) if args.what == "shards" else _crops(args, tiles)


def _shards(args: argparse.Namespace, tiles: int) -> int:
    from eosin.data_tools.errors import DONE, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.data_tools.shards_sheet import write_sheet

    if args.recipe is not None:
        raise UserError(f"'{args.recipe}': eosin inspect shards takes no recipe; give SHARDS and --out alone")
    print("\n".join(write_sheet(ShardSet(args.shards), args.out, tiles)))
    return DONE


def _crops(args: argparse.Namespace, tiles: int) -> int:
    from eosin.data_tools.errors import DONE, UserError
    from eosin.ssl.config import load_config
    from eosin.ssl.crops_sheet import write_crops

    if args.recipe is None:
        raise UserError("eosin inspect crops needs a recipe, which says what is made of the tiles; give e.g. 'demo'")
    # Nothing is trained, so that the run's folder is never made.
    given = [f"data.shards={args.shards}", "run.dir=not-made", *args.overrides]
    drawn = write_crops(load_config(args.recipe, given), args.out, tiles)
    print(f"{args.out}: crops of {drawn} tiles")
    return DONE
