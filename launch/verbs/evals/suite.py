"""``eosin eval suite``: many tasks × encoders into one folder and one page; or the checkpoints of a run, watched."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

EPILOG = """\
examples:
  eosin eval suite tiles --encoders run random:run color --data lc25000=LC25000 pbc=PBC --out results
  eosin eval suite mine.yaml --encoders a b c --out results
  eosin eval suite mine.yaml --watch run --out watched

SUITE is a YAML file or a shipped name: tiles, public. The same command goes on after a kill, and does again only what
has changed. OUT/index.html compares; OUT/results holds what stands behind it. A mistake in one task is listed, the
others go on, and the exit code is 3.

--watch evaluates each new checkpoint of a run beside it (OUT/watch.jsonl, OUT/watch.png) and picks one on validation
only (OUT/best.json): with a fixed split on the side 'val', never on 'test'."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.add_argument("suite", metavar="SUITE", help="a YAML file, or the name of a shipped suite")
    parser.add_argument("--encoders", nargs="+", default=[], metavar="ENCODER", help="as 'eosin embed' takes them")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="where data lies that the suite calls by a name"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="folder of all that is made")
    parser.add_argument("--watch", type=Path, metavar="RUN", help="evaluate the checkpoints of this training run")
    parser.add_argument("--once", action="store_true", help="with --watch: end when all that is there is evaluated")
    parser.add_argument("--every", type=float, default=30.0, metavar="S", help="with --watch: seconds between looks")
    parser.add_argument("--batch-size", type=int, metavar="N", help="tiles at once; found by itself if not given")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(args: argparse.Namespace) -> int:
    """Run or watch; return the exit code."""
    from eosin.data_tools.errors import TO_BE_CONTINUED, UserError

    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is not a number of tiles; give 1 or more")
    if not 0 < args.every < 1e6:
        raise UserError(f"--every {args.every} is not a number of seconds; give one above 0")
    if args.watch and args.encoders:
        raise UserError("--watch evaluates the run's own checkpoints; leave --encoders out")
    if args.once and not args.watch:
        raise UserError("--once is for --watch RUN; leave it out")
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _watch(args) if args.watch else _run(args)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr, flush=True)
        return TO_BE_CONTINUED


STOPPED = "eosin: stopped; the same command goes on"


def _run(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS
    from eosin.eval.encoders import pick_device
    from eosin.eval.suite import run_suite, table
    from eosin.eval.suite_file import load_suite

    device = str(pick_device(args.device))
    suite = load_suite(args.suite)
    outcome = run_suite(suite, args.encoders, _data(args.data), args.out, device, args.batch_size)
    rows = table(outcome.tasks)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for task in outcome.tasks:
        for said in task.refusals:
            print(f"{task.name}: {said}", file=sys.stderr)
    for name, get in outcome.skipped:
        how = f"give --data {suite.tasks[name].data}=PATH"
        print(f"skipped: {name}, its data has no path; {how}: {get}", file=sys.stderr)
    for path, count in outcome.left_out.items():
        print(f"left out: {count} tiles, listed beside {path}", file=sys.stderr)
    print(args.out / "index.html")
    return DONE_WITH_REFUSALS if outcome.refused else DONE


def _watch(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS
    from eosin.eval.encoders import pick_device
    from eosin.eval.suite import WATCHED
    from eosin.eval.suite_file import load_suite
    from eosin.eval.watch import read_rows, unanswered, watch

    suite, device = load_suite(args.suite), str(pick_device(args.device))
    data = _data(args.data)
    best = watch(suite, args.watch, data, args.out, device, args.batch_size, args.every, args.once)
    print(f"picked: step {best['step']}: {best['why']}" if best else "no checkpoint can be picked yet")
    missing = unanswered(read_rows(args.out))
    for probe in missing:
        print(f"not answered: {probe}; the reasons are in {args.out / WATCHED}", file=sys.stderr)
    return DONE_WITH_REFUSALS if missing else DONE


def _data(given: list[str]) -> dict[str, Path]:
    from eosin.data_tools.errors import UserError

    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise UserError(f"--data {one} is not NAME=PATH, e.g. lc25000=/data/LC25000")
        found[name] = Path(path)
    return found


def _stop(*_: object) -> None:
    """End at once, to be continued: what is on the disk is as good as after any kill."""
    from eosin.data_tools.errors import TO_BE_CONTINUED

    print(STOPPED, file=sys.stderr, flush=True)
    raise SystemExit(TO_BE_CONTINUED)
