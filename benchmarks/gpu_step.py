"""Time whole training steps on one GPU beside facebookresearch/dinov2's, and say where ours spend their time.

    DINOV2_CHECKOUT=checkout python benchmarks/gpu_step.py --out gpu.json

ViT-S, B and L/16, 2 × 224 + 8 × 96 px crops, the recipe ``dinov2``. Ours: the whole step from uint8 tiles of 256 px on
the GPU to new weights, crops included, in bfloat16, with each attention backend, compiled or not. Theirs: the same step
from crops and masks that are ready on the GPU, in float16 with its gradient scaler (its default) and in bfloat16. Each
is a process of its own that holds its network; they take turns, a window each, and give the memory back. Besides: crops
alone, Macenko normalization, and the share of a step's parts. What fails is recorded with its reason and the rest goes
on; the file is written again after each part.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MODELS = {"S": ("vit_small_patch16_224", 128), "B": ("vit_base_patch16_224", 128), "L": ("vit_large_patch16_224", 64)}
OURS: dict[str, list[str]] = {
    "eosin sdpa": [],
    "eosin varlen": ["run.attention=varlen"],
    "eosin xformers": ["run.attention=xformers"],
    "eosin sdpa, compiled": ["run.compile=true"],
    "eosin varlen, compiled": ["run.attention=varlen", "run.compile=true"],
}
# As many at a time as fit into a GPU's memory with their weights.
GROUPS = (
    ("eosin sdpa", "eosin varlen", "dinov2 fp16", "dinov2 bf16"),
    ("eosin sdpa, compiled", "eosin varlen, compiled", "eosin xformers", "dinov2 fp16"),
)
CROPS = "crops alone"
WARM = 3  # steps before anything is timed
START, TURN = 240, 120  # seconds in which a process must be ready, and done with a window


def main() -> None:
    """Measure what was asked for; print Markdown rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON of all measures (default: gpu.json)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["L", "B", "S"])
    parser.add_argument("--batch", type=int, help="images a step (default: 128, for ViT-L 64)")
    parser.add_argument("--windows", type=int, default=5, help="of each, by turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a window, about (default: 1.5)")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which no part begins (default: 540)")
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name holds it, such as 'group 2'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    args = parser.parse_args()

    end = time.monotonic() + args.limit
    found: dict[str, Any] = {"machine": _machine(args.device), "date": str(datetime.date.today()), "parts": {}}
    parts: dict[str, Callable[[], Any]] = {}
    for number, group in enumerate(GROUPS):
        for name in args.models:
            parts[f"ViT-{name}/16, group {number + 1}"] = lambda name=name, group=group: by_turns(args, name, group)
        if number == 0:
            parts[CROPS] = lambda: by_turns(args, "S", (CROPS,))
            parts["stain"] = stain
    for name, part in ((name, part) for name, part in parts.items() if args.only in name):
        try:
            found["parts"][name] = part() if time.monotonic() < end else {"failed": "no time was left"}
        except Exception as error:
            found["parts"][name] = _failure(error)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for line in rows(name, found):
            print(line, flush=True)


