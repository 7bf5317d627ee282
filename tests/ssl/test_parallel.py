"""One process, two under DDP and two under FSDP2 do the same; parts of a batch do what the whole batch does.

Run as a script, this file is one process of two.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eosin.data_tools.errors import UserError
from eosin.ssl import checkpoint, distributed, parallel
from eosin.ssl.config import load_config, read_run_config
from eosin.ssl.network import StudentTeacher, divide
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import at
from eosin.ssl.train import _gradient, train

BATCH, STEPS = 16, 20
TINY = [
    "data.shards=s",
    "run.dir=r",
    "model={args: {depth: 2, embed_dim: 48, num_heads: 3, init_values: 0.1}, drop_path: 0.2}",
    "crops={global_size: 32, local_size: 16, local_count: 2}",
    "objective={prototypes: 64, hidden: 32, bottleneck: 16, koleo: 0.1, kde: 0.05}",
    "optim={lr: 0.001, clip: 0.05}",
    f"data.batch={BATCH}",
]
ALONE = ["objective.koleo=0", "objective.kde=0"]  # without what looks at other samples
CASES = {
    "ddp": ["run.strategy=ddp"],
    "ddp in parts": ["run.strategy=ddp", "optim.accumulate=4", *ALONE],
    "fsdp": ["run.strategy=fsdp"],
    "fsdp in parts": ["run.strategy=fsdp", "optim.accumulate=4", *ALONE],
    "fsdp compiled": ["run.strategy=fsdp", "run.compile=true", "run.checkpoint_activations=blocks"],
}


def views():
    """Noise as the views of a whole batch."""
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, BATCH, 3, side, side, generator=generator) for side in (32, 16)]
    return crops, torch.rand(2, BATCH, 4, generator=generator) < 0.4, torch.arange(BATCH) * 7


def one_step(config):
    """The state around one step of training on this process's share: what ``test_a_step`` compares."""
    torch.manual_seed(0)
    model = StudentTeacher(config)
    student = parallel.spread(model, config, torch.device("cpu"))
    optimizer = build_optimizer(model.student, config)
    share = divide(views(), distributed.ranks())[distributed.rank()]
    moment = at(5, config)
    set_moment(optimizer, moment)
    terms = _gradient(model, student, divide(share, config.optim.accumulate), moment, torch.device("cpu"))
    found = {"gradient": whole((n, p.grad) for n, p in model.student.named_parameters())}
    found["norm"] = parallel.clip(list(model.student.parameters()), config.optim.clip)
    found["clipped"] = whole((n, p.grad) for n, p in model.student.named_parameters())
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    found["skipped"] = whole(model.student.named_parameters())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    found |= {"student": whole(model.student.named_parameters()), "before": whole(model.teacher.named_parameters())}
    model.update_teacher(0.9, torch.tensor(False))
    found["still"] = whole(model.teacher.named_parameters())
    model.update_teacher(0.9, torch.tensor(True))
    found["teacher"] = whole(model.teacher.named_parameters())
    found["loss"] = distributed.all_sum(terms["loss"]) / distributed.ranks()
    return found


def whole(named):
    return {name: distributed.full(value.detach()).clone() for name, value in named}


def relative(found, expected):
    """Norm of the difference of all tensors over that of the expected ones."""
    assert found.keys() == expected.keys()
    difference = sum((found[n] - expected[n]).double().square().sum() for n in expected)
    return float((difference / sum(e.double().square().sum() for e in expected.values())).sqrt())


def steps_of_all_cases(out):
    torch.compile = partial(torch.compile, backend="eager")
    distributed.start("cpu")
    found = {name: one_step(load_config("demo", [*TINY, *overrides])) for name, overrides in CASES.items()}
    if distributed.rank() == 0:
        torch.save(found, out)
    distributed.stop()


