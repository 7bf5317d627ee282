import pytest
import torch

from eosin.data_tools.errors import UserError
from eosin.ssl import attention
from eosin.ssl.attention import BACKENDS, borders
from eosin.ssl.backbone import build_backbone, packed_features
from eosin.ssl.config import load_config

GROUPS = [(3, 17), (0, 9), (5, 5)]


def tokens(groups, device="cpu", dtype=torch.float32, heads=2, width=32):
    generator = torch.Generator().manual_seed(0)
    rows = sum(n * t for n, t in groups)
    return [torch.randn(rows, heads, width, generator=generator).to(device, dtype) for _ in range(3)]


def by_hand(q, k, v, groups):
    """Softmax attention, a crop and a head at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, start = torch.zeros_like(q), 0
    for length in [t for n, t in groups for _ in range(n)]:
        crop = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[crop, head] @ k[crop, head].T / q.shape[2] ** 0.5
            out[crop, head] = scores.softmax(dim=1) @ v[crop, head]
        start += length
    return out


def test_each_token_attends_to_its_own_crop_only():
    q, k, v = tokens(GROUPS)
    torch.testing.assert_close(BACKENDS["sdpa"](q, k, v, GROUPS).double(), by_hand(q, k, v, GROUPS), atol=1e-5, rtol=0)


def test_no_crop_at_all_is_no_error():
    for name in BACKENDS:
        assert BACKENDS[name](*tokens([(0, 17), (0, 5)]), [(0, 17), (0, 5)]).shape == (0, 2, 32)


def test_borders_are_where_crops_begin_and_end():
    assert borders(GROUPS, torch.device("cpu")).tolist() == [0, 17, 34, 51, 56, 61, 66, 71, 76]


def test_a_backend_that_cannot_run_is_refused(tiny_shards, tmp_path):
    from eosin.ssl.train import train

    settings = [f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'run'}", "run.device=cpu", "run.attention=varlen"]
    with pytest.raises(UserError, match=r"run\.attention: 'varlen' has kernels for CUDA only"):
        train(load_config("smoke", settings))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"run\.attention: 'flash' is not valid"):
        load_config("smoke", [*settings, "run.attention=flash"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'xformers' is not installed; pip install 'eosin\[gpu\]'"):
        attention.check("xformers", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_backends_agree_with_exact_attention(name):
    if name == "xformers":
        pytest.importorskip("xformers")
    q, k, v = (x.requires_grad_() for x in tokens(GROUPS, "cuda", torch.bfloat16, heads=6, width=64))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, device="cuda", dtype=torch.float64)
    ours, truth = BACKENDS[name](q, k, v, GROUPS), by_hand(*exact, GROUPS)
    torch.testing.assert_close(ours.double(), truth, atol=2e-2, rtol=2e-2)  # bf16 has eight bits
    (ours.double() * weight).sum().backward()
    (truth * weight).sum().backward()
    for half, full in zip((q, k, v), exact):
        assert (half.grad.double() - full.grad).norm() < 2e-2 * full.grad.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_a_packed_pass_with_drop_path_is_the_same_for_each_backend(name):
    if name == "xformers":
        pytest.importorskip("xformers")
    given = ["data.shards=s", "run.dir=r", "crops.global_size=64", "crops.local_size=32"]
    given += ["model.args={depth: 3, embed_dim: 128, num_heads: 2, qk_norm: true}"]
    outputs = []
    for backend in ("sdpa", name):
        torch.manual_seed(0)
        backbone = build_backbone(load_config("demo", [*given, f"run.attention={backend}"]), packed=True).cuda()
        generator = torch.Generator().manual_seed(1)
        groups = [torch.randn(n, t, 128, generator=generator).cuda() for n, t in ((8, 17), (32, 5))]
        with torch.autocast("cuda", torch.bfloat16):
            keys, wanted = torch.arange(40, device="cuda"), torch.arange(0, 8 * 17 + 32 * 5, 3, device="cuda")
            outputs.append(packed_features(backbone, groups, keys, 0.3, wanted).float())
    ours, theirs = outputs
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()
