"""Planted collapse: where the loss ends is known in advance, with the recipe and without its safeguards."""

import math

import pytest
import torch

from eosin.ssl import network
from eosin.ssl.config import load_config
from eosin.ssl.network import StudentTeacher
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import at

KINDS, PROTOTYPES, STEPS = 8, 16, 150
TINY = [
    "data.shards=s",
    "run.dir=r",
    f"run.steps={STEPS}",
    "model.args={depth: 1, embed_dim: 48, num_heads: 3, init_values: 0.1}",
    "crops={global_size: 32, local_size: 16, local_count: 2}",
    f"objective={{prototypes: {PROTOTYPES}, hidden: 32, bottleneck: 16, ibot: 0.0, koleo: 0.0, momentum: [0.9, 1.0]}}",
    "optim={warmup: 10, lr: 0.002, scaling: none}",
    "data.batch=32",
]


def end_of_training(*overrides):
    """DINO's loss, the entropy of a crop's target and that of all, after training on eight colors under noise."""
    config = load_config("demo", [*TINY, *overrides])
    torch.manual_seed(0)
    model = StudentTeacher(config)
    optimizer = build_optimizer(model.student, config)
    generator = torch.Generator().manual_seed(1)
    colors = 2 * torch.randn(KINDS, 3, 1, 1, generator=generator)
    images = colors[torch.arange(32) % KINDS]
    for step in range(STEPS):
        moment = at(step, config)
        set_moment(optimizer, moment)
        crops = [images + 0.3 * torch.randn(2, 32, 3, side, side, generator=generator) for side in (32, 16)]
        masks = torch.zeros(2, 32, 4, dtype=torch.bool)
        part = crops, masks, torch.arange(32) + 32 * step
        (targets,), measures = model.targets([part], moment.teacher_temperature)
        terms = model.losses(model.student, part, targets) | measures
        terms["dino"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(moment.momentum)
    return [terms[name].item() for name in ("dino", "teacher_entropy", "prototype_entropy")]


def test_with_the_recipe_the_loss_ends_at_the_entropy_of_what_there_is_to_tell():
    # All prototypes are used alike, and a crop is told apart far better than by chance.
    loss, of_a_crop, of_all = end_of_training("objective.teacher_temperature=[0.04,0.04]")
    assert of_all == pytest.approx(math.log(PROTOTYPES), abs=0.01)
    assert loss < math.log(PROTOTYPES) - 0.5
    assert loss == pytest.approx(of_a_crop, abs=0.1)  # the student knows all that the teacher says


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_with_a_warm_teacher_it_ends_at_ln_k(targets):
    found = end_of_training("objective.teacher_temperature=[1.0,1.0]", f"objective.targets={targets}")
    assert found == pytest.approx([math.log(PROTOTYPES)] * 3, abs=1e-3)


def test_without_centering_one_prototype_takes_all(monkeypatch):
    monkeypatch.setattr(network, "update_center", lambda center, scores: None)
    found = end_of_training("objective.teacher_temperature=[0.04,0.04]", "objective.targets=centering")
    assert found == pytest.approx([0.0] * 3, abs=1e-2)
