"""Sections of words and numbers: who won, what went in, the probes, how to do it again."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eosin.eval.report import findings, history, plots
from eosin.eval.report.findings import Probe, Results
from eosin.eval.report.material import Material
from eosin.eval.report.page import Block, Gallery, Listing, Section, Table, Words, chart

MOST_ROWS = 24
REASONS = {
    "background": "too little tissue",
    "pen": "pen marks",
    "blank": "nothing to see",
    "blur": "out of focus",
    "unreadable": "cannot be decoded",
    "limit": "over the limit of tiles a slide",
    "refused": "cannot be used",
}


def verdict(m: Material) -> Section:
    """Who won, in words, whoever it was."""
    found = findings.probes(m.results)
    title = "Verdict"
    if not found:
        missing = (
            "No probe was given, so nothing is known of what the encoder learned. Embed RUN, random:RUN and color, run "
            "'eosin eval knn E... --label L --group G --out knn.json', and give --results knn.json to 'eosin report'."
        )
        return Section("verdict", title, "Did training help?", [Words([missing], "warning")])
    head, rows = findings.verdict_rows(found)
    blocks: list[Block] = [Words(findings.headline(found), "verdict")]
    warned = [*_strangers(m), *findings.below_chance(found)]
    blocks += [Words(warned, "warning")] if warned else []
    metrics = dict.fromkeys(findings.title_of(p.primary) for p in found)
    caption = f"{', '.join(metrics)} with 95 % intervals.".capitalize()
    blocks.append(Table(head, rows, caption))
    blocks.append(Words([findings.sentence(probe) for probe in found], "list"))
    notes = dict.fromkeys(note for r in m.results for note in r.data.get("notes", []))
    blocks += [Words(list(notes))] if notes else []
    lead = "Did training help, compared with the same network untrained and with twelve color statistics?"
    return Section("verdict", title, lead, blocks)


def inputs(m: Material) -> Section:
    """Slides, tiles, and what was left out."""
    used, mpp = m.used, m.shards.mpp
    facts = [
        ("slides", f"{len(used):,}" + (f" used, {len(m.slides) - len(used)} not" if len(used) < len(m.slides) else "")),
        ("patients", f"{len(m.known('patient')):,}" if m.known("patient") else "not given"),
        ("sites", _listed(m.known("site"))),
        ("scanners", _listed(m.known("scanner") or m.known("vendor"))),
        ("stains", _listed(m.known("stain"))),
        (f"classes ({m.label})", _listed(m.known(m.label))),
        ("tiles", f"{len(m.shards):,} of {m.shards.tile_size} px, {_magnification(mpp)}"),
    ]
    if "tissue_mm2" in m.slides:
        facts.append(("tissue", f"{m.slides['tissue_mm2'].sum():,.1f} mm²"))
    blocks: list[Block] = [Table([], facts)]
    if m.synthetic.any():
        blocks.insert(0, Words([_synthetic(m)], "warning"))
    blocks += [b for b in (_composition(m), _dropped(m), _refused(m)) if b]
    lead = "Slides are cut into square tiles where there is tissue; only these tiles are ever shown to the model."
    return Section("inputs", "What went in", lead, blocks)


def probes(m: Material) -> Section:
    """All encoders under all protocols, drawn and in numbers."""
    lead = (
        "A probe learns to tell labels from frozen features and is scored on groups it never saw. "
        "Dots are values, lines 95 % intervals over groups."
    )
    found = findings.probes(m.results)
    if not found:
        missing = "No results were given: 'eosin eval knn|linear|mil' makes them and --results R.json adds them."
        return Section("probes", "Probes", lead, [Words([missing])])
    blocks: list[Block] = [Gallery([chart(*drawn) for drawn in forests(found)], 2000)]
    for probe in found:
        rows = findings.metric_rows(probe)
        head = ["Encoder", *map(findings.title_of, probe.metrics)]
        caption = f"{probe.title}: {probe.conditions}; {probe.data['groups']} groups."
        blocks.append(Table(head, rows, caption, frozenset([len(rows) - 1])))
    for result in m.results:
        rows = findings.difference_rows(result)
        if rows:
            head = ["Paired difference", findings.title_of(findings.primary_of(result.data)), ""]
            name = findings.PROTOCOLS.get(result.data["protocol"], result.data["protocol"])
            blocks.append(Table(head, rows, f"{name}: differences under the same draws of groups."))
        blocks += [Words([f"Left out: {n} with {why}."]) for why, n in result.data.get("left_out", {}).items()]
    return Section("probes", "Probes", lead, blocks)


def forests(found: list[Probe]) -> list[tuple[bytes, str]]:
    """Every encoder of every probe with its interval: a PNG for each metric that is compared, and what it shows."""
    drawn = []
    for metric in dict.fromkeys(p.primary for p in found):
        panels = [
            plots.Panel(f"{p.title} · {p.data['label']}", p.chance, [_drawn(p, r) for r in p.rows])
            for p in found
            if p.primary == metric
        ]
        label = findings.title_of(metric)
        drawn.append((plots.forest(panels, label), f"{label} of every encoder under every probe, with intervals"))
    return drawn


def reproduction(m: Material) -> Section:
    """Versions, commands, fingerprints and the whole configuration."""
    from omegaconf import OmegaConf

    saved = f"{m.checkpoint.name}, after {m.step:,} of {m.config.run.steps:,} steps" if m.checkpoint else "none yet"
    facts = [
        ("versions", versions()),
        ("checkpoint", saved),
        ("trained by", history.way(m.config, m.about.get("how", {}))),
        ("held out of training", history.held_out(m.config, m.trained_on) or "nothing"),
        ("steps gone wrong", history.trouble(m.run, m.records, m.step)),
        ("seed", str(m.config.run.seed)),
        ("shards (sha256)", m.shards.identity[:16]),
    ]
    blocks: list[Block] = [Table([], facts), Listing("\n".join(_commands(m)))]
    blocks += [fingerprints(m.results)] if m.results else []
    if m.release is not None:
        blocks += _release(m, m.release)
    else:
        blocks.append(Words(["Not released yet: 'eosin export RUN --out RELEASE' makes a folder that timm loads."]))
    config = OmegaConf.to_yaml(OmegaConf.create(m.config.model_dump()))
    blocks.append(Listing(config, "The run's whole configuration (config.yaml)"))
    return Section("reproduction", "How to do it again", "Everything that decides the numbers above.", blocks)


def versions() -> str:
    """Of eosin and what the numbers depend on."""
    import timm
    import torch

    ours = f"eosin {version('eosin')}, Python {platform.python_version()}"
    return f"{ours}, torch {torch.__version__}, timm {timm.__version__}, numpy {np.__version__}"


def fingerprints(results: Iterable[Results]) -> Table:
    """What made the features of every encoder."""
    prints = {r.get("encoder", r["name"]): r["fingerprint"] for result in results for r in result.data["encoders"]}
    rows = [[name, *_print_cells(p)] for name, p in prints.items()]
    head = ["Encoder", "Weights (sha256)", "Pooling", "Input", "Stain normalizer"]
    return Table(head, rows, "What made the features.")


def _release(m: Material, folder: Path) -> list[Block]:
    from eosin.eval.encoders import load_encoder, weights_sha256

    released = load_encoder(str(folder)).fingerprint["weights"]
    load = Listing(f'timm.create_model("local-dir:{folder}", pretrained=True)')
    if m.teacher is None or released != weights_sha256(m.teacher):
        stale = f"The release {folder} does not hold the weights of the newest checkpoint: export the run again."
        return [Words([stale], "warning"), load]
    return [Words(["The release holds the weights of this checkpoint and loads without eosin:"]), load]


def _strangers(m: Material) -> list[str]:
    """A warning where probed weights are not those of the run's newest checkpoint."""
    from eosin.eval.encoders import weights_sha256

    rows = [(r["name"], r) for result in m.results for r in result.data["encoders"]]
    ours = {name: r["fingerprint"].get("weights") for name, r in rows if findings.role_of(r) == "trained"}
    if m.teacher is None or not ours or weights_sha256(m.teacher) in ours.values():
        return []
    return [
        f"The encoder probed as '{next(iter(ours))}' does not have the weights of {m.run.name}'s newest checkpoint "
        f"({m.step:,} steps): these numbers speak of another encoder. Embed and probe again."
    ]


