"""Released weights against the networks they come from, in layouts that are written here by hand."""

import argparse
import copy
import os
import pickle
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.launch.cli import main
from eosin.ssl.config import load_config
from eosin.ssl.initialize import initialize, read_weights
from eosin.ssl.network import StudentTeacher

PLAIN = "vit_tiny_patch16_224"
DINOV2 = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"
SWIGLU = "vit_giant_patch14_dinov2"
SWIGLU_REGISTERS = "vit_giant_patch14_reg4_dinov2"
SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}


def network(architecture, size, seed=0, **args):
    """A small timm model with every weight random, native to ``size`` pixels."""
    if architecture.startswith("vit_giant"):
        args = {"mlp_ratio": 16 / 3} | args
    model = timm.create_model(
        architecture, num_classes=0, img_size=size, dynamic_img_size=True, **(SMALL | args)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(center + 0.2 * torch.randn(weight.shape, generator=generator))
    return model


def dinov2_names(model):
    """The tensors of a timm model as facebookresearch/dinov2 names them; positions there cover the class token."""
    state = {}
    for name, tensor in model.state_dict().items():
        swiglu = type(model.blocks[0].mlp).__name__ == "GluMlp"
        if swiglu:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[name] = tensor.clone()
    width = model.embed_dim
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        place = torch.randn(1, 1, width)
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.randn(1, width)}


def chunked(state, size):
    """Blocks in chunks, as DINOv2 trains them: ``blocks.<chunk>.<index in the whole>.``"""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            name = ".".join(["blocks", str(int(parts[1]) // size), *parts[1:]])
        out[name] = tensor
    return out


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def settings(path, architecture, size, *overrides, **args):
    if architecture.startswith("vit_giant"):
        args = {"mlp_ratio": 16 / 3} | args
    # The recipe has LayerScale; null is none.
    args = SMALL | ({"init_values": "null"} if architecture == PLAIN else {}) | args
    inner = ", ".join(f"{k}: {v}" for k, v in args.items())
    return load_config(
        "demo",
        [
            "data.shards=s",
            "run.dir=r",
            f"crops={{global_size: {size}, local_size: {size}}}",
            "objective={prototypes: 8, hidden: 8, bottleneck: 4}",
            f"model.architecture={architecture}",
            f"model.args={{{inner}}}",
            f"model.init_from={path}",
            *overrides,
        ],
    )


def begin(path, architecture, size, *overrides, **args):
    """Student and teacher that began with ``path``."""
    config = settings(path, architecture, size, *overrides, **args)
    model = StudentTeacher(config)
    model.teacher.requires_grad_(False)
    initialize(model, config.model)
    for ours, theirs in zip(model.student.state_dict().items(), model.teacher.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    return model.eval()


def complaint(path, architecture, size, *overrides, **args):
    with pytest.raises(UserError) as error:
        begin(path, architecture, size, *overrides, **args)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("model.init_from: ")
    return line


def assert_same(model, original, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.teacher.backbone.forward_features(images), original.forward_features(images)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def saved(path, payload):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in payload.items()}, path)
    else:
        torch.save(payload, path)
    return path


HEADS = {"dino_head.mlp.0.weight": torch.randn(5, 5), "dino_head.last_layer.weight": torch.randn(5, 5)}
OTHER = network(PLAIN, 64, seed=9).state_dict()  # what must not be taken

LAYOUTS = {
    "timm": lambda s: s,
    "timm with a head": lambda s: s | {"head.weight": torch.randn(10, 48), "head.bias": torch.randn(10)},
    "DINO": lambda s: {"state_dict": s},
    "DINO, within DDP": lambda s: {"state_dict": prefixed(s, "module.backbone.")},
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "compiled by block": lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()},
    "DINO, training": lambda s: {
        "student": prefixed(OTHER | {"more": torch.ones(3)}, "module.backbone.") | prefixed(HEADS, "module."),
        "teacher": prefixed(s, "backbone.") | HEADS,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 5)},
    },
    "iBOT, training": lambda s: {
        "student": prefixed(OTHER, "module.backbone."),
        "teacher": prefixed(s, "module.backbone.") | prefixed({"mlp.0.weight": torch.ones(3, 3)}, "module.head."),
        "fp16_scaler": None,
    },
    "student and teacher in one": lambda s: {
        "model": prefixed(OTHER, "student.backbone.") | prefixed(s, "teacher.backbone.") | prefixed(HEADS, "teacher.")
    },
    "fp16": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_original_features(layout, tmp_path, capsys):
    original = network(PLAIN, 64)
    if layout == "fp16":
        original.load_state_dict({k: v.half().float() for k, v in original.state_dict().items()})
    path = saved(tmp_path / "weights.pth", LAYOUTS[layout](original.state_dict()))
    model = begin(path, PLAIN, 64)
    assert_same(model, original, 64)
    total = len(original.state_dict())
    assert f"{total} of {total} backbone tensors loaded from {path}" in capsys.readouterr().out
    assert not model.student.mask_token.any()


def test_layer_scale_and_mask_token_of_ibot(tmp_path):
    original = network(PLAIN, 64, init_values=0.1)
    state = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in original.named_parameters()
    }
    token = torch.randn(1, 48)
    path = saved(
        tmp_path / "weights.pth", {"state_dict": {k: v.detach() for k, v in state.items()} | {"masked_embed": token}}
    )
    model = begin(path, PLAIN, 64, init_values=0.1)
    assert_same(model, original, 64)
    assert torch.equal(model.student.mask_token, token[0])


