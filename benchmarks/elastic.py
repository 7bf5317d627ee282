"""Put streams through stops, other numbers of ranks and other numbers of workers, and count what is repeated or missed.

    python benchmarks/elastic.py                          every system that is installed
    python benchmarks/elastic.py --systems eosin litdata
    python benchmarks/elastic.py --out elastic.json       all that was counted, beside the printed table

Peers: pip install litdata mosaicml-streaming megatron-energon torchdata

Every rank is a process of its own that logs the samples of each batch it was given. A stop is a state saved after some
batch, more batches (lost work, as in a training run that dies between checkpoints), then SIGKILL to the rank and its
workers. Continued runs read that state. What counts is what was consumed up to a state and after the last one. All
systems stream the same tiles; how each is set up stands in benchmarks/peers.py.
"""

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from peers import SYSTEMS, NotOfferedError, Run

BATCH = 12  # samples in a global batch
PER_SHARD, SHARDS = 12, 24
TILES = PER_SHARD * SHARDS  # divides by every number of ranks × workers × samples that is used
UNEVEN_TILES = TILES + 7  # does not
STEPS = TILES // BATCH  # of an epoch
LOST = 2  # steps between a state and the kill
SETTLE = 2.0  # seconds that workers get to read ahead before the samples read are counted


class Leg(NamedTuple):
    """Part of a run between two stops: up to global step ``stop``, or to the end of the epochs."""

    ranks: int
    workers: int
    stop: int | None = None


class Plan(NamedTuple):
    """A run: its legs, how many epochs it takes, and of which tiles."""

    legs: list[Leg]
    epochs: int = 1
    tiles: str = "even"


PLANS = {
    "1 rank": Plan([Leg(1, 0)], epochs=2),
    "2 ranks": Plan([Leg(2, 0)]),
    "3 ranks": Plan([Leg(3, 0)]),
    "4 workers": Plan([Leg(1, 4)], epochs=2),
    "1 rank of 6": Plan([Leg(1, 6)]),
    "2 ranks of 3": Plan([Leg(2, 3)]),
    "3 ranks of 2": Plan([Leg(3, 2)]),
    "same": Plan([Leg(1, 0, 20), Leg(1, 0, 29), Leg(1, 0)], epochs=2),
    "same, 2 workers": Plan([Leg(1, 2, 20), Leg(1, 2)], epochs=2),
    "same, 2 ranks": Plan([Leg(2, 2, 7), Leg(2, 2, 29), Leg(2, 2)], epochs=2),
    "ranks": Plan([Leg(1, 2, 7), Leg(2, 2, 29), Leg(3, 2)], epochs=2),
    "ranks, 6 in all": Plan([Leg(2, 3, 7), Leg(3, 2, 29), Leg(1, 6)], epochs=2),
    "workers": Plan([Leg(1, 0, 7), Leg(1, 4, 29), Leg(1, 2)], epochs=2),
    "both": Plan([Leg(1, 0, 7), Leg(2, 4, 29), Leg(3, 2)], epochs=2),
    "uneven": Plan([Leg(3, 4)], tiles="uneven"),
}
QUESTIONS = {
    "same global batches on 1, 2, 3 ranks": "as many workers a rank",
    "the same, workers in all kept": "1 × 6, 2 × 3, 3 × 2",
    "same global batches with 0, 4 workers": "1 rank",
    "resumes exactly, nothing changed": "1 × 0, 1 × 2, 2 × 2, over an epoch's edge",
    "on other ranks": "1 → 2 → 3 of 2 workers",
    "on other ranks, workers in all kept": "2 × 3 → 3 × 2 → 1 × 6",
    "with other workers": "0 → 4 → 2",
    "with both": "1 × 0 → 2 × 4 → 3 × 2",
    "every rank as many batches": "uneven shards, 3 × 4",
    "epochs in another order": "0 and 4 workers",
    "resumes without reading again": "samples read before the first batch at step 0 → 20",
}


