"""``eosin train --plan``: a run's figures as a screen of text, and its schedules as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path

if TYPE_CHECKING:
    from eosin.ssl.config import Config
    from eosin.ssl.plan import Flops, Phase, Plan, Shape

GIB, MIB = 2**30, 2**20
SPEEDS = (100.0, 200.0, 400.0)  # TFLOP/s a GPU, shown where none is given
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
CARDS = (24, 40, 80)  # GiB of a GPU
# What a plan does without; whatever a user gives goes before.
UNSET = ["data.shards=not-set", "run.dir=not-set"]
POINTS = 1000  # of a drawn curve


def show(
    recipe: str,
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    gpus: int | None = None,
    tflops: float | None = None,
    price: float | None = None,
) -> None:
    """Print the plan of a recipe, and draw its schedules into ``out`` if that is given.

    Args:
        gpus: processes that share a batch; 1 where it is not given.
        tflops: TFLOP/s that a GPU achieves.
        price: of a GPU hour, in any currency.

    Raises:
        UserError: for a mistake in the configuration or in one of these.
    """
    _refuse(out, gpus, tflops, price)
    from eosin.ssl.config import load_config
    from eosin.ssl.plan import Plan

    config = load_config(recipe, [*UNSET, *overrides])
    gpus = gpus or 1
    parts = gpus * config.optim.accumulate
    if config.data.batch % parts:
        times = f" times optim.accumulate={config.optim.accumulate}" if parts > gpus else ""
        raise UserError(
            f"--gpus {gpus}{times} does not divide data.batch {config.data.batch}; {_divisors(config, gpus)}"
        )
    plan = Plan(config)
    title = f"{Path(recipe).stem}: {config.run.steps:,} steps of {config.data.batch:,} images"
    print("\n".join(lines(plan, title, gpus, tflops, price, table=out is None)))
    if out:
        draw(config, title, out)
        print(f"schedules drawn in {out}")


def _refuse(out: Path | None, gpus: int | None, tflops: float | None, price: float | None) -> None:
    if out and out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the schedules are a PNG; give a name that ends in .png")
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus {gpus} is not a number of GPUs; give 1 or more")
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(f"--tflops {tflops:g} is not a speed; give the TFLOP/s that a GPU achieves, above 0")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price:g} is not a price; give that of a GPU hour, 0 or more")


def _divisors(config: Config, gpus: int) -> str:
    batch, parts = config.data.batch, config.optim.accumulate
    divisors = [n for n in range(1, batch // parts + 1) if batch % (n * parts) == 0]
    if not divisors:
        whole = gpus * parts
        return f"the nearest data.batch that {whole} divides: {max(round(batch / whole), 1) * whole}"
    below, above = [n for n in divisors if n < gpus][-1:], [n for n in divisors if n > gpus][:1]
    return f"the nearest that do: {', '.join(map(str, below + above))}"


def lines(
    plan: Plan, title: str, gpus: int, tflops: float | None = None, price: float | None = None, *, table: bool = True
) -> list[str]:
    """The plan as text; ``table`` adds the schedule."""
    parts = [_model(plan), _flops(plan), _memory(plan, gpus), _time(plan, gpus, tflops, price)]
    if table:
        parts.append(_schedule(plan.config))
    text = [f"plan of {title}; nothing is trained, no data is read"]
    for part in parts:
        text += ["", *part]
    return text


def _model(plan: Plan) -> Iterator[str]:
    shape, parts = plan.shape, plan.parameters
    yield (
        f"model       {plan.config.model.architecture}: width {shape.width:,}, depth {shape.depth}, "
        f"{shape.heads} heads, {'gated ' * shape.gated}MLP {shape.hidden:,}, patch {shape.patch} px, "
        f"{shape.prefix - 1} registers"
    )
    for phase in plan.phases:
        begin = "crops       " if phase is plan.phases[0] else f"            last {phase.steps:,} steps: "
        yield begin + _crops(shape, phase)
    tied = " (iBOT's too)" if shape.tied else ""
    named = " + ".join(f"{name}{tied if name == 'DINO head' else ''} {n:,}" for name, n in parts.items())
    yield f"parameters  {named}"
    yield f"            = {sum(parts.values()):,} trained, and as many in the teacher's copy (exact)"


def _crops(shape: Shape, phase: Phase) -> str:
    crops = phase.crops
    text = f"2 x {crops.global_size} px ({shape.tokens(crops.global_size):,} tokens)"
    if crops.local_count:
        text += f" + {crops.local_count} x {crops.local_size} px ({shape.tokens(crops.local_size):,} tokens)"
    patches = 2 * (shape.tokens(crops.global_size) - shape.prefix)
    return f"{text}; {phase.masked:.4g} of {patches:,} patches masked (mean)"


def _flops(plan: Plan) -> Iterator[str]:
    from eosin.ssl.memory import recomputed
    from eosin.ssl.plan import backward, crop_forward, fvcore_table, student_forward, teacher_forward

    phase, rate = plan.phases[0], plan.config.model.drop_path
    there = student_forward(plan.shape, phase)
    yield "FLOP, one image, in GFLOP     patch embedding       linear    attention        heads        total"
    yield _row("student, forward", there)
    yield _row("teacher, forward", teacher_forward(plan.shape, phase))
    yield _row("student, backward", backward(there))
    yield _row("a step", plan.step(phase, 0.0))
    if rate:
        yield _row("a step, as executed", plan.step(phase))
    for later in plan.phases[1:]:
        yield _row("last steps, as executed", plan.step(later))
    if plan.config.run.checkpoint_activations == "blocks":
        yield _row("blocks, computed again", recomputed(plan, plan.phases[-1]))
    if rate:
        yield f"  Drop path {rate:g}: what a crop's branches drop is not computed."
    counted, side = fvcore_table(plan.config), plan.config.crops.global_size
    named = " + ".join(f"{part} {_digits(n / 1e9)} ({held / 1e6:,.1f} M)" for part, (held, n) in counted.items())
    whole, closed = (_digits(n / 1e9) for n in (sum(n for _, n in counted.values()), crop_forward(plan.shape, side)))
    yield f"  fvcore, a {side} px crop (parameters): {named}"
    yield f"  in sum {whole}, in closed form {closed}: fvcore misses attention's two products (SDPA)"


def _row(name: str, flops: Flops) -> str:
    parts = (flops.embedding, flops.linear, flops.attention, flops.heads, flops.total)
    return f"  {name:<28}" + "".join(f"{_digits(v / 1e9):>{w}}" for v, w in zip(parts, (15, 13, 13, 13, 13)))


def _memory(plan: Plan, gpus: int) -> Iterator[str]:
    from eosin.ssl.memory import held

    run, images = plan.config.run, plan.config.data.batch // gpus
    of_each = held(plan, gpus)
    memory, parts = of_each.memory, of_each.parts
    unit, name = (GIB, "GiB") if of_each.exact >= GIB else (MIB, "MiB")
    exact = {"student": memory.student, "teacher": memory.teacher, "gradients": memory.gradients}
    exact |= {"AdamW": memory.moments, "DDP's buckets": memory.buckets, "sums": of_each.summed}
    named = " + ".join(f"{part} {_digits(n / unit)}" for part, n in exact.items() if n)
    kept = of_each.kept(images)
    image, every, whole = (_digits(n / unit) for n in (memory.image, kept, of_each.exact + kept))
    fixed = _digits((memory.fixed + of_each.gathered) / unit)
    now = images // parts
    waiting = f" + {images - now:,} x {_digits(of_each.waiting / unit)} waiting" if parts > 1 else ""
    how = [f"{images:,} images" + (f" in {parts} parts" if parts > 1 else "")]
    how[0] += f" at {memory.side} px" if len(plan.phases) > 1 else ""
    how += ["bf16" if plan.bf16 else "fp32"]
    how += ["sharded by FSDP2" if run.strategy == "fsdp" else "DDP"] if gpus > 1 else []
    how += ["blocks computed again" if run.checkpoint_activations == "blocks" else "no checkpointing"]
    yield f"memory      of {'each of ' * (gpus > 1)}{_gpus(gpus)} with {', '.join(how)}"
    yield f"  exact     {named} = {_digits(of_each.exact / unit)} {name}"
    yield f"  estimate  activations {fixed} + {now:,} x {image}{waiting} = {every} {name}; in all {whole} {name}"
    room = ", ".join(f"{of_each.room(card * GIB):,} in {card} GiB" for card in CARDS)
    yield f"            images that would fit: {room}"


def _time(plan: Plan, gpus: int, tflops: float | None, price: float | None) -> Iterator[str]:
    from eosin.ssl.memory import executed
    from eosin.ssl.plan import days

    flops = executed(plan)
    ask = "" if tflops else "; give --tflops, what a GPU achieves, for time and cost"
    again = f", {100 * (1 - plan.flops / flops):.0f} % of them again" if flops > plan.flops else ""
    yield f"time        {plan.images:,} images, {_flop(flops)} in all{again}{ask}"
    columns = ["TFLOP/s a GPU", "images/s a GPU", f"days on {_gpus(gpus)}", "GPU hours"]
    columns += [f"cost at {price:g} an hour"] if price is not None else []
    yield "  " + "   ".join(columns)
    for speed in (tflops,) if tflops else SPEEDS:
        length = days(flops, speed, gpus)
        hours = length * 24 * gpus
        values = [f"{speed:g}", *map(_digits, (plan.images / (hours * 3600), length, hours, hours * (price or 0)))]
        yield "  " + "   ".join(f"{value:>{len(column)}}" for value, column in zip(values, columns))


def _schedule(config: Config) -> Iterator[str]:
    from eosin.ssl.schedules import at

    yield f"schedule    learning rate: {_peak(config)}; layer decay {config.optim.layer_decay:g}"
    yield "                    step   learning rate   weight decay   momentum   temperature   frozen"
    for step, name in moments(config):
        moment = at(step, config)
        frozen = [
            part
            for part, held in (("last layer", moment.last_layer_frozen), ("backbone", moment.backbone_frozen))
            if held
        ]
        yield (
            f"  {name:<12}{step:>10,}{moment.lr:>16.3e}{moment.weight_decay:>15.4f}{moment.momentum:>11.5f}"
            f"{moment.teacher_temperature:>14.4f}   {', '.join(frozen) or '-'}"
        )


def moments(config: Config) -> list[tuple[int, str]]:
    """Steps worth a line, counted from 0, with their names; where two fall together the first name stays."""
    steps = config.run.steps
    named = [(0, "start"), (min(config.optim.warmup, steps - 1), "warm-up end")]
    named += [(steps * share // 100, f"{share} %") for share in (25, 50, 75)] + [(steps - 1, "last")]
    first: dict[int, str] = {}
    for step, name in named:
        first.setdefault(step, name)
    return sorted(first.items())


def _peak(config: Config) -> str:
    from eosin.ssl.schedules import base_lr

    optim, batch = config.optim, config.data.batch
    scaling = {"sqrt": f" x sqrt({batch} / 1024)", "linear": f" x {batch} / 1024", "none": ", not scaled"}
    return f"peak {base_lr(config):.3e} = {optim.lr:g}{scaling[optim.scaling]}"


def draw(config: Config, title: str, out: Path) -> None:
    """Draw the schedules over the run as a PNG, 2 x 2 panels."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from eosin.eval.report.plots import BLUE, DPI, INK, ORANGE, PURPLE, SOFT, STYLE
    from eosin.ssl.schedules import at, base_lr

    optim, steps = config.optim, config.run.steps
    # The ends of warm-ups are corners, which even spacing would cut off.
    corners = [optim.warmup, optim.warmup - 1, config.objective.teacher_temperature_warmup]
    places = np.union1d(np.linspace(0, steps - 1, min(POINTS, steps)).astype(int), np.clip(corners, 0, steps - 1))
    curve = [at(int(step), config) for step in places]
    panels = {
        "Learning rate": "lr",
        "Weight decay": "weight_decay",
        "Momentum of the teacher": "momentum",
        "Temperature of the teacher": "teacher_temperature",
    }
    spans = [("last layer frozen", optim.freeze_last_layer, ORANGE), ("backbone frozen", optim.heads_only, BLUE)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        grid: Any = figure.subplots(2, 2, sharex=True)
        for axes, (name, key) in zip(grid.flat, panels.items()):
            axes.plot(places, [getattr(moment, key) for moment in curve], color=PURPLE)
            axes.set_title(name)
            axes.margins(x=0.01)
            axes.locator_params(axis="x", nbins=6)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            if config.high_resolution:
                switch = steps - config.high_resolution.steps
                axes.axvline(switch, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
                if key == "weight_decay":  # which has room for words
                    label = f"crops of {config.high_resolution.crops.global_size} px\nfrom step {switch:,}"
                    axes.lines[-1].set_label(label)
                    axes.legend(loc="upper left")
        rate = grid[0, 0]
        rate.plot(max(optim.warmup - 1, 0), base_lr(config), "o", color=INK, markersize=5, label=_peak(config))
        for name, end, color in sorted(spans, key=lambda span: -span[1]):  # the shorter one on top
            if end:
                rate.axvspan(0, end, color=color, alpha=0.7, linewidth=0, label=f"{name}, {end:,} steps")
        rate.set_ylim(top=1.45 * base_lr(config))  # room for the legend
        rate.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="white", framealpha=1)
        figure.suptitle(title, fontsize=11, color=INK)
        figure.supxlabel("training step", fontsize=10, color=SOFT)
        with atomic_path(out) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def _digits(value: float) -> str:
    """A number with about four digits that count."""
    if value == 0 or value >= 999.95:
        return f"{value:,.0f}"
    return f"{value:.{max(3 - math.floor(math.log10(value)), 0)}f}" if value >= 0.001 else f"{value:.2e}"


def _flop(value: float) -> str:
    """FLOPs with the prefix that fits."""
    power = min(max(int(math.log10(max(value, 1)) // 3), 0), len(PREFIXES) - 1)
    return f"{_digits(value / 1000**power)} {PREFIXES[power]}FLOP"


def _gpus(count: int) -> str:
    return f"{count:,} GPU{'s' * (count > 1)}"
