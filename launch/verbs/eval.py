"""``eosin eval``: probes on embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path

PROBES = {
    "knn": "k nearest neighbors by cosine (dinov2-knn)",
    "linear": "logistic regression, its strength chosen by grouped folds inside the training side",
    "mil": "bags of tiles: mean pooling and gated attention",
}
EPILOG = """\
examples:
  eosin eval knn trained.safetensors random.safetensors color.safetensors --label label --group patient --out knn.json
  eosin eval linear *.safetensors --label grade --labels grades.csv --key slide --group patient --out linear.json
  eosin eval mil *.safetensors --label label --group patient --out mil.json
  eosin eval knn *.safetensors --label label --group site --split leave-one-group-out --by scanner --out sites.json
  eosin eval linear *.safetensors --label label --group patient --split fixed --side split --out fixed.json

Every sample is scored by a probe that never saw its group. Intervals and paired differences come from a bootstrap over
groups, or over what --cluster names. A split with a patient, slide or image on both sides is refused.
OUT.predictions.parquet holds what was said of each sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = EPILOG
    probes = parser.add_subparsers(dest="probe", required=True, metavar="PROBE")
    for name, summary in PROBES.items():
        probe = probes.add_parser(name, help=summary, description=summary, formatter_class=parser.formatter_class)
        _add_common(probe)
        if name == "knn":
            probe.add_argument(
                "--k", type=int, nargs="+", default=[20], metavar="K", help="neighbors; several in one pass"
            )
        if name != "mil":
            valid = "dinov2-knn, uni-knn" if name == "knn" else "uni-linear, pathobench-linear"
            probe.add_argument("--preset", metavar="NAME", help=f"a published protocol in its place: {valid}")
        if name == "mil":
            probe.add_argument("--bag", default="slide", metavar="COLUMN", help="what a bag is")
        probe.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from eosin.data_tools.errors import DONE
    from eosin.eval import probe
    from eosin.eval.describe import describe

    question = probe.Question(
        args.embeddings,
        args.label,
        args.group,
        args.out,
        args.labels,
        args.key,
        args.folds,
        args.seed,
        args.split,
        args.repeats,
        args.side,
        tuple(dict.fromkeys(args.by)),
        args.allow_leak,
        args.cluster,
    )
    from eosin.eval.encoders import pick_device

    device = str(pick_device(args.device))
    if args.probe != "mil" and args.preset:
        family = {"knn": "knn", "linear": "logistic"}[args.probe]
        results = probe.run_preset(question, args.preset, family, device)
    elif args.probe == "linear":
        results = probe.run_linear(question, device)
    elif args.probe == "knn":
        results = probe.run_knn(question, args.k, device)
    else:
        results = probe.run_mil(question, args.bag, device)
    print(describe(results))
    return DONE


def _add_common(probe: argparse.ArgumentParser) -> None:
    probe.add_argument("--debug", action="store_true", help="show the traceback of an error")
    probe.add_argument("embeddings", nargs="+", type=Path, metavar="E", help="embeddings of the same tiles")
    probe.add_argument("--label", required=True, metavar="COLUMN", help="what is to be told")
    probe.add_argument(
        "--group", required=True, metavar="COLUMN", help="what must not stand on both sides of a split, e.g. patient"
    )
    probe.add_argument("--out", type=Path, required=True, metavar="R.json", help="the results")
    probe.add_argument("--labels", type=Path, metavar="CSV", help="labels kept elsewhere, joined by --key")
    probe.add_argument(
        "--key", choices=("tile", "slide", "patient"), default="slide", help="what a row of --labels speaks of"
    )
    probe.add_argument(
        "--split",
        choices=("kfold", "leave-one-group-out", "monte-carlo", "fixed"),
        default="kfold",
        help="how sides are made: grouped and stratified folds; each group alone; drawn anew --repeats times; --side",
    )
    probe.add_argument(
        "--folds", type=int, default=5, metavar="N", help="folds; a Monte Carlo pass scores one in N of the groups"
    )
    probe.add_argument("--repeats", type=int, default=10, metavar="N", help="passes of a Monte Carlo split")
    probe.add_argument(
        "--side", default="split", metavar="COLUMN", help="column that says train, val or test, for --split fixed"
    )
    probe.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="give the metrics for each value too, e.g. of site"
    )
    probe.add_argument(
        "--cluster", metavar="COLUMN", help="what the bootstrap draws as a whole, e.g. patient; the group if not given"
    )
    probe.add_argument(
        "--allow-leak", metavar="REASON", help="score a split with a patient, slide or image on both sides; say why"
    )
    probe.add_argument("--seed", type=int, default=0, metavar="N", help="of folds, bootstrap and training")
