"""``eosin train``: pretraining from a recipe; started again on the same run.dir, it goes on where it was."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``eosin train``."""
    from eosin import configs

    parser.usage = "eosin train RECIPE data.shards=SHARDS run.dir=RUN [key.sub=value ...]"
    parser.add_argument("recipe", help=f"a shipped recipe ({', '.join(configs.names())}) or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that go before the recipe's")
    parser.epilog = "example:\n  eosin train small data.shards=shards run.dir=run run.steps=500 optim.lr=1e-3"


def main(args: argparse.Namespace) -> int:
    """Load the configuration and train."""
    from eosin.ssl.config import load_config
    from eosin.ssl.train import train

    return train(load_config(args.recipe, args.overrides))
