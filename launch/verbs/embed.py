"""``eosin embed``: encoder × shard set or slides -> embeddings."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from eosin.eval.embed_parts import Summary
    from eosin.eval.encoders import Encoder

EPILOG = """\
ENCODER is one of
  RUN                a run folder: the newest checkpoint's teacher, with the run's preprocessing and stain normalizer
  RELEASE            a release folder of 'eosin export'
  random:FOLDER      the same network and preprocessing with untrained weights
  timm:NAME, torchvision:NAME    random weights, or released ones with --pretrained
  hf-hub:OWNER/NAME  a timm model or a release on the Hub
  MODULE:FUNCTION    what your function makes: a function of uint8 tiles [B, 3, H, W], a module or (model, transform)
  color              twelve color statistics
  precomputed:PATH   features in .npz, .h5, .pt, .safetensors, or a folder of one a slide; without SHARDS

example:
  eosin embed run shards --out trained.safetensors
  eosin embed random:run shards --out random.safetensors
  eosin embed color shards --out color.safetensors
  eosin embed run slides/ --slides slides.csv --out all.safetensors

Tiles or slides that cannot be used are left out and listed in OUT.refused.csv, and the exit code is 3. Killed, the
same command goes on. 'eosin launch torchrun --nproc 2 -- embed ...' shares the work."""
SHOWN = 20
# Options that say how slides are tiled.
SLIDES = ("mpp", "tile_size", "min_tissue", "coords", "slides_csv", "mpp_override", "frozen", "workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("encoder", metavar="ENCODER", help="what embeds; see below")
    parser.usage = "eosin embed ENCODER SHARDS|SLIDE ... --out E.safetensors [options]"
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="a shard set; or slides, or folders of slides")
    parser.add_argument("--out", type=Path, required=True, metavar="E.safetensors", help="the embeddings")
    parser.add_argument("--name", help="of the encoder in tables and plots")
    poolings = ("auto", "cls", "mean", "cls+mean")
    parser.add_argument("--pooling", choices=poolings, default="auto", metavar="P", help="cls, mean or cls+mean")
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="class tokens of the last N blocks")
    parser.add_argument("--pretrained", action="store_true", help="released weights (timm:, torchvision:)")
    stains = ("off", "tile", "slide")
    precisions = ("auto", "fp32", "bf16", "fp16")
    parser.add_argument("--precision", choices=precisions, default="auto", metavar="P", help="fp32, bf16 or fp16")
    parser.add_argument("--stain", choices=stains, metavar="MODE", help="normalize tiles: off, tile or slide")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="tiles at once; auto: what fits the GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    slides = parser.add_argument_group("slides: their tiles, as 'eosin tile' makes them")
    add = slides.add_argument
    add("--mpp", type=float, nargs="+", metavar="M", help="µm per pixel, one or several (default: 0.5)")
    add("--tile-size", type=int, metavar="PX", help="side of a tile (default: 256)")
    add("--min-tissue", type=float, metavar="SHARE", help="smallest share of tissue (default: 0.5)")
    add("--coords", type=Path, metavar="P", help="places instead: a CSV, or HDF5 files in a folder")
    add("--slides", dest="slides_csv", type=Path, metavar="CSV", help="what is known of the slides")
    add("--mpp-override", type=float, metavar="MPP", help="of the slides, whatever their files say")
    add("--frozen", action="store_true", default=None, help="keep frozen sections")
    add("--workers", type=int, metavar="N", help="processes that read slides (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, TO_BE_CONTINUED, UserError
    from eosin.eval.embed_parts import refused_path
    from eosin.eval.encoders import load_encoder
    from eosin.ssl import distributed

    batch_size = _batch_size(args.batch_size)
    if args.encoder.startswith("precomputed:"):
        return _precomputed(args)
    if args.encoder == "color":
        _refuse_unused(
            args, {"pooling": "auto", "layers": 1, "precision": "auto"}, "for networks, and 'color' is statistics"
        )
    if not args.shards:
        raise UserError(f"give what '{args.encoder}' is to embed: eosin embed {args.encoder} SHARDS --out {args.out}")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: sys.exit(TO_BE_CONTINUED))  # what is on the disk is gone on from
    with _rank(args.device) as device:
        encoder = load_encoder(
            args.encoder,
            pooling=args.pooling,
            layers=args.layers,
            pretrained=args.pretrained,
            precision=args.precision,
            stain=args.stain,
            device=device,
            name=args.name,
        )
        summary = _embed(encoder, args, batch_size)
        if distributed.rank():
            return DONE
    if summary.cached:
        print(f"{args.out} holds these embeddings already ({summary.tiles} tiles); nothing to do")
        return DONE
    print(f"{summary.tiles} tiles x {summary.dimension} features of '{encoder.name}' in {args.out}")
    for notice in summary.notices:
        print(f"note: {notice}", file=sys.stderr)
    for reason, count in summary.raw.most_common():
        print(f"{count} tiles are not stain-normalized, they stay raw: {reason}", file=sys.stderr)
    for key, reason in summary.refused[:SHOWN]:
        print(f"left out: {key}: {reason}", file=sys.stderr)
    if summary.refused:
        print(f"{len(summary.refused)} left out; all are in {refused_path(args.out)}", file=sys.stderr)
        return DONE_WITH_REFUSALS
    return DONE


def _precomputed(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE, UserError
    from eosin.eval.precomputed import import_features

    if args.shards:
        raise UserError(f"features are there already in '{args.encoder}', so nothing is embedded; leave SHARDS out")
    unused = {"pooling": "auto", "layers": 1, "pretrained": False, "precision": "auto", "stain": None}
    unused |= {name: None for name in SLIDES if name != "slides_csv"}
    _refuse_unused(args, unused, f"for what embeds, and '{args.encoder}' holds features")
    path = args.encoder.partition(":")[2]
    if not path:
        raise UserError("'precomputed:' names no features; give precomputed:PATH of a file or folder")
    summary = import_features(Path(path), args.out, args.slides_csv, args.name)
    what = f"{summary.tiles} tiles x {summary.dimension} features"
    print(f"{args.out} holds these embeddings already ({what})" if summary.cached else f"{what} in {args.out}")
    return DONE


def _refuse_unused(args: argparse.Namespace, unused: Mapping[str, object], why: str) -> None:
    """Raise UserError where one of the options is not as it would be without being given."""
    from eosin.data_tools.errors import UserError

    if given := [name for name, default in unused.items() if getattr(args, name) != default]:
        raise UserError(f"--{given[0].replace('_', '-')} is {why}; leave it out")


def _embed(encoder: Encoder, args: argparse.Namespace, batch_size: int | None) -> Summary:
    from eosin.data_tools.errors import UserError

    given = {name: getattr(args, name) for name in SLIDES if getattr(args, name) is not None}
    sets = [path for path in args.shards if "://" in path or (Path(path) / "dataset.json").is_file()]
    if not sets:
        from eosin.eval.embed_slides import embed_slides

        return embed_slides(encoder, args.shards, args.out, batch_size=batch_size, **given)
    if len(args.shards) > 1:
        raise UserError(f"{sets[0]} is a shard set; give it alone, since one file holds the tiles of one set")
    if given:
        option = next(iter(given)).removesuffix("_csv").replace("_", "-")
        raise UserError(f"--{option} is for slides, and {sets[0]} is a shard set, whose tiles are made; leave it out")
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.embed import embed

    return embed(encoder, ShardSet(sets[0]), args.out, batch_size)


@contextlib.contextmanager
def _rank(name: str) -> Iterator[torch.device]:
    """The device of this process, which is in a group with the other ranks where there are any."""
    import torch

    from eosin.eval.encoders import pick_device
    from eosin.ssl import distributed

    device = pick_device(name)
    distributed.start("cpu")  # what ranks tell each other is small
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        yield device
    finally:
        distributed.stop()


def _batch_size(text: str) -> int | None:
    from eosin.data_tools.errors import UserError

    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch-size {text} is not a number of tiles; give 1 or more, or auto")
    return int(text)