@pytest.mark.parametrize("architecture", [DINOV2, REGISTERS, SWIGLU, SWIGLU_REGISTERS])
@pytest.mark.parametrize("layout", ["released", "safetensors", "teacher, chunked", "model, chunked by one"])
def test_dinov2(architecture, layout, tmp_path, capsys):
    original = network(architecture, 98)
    state = dinov2_names(original)
    if layout == "safetensors":
        path = saved(tmp_path / "weights.safetensors", state)
    else:
        payload = {
            "released": state,
            "teacher, chunked": {"teacher": prefixed(chunked(state, 2), "backbone.") | HEADS},
            "model, chunked by one": {"model": prefixed(chunked(state, 1), "backbone."), "iteration": 7},
        }[layout]
        path = saved(tmp_path / "weights.pth", payload)
    model = begin(path, architecture, 98)
    assert_same(model, original, 98)
    assert torch.equal(model.student.mask_token, state["mask_token"][0])
    assert "0 interpolated, with the mask token" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", [DINOV2, REGISTERS])
@pytest.mark.parametrize("size", [56, 140])
def test_positions_are_interpolated_as_timm_does(architecture, size, tmp_path, capsys):
    original = network(architecture, 98)
    path = saved(tmp_path / "weights.pth", dinov2_names(original))
    model = begin(path, architecture, size)
    assert_same(model, original, size)  # timm interpolates on the way
    assert "(1 interpolated" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", [DINOV2, REGISTERS])
def test_another_patch_size_is_resampled_as_timm_does(architecture, tmp_path, capsys):
    state = dinov2_names(network(architecture, 98))
    path = saved(tmp_path / "weights.pth", state)
    model = begin(path, architecture, 64, patch_size=16)
    expected = network(architecture, 64, patch_size=16)
    expected.load_state_dict(checkpoint_filter_fn(copy.copy(state), expected))
    assert_same(model, expected, 64)
    assert "(2 interpolated" in capsys.readouterr().out


@pytest.mark.parametrize("there", [False, True], ids=["covered", "uncovered"])
@pytest.mark.parametrize("registers", [0, 4])
def test_positions_that_cover_other_tokens_are_folded_exactly(there, registers, tmp_path):
    """timm's two ways with prefix tokens, from one to the other, at the same and at another size."""
    original = network(PLAIN, 96, reg_tokens=registers, no_embed_class=there)
    path = saved(tmp_path / "weights.safetensors", original.state_dict())
    for size in (96, 64):
        model = begin(path, PLAIN, size, reg_tokens=registers, no_embed_class=str(not there).lower())
        assert_same(model, original, size)


