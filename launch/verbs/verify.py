"""``eosin verify``: is a shard set whole?"""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin verify shards --sample 1000
  eosin verify shards --repair

Checks every checksum, the index against the tars, keys, JSON, places and the slides table, and decodes all tiles or
a sample. --repair writes an index that is missing or wrong again where its tar, unchanged, proves what it held; tars
are never touched. Exit code 0: whole, or whole after the repair. 2: one line a problem, and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a shard set")
    parser.add_argument("--sample", type=int, metavar="N", help="decode N tiles only (default: all)")
    parser.add_argument("--repair", action="store_true", help="rebuild indices from their tars")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE, USER_ERROR
    from eosin.data_tools.verify import report, verify_shards

    verdict = verify_shards(args.shards, args.sample, args.workers, args.repair)
    print(report(args.shards, verdict, args.repair))
    return USER_ERROR if verdict.problems else DONE
