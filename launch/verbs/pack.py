"""``eosin pack``: image folder -> shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples:
  eosin pack images/ --out shards
  eosin pack images/ --out shards --manifest images/manifest.csv --label diagnosis --group slide_id --tile-size 224

Without a manifest the first folder on an image's way is its label. The manifest has a column path, relative to the
folder; every further column is kept. Images that cannot be used are listed and the exit code is 3."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="searched for images to any depth")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="a new folder")
    parser.add_argument("--manifest", type=Path, metavar="CSV", help="which images, and what is known of them")
    parser.add_argument("--label", metavar="COLUMN", help="column of the manifest that is the label")
    parser.add_argument("--group", metavar="COLUMN", help="column of the manifest that names the slide")
    parser.add_argument("--tile-size", type=int, metavar="PX", help="scale the shorter side to this, cut the middle")
    parser.add_argument("--mpp", type=float, help="µm per pixel of the tiles as stored, where known")
    parser.add_argument("--stain", default="H&E", help="of all images, where no column says; none for unstained")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.pack import pack_images

    summary = pack_images(
        args.folder,
        args.out,
        manifest=args.manifest,
        label=args.label,
        group=args.group,
        tile_size=args.tile_size,
        mpp=args.mpp,
        stain=args.stain,
    )
    print(summary)
    return summary.exit_code