def test_a_network_without_layer_scale_has_layer_scale_one(tmp_path, capsys):
    original = network(PLAIN, 64)
    model = begin(saved(tmp_path / "w.pt", original.state_dict()), PLAIN, 64, init_values=1e-5)
    assert_same(model, original, 64)
    assert "8 LayerScales set to 1" in capsys.readouterr().out


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", [0, 2])
def test_dinov2_itself(swiglu, registers, chunks, tmp_path, monkeypatch):
    """Against facebookresearch/dinov2's own network, where DINOV2_CHECKOUT names its checkout."""
    checkout = os.environ.get("DINOV2_CHECKOUT")
    if not checkout:
        pytest.skip("set DINOV2_CHECKOUT to a checkout of facebookresearch/dinov2")
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    from dinov2.models.vision_transformer import DinoVisionTransformer

    torch.manual_seed(3)
    theirs = DinoVisionTransformer(
        img_size=98,
        patch_size=14,
        embed_dim=48,
        depth=4,
        num_heads=3,
        init_values=1.0,
        ffn_layer="swiglufused" if swiglu else "mlp",
        block_chunks=chunks,
        num_register_tokens=registers,
    ).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.2)
    names = {(False, 0): DINOV2, (False, 4): REGISTERS, (True, 0): SWIGLU, (True, 4): SWIGLU_REGISTERS}
    hidden = (int(48 * 4 * 2 / 3) + 7) // 8 * 8
    args = {"mlp_ratio": 2 * hidden / 48} if swiglu else {}
    path = saved(tmp_path / "weights.pth", {"teacher": prefixed(theirs.state_dict(), "backbone.")})
    model = begin(path, names[swiglu, registers], 98, **args)
    images = torch.randn(2, 3, 98, 98)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        ours = model.teacher.backbone.forward_features(images)
    parts = [expected["x_norm_clstoken"].unsqueeze(1), expected["x_norm_regtokens"], expected["x_norm_patchtokens"]]
    torch.testing.assert_close(ours, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.student.mask_token, theirs.mask_token[0])


# What is refused


def test_another_network_is_refused_with_what_differs(tmp_path):
    path = saved(tmp_path / "w.safetensors", network(PLAIN, 64).state_dict())
    line = complaint(path, PLAIN, 64, embed_dim=96)
    assert "0 of 54 backbone tensors fit" in line
    assert "cls_token is 1x1x48 there and 1x1x96 here" in line
    assert "and 49 more" in line
    assert "model.args" in line
    line = complaint(path, PLAIN, 64, depth=6)
    assert "blocks.4.norm1.weight is missing" in line
    assert "and 19 more" in line
    assert "model.init_partial=true" in line
    # A part of a deeper network fits in full and is still another network.
    assert "blocks.2.attn.proj.bias has no place" in complaint(path, PLAIN, 64, depth=2)
    assert "reg_token is missing" in complaint(path, PLAIN, 64, reg_tokens=4)
    assert "3x32 there" in complaint(
        saved(tmp_path / "thin.pth", {"cls_token": torch.ones(3, 32)}), PLAIN, 64
    )  # not even three dimensions


def test_layer_scale_and_registers_that_the_model_lacks_are_refused(tmp_path):
    path = saved(tmp_path / "w.pth", dinov2_names(network(REGISTERS, 98)))
    line = complaint(path, DINOV2, 98)
    assert "reg_token has no place" in line
    path = saved(tmp_path / "v.pth", network(PLAIN, 64, init_values=0.1).state_dict())
    assert "blocks.0.ls1.gamma has no place" in complaint(path, PLAIN, 64)


def test_partial_goes_on_with_what_fits_and_says_so(tmp_path, capsys):
    original = network(PLAIN, 64)
    path = saved(tmp_path / "w.safetensors", original.state_dict())
    model = begin(path, PLAIN, 64, "model.init_partial=true", depth=6)
    assert "54 of 78 backbone tensors loaded" in capsys.readouterr().out
    assert torch.equal(model.student.backbone.blocks[3].attn.qkv.weight, original.blocks[3].attn.qkv.weight)
    line = complaint(path, PLAIN, 64, "model.init_partial=true", embed_dim=96)
    assert "model.init_partial" not in line
    line = complaint(path, PLAIN, 64, "model.init_partial=true", embed_dim=96, init_values=0.1)
    assert "8 of 62" in line  # LayerScale of one comes from nowhere


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = network(PLAIN, 64).state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = float("inf")
    assert "blocks.1.mlp.fc1.bias is not finite" in complaint(saved(tmp_path / "w.pth", state), PLAIN, 64)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["BOMB"]),))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("absent.pth", ["does not exist"]),
        ("bare.pth", ["bare pickle"]),
        ("bomb.pth", ["not unpickled", "as safetensors"]),
        ("module.pth", ["not unpickled"]),
        ("text.pth", ["fetch it again"]),
        ("text.safetensors", ["not a safetensors file"]),
        ("cut.safetensors", ["cut short"]),
        ("cut.pth", ["cut short"]),
        ("weights.h5", ["'.h5'", ".safetensors, .pth"]),
        ("cnn.pth", ["no vision transformer", "conv1.weight"]),
        ("list.pth", ["no vision transformer", "0 tensors"]),
        ("folder", ["neither a run", "model.safetensors"]),
        ("timm:vit_tiny_patch16_225", ["timm has no model", "did you mean"]),
        ("hf-hub:tiny", ["is not hf-hub:OWNER/REPO"]),
    ],
)
def test_bad_input_is_one_line(name, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    state = network(PLAIN, 64).state_dict()
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a": Bomb()}))
    torch.save({"state_dict": state, "a": Bomb()}, tmp_path / "bomb.pth")
    torch.save(network(PLAIN, 64), tmp_path / "module.pth")
    for text in ("text.pth", "text.safetensors"):
        (tmp_path / text).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for cut in ("cut.safetensors", "cut.pth"):
        whole = saved(tmp_path / cut, state).read_bytes()
        (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "weights.h5").write_text("")
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "cnn.pth")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    (tmp_path / "folder").mkdir()
    line = complaint(name if ":" in name else tmp_path / name, PLAIN, 64)
    for part in parts:
        assert part in line
    assert not (tmp_path / "went off").exists()


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    tree = {"state_dict": network(PLAIN, 64).state_dict()}
    tree["again"] = tree
    assert len(read_weights(str(saved(tmp_path / "w.pth", tree))).tensors) >= 54