class Outcome(NamedTuple):
    """What came of a plan.

    Attributes:
        failure: why it did not end, or None.
        steps: for each consumed global batch (epoch, ids of each rank's part).
        batches: how many each rank got in the last leg.
        touched: samples read before each leg's first batch, by rank 0.
        diverged: whether the first batches after a state differ from those lost with the kill, ranks and workers alike.
    """

    failure: str | None
    steps: list[tuple[int, list[list[int]]]]
    batches: list[int]
    touched: list[int]
    diverged: bool


def main() -> None:
    """Write the tiles, run every plan of every system, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="only these; no table then")
    parser.add_argument("--out", type=Path, help="write all outcomes and verdicts here, as JSON")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that a leg may take (default: 180)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return run_rank(json.loads(args.job.read_text()), args.rank)
    results = {}
    with tempfile.TemporaryDirectory(prefix="eosin-elastic-") as folder:
        for name in args.systems:
            system = SYSTEMS[name]
            if missing := system.missing():
                print(f"{name} is left out: {missing} is not installed", flush=True)
                continue
            root = Path(folder) / name
            for kind in ("even", "uneven"):
                system.write(phantom_shards(Path(folder) / kind, uneven=kind == "uneven"), root / kind)
            outcomes = {}
            for plan in args.plans:
                began = time.monotonic()
                outcomes[plan] = run_plan(name, PLANS[plan], root, root / plan, args.timeout)
                said = outcomes[plan].failure or ("" if plan == "uneven" else coverage(outcomes[plan]))
                print(f"{name}, {plan}: {said} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            results[name] = {"versions": system.versions, "outcomes": outcomes}
            if set(args.plans) == set(PLANS):
                results[name]["verdicts"] = dict(zip(QUESTIONS, verdicts(outcomes)))
    if args.out:
        whole = {n: r | {"outcomes": {p: o._asdict() for p, o in r["outcomes"].items()}} for n, r in results.items()}
        args.out.write_text(json.dumps(whole, indent=1))
    if set(args.plans) == set(PLANS):
        print(table(results))


def phantom_shards(folder: Path, uneven: bool):
    """A shard set of small noise tiles whose number is in their JSON; made once. Uneven: shards of other sizes."""
    import numpy as np
    import pandas as pd
    import simplejpeg

    from eosin.data_tools.shards import ShardSet, ShardWriter

    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        image_bytes, member = 2048, 2048 + 3 * 512  # with both headers and the JSON's block
        writer = ShardWriter(folder, shard_bytes=PER_SHARD * member)
        for tile in range(UNEVEN_TILES if uneven else TILES):
            jpeg = simplejpeg.encode_jpeg(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            # A comment fills each file up, so that every shard has as many tiles, or not.
            fill = image_bytes + (512 * int(rng.integers(0, 4)) if uneven else 0) - len(jpeg) - 4
            jpeg = jpeg[:2] + b"\xff\xfe" + (fill + 2).to_bytes(2, "big") + bytes(fill) + jpeg[2:]
            writer.add(f"tile_{tile:06d}", jpeg, "jpg", {"x": 0, "y": 0, "mpp": 0.5, "id": tile}, 0)
        writer.finish(pd.DataFrame({"slide": ["noise"]}), tile_size=16, mpp=0.5, config={})
    return ShardSet(folder)


def run_plan(name: str, plan: Plan, data: Path, folder: Path, timeout: float) -> Outcome:
    """Run a plan's legs, one after the other, each in as many processes as it has ranks."""
    kept: list[tuple[int, list[list[int]]]] = []
    lost: list[tuple[int, list[list[int]]]] = []
    logs: list[list[dict[str, Any]]] = []
    touched: list[int] = []
    diverged = False
    state, epoch = None, 0
    for number, leg in enumerate(plan.legs):
        work = folder / str(number)
        (work / "state").mkdir(parents=True)
        before = plan.legs[number - 1]
        redistribute = SYSTEMS[name].redistribute
        if state and redistribute and leg.ranks != before.ranks:
            try:
                redistribute(state, work / "redistributed", leg.ranks)
            except RuntimeError as error:
                return Outcome(f"refuses ({error})", kept, [], touched, diverged)
            state = work / "redistributed"
        job = {
            "system": name,
            "data": str(data / plan.tiles),
            "ranks": leg.ranks,
            "workers": leg.workers,
            "step": len(kept),
            "stop": leg.stop,
            "epoch": epoch,
            "epochs": plan.epochs,
            "state": str(state) if state else None,
            "work": str(work),
        }
        failure, logs = run_leg(job, timeout)
        steps = []
        for parts in itertools.zip_longest(*logs):  # a rank may end before the others
            there = [part for part in parts if part]
            steps.append((there[0]["epoch"], [part["ids"] for part in there]))
        if failure:
            return Outcome(failure, kept + steps, [len(log) for log in logs], touched, diverged)
        touched.append(logs[0][0]["touched"])
        if (before.ranks, before.workers) == (leg.ranks, leg.workers):
            diverged |= any(a != b for a, b in zip(lost, steps))
        if leg.stop is not None:
            steps, lost = steps[: leg.stop - len(kept)], steps[leg.stop - len(kept) :]
        kept += steps
        state, epoch = work / "state", steps[-1][0]
    return Outcome(None, kept, [len(log) for log in logs], touched, diverged)


