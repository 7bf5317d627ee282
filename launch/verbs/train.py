"""``eosin train``: pretraining from a recipe; started again on the same run.dir, it goes on where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from eosin.data_tools.errors import DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``eosin train``."""
    from eosin import configs

    parser.usage = (
        "eosin train RECIPE data.shards=SHARDS run.dir=RUN [key.sub=value ...] [--rewind STEP [--skip-batches N]]\n"
        "       eosin train RECIPE [key.sub=value ...] --plan [--out P.png] [--gpus N] [--tflops T] [--price P]"
    )
    parser.add_argument("recipe", help=f"a shipped recipe ({', '.join(configs.names())}) or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that go before the recipe's")
    rewind = parser.add_argument_group("rewind")
    rewind.add_argument(
        "--rewind",
        type=int,
        metavar="STEP",
        help="go on from the checkpoint of this step instead of the newest; later ones are moved aside",
    )
    rewind.add_argument(
        "--skip-batches", type=int, metavar="N", help="pass over the next N batches of tiles there; 0 if not given"
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--plan",
        action="store_true",
        help="train nothing; print what the run will be: parameters, FLOPs, memory, time, schedule. Needs no data",
    )
    plan.add_argument("--out", type=Path, metavar="P.png", help="draw the schedules too")
    plan.add_argument("--gpus", type=int, metavar="N", help="GPUs that share a batch; 1 if not given")
    plan.add_argument("--tflops", type=float, metavar="T", help="TFLOP/s that a GPU achieves")
    plan.add_argument("--price", type=float, metavar="P", help="of a GPU hour, in any currency")
    parser.epilog = (
        "examples:\n"
        "  eosin train small data.shards=shards run.dir=run run.steps=500 optim.lr=1e-3\n"
        "  eosin train small data.shards=shards run.dir=run run.steps=500 optim.lr=1e-3 --rewind 300 --skip-batches 5\n"
        "  eosin train dinov2 data.batch=1024 --plan --gpus 16 --tflops 200 --price 2.5"
    )


def main(args: argparse.Namespace) -> int:
    """Load the configuration, and train or plan."""
    extras = {name: getattr(args, name) for name in ("out", "gpus", "tflops", "price")}
    if args.plan and args.rewind is not None:
        raise UserError("--rewind trains and --plan does not; leave one out")
    if args.rewind is None and args.skip_batches is not None:
        raise UserError("--skip-batches belongs to a rewind; add --rewind STEP, or leave it out")
    for name in ("rewind", "skip_batches"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is below 0; give a number from 0 up")
    if args.plan:
        from eosin.launch.plan import show

        show(args.recipe, args.overrides, **extras)
        return DONE
    for name, value in extras.items():
        if value is not None:
            raise UserError(f"--{name} belongs to a plan; add --plan, or leave it out")
    from eosin.ssl.config import load_config
    from eosin.ssl.rewind import Rewind
    from eosin.ssl.train import train

    back = None if args.rewind is None else Rewind(args.rewind, args.skip_batches or 0)
    return train(load_config(args.recipe, args.overrides), back)
