"""``eosin pack``: images that exist already -> shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples:
  eosin pack images/ --out shards
  eosin pack images/ --out shards --manifest images/manifest.csv --label diagnosis --group slide_id --tile-size 224
  eosin pack pcam_train_x.h5 pcam_train_y.h5 --out shards
  eosin pack TCGA-12K-parquet/ --out shards
  eosin pack cells/ --out shards --modality fluorescence --channel 1

SOURCE is a folder or zip of images, where the first folder on an image's way is its label; HDF5 with arrays of pixels,
columns of as many rows (y is the label) and, one file a slide, coords; Parquet with image bytes and columns; or tars of
WebDataset, where json, cls (the label) and txt (text) say what is known. Several of one kind may be given, or a folder
of them. A manifest, for one folder or zip, has a column path; every further column is kept. What cannot be used is
listed and the exit code is 3. Fluorescence and X-ray become 8-bit gray by one window of values for the whole set."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="folders, .zip, .h5, .parquet or .tar")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="a new folder")
    parser.add_argument("--manifest", type=Path, metavar="CSV", help="which images, and what is known of them")
    parser.add_argument("--label", metavar="COLUMN", help="column of the manifest or source that is the label")
    parser.add_argument("--group", metavar="COLUMN", help="column that names the slide, where that is not slide")
    parser.add_argument("--tile-size", type=int, metavar="PX", help="scale the shorter side to this, cut the middle")
    parser.add_argument("--mpp", type=float, help="µm per pixel of the tiles as stored, where known")
    parser.add_argument("--stain", help="where no column says; H&E by default, none for other modalities")
    parser.add_argument("--modality", default="brightfield", help="brightfield, fluorescence or xray")
    parser.add_argument("--channel", type=int, metavar="N", help="of fluorescence or X-ray, counted from 0")
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values to become 0 and 255; measured over a sample of the set by default (percentiles 0.1 and 99.9), "
        "while images of 8 bits stay as they are",
    )


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.pack import pack_images

    summary = pack_images(
        args.sources,
        args.out,
        manifest=args.manifest,
        label=args.label,
        group=args.group,
        tile_size=args.tile_size,
        mpp=args.mpp,
        stain=args.stain,
        modality=args.modality,
        channel=args.channel,
        window=args.window,
    )
    print(summary)
    return summary.exit_code
