"""Memory and what is computed twice, against what torch really holds and counts.

Run as a script, this file is one process of two.
"""

import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from eosin.ssl import distributed, memory, parallel
from eosin.ssl.config import load_config
from eosin.ssl.network import StudentTeacher, divide
from eosin.ssl.optimizer import build_optimizer
from eosin.ssl.plan import Plan
from eosin.ssl.schedules import at
from eosin.ssl.train import _gradient

CPU = torch.device("cpu")
SIZES = [
    "data.shards=s",
    "run.dir=r",
    "run.device=cpu",
    "model={architecture: vit_tiny_patch16_224, args: {depth: 6, embed_dim: 96, init_values: 1.0e-5}, drop_path: 0}",
    "crops={global_size: 64, local_size: 32, local_count: 4}",
    # Masked patches are then as many in any sample as on average.
    "objective={prototypes: 510, hidden: 128, bottleneck: 64, mask_probability: 1.0, mask_ratio: [0.25, 0.25]}",
]


def load(*overrides):
    return load_config("dinov2", [*SIZES, *overrides])


def part(config, batch):
    """Noise as the views of a batch."""
    crops = config.crops
    patches = (crops.global_size // 16) ** 2
    sides = [(2, crops.global_size), (crops.local_count, crops.local_size)]
    views = [torch.randn(count, batch, 3, side, side) for count, side in sides]
    return views, (torch.arange(patches) < patches // 4).repeat(2, batch, 1), torch.arange(batch)


class Live(TorchDispatchMode):
    """The most bytes that storages made within it held at any moment."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes, self.most = known, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes and storage.data_ptr() not in self.known:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata)
            self.most = max(self.most, sum(self.sizes.values()))


def peak(config, batch):
    """Bytes at most of a forward and backward pass on given crops, without the weights and their gradients."""
    torch.manual_seed(0)
    model = StudentTeacher(config)
    student = parallel.spread(model, config, CPU)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Live(known) as live:
        given = divide(part(config, batch), config.optim.accumulate)
        _gradient(model, student, given, at(5, config), CPU)
    return live.most - sum(p.grad.nbytes for p in model.student.parameters())


BF16 = ["model.drop_path=0.3", "run.precision=bf16"]


@pytest.mark.parametrize(
    ("blocks", "accumulate", "more"),
    [("none", 1, []), ("none", 4, []), ("blocks", 1, []), ("blocks", 4, []), ("none", 1, BF16), ("blocks", 1, BF16)],
)
def test_activations_are_about_what_a_step_holds(blocks, accumulate, more):
    config = load(f"run.checkpoint_activations={blocks}", f"optim.accumulate={accumulate}", *more)
    planned, found = memory.held(Plan(config), 1), peak(config, 16)
    # What lives for a moment only is not in the closed forms, and is more beside six blocks than beside many. The
    # copies of weights that autocast makes, which the closed form counts, are gone when blocks are computed again.
    assert 0.7 < planned.kept(16) / found < 1.3 + 0.4 * (bool(more) and blocks == "blocks")


def test_checkpointing_and_parts_save_what_the_plan_says():
    plain, blocks, parts, both = (
        memory.held(Plan(load(f"run.checkpoint_activations={b}", f"optim.accumulate={a}")), 1).kept(64)
        for b, a in [("none", 1), ("blocks", 1), ("none", 4), ("blocks", 4)]
    )
    assert both < blocks < plain / 3
    assert both < parts < plain / 2.5


@pytest.mark.parametrize("scaled", ["1.0e-5", "null"])
def test_what_is_computed_twice(scaled):
    def count(*overrides):
        config = load(f"model.args={{depth: 3, init_values: {scaled}}}", *overrides)
        torch.manual_seed(0)
        model = StudentTeacher(config)
        student = parallel.spread(model, config, CPU)
        # Of attention's kernels only the plain one is counted, and it computes nothing twice.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _gradient(model, student, [part(config, 4)], at(5, config), CPU)
        return counter.get_total_flops(), Plan(config)

    (plain, without), (twice, planned) = count(), count("run.checkpoint_activations=blocks")
    again = memory.recomputed(planned, planned.phases[0])
    assert 4 * again.total == pytest.approx(twice - plain, rel=1e-3)
    assert again.total > 0.1 * planned.step(planned.phases[0]).total
    assert memory.recomputed(without, without.phases[0]).total == 0
    images = planned.config.run.steps * planned.config.data.batch
    assert memory.executed(planned) == pytest.approx(planned.flops + images * (twice - plain) / 4, rel=1e-3)
    assert memory.executed(without) == without.flops


# Two processes.
CASES = {
    "fsdp": ["run.strategy=fsdp"],
    "fsdp in parts": ["run.strategy=fsdp", "optim.accumulate=2"],
    "ddp": ["run.strategy=ddp"],
}


def rank_of_two(out):
    """What this process really holds after a step of each case, as JSON."""
    distributed.start("cpu")
    found = {name: held_here(load("model.args.depth=3", *overrides)) for name, overrides in CASES.items()}
    Path(f"{out}-{distributed.rank()}").write_text(json.dumps(found))
    distributed.stop()


def held_here(config):
    torch.manual_seed(0)
    model = StudentTeacher(config)
    student = parallel.spread(model, config, CPU)
    optimizer = build_optimizer(model.student, config)
    summed = 0

    def whole(*_):
        """Bytes of gradients that are not shards, after the backward pass of a part."""
        nonlocal summed
        if config.run.strategy == "fsdp":
            states = [m._get_fsdp_state() for m in model.student.modules() if hasattr(m, "_get_fsdp_state")]
            sharded = [p for s in states for g in s._fsdp_param_groups for p in g.fsdp_params]
            held = [p.unsharded_param.grad for p in sharded if hasattr(p, "_unsharded_param")]
            summed = max(summed, sum(g.nbytes for g in held if g is not None))

    divided = divide(part(config, 4), config.optim.accumulate)
    losses = model.losses
    model.losses = lambda *args: (whole(), losses(*args))[1]  # before the next part
    _gradient(model, student, divided, at(5, config), CPU)
    optimizer.step()

    def bytes_of(tensors):
        return sum(distributed.local(t.detach()).nbytes for t in tensors)

    return {
        "student": bytes_of(model.student.parameters()),
        "teacher": bytes_of(model.teacher.parameters()),
        "gradients": bytes_of(p.grad for p in model.student.parameters()),
        "moments": bytes_of(t for state in optimizer.state.values() for t in state.values()),
        "summed": summed,
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes holds."""
    out = tmp_path_factory.mktemp("held") / "found"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(out)], env=os.environ | world | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    return [json.loads(out.with_name(f"found-{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_exactly_its_share(of_two, case):
    planned = memory.held(Plan(load("model.args.depth=3", *CASES[case])), 2)
    first, second = (found[case] for found in of_two)
    expected = {name: getattr(planned.memory, name) for name in ("student", "teacher", "gradients", "moments")}
    assert expected | {"summed": planned.summed} == first
    # Nobody holds more than the first, and together they hold each weight once, or once each.
    assert all(second[name] <= first[name] for name in first)
    weights = 4 * sum(Plan(load("model.args.depth=3")).parameters.values())
    assert first["student"] + second["student"] == (weights if "fsdp" in case else 2 * weights)
    assert (planned.summed > 0) == ("parts" in case)


def test_rows_that_do_not_divide_go_to_the_first():
    network = Plan(load()).network
    whole = memory.shard_bytes(network, 1)
    assert whole == 4 * sum(p.numel() for p in network.parameters())
    # No tensor has more rows than a million: each row of each tensor is then alone on a process.
    assert memory.shard_bytes(network, 10**6) == 4 * sum(p.numel() // p.shape[0] for p in network.parameters())


def test_room_is_a_multiple_of_the_parts():
    held = memory.held(Plan(load("optim.accumulate=4")), 1)
    limit = held.exact + held.kept(40) + 1
    assert held.room(limit) == 40
    assert held.room(limit - 2) == 36
    assert held.room(held.exact / 2) == 0


if __name__ == "__main__":
    rank_of_two(sys.argv[1])
