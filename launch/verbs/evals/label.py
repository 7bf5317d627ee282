"""``eosin eval label``: annotations of slides -> labels of tiles."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
ANNOTATIONS is a folder, or one file, of
  GeoJSON        as QuPath writes it: SLIDE.geojson; what has no class, or one with an asterisk, does not count
  ASAP           SLIDE.xml; the group is the class
  masks          SLIDE.png or .tif of any size, stretched onto the slide, or TILE.png; a value or color is a class
  legend.csv     value,class: other names for values, colors (#rrggbb) and classes; what it does not list is left out

examples:
  eosin eval label shards annotations --out labels.csv
  eosin eval knn *.safetensors --labels labels.csv --key tile --label label --group patient --out knn.json

A tile gets the class that covers the most of it. Outlines count pixels of the slide's finest level; where they
overlap, the later one is on top."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of a shard set")
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="folder of annotations, or one file")
    parser.add_argument("--out", type=Path, required=True, metavar="L.csv", help="tile, label and cover, a row a tile")
    parser.add_argument(
        "--cover", type=float, default=0.5, metavar="SHARE", help="of a tile, below which it stays unlabeled"
    )
    parser.add_argument(
        "--tile-size", type=float, metavar="N", help="a tile's side in pixels of the slide's finest level, if not known"
    )


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    import sys

    from eosin.data_tools.errors import DONE
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.annotations import open_annotations, refuse_other_file, tile_labels, tile_places, write_labels

    refuse_other_file(args.out)
    table = tile_places(ShardSet(args.shards), args.tile_size)
    annotations, notices = open_annotations(args.annotations, table)
    labels, shares = tile_labels(annotations, args.cover)
    write_labels(args.out, table, labels, shares)
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    for name in annotations.classes:
        print(f"{(labels == name).sum()} tiles are '{name}'")
    print(f"{(labels == '').sum()} of {len(labels)} tiles stay unlabeled: no class covers {args.cover:.0%} of them")
    return DONE