def _synthetic(m: Material) -> str:
    count = int(m.synthetic[m.tiles_of_slide > 0].sum())
    which = "All slides are" if count == len(m.used) else f"{count} of {len(m.used)} slides are"
    return f"{which} synthetic: drawn by a program, not tissue of any patient."


def _composition(m: Material) -> Table | None:
    """Slides, patients and tiles by whatever the slides table tells apart."""
    columns = [c for c in (m.label, "site", "scanner", "stain") if len(m.known(c)) > 1]
    if not columns:
        return None
    table = pd.DataFrame({c: m.column(c) for c in [*columns, "patient"]}).assign(tiles=m.tiles_of_slide)
    grouped = table[table["tiles"] > 0].groupby(columns)
    counts = grouped.agg(slides=("tiles", "size"), patients=("patient", "nunique"), tiles=("tiles", "sum"))
    counts = counts.reset_index()
    rows = [
        [*(v or "–" for v in row[: len(columns)]), *(f"{n:,}" for n in row[len(columns) :])]
        for row in counts.head(MOST_ROWS).itertuples(index=False)
    ]
    more = f" The first {MOST_ROWS} of {len(counts)} combinations." if len(counts) > MOST_ROWS else ""
    return Table([*columns, "slides", "patients", "tiles"], rows, f"Slides by {', '.join(columns)}.{more}")


def _dropped(m: Material) -> Table | None:
    dropped = {r: int(m.slides[f"dropped_{r}"].sum()) for r in REASONS if f"dropped_{r}" in m.slides}
    if not dropped:
        return None
    total = len(m.shards) + sum(dropped.values())
    entries = [("kept", len(m.shards)), *((f"dropped: {REASONS[r]}", n) for r, n in dropped.items() if n)]
    rows = [[what, f"{n:,}", f"{100 * n / total:.1f} %"] for what, n in entries]
    return Table(["Places on the slides' grid", "tiles", "share"], rows)