def state(config, step):
    """What a checkpoint holds once it is loaded, each tensor whole."""
    model = StudentTeacher(config)
    parallel.spread(model, config, torch.device("cpu"))
    optimizer = build_optimizer(model.student, config)
    assert checkpoint.resume(Path(config.run.dir), model, optimizer, {}, step) == step
    found = whole(model.state_dict().items())
    for name, parameter in model.student.named_parameters():
        found |= whole((f"student.{name}.{key}", value) for key, value in optimizer.state[parameter].items())
    return found


def states(out, run, steps):
    distributed.start("cpu")
    config = read_run_config(run)
    ways = {way: config.run.model_copy(update={"strategy": way, "dir": run}) for way in ("ddp", "fsdp")}
    found = {
        (step, way): state(config.model_copy(update={"run": ways[way]}), step)
        for step in json.loads(steps)
        for way in ways
    }
    if distributed.rank() == 0:
        torch.save(found, out)
    distributed.stop()


def run_training(*arguments):
    from eosin.launch.cli import main

    sys.exit(main(list(arguments)))


def processes(count, *arguments):
    """Run this file as ``count`` processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(count):
        world = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (world if count > 1 else {})
        command = [sys.executable, __file__, *map(str, arguments)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [rank.communicate(timeout=200)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(said)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """One step of each case, by two processes."""
    out = tmp_path_factory.mktemp("steps") / "found.pt"
    processes(2, "steps_of_all_cases", out)
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_processes_is_that_of_one(of_two, case):
    alone = one_step(load_config("demo", [*TINY, *(ALONE if "parts" in case else [])]))
    found = of_two[case]
    assert found["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-6)
    # KoLeo divides by distances that are small in the beginning, which makes rounding larger.
    assert relative(found["gradient"], alone["gradient"]) < (1e-5 if "parts" in case else 1e-4)
    # Against the definition: the root of the sum of all squares, over all shards.
    norm = torch.cat([g.flatten() for g in alone["gradient"].values()]).norm().item()
    assert found["norm"].item() == pytest.approx(norm, rel=1e-5)
    assert norm > 0.05
    assert torch.cat([g.flatten() for g in found["clipped"].values()]).norm().item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_the_teacher_moves_by_its_share_of_the_distance(of_two, case):
    found = of_two[case]
    assert relative(found["skipped"], found["before"]) == 0  # student and teacher begin alike
    assert relative(found["student"], found["before"]) > 1e-3
    assert relative(found["still"], found["before"]) == 0
    for name, before in found["before"].items():
        expected = before + (1 - 0.9) * (found["student"][name] - before)
        torch.testing.assert_close(found["teacher"][name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_parts_of_a_batch_give_its_gradient(targets):
    def gradient(*overrides):
        return one_step(load_config("demo", [*TINY, f"objective.targets={targets}", *overrides]))["gradient"]

    assert relative(gradient("optim.accumulate=4", *ALONE), gradient(*ALONE)) < 1e-5
    # KoLeo and KDE see the samples of their part only.
    assert 1e-4 < relative(gradient("optim.accumulate=4"), gradient()) < 2e-3


def saved(config, backward=True):
    """Bytes that a step keeps for the backward pass, at most at any moment; and the gradient."""
    torch.manual_seed(0)
    model = StudentTeacher(config)
    own = {p.data_ptr() for p in model.parameters()}
    alive, most = {}, 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal most
        kept = Kept(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            alive[id(kept)] = tensor.numel() * tensor.element_size()
            weakref.finalize(kept, alive.pop, id(kept))
            most = max(most, sum(alive.values()))
        return kept

    student = parallel.spread(model, config, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        _gradient(model, student, divide(views(), config.optim.accumulate), at(5, config), torch.device("cpu"))
    return most, {n: p.grad for n, p in model.student.named_parameters()}


def test_only_one_part_is_kept_for_the_backward_pass():
    whole_batch, _ = saved(load_config("demo", TINY))
    quarter, _ = saved(load_config("demo", [*TINY, "optim.accumulate=4"]))
    assert quarter < 0.3 * whole_batch


def test_recomputed_blocks_keep_less_and_give_the_same_bits():
    plain, expected = saved(load_config("demo", [*TINY, "model.args.depth=4"]))
    less, found = saved(load_config("demo", [*TINY, "model.args.depth=4", "run.checkpoint_activations=blocks"]))
    assert list(found) == list(expected)  # the names too
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert less < 0.4 * plain


@pytest.mark.parametrize(("batch", "valid"), [(10, 9), (2, 3)])
def test_a_share_that_does_not_divide_into_parts_is_one_line(batch, valid, tiny_shards, tmp_path):
    given = [*TINY, f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'run'}", f"data.batch={batch}"]
    with pytest.raises(UserError, match=f"optim.accumulate=3; the nearest that does is {valid}$"):
        train(load_config("demo", [*given, "optim.accumulate=3"]))


# Two processes, whole runs.


@pytest.fixture(scope="module")
def settings(tiny_shards, tiny_recipe):
    # At a high rate Adam makes much of the last bits of the first gradients, which KoLeo makes large: a step differs by
    # 1e-7, and the curves soon by more than they are compared to.
    more = ["objective.kde=0.05", "model.drop_path=0.2", "optim={lr: 0.0003, warmup: 10}"]
    more += ["run.checkpoint_every=5", "run.keep=9"]
    return ["train", *tiny_recipe, *more, f"run.steps={STEPS}", f"data.shards={tiny_shards}"]


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """A run of one process, uninterrupted."""
    run = tmp_path_factory.mktemp("one") / "run"
    processes(1, "run_training", *settings, f"run.dir={run}")
    return run


def curve(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def teacher(run):
    return load_file(checkpoint.latest(run) / checkpoint.TEACHER)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(one, settings, tmp_path, strategy):
    run = tmp_path / "run"
    processes(2, "run_training", *settings, f"run.dir={run}", f"run.strategy={strategy}")
    assert len(curve(run)) == STEPS
    assert curve(run) == pytest.approx(curve(one), rel=1e-4)
    assert relative(teacher(run), teacher(one)) < 1e-4


@pytest.fixture(scope="module")
def by_turns(one, settings, tmp_path_factory):
    """A run whose checkpoints 5, 10 and 15 were written by one process, two under DDP and two under FSDP2.

    With it, what the curve became when two under DDP, two under FSDP2, two under DDP and one went on after them.
    """
    run = shutil.copytree(one, tmp_path_factory.mktemp("turns") / "run")
    curves = []
    for step, count, strategy in [(5, 2, "ddp"), (10, 2, "fsdp"), (15, 2, "ddp"), (15, 1, "auto")]:
        for later in (folder for folder in checkpoint.steps(run) if checkpoint.step_of(folder) > step):
            shutil.rmtree(later)
        processes(count, "run_training", *settings, f"run.dir={run}", f"run.strategy={strategy}")
        curves.append(curve(run))
    return run, curves


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_processes_and_strategies(one, by_turns):
    run, curves = by_turns
    for found in curves:
        assert found == pytest.approx(curve(one), rel=1e-4)
    assert relative(teacher(run), teacher(one)) < 1e-4


@pytest.mark.slow
def test_whoever_loads_a_checkpoint_has_what_was_written(by_turns, tmp_path):
    run, _ = by_turns
    steps = [5, 10, 15]
    processes(2, "states", tmp_path / "states.pt", run, json.dumps(steps))
    found = torch.load(tmp_path / "states.pt")
    assert len(found) == 6
    config = read_run_config(run)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})
    for step in steps:
        # torch's own reader of a checkpoint, which knows nothing of models.
        dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}", tmp_path / "plain.pt")
        plain = torch.load(tmp_path / "plain.pt", weights_only=False)
        moments = {f"{n}.{k}": v for n, each in plain["optimizer"]["state"].items() for k, v in each.items()}
        for loaded in (found[step, "ddp"], found[step, "fsdp"], state(config, step)):
            assert relative(loaded, plain["model"] | moments) == 0


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
