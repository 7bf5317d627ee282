"""The last block finishes no more tokens than are asked for: those, and all gradients, are as if it finished all."""

import pytest
import torch

from eosin.data_tools.draws import uniform
from eosin.ssl import parallel
from eosin.ssl.backbone import DROP_PATH, PackedBlock, build_backbone, packed_features
from eosin.ssl.config import load_config
from eosin.ssl.network import Network, StudentTeacher

SMALL = ["data.shards=s", "run.dir=r", "crops={global_size: 64, local_size: 32}", "objective.prototypes=32"]
PLAIN = ["model.args={depth: 3, embed_dim: 48, num_heads: 3, init_values: 0.1}"]
ROWS = 4 * 17 + 6 * 5
ARCHITECTURES = {
    "LayerScale": PLAIN,
    "no LayerScale, normed queries": ["model.args={depth: 2, embed_dim: 48, num_heads: 3, qk_norm: true}"],
    "SwiGLU, registers": [
        "model.architecture=vit_giant_patch14_reg4_dinov2",
        "model.args={depth: 2, embed_dim: 48, num_heads: 3, patch_size: 16, mlp_ratio: 5.3334}",
    ],
    "one block": ["model.args={depth: 1, embed_dim: 48, num_heads: 3}"],
}


def backbone(*overrides):
    torch.manual_seed(0)
    return build_backbone(load_config("demo", [*SMALL, *overrides]), packed=True).double()


def crop_by_crop(network, groups, keys, rate):
    """All tokens [T, D], each crop by itself through the parts of timm's own blocks."""
    out = []
    for number, crop in enumerate(crop for group in groups for crop in group.split(1)):
        for place, block in enumerate(network.blocks):
            branches = (lambda t, b=block: b.ls1(b.attn(b.norm1(t))), lambda t, b=block: b.ls2(b.mlp(b.norm2(t))))
            for branch, function in enumerate(branches):
                if uniform(keys[number], place, branch, DROP_PATH) >= rate:
                    crop = crop + function(crop) / (1 - rate)
        out.append(network.norm(crop)[0])
    return torch.cat(out)


def inputs():
    generator = torch.Generator().manual_seed(1)
    groups = [torch.randn(n, t, 48, generator=generator, dtype=torch.float64) for n, t in ((4, 17), (6, 5))]
    return [group.requires_grad_() for group in groups]


@pytest.mark.parametrize("wanted", [[0, 17, 34, 51, 68, 73, 78, 83, 88, 93, 3, 9, 40], [97, 20, 21], list(range(ROWS))])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.97])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wanted_tokens_and_gradients_are_those_of_the_full_computation(name, rate, wanted):
    network, wanted, keys = backbone(*ARCHITECTURES[name]), torch.tensor(wanted), torch.arange(10) + 100
    weight = torch.randn(len(wanted), 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outputs, gradients = [], []
    for compute in (
        lambda groups: packed_features(network, groups, keys, rate, wanted),
        lambda groups: crop_by_crop(network, groups, keys, rate)[wanted],
    ):
        groups = inputs()
        outputs.append(compute(groups))
        used = [p for n, p in network.named_parameters() if n.startswith(("blocks.", "norm."))]
        found = torch.autograd.grad((outputs[-1] * weight).sum(), [*groups, *used], allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip([*groups, *used], found)])
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_the_last_block_finishes_class_tokens_and_masked_patches_only(monkeypatch):
    seen = []
    forward = PackedBlock.forward

    def counted(self, x, **kwargs):
        self.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        return forward(self, x, **kwargs)

    monkeypatch.setattr(PackedBlock, "forward", counted)
    network = Network(load_config("demo", [*SMALL, *PLAIN]))
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[0, 3] = masks[2, 5] = masks[2, 15] = True
    crops = [torch.randn(2, 2, 3, 64, 64), torch.randn(3, 2, 3, 32, 32)]
    network(crops, masks, torch.arange(2), hide=True, rate=0.0)
    assert seen == [ROWS, ROWS, 10 + 3]


def test_heads_are_given_the_masked_patches_in_the_order_of_the_masks():
    """Against timm's own tokens of each global crop, which the teacher sees without a mask token."""
    network = Network(load_config("demo", [*SMALL, *ARCHITECTURES["SwiGLU, registers"]]))
    masks = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    crops = [torch.randn(2, 2, 3, 64, 64), torch.randn(3, 2, 3, 32, 32)]
    with torch.no_grad():
        out = network(crops, masks, torch.arange(2), hide=False, rate=0.0)
        patches = network.backbone.forward_features(crops[0].flatten(0, 1))[:, network.backbone.num_prefix_tokens :]
        expected = torch.cat([network.dino_head(tokens[mask]) for tokens, mask in zip(patches, masks)])
    torch.testing.assert_close(out.patch_scores, expected, atol=1e-5, rtol=1e-4)


def test_recomputed_blocks_give_the_same_bits():
    gradients = []
    for way in ("none", "blocks"):
        config = load_config("demo", [*SMALL, *PLAIN, "model.drop_path=0.3", f"run.checkpoint_activations={way}"])
        torch.manual_seed(0)
        model = StudentTeacher(config)
        parallel.spread(model, config, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        crops = [torch.randn(n, 2, 3, side, side, generator=generator) for n, side in ((2, 64), (3, 32))]
        masks = torch.rand(4, 16, generator=generator) < 0.3
        said = model.student(crops, masks, torch.arange(2), hide=True, rate=0.3)
        (said.cls_scores.square().sum() + said.patch_scores.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.student.named_parameters()})
    assert all(torch.equal(*(g[name] for g in gradients)) for name in gradients[0] if gradients[0][name] is not None)
    assert sum(g is not None for g in gradients[1].values()) == sum(g is not None for g in gradients[0].values()) > 40
