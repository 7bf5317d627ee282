"""``eosin stain``: what is done to the stain of shard sets and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

EPILOG = """\
example:
  eosin stain fit shards
  eosin stain audit shards --out stain.html
  eosin stain reference well_stained.png --out reference.json
  eosin stain normalize shards --to reference.json --out normalized

A REFERENCE is a name (eosin, torchstain), an image, a slide, a shard set, or a JSON of 'eosin stain reference'.
Each action explains itself: eosin stain ACTION --help"""
CONVENTIONS = ("eosin", "torchstain", "tiatoolbox")
METHODS = ("macenko", "reinhard", "reinhard-modified")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    fit = action("fit", "fit every H&E slide and write the fits into the slides table")
    fit.add_argument("shards", metavar="SHARDS", help="a shard set")
    fit.add_argument("--tiles", type=int, default=32, metavar="N", help="tiles a slide to fit on")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of tiles")

    audit = action("audit", "one HTML page: stains of the slides, outliers, before and after, color variance, failures")
    audit.add_argument("shards", metavar="SHARDS", help="a shard set with fits")
    audit.add_argument("--out", type=Path, required=True, metavar="HTML", help="where the page is written")

    reference = action("reference", "make a reference of images, slides or shard sets: the median of their fits")
    reference.add_argument("sources", nargs="+", metavar="SOURCE", help="image, slide or shard set")
    reference.add_argument("--out", type=Path, required=True, metavar="JSON", help="where it is written")

    normalize = action("normalize", "normalize a folder of images, or a shard set, into a new one")
    normalize.add_argument("source", type=Path, metavar="IN", help="folder of images, or a shard set")
    normalize.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    normalize.add_argument("--mode", choices=("slide", "tile"), help="default: slide for shard sets, tile for images")

    for made in (audit, normalize):
        made.add_argument("--to", metavar="REFERENCE", help="what is normalized to (default: that of --convention)")
        made.add_argument("--method", choices=METHODS, default="macenko", help="how")
    for made in (fit, audit, reference, normalize):
        made.add_argument("--convention", choices=CONVENTIONS, default="eosin", help="whose constants Macenko's has")


def main(args: argparse.Namespace) -> int:
    """Run the action; return its exit code."""
    actions = {"fit": _fit, "audit": _audit, "reference": _reference, "normalize": _normalize}
    return actions[args.action](args)


def _fit(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE, UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.ssl.stain.fits import fit_slides

    if args.tiles < 1:
        raise UserError(f"--tiles {args.tiles} is not a number of tiles; give 1 or more")
    table = fit_slides(ShardSet(args.shards), tiles_per_slide=args.tiles, seed=args.seed, convention=args.convention)
    good = table[table["stain_fit"] != ""]
    print(f"{len(good)} of {len(table)} slides fitted; the fits are in {args.shards}/slides.parquet")
    if len(good):
        angle, residual = good["stain_angle"].median(), good["stain_residual"].median()
        print(f"  {angle:.0f}° between the stains, {residual:.0%} of the density outside them (medians)")
    for reason, count in table.loc[table["stain_fit"] == "", "stain_reason"].value_counts().items():
        print(f"  {count} without a fit, left as they are: {reason}")
    return DONE


def _audit(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE
    from eosin.data_tools.shards import ShardSet
    from eosin.eval.report.stain_audit import write_audit

    write_audit(ShardSet(args.shards), args.out, _description(args, "slide"))
    print(f"open {args.out}")
    return DONE


def _reference(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import DONE, UserError
    from eosin.ssl.stain.reference import make_reference, save_reference

    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: a reference is a JSON file; give a name that ends in .json")
    made = make_reference(args.sources, args.convention)
    save_reference(args.out, made)
    print(f"{args.out}: hematoxylin {_vector(made.vectors[0])}, eosin {_vector(made.vectors[1])}")
    return DONE


def _normalize(args: argparse.Namespace) -> int:
    from eosin.data_tools.errors import UserError
    from eosin.data_tools.shards import ShardSet
    from eosin.ssl.stain.convert import LISTED, normalize_folder, normalize_shards

    if not args.source.is_dir():
        raise UserError(f"{args.source} is no folder; give a folder of images or a shard set")
    if args.source.resolve() in args.out.resolve().parents:
        raise UserError(f"--out {args.out} lies inside {args.source}; give a folder beside it")
    if (args.source / "dataset.json").is_file():
        done = normalize_shards(ShardSet(args.source), args.out, _description(args, args.mode or "slide"))
    elif args.mode == "slide":
        raise UserError(f"--mode slide: {args.source} is no shard set and knows no slides; leave --mode out")
    else:
        done = normalize_folder(args.source, args.out, _description(args, "tile"))
    print(f"{args.out}: {done.images} images, {done.images - done.raw.total()} of them normalized to {args.to}")
    for reason, count in done.raw.most_common():
        print(f"  {count} stay raw: {reason}")
    if done.refused:
        print(f"  {len(done.refused)} left out, the first {done.refused[0][0]}: {done.refused[0][1]}")
    if done.raw or done.refused:
        print(f"  all of these are listed in {args.out / LISTED}")
    return done.exit_code


def _description(args: argparse.Namespace, mode: Literal["slide", "tile"]) -> dict[str, Any]:
    from eosin.data_tools.errors import UserError
    from eosin.ssl.config import Stain
    from eosin.ssl.stain.normalizer import describe
    from eosin.ssl.stain.reference import BUILT_IN

    if not args.to and args.convention not in BUILT_IN:
        raise UserError(f"--to: the convention {args.convention} has no reference of its own; give an image or a JSON")
    args.to = args.to or args.convention
    stain = Stain(normalize=mode, method=args.method, convention=args.convention, reference=args.to)
    found = describe(stain)
    assert found is not None
    return found


def _vector(vector: list[float]) -> str:
    return "(" + ", ".join(f"{v:.3f}" for v in vector) + ")"
