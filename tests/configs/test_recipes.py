"""Shipped recipes: their published figures, their form, and that each one trains."""

import json
from pathlib import Path

import pytest

from eosin import configs
from eosin.launch.cli import main
from eosin.ssl.config import load_config
from eosin.ssl.schedules import at, base_lr

GIVEN = ["data.shards=s", "run.dir=r"]
# From the papers, their code and model cards; where each comes from is said in docs/recipes.md.
PUBLISHED = {
    "dinov2": {
        "model.architecture": "vit_large_patch16_224",
        "model.drop_path": 0.3,
        "crops.global_scale": [0.32, 1.0],
        "crops.local_size": 96,
        "crops.local_scale": [0.05, 0.32],
        "crops.local_count": 8,
        "objective.prototypes": 65536,
        "objective.bottleneck": 256,
        "objective.tied_heads": True,
        "objective.targets": "centering",
        "objective.teacher_temperature": [0.04, 0.07],
        "objective.teacher_temperature_warmup": 37500,
        "objective.student_temperature": 0.1,
        "objective.mask_probability": 0.5,
        "objective.mask_ratio": [0.1, 0.5],
        "objective.koleo": 0.1,
        "objective.momentum": [0.992, 1.0],
        "optim.lr": 4e-3,
        "optim.scaling": "sqrt",
        "optim.warmup": 12500,
        "optim.weight_decay": [0.04, 0.4],
        "optim.layer_decay": 0.9,
        "optim.patch_embed_lr": 0.2,
        "optim.clip": 3.0,
        "data.batch": 2048,
        "run.steps": 125000,
    },
    "dinov2_long": {
        "model.architecture": "vit_giant_patch14_dinov2",
        "model.drop_path": 0.4,
        "objective.prototypes": 131072,
        "objective.bottleneck": 384,
        "objective.ibot_bottleneck": 256,
        "objective.tied_heads": False,
        "objective.targets": "sinkhorn",
        "objective.momentum": [0.994, 1.0],
        "optim.lr": 2e-4,
        "optim.weight_decay": [0.04, 0.2],
        "optim.layer_decay": 1.0,
        "run.steps": 625000,
    },
    "snpfm": {
        "model.architecture": "vit_base_patch16_224",
        "stain.normalize": "tile",
        "stain.method": "macenko",
        "stain.convention": "torchstain",
        "objective.ibot": 0.0,
        "objective.koleo": 0.0,
    },
    "uni": {
        "model.architecture": "vit_large_patch16_224",
        "objective.tied_heads": True,
        "objective.targets": "centering",
        "optim.warmup": 12500,
        "optim.final_lr": 1e-6,
        "objective.teacher_temperature_warmup": 37500,
        "optim.freeze_last_layer": 1250,
        "data.batch": 3072,
        "run.steps": 125000,
        "high_resolution.steps": 12500,
        "high_resolution.crops.global_size": 512,
    },
    "virchow2": {
        "model.args.embed_dim": 1280,
        "model.args.depth": 32,
        "model.args.num_heads": 16,
        "crops.global_size": 224,
        "crops.local_size": 98,
        "crops.aspect": [0.95, 1.05],
        "objective.koleo": 0.0,
        "objective.kde": 0.05,
        "objective.kde_concentration": 5.0,
        "data.batch": 4096,
    },
    "rudolfv": {
        "model.architecture": "vit_large_patch14_reg4_dinov2",
        "optim.warmup": 100000,
        "optim.final_lr": 0.0,
        "optim.weight_decay": [0.04, 0.2],
        "augment.solarize": 0.0,
        "augment.rotate90": True,
        "data.batch": 960,
        "run.steps": 625000,
    },
    "dinobloom": {
        "model.architecture": "vit_base_patch14_dinov2",
        "crops.local_count": 0,
        "augment.rotate": 0.3,
        "augment.brightness": 0.3,
        "augment.contrast": 0.2,
        "augment.saturation": 0.3,
        "augment.hue": 0.15,
        "augment.jitter": 0.8,
        "augment.gray": 0.1,
        "augment.solarize": 0.0,
        "objective.targets": "sinkhorn",
        "objective.tied_heads": False,
        "objective.momentum": [0.994, 1.0],
        "optim.lr": 2e-4,
        "data.batch": 120,
        "run.steps": 100000,
        "stain.normalize": "off",
        "stain.augment": [],
    },
    "pathorchestra": {"model.architecture": "vit_large_patch16_224", "model.args.init_values": 1e-5},
    "stainnet_s": {
        "model.architecture": "vit_small_patch16_224",
        "augment.mean": [0.5] * 3,
        "augment.std": [0.5] * 3,
        "objective.ibot": 0.0,
        "stain.normalize": "off",
        "stain.augment": [],
    },
    "stainnet_b": {"model.architecture": "vit_base_patch16_224", "augment.mean": [0.5] * 3},
    "midnight": {
        "model.architecture": "vit_giant_patch14_dinov2",
        "objective.koleo": 0.0,
        "data.batch": 768,
        "run.steps": 1_000_000,
    },
}
OURS = {"demo", "small", "single_gpu", "plain", "smoke"}


