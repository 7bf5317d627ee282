"""The ``eosin`` command: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from eosin.data_tools.errors import USER_ERROR, UserError, nearest
from eosin.launch.ranks import first_to_say

# The table of contents: verb -> (module with add_arguments and main, what it does). Order is the user's path.
VERBS = {
    "demo": (
        "eosin.launch.verbs.demo",
        "the whole path below on phantoms or your slides, with a report at the end",
    ),
    "tile": ("eosin.launch.verbs.tile", "slides -> shard set"),
    "merge": ("eosin.launch.verbs.merge", "the parts of a shared tiling -> one shard set"),
    "pack": ("eosin.launch.verbs.pack", "images in folders, zips, HDF5, Parquet or tars -> shard set"),
    "verify": ("eosin.launch.verbs.verify", "checksums, index and decoding of a shard set"),
    "inspect": ("eosin.launch.verbs.inspect", "pictures of a shard set: what is in it, what the model sees"),
    "stain": ("eosin.launch.verbs.stain", "per-slide stain fits, audit, references, normalized copies"),
    "train": ("eosin.launch.verbs.train", "pretraining from a recipe; resumes by itself"),
    "embed": ("eosin.launch.verbs.embed", "encoder x shard set or slides -> embeddings"),
    "eval": ("eosin.launch.verbs.eval", "probes of encoders: knn, linear, fewshot, retrieval, dense, mil, suite ..."),
    "report": ("eosin.launch.verbs.report", "one self-contained HTML page of a run"),
    "export": ("eosin.launch.verbs.export", "the release bundle of a run"),
    "launch": ("eosin.launch.launchers", "run any verb above here, under torchrun or on SLURM"),
}
EPILOG = """\
Start with:  eosin demo --out demo
Then yours:  eosin tile SLIDES --out shards
             eosin stain fit shards
             eosin train demo data.shards=shards run.dir=run
             eosin embed run shards --out e.safetensors
             eosin eval knn e.safetensors --label label --group patient --out knn.json

Each verb explains itself: eosin VERB --help
Exit codes: 0 done, 1 a bug, 2 your input, 3 done with refusals, 75 saved and to be continued"""


# What a user can mend: no space, no permission, a path that leads through a file or is taken.
MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG),
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's lines and shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help and action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings:
            return f"{action.help} (default: {action.default})"
        return action.help


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``eosin ARGV`` and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv[: argv.index("--")] if "--" in argv else "--debug" in argv
    try:
        return run(argv)
    except UserError as error:
        if debug:
            raise
        return _say(str(error))
    except OSError as error:
        # Only what a user can mend; any other OSError is a bug and shows its traceback.
        if debug or error.errno not in MENDABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _say(f"cannot read or write: {error.strerror}{where}; mend that and run the same command again")
    except KeyboardInterrupt:
        return _say("stopped by the keyboard")


def run(argv: list[str]) -> int:
    """Run one verb; errors pass through."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_contents())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"eosin {version('eosin')}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        raise UserError(f"there is no verb '{verb}'; {nearest(verb, list(VERBS))}; see 'eosin --help'")
    module_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"eosin {verb}", description=summary, formatter_class=Formatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    try:
        args = parser.parse_intermixed_args(argv[1:])  # a recipe's overrides may follow an option
    except TypeError:  # what argparse says of verbs that have actions of their own, or pass a rest on
        args = parser.parse_args(argv[1:])
    code: int = module.main(args)
    return code


def _contents() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    return (
        "Eosin pretrains pathology foundation models by self-supervision and proves what they learned.\n\n"
        f"usage: eosin VERB ...\n\n{verbs}\n\n{EPILOG}"
    )


def _say(line: str) -> int:
    if first_to_say():
        print(f"eosin: {' '.join(line.split())}", file=sys.stderr)
    return USER_ERROR


def entry() -> None:
    """Entry point of the console script: exit with the verb's code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no µ must not turn finished work into an error.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has seen enough; what is left is not written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    entry()
