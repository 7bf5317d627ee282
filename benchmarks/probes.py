"""Time the probes of eosin.eval beside what people run today, in one process, by turns, and print a row a comparison.

    python benchmarks/probes.py                              full sizes: half an hour on two cores, 5 GB of memory
    python benchmarks/probes.py logistic --size 20000 512 50
    DINOV2_CHECKOUT=checkout python benchmarks/probes.py knn-dinov2
    DINOV2_CHECKOUT=checkout python benchmarks/probes.py --device cuda       the peers too, but scikit-learn and UNI

Both sides answer the same question of the same made-up features, and their answers are compared before anything is
printed: features are drawn around a center a class, with variances of the principal axes that fall by a power law, as
embeddings' do. A row says seconds (median and range), the ratio of medians, and how the answers agree; it belongs in
docs/benchmarks.md. DINOv2's routine is the class KnnModule of a checkout of facebookresearch/dinov2, and UNI's the
function eval_fewshot of one of mahmoodlab/UNI (UNI_CHECKOUT), run as they stand.
"""

import argparse
import os
import sys


def _given(option: str, default: str) -> str:
    return sys.argv[sys.argv.index(option) + 1] if option in sys.argv[:-1] else default


THREADS, DEVICE = _given("--threads", "2"), _given("--device", "cpu")
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = THREADS

import ast
import datetime
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import machine
from torch.nn.functional import normalize, one_hot, softmax

from eosin.eval.fewshot import draw_episodes, episode_scores, simpleshot
from eosin.eval.logistic import Scale, logistic_path
from eosin.ssl.metrics import knn_probabilities

KS = (10, 20, 100, 200)
EPISODES = "1,000 SimpleShot episodes, 4 shots, {} classes, 1,000 queries of {:,}"
Sides = tuple[np.ndarray, np.ndarray]


class Case(NamedTuple):
    """Two functions that answer the same, and what says in words how their answers agree, or ends the program."""

    work: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    agree: Callable[[Any, Any], str]


def logistic(rows: int, dimension: int, classes: int) -> Case:
    """Logistic regression at C = 1 to no worse an objective than scikit-learn's at its default tolerance."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    features, labels = features_of(rows, dimension, classes)
    features = Scale.of(features)(features)

    def objective(weights: np.ndarray, intercepts: np.ndarray) -> float:
        entropy = 0.0
        for low in range(0, rows, 10_000):
            scores = features[low : low + 10_000].astype(np.float64) @ weights + intercepts
            top = scores.max(axis=1, keepdims=True)
            own = scores[np.arange(len(scores)), labels[low : low + 10_000]]
            entropy += float((np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0] - own).sum())
        return entropy / rows + 0.5 * float((weights**2).sum()) / rows

    def agree(fit: Any, oracle: Any) -> str:
        ours, theirs = objective(fit.weights, fit.intercepts), objective(oracle.coef_.T, oracle.intercept_)
        if ours > theirs + 1e-5:
            sys.exit(f"objective {ours:.6f} is worse than the peer's {theirs:.6f}")
        same = (fit.probabilities(features).argmax(axis=1) == oracle.predict(features)).mean()
        steps = f"{fit.steps} and {oracle.n_iter_[0]} steps"
        return f"objectives {ours:.6f} and {theirs:.6f}, {steps}, {same:.2%} of predictions equal"

    return Case(
        f"logistic regression, {rows:,} × {dimension:,} × {classes} classes, C = 1",
        f"scikit-learn {sklearn.__version__} (lbfgs, float32)",
        lambda: next(logistic_path(features, labels, [1.0], device=DEVICE)),
        lambda: LogisticRegression(max_iter=10_000).fit(features, labels),
        agree,
    )


def knn_scikit(rows: int, dimension: int, classes: int) -> Case:
    """Weighted kNN of 1,000 queries against scikit-learn's brute force, by L2 of normalized features, its fastest."""
    import sklearn
    from sklearn.neighbors import KNeighborsClassifier

    bank, queries, labels = _sides(rows, dimension, classes)

    def theirs() -> np.ndarray:
        unit, asked = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (bank, queries))
        found = []
        for k in KS:
            # The cosine is 1 - d² / 2; a factor that is common to all neighbors drops out.
            model = KNeighborsClassifier(k, algorithm="brute", weights=lambda d: np.exp(-0.5 * d**2 / 0.07))
            found.append(model.fit(unit, labels).predict_proba(asked))
        return np.stack(found)

    return _knn_case(bank, queries, labels, classes, f"scikit-learn {sklearn.__version__} (brute force)", theirs)


