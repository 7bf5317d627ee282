"""``eosin embed``: encoder × shard set -> embeddings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """\
ENCODER is one of
  RUN            a run folder: the newest checkpoint's teacher, with the run's preprocessing and stain normalization
  RELEASE        a release folder of 'eosin export'
  random:FOLDER  the same network and preprocessing with untrained weights
  timm:NAME      a timm model: random weights, or released ones with --pretrained
  color          twelve color statistics

example:
  eosin embed run shards --out trained.safetensors
  eosin embed random:run shards --out random.safetensors
  eosin embed color shards --out color.safetensors

Tiles that cannot be used are left out and listed in OUT.refused.csv, and the exit code is 3."""
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("encoder", metavar="ENCODER", help="what embeds; see below")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of a shard set")
    parser.add_argument("--out", type=Path, required=True, metavar="E.safetensors", help="the embeddings")
    parser.add_argument(
        "--pooling", choices=("cls", "mean", "cls+mean"), default="cls", help="class token, mean of patches, or both"
    )
    parser.add_argument("--pretrained", action="store_true", help="released weights for timm:NAME")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="tiles at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.embed import embed, refused_path
    from eosin.eval.encoders import load_encoder, pick_device

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is not a number of tiles; give 1 or more")
    shards = ShardSet(args.shards)
    encoder = load_encoder(
        args.encoder, pooling=args.pooling, pretrained=args.pretrained, device=pick_device(args.device)
    )
    summary = embed(encoder, shards, args.out, args.batch_size)
    if summary.cached:
        print(f"{args.out} holds these embeddings already ({summary.tiles} tiles); nothing to do")
        return DONE
    print(f"{summary.tiles} tiles x {summary.dimension} features of '{encoder.name}' in {args.out}")
    for reason, count in summary.raw.most_common():
        print(f"{count} tiles are not stain-normalized, they stay raw: {reason}", file=sys.stderr)
    for key, reason in summary.refused[:SHOWN]:
        print(f"left out: {key}: {reason}", file=sys.stderr)
    if summary.refused:
        print(f"{len(summary.refused)} tiles left out; all are in {refused_path(args.out)}", file=sys.stderr)
        return DONE_WITH_REFUSALS
    return DONE
