"""``eosin verify``: is a shard set whole?"""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin verify shards --sample 1000

Checks every checksum, the index against the tars, keys, JSON and the slides table's counts, and decodes all tiles or
a sample. Exit code 0: whole. 2: one line a problem."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a shard set")
    parser.add_argument("--sample", type=int, metavar="N", help="decode N tiles only (default: all)")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE, USER_ERROR
    from eosin.data_tools.verify import report, verify_shards

    problems, decoded = verify_shards(args.shards, args.sample)
    print(report(args.shards, problems, decoded))
    return USER_ERROR if problems else DONE