def knn_dinov2(rows: int, dimension: int, classes: int) -> Case:
    """Weighted kNN of 1,000 queries against DINOv2's module, in its batches of 256."""
    module = _dinov2_module()
    bank, queries, labels = _sides(rows, dimension, classes)

    def theirs() -> np.ndarray:
        unit, asked = (normalize(torch.from_numpy(side).to(DEVICE), dim=1) for side in (bank, queries))
        knn = module(unit, torch.from_numpy(labels).to(DEVICE), list(KS), 0.07, DEVICE, classes)
        with torch.no_grad():
            parts = [knn(part) for part in asked.split(256)]
        votes = torch.stack([torch.cat([part[k] for part in parts]) for k in KS])
        return (votes / votes.sum(dim=2, keepdim=True)).cpu().numpy()

    return _knn_case(bank, queries, labels, classes, "DINOv2's KnnModule", theirs)


def simpleshot_uni(rows: int, dimension: int, classes: int) -> Case:
    """1,000 episodes of 4 shots, 1,000 queries, against UNI's eval_fewshot, which draws others and has four metrics."""
    sys.path.insert(0, os.environ.get("UNI_CHECKOUT") or sys.exit("simpleshot-uni needs UNI_CHECKOUT"))
    from uni.downstream.eval_patch_features.fewshot import eval_fewshot

    (support, labels), (queries, truth), ours = _episodes(rows, dimension, classes)

    def theirs() -> np.ndarray:
        given = [torch.from_numpy(part) for part in (support, labels, queries, truth)]
        # More queries a class than there are: all of them.
        return eval_fewshot(*given, n_iter=1000, n_shot=4, n_query=len(truth) + 1)[0]["Kw4s_bacc"].to_numpy()

    def agree(found: np.ndarray, expected: np.ndarray) -> str:
        gap, error = found.mean() - expected.mean(), np.sqrt((found.var() + expected.var()) / len(found))
        if abs(gap) > 4 * error:
            sys.exit(f"mean balanced accuracies differ by {gap:.2g}, with a standard error of {error:.2g}")
        return f"balanced accuracy {found.mean():.4f} and {expected.mean():.4f}, each over episodes of its own"

    return Case(EPISODES.format(classes, dimension), "UNI's eval_fewshot", ours, theirs, agree)


def simpleshot_loop(rows: int, dimension: int, classes: int) -> Case:
    """The same against a loop that does no more than it must, and measures distances by broadcasting, as UNI's."""

    def distances(asked: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return (asked[:, None] - classes[None]).norm(dim=2)

    return _simpleshot_case(rows, dimension, classes, "loop over episodes", distances)


def simpleshot_cdist(rows: int, dimension: int, classes: int) -> Case:
    """The same against the same loop with torch.cdist."""
    return _simpleshot_case(rows, dimension, classes, "loop over episodes, torch.cdist", torch.cdist)


CASES = {
    "logistic": (logistic, (100_000, 1024, 100)),
    "knn-scikit": (knn_scikit, (100_000, 1024, 100)),
    "knn-dinov2": (knn_dinov2, (100_000, 1024, 100)),
    "simpleshot-uni": (simpleshot_uni, (10_000, 1024, 9)),
    "simpleshot": (simpleshot_loop, (10_000, 1024, 9)),
    "simpleshot-cdist": (simpleshot_cdist, (10_000, 1024, 9)),
}


def main() -> None:
    """Run the named comparisons and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--size", nargs=3, type=int, metavar=("ROWS", "DIMENSION", "CLASSES"), help="other than full")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default: 2)")
    parser.add_argument("--device", default="cpu", help="of ours, and of the peers that can (default: cpu)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(CASES)):
        sys.exit(f"there is no comparison '{unknown[0]}'; valid: {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    head = ("work", "peer", "ours", "theirs", "ratio", "answers", "machine", "date", "command")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in args.names or CASES:
        make, full = CASES[name]
        print(row(make(*(args.size or full)), args), flush=True)


def row(case: Case, args: argparse.Namespace) -> str:
    """Run both sides by turns and say what was found as a row of docs/benchmarks.md."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.runs):
        answers = []
        for side, function in enumerate((case.ours, case.theirs)):
            began = time.perf_counter()
            answers.append(function())
            seconds[side].append(time.perf_counter() - began)
    ours, theirs = (f"{statistics.median(s):.3g} s [{min(s):.3g}–{max(s):.3g}]" for s in seconds)
    ratio = f"{statistics.median(seconds[1]) / statistics.median(seconds[0]):.2f}"
    command = f"`python benchmarks/probes.py {shlex.join(sys.argv[1:])}`"
    cells = [case.work, case.peer, ours, theirs, ratio, case.agree(*answers), machine(args.threads, DEVICE)]
    return f"| {' | '.join([*cells, f'{datetime.date.today()}', command])} |"


def features_of(rows: int, dimension: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, dimension] float32 and labels; the classes and axes are the same for every seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([seed, rows])
    centers = 0.3 * fixed.standard_normal((classes, dimension)) * (fixed.random(dimension) < 0.3)
    deviations = np.arange(1, dimension + 1) ** -0.7
    axes = np.linalg.qr(fixed.standard_normal((dimension, dimension)))[0].astype(np.float32)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, rows - classes)]
    features = rng.standard_normal((rows, dimension), dtype=np.float32)
    features += centers.astype(np.float32)[labels]
    features *= deviations.astype(np.float32)
    return features @ axes, labels


