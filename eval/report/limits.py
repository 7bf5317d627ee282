"""What the model was not shown: the limits of a run, read off its data rather than assumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eosin.eval.report.material import Material
from eosin.eval.report.page import Block, Section, Words
from eosin.ssl.stain.fits import HE

FEW_PATIENTS = 20
RARE = 0.05
OBJECTIVE_PIXELS = 10.0  # µm/px times the magnification of the objective it is called by
NOT_A_DEVICE = "This is not a medical device. Nothing here may guide a diagnosis or a treatment."


def limits(m: Material) -> Section:
    """The limits as a list, the fixed line last."""
    lines = [*_slides(m), *_places(m), *_looks(m), *_classes(m), *_training(m)]
    lead = "What a model never saw it cannot be trusted with; this list is derived from the data of this run."
    blocks: list[Block] = [Words(lines, "list"), Words([NOT_A_DEVICE], "warning")]
    return Section("limits", "What it was not shown", lead, blocks)


def _slides(m: Material) -> Iterator[str]:
    synthetic = m.synthetic[m.tiles_of_slide > 0]
    if synthetic.all():
        yield "No real tissue: every slide is synthetic, so no number here says anything about patients."
    elif synthetic.any():
        yield f"{synthetic.sum()} of {len(synthetic)} slides are synthetic; numbers mix them with real tissue."
    patients = len(m.known("patient"))
    if not patients:
        yield "The slides table names no patients, so slides of one patient may stand on both sides of a split."
    elif patients < FEW_PATIENTS:
        yield f"Only {patients} patients: what varies from patient to patient is hardly sampled."
    refused = len(m.slides) - len(m.used)
    if refused:
        which = "1 slide gave no tile and is" if refused == 1 else f"{refused} slides gave no tile and are"
        yield f"{which} not part of any number here."


def _places(m: Material) -> Iterator[str]:
    for what, values in (("site", m.known("site")), ("scanner", m.known("scanner") or m.known("vendor"))):
        if not values:
            yield f"The slides table names no {what}, so nothing tells how the model does on another one."
        elif len(values) == 1:
            yield f"One {what} only ({values[0]}); it has not been shown what another one does to the image."
        else:
            held_out = any(r.data["group"] == what for r in m.results)
            tested = "" if held_out else f", and no probe held a whole {what} out"
            yield f"{len(values)} {what}s ({_some(values)}) and no other{tested}."


def _looks(m: Material) -> Iterator[str]:
    stains = m.known("stain")
    if stains and set(stains) <= set(HE):
        yield "Only H&E: no immunohistochemistry, no special stain, no fluorescence."
    elif stains:
        yield f"Stains seen: {_some(stains)}; no other."
    found = m.shards.column("mpp")
    mpps = np.unique(np.round(found[np.isfinite(found)], 2))
    if not len(mpps):
        yield "The µm/px of the tiles is unknown, so the magnification it has learned is unknown too."
    elif len(mpps) == 1:
        yield f"One magnification: {mpps[0]:g} µm/px (about {OBJECTIVE_PIXELS / mpps[0]:.0f}×)."
    else:
        yield f"Magnifications from {mpps[0]:g} to {mpps[-1]:g} µm/px and none outside."
    spoiled = sum(int(m.slides[c].sum()) for c in ("dropped_pen", "dropped_blur") if c in m.slides)
    if spoiled:
        yield f"{spoiled:,} tiles under pen marks or out of focus were left out, so it does not know how these look."


def _classes(m: Material) -> Iterator[str]:
    if not m.results:
        yield "No label was probed, so nothing is known of any diagnosis."
    asked = set()
    for r in m.results:
        if r.data["label"] in asked or not r.data.get("class_counts"):
            continue
        asked.add(r.data["label"])
        counts = dict(zip(r.data["classes"], r.data["class_counts"]))
        rarest = min(counts, key=lambda c: counts[c])
        share = counts[rarest] / max(sum(counts.values()), 1)
        unit = r.data.get("unit", "sample")
        known = ", ".join(f"{c} {n:,}" for c, n in list(counts.items())[:12]) + (", …" if len(counts) > 12 else "")
        yield f"Classes of '{r.data['label']}': {known} {unit}s, and no other."
        if share < RARE:
            yield f"Class '{rarest}' is rare ({counts[rarest]} {unit}s, {100 * share:.1f} %): little is known of it."
        else:
            yield f"No rare class: even the smallest, '{rarest}', is {100 * share:.0f} % of the {unit}s."


def _training(m: Material) -> Iterator[str]:
    if m.step:
        passes = m.step * m.config.data.batch / len(m.shards)
        yield f"{m.step:,} steps of {m.config.data.batch} tiles are {passes:,.1f} passes over the tiles."
    if m.step < m.config.run.steps:
        yield f"The run is not complete: {m.step:,} of {m.config.run.steps:,} steps."
    seen = m.about.get("facts", {}).get("shard set")
    probed = {r["fingerprint"].get("shards") for result in m.results for r in result.data["encoders"]}
    if seen is not None and seen in probed:
        yield (
            "The probes use the slides that pretraining saw, without their labels: "
            "features of slides it never saw may be worse."
        )
    bad = max((r.get("bad_tiles") or 0 for r in m.records), default=0)
    if bad:
        yield f"{bad} tiles could not be decoded and were skipped; they are listed in the run's bad_tiles.jsonl."


def _some(values: list[str], most: int = 6) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")
