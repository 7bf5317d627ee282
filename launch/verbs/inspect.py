"""``eosin inspect``: pictures of what is in a shard set and of what training makes of it."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin inspect crops shards virchow2 stain.augment=none --out crops.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    text = "crops: what the model sees, tile by tile: global crops with their masks, and local crops"
    parser.add_argument("what", choices=["crops"], help=text)
    parser.add_argument("shards", metavar="SHARDS", help="a shard set: its folder or URL")
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that go before the recipe's")
    parser.add_argument("--tiles", type=int, default=8, metavar="N", help="tiles to show, of as many slides as can be")
    parser.add_argument("--out", type=Path, required=True, metavar="P.png", help="the picture")


def main(args: argparse.Namespace) -> int:
    """Draw the crops."""
    from eosin.data_tools.errors import DONE
    from eosin.ssl.config import load_config
    from eosin.ssl.crops_sheet import write_crops

    # Nothing is trained, so that the run's folder is never made.
    given = [f"data.shards={args.shards}", "run.dir=not-made", *args.overrides]
    drawn = write_crops(load_config(args.recipe, given), args.out, args.tiles)
    print(f"{args.out}: crops of {drawn} tiles")
    return DONE
