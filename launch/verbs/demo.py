"""``eosin demo``: the whole road in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
example:
  eosin demo --out demo
  eosin demo --out mine --slides SLIDES --table slides.csv

Without --slides it makes synthetic slides (phantoms). Killed, it goes on when started again. Look at OUT/report.html.
A first slide to try: OpenSlide's freely available CMU-1-Small-Region.svs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of a killed demo")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="a folder of your slides, instead of phantoms")
    parser.add_argument("--table", type=Path, metavar="CSV", help="what is known of your slides: patient, label, ...")
    parser.add_argument("--seed", type=int, default=0, help="decides everything random")
    parser.add_argument("--patients", type=int, default=30, help="phantom patients, two slides each")
    parser.add_argument("--steps", type=int, default=300, help="training steps")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import UserError
    from eosin.launch.demo import run_demo

    if args.slides and not args.slides.exists():
        raise UserError(f"{args.slides} does not exist; give a folder of slides")
    if args.table and not args.slides:
        raise UserError("--table speaks of your own slides; give --slides too")
    return run_demo(
        args.out, slides=args.slides, table=args.table, seed=args.seed, patients=args.patients, steps=args.steps
    )
