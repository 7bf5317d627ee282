"""Monitors that say in plain words when a run goes wrong; they look at logged numbers only."""

from __future__ import annotations

import math

SETTLED = 100  # steps; before them even a healthy teacher still answers evenly


def warnings(record: dict[str, float], prototypes: int) -> list[str]:
    """Sentences about one logged record of a run, none when it is healthy.

    Args:
        record: as written to ``metrics.jsonl``.
        prototypes: K, whose logarithm is the loss of a student that has learned nothing.
    """
    top = math.log(prototypes)
    said = []
    warm = record["step"] > max(record["warmup"], SETTLED)
    if warm and record["prototype_entropy"] < 0.2 * top:
        said.append("nearly all crops fall on a few prototypes: the teacher has collapsed to one answer")
    if warm and record["teacher_entropy"] > 0.98 * top and record["dino"] > 0.98 * top:
        said.append(f"the loss stays at ln K = {top:.2f} and the teacher answers evenly: DINO teaches nothing yet")
    if warm and record["mean_cosine"] > 0.98:
        said.append("features of different tiles point the same way (mean cosine above .98): they are collapsing")
    if warm and record["effective_rank"] < 3:
        said.append("features span fewer than three directions (effective rank below 3): they are collapsing")
    if record["skipped"] > 0:
        said.append(f"{record['skipped']:.0f} steps were skipped since their gradient was not finite")
    return said