def run_leg(job: dict[str, Any], timeout: float) -> tuple[str | None, list[list[dict[str, Any]]]]:
    """Start the ranks, kill them when all have come to the stop; why it failed, and what each rank logged."""
    work = Path(job["work"])
    (work / "job.json").write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(job["ranks"]):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GLOBAL_RANK": str(rank),  # litdata's
            "WORLD_SIZE": str(job["ranks"]),
            "LOCAL_WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--job", str(work / "job.json"), "--rank", str(rank)]
        with (work / f"rank{rank}.out").open("wb") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True))
    ends = [work / f"rank{rank}.end" for rank in range(job["ranks"])]
    limit = time.monotonic() + timeout
    while not all(end.exists() for end in ends) and time.monotonic() < limit:
        if any(p.poll() is not None and not end.exists() for p, end in zip(processes, ends)):
            time.sleep(0.5)  # a rank died without a word
            break
        time.sleep(0.05)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    logs = [[json.loads(line) for line in _lines(work / f"rank{rank}.jsonl")] for rank in range(job["ranks"])]
    said = [json.loads(end.read_text()) for end in ends if end.exists()]
    failure = next((text for text in said if text), None)
    if failure is None and len(said) < job["ranks"]:
        failure = f"hangs ({[len(log) for log in logs]} batches in {timeout:.0f} s)"
        if time.monotonic() < limit:
            failure = f"dies ({_last_line(work / f'rank{[end.exists() for end in ends].index(False)}.out')})"
    return failure, logs


def run_rank(job: dict[str, Any], rank: int) -> None:
    """One rank of a leg: log every batch, save where told, then wait to be killed."""
    work = Path(job["work"])
    run = Run(
        data=Path(job["data"]),
        rank=rank,
        ranks=job["ranks"],
        workers=job["workers"],
        batch=BATCH,
        step=job["step"],
        epoch=job["epoch"],
        epochs=job["epochs"],
        state=Path(job["state"]) if job["state"] else None,
        touched=work / f"rank{rank}.touched",
    )
    run.touched.touch()
    if run.ranks > 1:  # as any training does before it opens its data
        import torch

        torch.distributed.init_process_group("gloo")
    said = None
    try:
        stream = SYSTEMS[job["system"]].stream(run)
        with (work / f"rank{rank}.jsonl").open("w") as log:
            for step, (epoch, ids) in enumerate(stream.batches, run.step + 1):
                line: dict[str, Any] = {"step": step, "epoch": epoch, "ids": ids}
                if step == run.step + 1:
                    time.sleep(SETTLE if run.workers else 0)
                    line["touched"] = run.touched.stat().st_size
                print(json.dumps(line), file=log, flush=True)
                if step == job["stop"]:
                    stream.save(work / "state")
                if job["stop"] is not None and step == job["stop"] + LOST:
                    break
    except NotOfferedError as error:
        said = f"not offered ({error})"
    except Exception as error:  # whatever a system says to being continued so is its answer
        text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
        said = f"refuses ({type(error).__name__}: {' '.join(text.split())[:160]})"
    part = work / f"rank{rank}.part"
    part.write_text(json.dumps(said))
    part.rename(work / f"rank{rank}.end")
    time.sleep(3600)