def by_turns(args: argparse.Namespace, model: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Windows of each of ``names`` by turns, then a profile of each that is ours."""
    spawn = multiprocessing.get_context("spawn")
    workers, found = {}, {name: {} for name in names}
    for name in names:
        here, there = spawn.Pipe()
        process = spawn.Process(target=serve, args=(there, name, model, args))
        process.start()
        there.close()
        workers[name] = (process, here)
    try:
        for name in names:
            _ask(workers, found, name, "", START)
        # One after another from here on: the GPU's memory holds all the weights, but one step at a time.
        for name in list(workers):
            found[name] |= _ask(workers, found, name, "warm", START)
        for _ in range(args.windows):
            for name in list(workers):
                for key, value in _ask(workers, found, name, "window", TURN).items():
                    found[name].setdefault(key, []).append(value)
        for name in [n for n in workers if n.startswith("eosin")]:
            found[name]["profile"] = _ask(workers, found, name, "profile", TURN)
    finally:
        for process, _ in workers.values():
            process.kill()
            process.join()
    return found


def _ask(workers: dict[str, Any], found: dict[str, Any], name: str, command: str, wait: float) -> dict[str, Any]:
    """A worker's answer; one that fails or is silent is left out from here on."""
    process, here = workers[name]
    answer: dict[str, Any] = {"failed": f"no answer in {wait:.0f} s"}
    try:
        if command:
            here.send(command)
        if here.poll(wait):
            answer = here.recv()
    except (EOFError, OSError):
        process.join(5)
        answer = {"failed": f"the process ended with {process.exitcode}"}
    if "failed" in answer:
        found[name] |= answer
        process.kill()
        process.join()
        del workers[name]
        return {}
    return answer


def serve(connection: Connection, name: str, model: str, args: argparse.Namespace) -> None:
    """A worker: make the step that ``name`` stands for and run it when told to."""
    try:
        step, sections, work = make(name, model, args)
        connection.send({})
        steps = 1
        while command := connection.recv():
            if command == "warm":
                answer = warm(step, args.seconds, args.device)
                steps = answer["steps"]
            elif command == "window":
                answer = window(step, steps, work, args.device)
            else:
                answer = profile(step, sections, args.device)
            if args.device == "cuda":
                torch.cuda.empty_cache()
            connection.send(answer)
    except EOFError:
        pass
    except Exception as error:
        connection.send(_failure(error))


def make(
    name: str, model: str, args: argparse.Namespace
) -> tuple[Callable[[], object], Sections | None, dict[str, float]]:
    """The step, the clock of its sections, and the images and FLOPs of a step."""
    import step

    from eosin.ssl.augment import multi_crop
    from eosin.ssl.config import load_config
    from eosin.ssl.plan import Plan

    architecture, batch = MODELS[model]
    batch = args.batch or batch
    overrides = ["data.shards=s", "run.dir=r", f"model.architecture={architecture}", f"data.batch={batch}"]
    config = load_config("dinov2", [*overrides, *args.overrides, *OURS.get(name, [])])
    tiles = 4 * batch if name == CROPS else batch
    generator = torch.Generator(args.device).manual_seed(0)
    images = torch.randint(0, 256, (tiles, 3, 256, 256), dtype=torch.uint8, device=args.device, generator=generator)
    plan = Plan(config)
    work = {"images": tiles, "flops": 0.0 if name == CROPS else tiles * plan.step(plan.phases[0]).total}
    if name == CROPS:
        return lambda: multi_crop(images, torch.arange(tiles, device=args.device), config), None, work
    if name.startswith("dinov2"):
        return step.dinov2(config, images, precision=name.split()[1]), None, work
    sections = Sections(args.device)
    return step.eosin(config, images, section=sections), sections, work


class Sections:
    """How long the parts of a step take on the device: an event at the border of each, in the order of the stream."""

    def __init__(self, device: str) -> None:
        self.cuda, self.borders = device == "cuda", []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One part; where nothing is recorded, it costs two events."""
        began = self._now()
        yield
        self.borders.append((name, began, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Of each part, since the last call."""
        sums: dict[str, float] = {}
        for name, began, ended in self.borders:
            took = began.elapsed_time(ended) if self.cuda else 1e3 * (ended - began)
            sums[name] = sums.get(name, 0.0) + took
        self.borders.clear()
        return sums

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def warm(step: Callable[[], object], seconds: float, device: str) -> dict[str, Any]:
    """Time the first step, in which a compiled network is compiled, and how many steps later ones take ``seconds``."""
    took = []
    for _ in range(WARM):
        began = time.perf_counter()
        step()
        _wait(device)
        took.append(time.perf_counter() - began)
    return {"first_step_s": took[0], "steps": max(round(seconds / took[-1]), 1)}


def window(step: Callable[[], object], steps: int, work: dict[str, float], device: str) -> dict[str, float | None]:
    """Speed, share of the GPU's peak and most memory of some steps, after one that is not timed."""
    from eosin.ssl.metrics import peak_flops

    step()
    _wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    took = (time.perf_counter() - began) / steps
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "images_per_s": work["images"] / took,
        "mfu": work["flops"] / took / peak if peak and work["flops"] else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


def profile(step: Callable[[], object], sections: Sections, device: str, steps: int = 5) -> dict[str, Any]:
    """Shares of a step's parts by the device's clock, and the kernels that take longest by torch's profiler."""
    step()
    _wait(device)
    sections.milliseconds()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    whole = 1e3 * (time.perf_counter() - began)
    parts = {name: took / whole for name, took in sections.milliseconds().items()}
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if sections.cuda else [])]) as profiler:
        step()
        _wait(device)
    events = [
        (e.key, e.self_device_time_total if sections.cuda else e.self_cpu_time_total) for e in profiler.key_averages()
    ]
    events = sorted((e for e in events if e[1] > 0), key=lambda e: -e[1])
    busy = sum(took for _, took in events)
    return {
        "step_ms": whole / steps,
        "parts": parts | {"rest": 1 - sum(parts.values())},
        "busiest": [{"name": name[:100], "share": took / busy} for name, took in events[:12]],
    }


def stain() -> dict[str, Any]:
    """The row of ``run.py stain-gpu``."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "stain-gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        return {"failed": f"run.py ended with {done.returncode}", "traceback": done.stderr[-4000:]}
    return {"row": done.stdout.splitlines()[-1]}


def rows(part: str, found: dict[str, Any]) -> Iterator[str]:
    """Markdown of a part: one row a side, the ratio to dinov2 in float16 of the same group."""
    sides = found["parts"][part]
    if "failed" in sides:
        yield f"{part}: {sides['failed']}"
        return
    if "row" in sides:
        yield sides["row"]
        return
    yield f"\n{part}, {found['machine']['name']}, {found['date']}\n"
    yield "| side | images/s | ratio | peak memory, GB | MFU | shares of a step |\n|---|---|---|---|---|---|"
    base = sides.get("dinov2 fp16", {}).get("images_per_s")
    for name, side in sides.items():
        if "images_per_s" not in side:
            yield f"| {name} | failed: {side['failed']} | | | | |"
            continue
        speeds = side["images_per_s"]
        middle = statistics.median(speeds)
        ratio = f"{middle / statistics.median(base):.2f}" if base else ""
        memory = f"{max(side['peak_gb']):.1f}" if side["peak_gb"][0] is not None else ""
        mfu = f"{statistics.median(side['mfu']):.1%}" if side["mfu"][0] is not None else ""
        parts = ", ".join(f"{k} {v:.0%}" for k, v in side.get("profile", {}).get("parts", {}).items())
        speed = f"{middle:,.0f} [{min(speeds):,.0f}–{max(speeds):,.0f}]"
        yield f"| {name} | {speed} | {ratio} | {memory} | {mfu} | {parts} |"


def _failure(error: Exception) -> dict[str, str]:
    line = (str(error).strip().splitlines() or [""])[0]
    return {"failed": f"{type(error).__name__}: {line}"[:300], "traceback": traceback.format_exc()[-4000:]}


def _machine(device: str) -> dict[str, Any]:
    cuda = device == "cuda"
    return {
        "name": torch.cuda.get_device_name() if cuda else "CPU",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
