"""``eosin merge``: the parts of a shared tiling -> one shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example, after 'eosin tile slides/ --out parts --part K/8' for K from 1 to 8:
  eosin merge parts/* --out shards

All parts must be there, of the same slides and settings. Tars are linked where the disk can, and else copied."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help="shard sets of 'eosin tile --part'")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="a new folder")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.merge import merge_parts

    summary = merge_parts(args.parts, args.out)
    print(summary)
    return summary.exit_code