def coverage(outcome: Outcome) -> str:
    """How many samples were repeated and missed, over all epochs; and whether a resumed run took another way."""
    seen: Counter[tuple[int, int]] = Counter((e, i) for e, parts in outcome.steps for part in parts for i in part)
    epochs = {epoch for epoch, _ in seen}
    repeated, missed = sum(seen.values()) - len(seen), TILES * len(epochs) - len(seen)
    if repeated or missed:
        return f"{repeated} repeated, {missed} missed"
    return "in another order" if outcome.diverged else ""


def verdicts(outcomes: dict[str, Outcome]) -> list[str]:
    """The answers to QUESTIONS, in their order."""

    def batches(plan: str) -> list[list[int]]:
        return [sorted(i for part in parts for i in part) for epoch, parts in outcomes[plan].steps if epoch == 0]

    def same(*plans: str) -> str:
        if failure := next((outcomes[p].failure for p in plans if outcomes[p].failure), None):
            return failure
        equal = [sum(a == b for a, b in zip(batches(plans[0]), batches(plan))) for plan in plans[1:]]
        lengths = {len(batches(plan)) for plan in plans}
        return "yes" if len(lengths) == 1 and min(equal) == max(lengths) else f"no ({min(equal)} of {STEPS} equal)"

    def exact(*plans: str) -> str:
        if failure := next((outcomes[p].failure for p in plans if outcomes[p].failure), None):
            return failure
        wrong = [text for plan in plans if (text := coverage(outcomes[plan]))]
        return f"no ({'; '.join(dict.fromkeys(wrong))})" if wrong else "yes"

    def counts() -> str:
        outcome = outcomes["uneven"]
        got = ", ".join(map(str, outcome.batches))
        missed = UNEVEN_TILES - len({i for _, parts in outcome.steps for part in parts for i in part})
        return outcome.failure or f"{'yes' if len(set(outcome.batches)) == 1 else 'no'} ({got}; {missed} missed)"

    def orders() -> str:
        repeats = []
        for plan in ("1 rank", "4 workers"):
            if outcomes[plan].failure:
                return str(outcomes[plan].failure)
            first, second = ([parts for e, parts in outcomes[plan].steps if e == epoch] for epoch in (0, 1))
            if first == second:
                repeats.append(plan)
        return f"no (the same with {' and '.join(repeats)})" if repeats else "yes"

    def at_once() -> str:
        found = [outcomes[plan] for plan in ("same", "same, 2 workers")]
        if failure := next((outcome.failure for outcome in found if outcome.failure), None):
            return failure
        text = ", ".join(f"{o.touched[0]} → {o.touched[1]}" for o in found)
        return f"{'yes' if all(o.touched[1] <= o.touched[0] + 2 * BATCH for o in found) else 'no'} ({text})"

    return [
        same("1 rank", "2 ranks", "3 ranks"),
        same("1 rank of 6", "2 ranks of 3", "3 ranks of 2"),
        same("1 rank", "4 workers"),
        exact("same", "same, 2 workers", "same, 2 ranks"),
        exact("ranks"),
        exact("ranks, 6 in all"),
        exact("workers"),
        exact("both"),
        counts(),
        orders(),
        at_once(),
    ]


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row a question, a column a system."""
    rows = [["question", *(r["versions"] for r in results.values())], ["---"] * (1 + len(results))]
    for question, how in QUESTIONS.items():
        rows.append([f"{question} ({how})", *(r["verdicts"][question] for r in results.values())])
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in rows)


def _lines(path: Path) -> list[str]:
    # A rank that was killed while it wrote leaves half a line.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:160] if lines else "no message"


if __name__ == "__main__":
    main()