def value(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


def test_every_recipe_is_accounted_for():
    assert set(configs.names()) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures_are_in(name):
    found = load_config(name, GIVEN).model_dump()
    assert {key: value(found, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_peaks_are_what_the_papers_say():
    assert base_lr(load_config("uni", GIVEN)) == 2e-3
    assert base_lr(load_config("rudolfv", GIVEN)) == 2e-4
    assert base_lr(load_config("dinov2", GIVEN)) == pytest.approx(4e-3 * 2**0.5)
    assert 2e-4 <= base_lr(load_config("midnight", GIVEN)) <= 3.5e-4
    uni = load_config("uni", GIVEN)
    assert at(12_500, uni).lr == pytest.approx(2e-3)
    assert at(124_999, uni).lr == pytest.approx(1e-6, rel=1e-3)
    # Extended-context translation keeps a crop within a tenth of 224 px of a 392-px region.
    low, high = load_config("virchow2", GIVEN).crops.global_scale
    assert low * 392**2 == pytest.approx(0.9 * 224**2, rel=1e-3)
    assert high * 392**2 == pytest.approx(1.1 * 224**2, rel=1e-3)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) | OURS))
def test_a_recipe_is_a_screen_that_says_where_its_values_come_from(name):
    lines = configs.path(name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    head = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    if name in PUBLISHED:
        assert "Not reproduced at full scale with Eosin" in head
        assert "ublished" in head or "see stainnet_s" in head
    else:
        assert "Our choice throughout" in head


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PUBLISHED) | OURS))
def test_each_trains_twenty_steps_scaled_down(name, tiny_shards, tmp_path):
    config = load_config(name, GIVEN)
    patch = 14 if "patch14" in config.model.architecture else 16
    ratio = ", mlp_ratio: 5.3334" if "giant" in config.model.architecture else ""
    overrides = [
        f"data.shards={tiny_shards}",
        f"run.dir={tmp_path / 'run'}",
        f"model.args={{depth: 1, embed_dim: 48, num_heads: 3{ratio}}}",
        "model.init_from=null",
        f"crops.global_size={2 * patch}",
        f"crops.local_size={patch}",
        "objective={prototypes: 32, hidden: 16, bottleneck: 8, teacher_temperature_warmup: 5}",
        "optim={warmup: 2, freeze_last_layer: 1}",
        "data={batch: 8, workers: 0}",
        "run={steps: 20, checkpoint_every: 20, log_every: 10, device: cpu}",
    ]
    if not config.objective.tied_heads:
        overrides.append("objective.ibot_bottleneck=4")
    if config.high_resolution:
        overrides.append(f"high_resolution={{steps: 5, crops: {{global_size: {3 * patch}, local_size: {patch}}}}}")
    assert main(["train", name, *overrides]) == 0
    records = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 20
    assert records[-1]["skipped"] == 0
    terms = {key for key in ("dino", "ibot", "koleo", "kde") if getattr(config.objective, key)}
    expected = sum(getattr(config.objective, key) * records[-1][key] for key in terms)
    assert records[-1]["loss"] == pytest.approx(expected, rel=1e-4)
