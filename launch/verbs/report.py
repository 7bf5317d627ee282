"""``eosin report``: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin report run --results knn.json linear.json mil.json --release release --out report.html

The page needs no network and no other file. What is missing, such as results, leaves its section with one line that
says which command adds it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="R.json", help="of eosin eval")
    parser.add_argument("--shards", type=Path, metavar="SHARDS", help="where the run's data.shards has moved to")
    parser.add_argument("--release", type=Path, metavar="DIR", help="of eosin export")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="SHARDS", help="shard sets tiled but not trained on"
    )
    parser.add_argument("--title", metavar="T", help="of the page; by default the run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.html", help="the page")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval.report import write_report

    title = args.title or f"Report of {'/'.join(args.run.resolve().parts[-2:])}"
    write_report(
        args.run,
        args.out,
        results=args.results,
        shards=args.shards,
        release=args.release,
        title=title,
        beside=args.beside,
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, opens in any browser")
    return DONE