def test_timm_names_give_timms_released_weights(monkeypatch, capsys):
    original = network(PLAIN, 64)
    asked = []

    def create_model(name, pretrained, num_classes):
        asked.append((name, pretrained))
        return original

    state = torch.get_rng_state()
    read = monkeypatch.setattr(timm, "create_model", create_model) or read_weights("timm:vit_tiny_patch16_224.augreg")
    assert asked == [("vit_tiny_patch16_224.augreg", True)]
    assert read.heads == 3
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    monkeypatch.setattr("eosin.ssl.initialize._read_timm", lambda name: read)
    assert_same(begin("timm:vit_tiny_patch16_224", PLAIN, 64), original, 64)
    assert "loaded from timm:vit_tiny_patch16_224" in capsys.readouterr().out


def test_timm_without_network_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def create_model(name, pretrained, num_classes):
        raise LocalEntryNotFoundError("https://huggingface.co/...\nno network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match="the Hub is reached") as error:
        read_weights("timm:vit_tiny_patch16_224")
    assert "\n" not in str(error.value)


RANK = """
import sys
import torch
sys.path.insert(0, {folder!r})
from eosin.data_tools.errors import UserError
from eosin.ssl import distributed
from eosin.ssl.initialize import initialize
from eosin.ssl.network import StudentTeacher
from test_initialize import settings, PLAIN
distributed.start("cpu")
for source in ("absent.pth", "w.pth"):
    config = settings(source, PLAIN, 64)
    torch.manual_seed(0)
    model = StudentTeacher(config)
    with torch.no_grad():
        for weight in model.student.backbone.parameters():
            weight += distributed.rank()
    try:
        initialize(model, config.model)
    except UserError as error:
        print(error)
torch.save(model.state_dict(), "out.pth")
distributed.stop()
"""


@pytest.mark.slow
def test_every_process_begins_with_what_rank_0_read(tmp_path):
    """Two processes in folders of their own: what rank 0 lacks ends both, what it has reaches both."""
    original = network(PLAIN, 64)
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    for folder in folders:
        folder.mkdir()
    saved(folders[0] / "w.pth", dinov2_names(original))  # rank 1 has no such file
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-c", RANK.format(folder=str(Path(__file__).parent))]
    processes = []
    for rank, folder in enumerate(folders):
        environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (out.splitlines() for out, _ in said)
    assert "absent.pth does not exist" in first[0]
    assert "54 of 54" in first[1]
    assert second == ["model.init_from: 'absent.pth' was refused by rank 0, which says why"]
    states = [torch.load(folder / "out.pth") for folder in folders]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    expected = original.state_dict()["blocks.1.mlp.fc1.weight"]
    assert torch.equal(states[1]["teacher.backbone.blocks.1.mlp.fc1.weight"], expected)


def test_heads_of_attention_are_compared_where_the_source_tells_them(tiny_run, tmp_path):
    release = tmp_path / "release"
    assert main(["export", str(tiny_run), "--out", str(release), "--name", "tiny"]) == 0
    for path in (tiny_run, release):
        line = complaint(path, PLAIN, 32, depth=2, num_heads=6, init_values=0.1)
        assert "attention has 3 heads there and 6 here" in line


def test_nothing_is_read_without_the_setting():
    config = load_config("demo", ["data.shards=s", "run.dir=r"])
    assert initialize(types.SimpleNamespace(), config.model) is None