def _refused(m: Material) -> Table | None:
    if "reason" not in m.slides:
        return None
    bad = m.slides[m.tiles_of_slide == 0]
    if not len(bad):
        return None
    names = m.column("source") if "source" in m.slides else m.column("slide")
    rows = [[str(names[n]), str(bad["reason"][n] or "gave no tile")] for n in bad.index[:MOST_ROWS]]
    more = f", the first {MOST_ROWS} of {len(bad)}" if len(bad) > MOST_ROWS else ""
    return Table(["Refused slide", "Reason"], rows, f"Slides that gave nothing, with the reason{more}.")


def _commands(m: Material) -> list[str]:
    """The commands that lead here, with the settings that the files on disk remember."""
    made = m.shards.dataset["config"]
    shards, run = shlex.quote(m.shards.name), shlex.quote(str(m.run))
    lines = []
    if made.get("verb") in ("tile", "pack"):
        options = ("mpp", "tile_size", "min_tissue", "max_tiles", "label", "group")
        given = [f"--{o.replace('_', '-')} {shlex.quote(str(made[o]))}" for o in options if made.get(o) is not None]
        source = "SLIDES" if made["verb"] == "tile" else "FOLDER"
        lines.append(f"eosin {made['verb']} {source} --out {shards} {' '.join(given)}")
    if "stain_fit" in m.slides:
        lines.append(f"eosin stain fit {shards}")
    lines.append(f"eosin train {run}/config.yaml data.shards={shards} run.dir=NEW_RUN")
    lines.append(f"eosin embed {run} {shards} --out trained.safetensors")
    lines.append(f"eosin embed random:{run} {shards} --out random.safetensors")
    lines.append(f"eosin embed color {shards} --out color.safetensors")
    if m.results:
        lines.append('E="trained.safetensors random.safetensors color.safetensors"')
    lines += [eval_command(result, "$E") for result in m.results]
    results = " ".join(shlex.quote(str(r.path)) for r in m.results)
    lines.append(f"eosin report {run} " + (f"--results {results} " if results else "") + "--out report.html")
    return lines


def eval_command(result: Results, embeddings: str) -> str:
    """The command that makes these results, with every option that is not as it would be without being given."""
    data, parameters = result.data, result.data["parameters"]
    split, leaks = data.get("split", {}), data.get("leaks", {})
    kind = split.get("kind", "kfold")
    verb = findings.verb_of(data)
    targets = [target["name"] for target in data.get("targets", [])]
    options = {"targets": targets} if verb == "regress" else {"label": [data["label"]]}
    if verb == "dense":
        options = {"masks": [data["masks"]], "patches": [parameters["patches"]]}
    options |= {"group": [data["group"]], "preset": [data["protocol"]] if "paper" in parameters else []}
    known = ("folds", "seed", "bag", "ratios", "shots", "episodes", "top", "starts", "width")
    for name in (*known, *(["k"] if verb in ("knn", "cluster") and not options["preset"] else [])):
        value = parameters.get(name, [])
        options[name] = value if isinstance(value, list) else [value]
    if verb == "knn" and options.get("k") == [20]:  # what is asked where nothing is said
        del options["k"]
    if kind != "kfold":
        options["split"] = [kind]
    if kind == "monte-carlo":
        options["repeats"] = [split["passes"] // parameters.get("runs", 1)]
    if kind == "fixed":
        options["side"] = [data["side"]]
    if labels := data.get("labels"):
        options |= {"labels": [labels["path"]], "key": [labels["key"]]}
    options["by"] = list(data.get("by", {}))
    if data.get("cluster", data["group"]) != data["group"]:
        options["cluster"] = [data["cluster"]]
    if leaks.get("reason"):
        options["allow-leak"] = [leaks["reason"]]
    given = [f"--{o} {' '.join(shlex.quote(str(v)) for v in values)}" for o, values in options.items() if values]
    given += ["--regress"] if verb == "dense" and targets else []
    return f"eosin eval {verb} {embeddings} {' '.join(given)} --out {shlex.quote(str(result.path))}"


def _print_cells(fingerprint: dict[str, Any]) -> list[str]:
    weights = str(fingerprint.get("weights", "no weights"))
    shown = fingerprint.get("preprocessing", {})
    size = f"{shown['size']} px" if "size" in shown else "whole tile"
    return [weights[:16], str(fingerprint.get("pooling", "–")), size, str(fingerprint.get("stain", "–"))]


def _drawn(probe: Probe, row: dict[str, Any]) -> tuple[str, str, float, float, float]:
    found = row["metrics"][probe.primary] or {}
    value, low, high = (math.nan if found.get(k) is None else found[k] for k in ("value", "low", "high"))
    return row["name"], findings.role_of(row), value, low, high


def _magnification(mpp: float | None) -> str:
    return f"{mpp:g} µm/px" if mpp else "µm/px unknown"


def _listed(values: list[str], most: int = 8) -> str:
    if not values:
        return "not given"
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{len(values)}: {', '.join(values[:most])}{more}" if len(values) > 1 else values[0]
