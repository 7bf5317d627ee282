"""What a run says of how it was trained, in sentences for the report and the model card: what it held out, how it ran,
what went wrong. Nothing here is drawn or judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.ssl import rewind
from eosin.ssl.config import Config
from eosin.ssl.held_out import held_out_slides, texts
from eosin.ssl.skipped import LIST


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, [] before the first is logged. Raises UserError where one is not JSON."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # a run under way is writing it
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path} line {number} is not JSON; start 'eosin train' again to mend it") from None
    return found


def held_out(config: Config, data: Mixture | None = None) -> str:
    """Patients and slides that were never trained on, as words; empty where none were held out.

    Args:
        data: the run's tiles, where they are no longer at ``data.shards``.
    """
    share = config.health.held_out
    if not share:
        return ""
    given = config.data.shards
    try:
        data = data or Mixture({given: 1.0} if isinstance(given, str) else given)
    except UserError:
        return f"about {100 * share:g} % of the patients (health.held_out); the shard set is not at hand to count them"
    slides = held_out_slides(data, share, config.run.seed)
    table = data.slides()
    of_slides, names = (texts(table[c]) if c in table else [""] * len(table) for c in ("patient", "slide"))
    patients = len({of_slides[n] or names[n] for n in slides})
    if not any(of_slides):
        return f"{len(slides)} of {len(table)} slides, each taken for a patient of its own (health.held_out={share:g})"
    whole = len({patient or slide for patient, slide in zip(of_slides, names)})
    return f"{patients} of {whole} patients, {len(slides)} of {len(table)} slides (health.held_out={share:g})"


def way(config: Config, how: Mapping[str, Any]) -> str:
    """Strategy, precision and global batch of a run, as words; ``how`` is of its checkpoint, or empty."""
    ranks = how.get("ranks")
    strategy = "FSDP2" if config.run.strategy == "fsdp" else "DDP"
    spread = f"{strategy} on {ranks} processes" if ranks else f"{strategy} where there were several processes"
    words = {"auto": "bfloat16 on a GPU, float32 on a CPU", "bf16": "bfloat16 (autocast)", "fp32": "float32"}
    parts = ["1 process" if ranks == 1 else spread, words[how.get("precision", config.run.precision)]]
    parts.append(f"global batch {config.data.batch:,}")
    if config.optim.accumulate > 1:
        parts[-1] += f", a process's share in {config.optim.accumulate} parts"
    if config.run.checkpoint_activations == "blocks":
        parts.append("activations computed again")
    return ", ".join(parts)


def trouble(run: Path, logged: Sequence[dict[str, Any]], step: int) -> str:
    """Steps that were skipped and rewinds of a run up to ``step``, as a sentence."""
    listed = run / LIST
    lines = listed.read_text(encoding="utf-8").splitlines(keepends=True) if listed.is_file() else []
    skipped = sorted({number for line in lines if line.endswith("\n") and (number := json.loads(line)["step"]) <= step})
    said = []
    if skipped:
        count = max(len(skipped), max((int(r.get("skipped") or 0) for r in logged), default=0))
        which = ", ".join(map(str, skipped[:5])) + (", …" if len(skipped) > 5 else "")
        said.append(f"{_number(count, 'step')} without a finite gradient changed nothing ({which})")
    for back in rewind.read(run):
        said.append(f"the run went back to step {back.step} and passed over {_number(back.skip, 'batch', 'batches')}")
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "." if said else "No step was skipped, none rewound."


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
