"""``eosin eval data``: public tile sets, how to get each, and their way into a shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples:
  eosin eval data                                             list the sets
  eosin eval data breakhis                                    what it is, how to get it, what its folder must hold
  eosin eval data breakhis downloads/breakhis --out shards    pack what was downloaded

Nothing is downloaded. The shard set has the columns that the set's names and tables give: label, patient or slide where
known, and split where there is an official one (eosin eval linear ... --split fixed --side split)."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of the sets")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="where it was unpacked")
    parser.add_argument("--out", type=Path, metavar="SHARDS", help="a new folder")


def main(args: argparse.Namespace) -> int:
    """List the sets, describe one, or pack one; return the exit code."""
    from eosin.data_tools.errors import DONE, UserError
    from eosin.eval import datasets

    if args.name is None:
        print("\n".join(datasets.listing()))
        return DONE
    if args.folder is None and args.out is None:
        print("\n".join(datasets.description(args.name)))
        return DONE
    if args.folder is None or args.out is None:
        raise UserError("to pack a set give both its folder and --out: eosin eval data NAME FOLDER --out SHARDS")
    summary = datasets.pack(args.name, args.folder, args.out)
    print(summary)
    print(f"note: {datasets.dataset(args.name).note}")
    return summary.exit_code