def _sides(rows: int, dimension: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bank, labels = features_of(rows, dimension, classes)
    return bank, features_of(1000, dimension, classes, seed=1)[0], labels


def _knn_case(bank, queries, labels, classes: int, peer: str, theirs: Callable[[], np.ndarray]) -> Case:
    def agree(found: np.ndarray, expected: np.ndarray) -> str:
        # Where the k-th and the next neighbor are as near as float32 can tell, either is right.
        same = float((np.abs(found - expected).max(axis=2) < 1e-4).mean())
        if same < 0.998:
            sys.exit(f"{1 - same:.2%} of probabilities differ")
        return f"{same:.2%} of probabilities within 1e-4"

    work = f"kNN, k = {', '.join(map(str, KS))}, {len(queries):,} queries in {len(bank):,} × {bank.shape[1]:,}"
    ours = lambda: knn_probabilities(queries, bank, labels, classes, KS, device=DEVICE)  # noqa: E731
    return Case(f"{work}, {classes} classes", peer, ours, theirs, agree)


def _episodes(rows: int, dimension: int, classes: int) -> tuple[Sides, Sides, Callable[[], np.ndarray]]:
    """Support and queries with their labels, and our side: the balanced accuracy of each episode."""
    support, labels = features_of(rows, dimension, classes)
    queries, truth = features_of(1000, dimension, classes, seed=1)

    def ours() -> np.ndarray:
        episodes = draw_episodes(labels, classes, 4, 1000, seed=0)
        return episode_scores(simpleshot(queries, support, episodes, device=DEVICE), truth)[1]

    return (support, labels), (queries, truth), ours


def _simpleshot_case(
    rows: int, dimension: int, classes: int, peer: str, distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Case:
    from sklearn.metrics import balanced_accuracy_score

    (support, labels), (queries, truth), ours = _episodes(rows, dimension, classes)

    def theirs() -> np.ndarray:
        asked, pool = (torch.from_numpy(side).to(DEVICE) for side in (queries, support))
        scores = []
        for episode in torch.from_numpy(draw_episodes(labels, classes, 4, 1000, seed=0)).to(DEVICE):
            drawn = pool[episode]  # [K, S, D]
            mean = drawn.mean(dim=(0, 1))
            means = normalize(drawn - mean, dim=2).mean(dim=1)
            said = distances(normalize(asked - mean, dim=1), means).argmin(dim=1)
            scores.append(balanced_accuracy_score(truth, said.cpu().numpy()))
        return np.array(scores)

    def agree(found: np.ndarray, expected: np.ndarray) -> str:
        gap = float(np.abs(found - expected).max())
        if gap > 5e-3:
            sys.exit(f"balanced accuracies differ by {gap:.2g}")
        return f"balanced accuracy of each episode within {gap:.1g}"

    return Case(EPISODES.format(classes, dimension), peer, ours, theirs, agree)


def _dinov2_module() -> Any:
    """The class KnnModule of a checkout, without the imports of its file, which want packages that it does not use."""
    checkout = os.environ.get("DINOV2_CHECKOUT")
    if not checkout:
        sys.exit("knn-dinov2 needs a checkout of facebookresearch/dinov2; set DINOV2_CHECKOUT to it")
    sys.path.insert(0, checkout)
    import dinov2.distributed

    source = (Path(checkout) / "dinov2" / "eval" / "knn.py").read_text(encoding="utf-8")
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "KnnModule")
    names: dict[str, Any] = {
        "torch": torch,
        "one_hot": one_hot,
        "softmax": softmax,
        "distributed": dinov2.distributed,
    }
    exec(compile(ast.Module([found], []), "knn.py", "exec"), names)
    store = Path(tempfile.mkdtemp()) / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    return names["KnnModule"]


if __name__ == "__main__":
    main()
