"""A run's release: a folder that timm loads as it is, with its preprocessing and a model card.

    RELEASE/
      config.json, model.safetensors   timm.create_model("local-dir:RELEASE", pretrained=True)
      preprocessing.json               input size, colors, mpp and the stain normalizer
      seen.json                        hashes of the slides and patients it was trained on, where the run kept them
      README.md                        model card, with the probes' results and what the model was not shown

Nothing of the training state enters it, and nothing in it is a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_dir, read_json, write_json
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.results import read_results

SCHEMA = 1


def export(run: Path, out: Path, *, results: list[Path], name: str) -> None:
    """Write the release of the newest checkpoint of ``run`` into the new folder ``out``.

    Args:
        results: files of ``eosin eval`` whose figures go into the model card.
        name: the model's name in the card.

    Raises:
        UserError: no such run, no checkpoint yet, results of another schema, or ``out`` holds something.
    """
    import torch
    from timm.models import save_for_hf

    from eosin.eval.report import history
    from eosin.ssl import checkpoint
    from eosin.ssl.backbone import build_backbone
    from eosin.ssl.config import read_run_config
    from eosin.ssl.seen import KINDS, SEEN_FILE, read_seen

    config = read_run_config(run)
    newest = checkpoint.latest(run)
    step = checkpoint.describe(newest)["step"]
    found = [read_results(path)[0] for path in results]
    backbone = build_backbone(config)
    checkpoint.load_teacher(newest / checkpoint.TEACHER, backbone)
    size = config.crops.global_size
    with atomic_dir(out) as folder:
        data_config = {
            "input_size": (3, size, size),
            "mean": tuple(config.augment.mean),
            "std": tuple(config.augment.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
        save_for_hf(backbone, str(folder), safe_serialization=True, data_config=data_config)
        (folder / "model.safetensors").chmod(0o644)
        _drop_num_classes(folder / "config.json")
        preprocessing = _preprocessing(run, config)
        write_json(folder / "preprocessing.json", preprocessing)
        seen = read_seen(run)
        if seen is not None:
            write_json(folder / SEEN_FILE, read_json(run / SEEN_FILE, "a list of what a model has seen"))
        facts = {
            "name": name,
            "config": config,
            "step": step,
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "features": backbone.num_features,
            "preprocessing": preprocessing,
            "data": _data(config.data.shards),
            "seen": {kind: sum(len(one[kind]) for one in seen.lists) for kind in KINDS} if seen else None,
            "held_out": history.held_out(config),
            "way": history.way(config, checkpoint.describe(newest).get("how", {})),
            "trouble": history.trouble(run, history.records(run), step),
            "results": found,
            "torch": torch.__version__,
        }
        (folder / "README.md").write_text(_card(facts), encoding="utf-8")


def _drop_num_classes(path: Path) -> None:
    """timm keeps ``num_classes`` beside ``model_args`` and in it; transformers' TimmWrapper takes it only once."""
    config = read_json(path, "timm's description of a model")
    config.get("model_args", {}).pop("num_classes", None)
    write_json(path, config)


def _preprocessing(run: Path, config: Any) -> dict[str, Any]:
    from eosin.ssl.stain.normalizer import describe_run

    return {
        "schema": SCHEMA,
        "input_size": config.crops.global_size,
        "resize": "the whole tile, bicubic, antialiased",
        "mean": config.augment.mean,
        "std": config.augment.std,
        "stain": describe_run(run, config.stain),
    }


def _data(shards: str | dict[str, float]) -> dict[str, Any]:
    """What the card says of the training data; a shard set that has moved away is said to have."""
    try:
        data = Mixture({shards: 1.0} if isinstance(shards, str) else shards)
    except UserError:
        return {"found": False}
    table = data.slides()
    return {
        "found": True,
        "tiles": len(data),
        "mpp": sorted({s.mpp for s in data.sets if s.mpp}),
        "tile_size": data.tile_size,
        "synthetic": "synthetic" in table and table["synthetic"].astype(str).str.lower().isin(["true", "1"]).any(),
        "counts": {
            column: table[column].replace("", None).nunique()
            for column in ("slide", "patient", "site", "scanner", "organ")
            if column in table and table[column].replace("", None).nunique()
        },
        "stains": sorted(set(table["stain"].dropna().astype(str))) if "stain" in table else [],
    }


def _card(facts: dict[str, Any]) -> str:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    template = (files("eosin.launch") / "card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(facts)
