"""The demo: the whole road on phantoms or on one's own slides, as the very commands a user would type.

Each step is one verb, printed before it runs; each verb leaves finished work alone, so a demo that was killed goes on.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, UserError
from eosin.data_tools.files import atomic_path, read_json

MARKER = "demo.json"
IHC = "shards-ihc"
LEAST_GROUPS = 5  # as many as the probes have folds
ENCODERS = {"trained": "{run}", "random": "random:{run}", "color": "color"}


def run_demo(out: Path, *, slides: Path | None, table: Path | None, seed: int, patients: int, steps: int) -> int:
    """Run the demo into ``out`` and write ``out/report.html``.

    Args:
        slides: a folder of the user's slides; None makes phantoms.
        table: what is known of the user's slides, as for ``eosin tile --slides``.
        patients: phantom patients, two slides each.
        steps: training steps.

    Returns:
        0, or 3 when slides were refused on the way.

    Raises:
        UserError: ``out`` holds something else, or a demo of other settings.
    """
    from eosin.ssl.config import load_config

    began = time.monotonic()
    # What can be refused is refused before the folder exists.
    load_config("demo", [f"data.shards={out / 'shards'}", f"run.dir={out / 'run'}", f"run.steps={steps}"])
    if table and not table.is_file():
        raise UserError(f"{table} does not exist; give a CSV file of what is known of the slides")
    if patients < 1:
        raise UserError(f"--patients {patients} makes no slide; give 1 or more")
    settings: dict[str, str | int | None] = {
        "slides": str(slides.resolve()) if slides else None,
        "table": str(table.resolve()) if table else None,
        "seed": seed,
        "patients": patients,
        "steps": steps,
    }
    _claim(out, settings)
    shards, run = out / "shards", out / "run"
    codes = []
    if slides is None:
        slides, table = _phantoms(out / "phantoms", patients, seed)
        codes.append(_ihc(out))
    given = ["--slides", str(table)] if table else []
    codes.append(_verb("tile", str(slides), "--out", str(shards), "--mpp", "0.5", "--tile-size", "256", *given))
    if not _fitted(shards):
        codes.append(_verb("stain", "fit", str(shards), "--seed", str(seed)))
    train = ["demo", f"data.shards={shards}", f"run.dir={run}", f"run.seed={seed}", f"run.steps={steps}"]
    codes.append(_verb("train", *train))
    embeddings = []
    for name, encoder in ENCODERS.items():
        embeddings.append(str(out / "embeddings" / f"{name}.safetensors"))
        codes.append(_verb("embed", encoder.format(run=run), str(shards), "--out", embeddings[-1]))
    results = _probes(out, shards, embeddings, seed, codes)
    release = out / "release"
    found = ["--results", *results] if results else []
    if not release.exists():
        codes.append(_verb("export", str(run), "--out", str(release), *found, "--name", "eosin-demo"))
    report = out / "report.html"
    beside = ["--beside", str(out / IHC)] if (out / IHC).exists() else []
    titled = ["--release", str(release), "--title", "Eosin demo", "--out", str(report)]
    codes.append(_verb("report", str(run), *found, *beside, *titled))
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"\nThe demo took {minutes}:{seconds:02d} min. Open {report} in a browser.")
    return max(codes)


def _claim(out: Path, settings: dict[str, str | int | None]) -> None:
    """Make ``out`` this demo's folder, or find that it is."""
    import json

    marker = out / MARKER
    if out.is_file():
        raise UserError(f"{out} is a file; give the path of a folder")
    if marker.is_file():
        there = read_json(marker, "the settings of a demo")
        if there != settings:
            changed = ", ".join(k for k in settings if there.get(k) != settings[k])
            raise UserError(f"{out} holds a demo of other settings ({changed}); give another --out, or remove it first")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} already holds something else; give a new folder")
    with atomic_path(marker) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _phantoms(folder: Path, patients: int, seed: int) -> tuple[Path, Path]:
    from eosin.data_tools.phantom import write_phantoms

    if not (folder / "slides.csv").is_file():
        _say(f"python -m eosin.data_tools.phantom --out {folder} --patients {patients} --seed {seed}")
        write_phantoms(folder, patients=patients, seed=seed)
    return folder / "slides", folder / "slides.csv"


def _ihc(out: Path) -> int:
    """Tile scikit-image's immunohistochemistry image, to show H&E operations leaving it alone."""
    import skimage.data
    from PIL import Image

    picture = out / "ihc" / "colon_FHL2.png"
    if not picture.is_file():
        with atomic_path(picture) as temporary:
            Image.fromarray(skimage.data.immunohistochemistry()).save(temporary)
    shards = out / IHC
    where = [str(picture), "--out", str(shards), "--mpp-override", "0.5", "--stain", "IHC"]
    codes = [_verb("tile", *where), DONE if _fitted(shards) else _verb("stain", "fit", str(shards))]
    return max(codes)


def _probes(out: Path, shards: Path, embeddings: list[str], seed: int, codes: list[int]) -> list[str]:
    """Run the probes where the slides table has labels and enough groups; return the results' paths."""
    from eosin.data_tools.shards import ShardSet

    table = ShardSet(shards).slides()
    table = table[table["tiles"] > 0]
    # Phantom patients are matched across classes; a matched set must not be split, as it would mislead by design.
    label, group = "label", "block" if "block" in table else "patient"
    if label not in table or table[label].nunique() < 2:
        print("\nno probes: the slides have no column 'label' of two classes (give --table slides.csv)")
        return []
    groups = table.groupby(label)[group].nunique().min()
    if groups < LEAST_GROUPS:
        print(f"\nno probes: a class has only {groups} {group}s; {LEAST_GROUPS} are needed for grouped folds")
        return []
    results = []
    for probe in ("knn", "linear", "mil"):
        results.append(str(out / "results" / f"{probe}.json"))
        if not Path(results[-1]).is_file():
            question = ["--label", label, "--group", group, "--seed", str(seed), "--out", results[-1]]
            codes.append(_verb("eval", probe, *embeddings, *question))
    return results


def _fitted(shards: Path) -> bool:
    from eosin.data_tools.shards import ShardSet

    return "stain_fit" in ShardSet(shards).slides()


def _verb(*arguments: str) -> int:
    """Run one verb as the command line would; any end but 0 or 3 ends the demo."""
    from eosin.launch.cli import run

    _say(shlex.join(["eosin", *arguments]))
    code = run(list(arguments))
    if code not in (DONE, DONE_WITH_REFUSALS):
        raise SystemExit(code)
    return code


def _say(command: str) -> None:
    print(f"\n$ {command}", flush=True)
