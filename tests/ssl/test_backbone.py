import pytest
import timm
import torch

from eosin import configs
from eosin.data_tools.draws import uniform
from eosin.data_tools.errors import UserError
from eosin.ssl.backbone import DROP_PATH, build_backbone, drop_path, model_arguments, packed_features
from eosin.ssl.config import load_config, patch_size
from eosin.ssl.masks import block_masks
from eosin.ssl.network import Network, StudentTeacher
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import at, base_lr

TINY = ["data.shards=s", "run.dir=r", "crops.global_size=64", "crops.local_size=32", "objective.prototypes=32"]


def config(*overrides):
    return load_config("demo", [*TINY, *overrides])


def forward(network, images, masks=None, keys=None, hide=True, rate=0.0):
    masks = torch.zeros(2 * images[0].shape[1], 16, dtype=torch.bool) if masks is None else masks
    keys = torch.arange(images[0].shape[1]) if keys is None else keys
    return network(images, masks, keys, hide=hide, rate=rate)


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_tiny_patch16_224", "{depth: 2}"),
        ("vit_small_patch14_reg4_dinov2", "{depth: 2, patch_size: 16}"),
        ("vit_giant_patch14_reg4_dinov2", "{depth: 2, embed_dim: 96, num_heads: 3, patch_size: 16, mlp_ratio: 5.3334}"),
        ("vit_tiny_patch16_224", "{depth: 2, qk_norm: true}"),
        ("vit_base_patch14_dinov2", "{depth: 2, embed_dim: 96, num_heads: 3}"),
        ("vit_giant_patch14_reg4_dinov2", "{depth: 2, embed_dim: 96, num_heads: 3, mlp_ratio: 5.3334}"),
    ],
    ids=["plain", "registers", "swiglu", "qk-norm", "patch 14", "patch 14, registers, swiglu"],
)
def test_the_packed_pass_equals_timm(architecture, args):
    big, small = (56, 28) if "patch14" in architecture and "patch_size" not in args else (64, 32)
    sizes = [f"crops.global_size={big}", f"crops.local_size={small}"]
    settings = config(f"model.architecture={architecture}", f"model.args={args}", *sizes)
    network = Network(settings)
    plain = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, img_size=big, **settings.model.args)
    plain.load_state_dict(network.backbone.state_dict())
    images = [torch.randn(2, 3, 3, big, big), torch.randn(4, 3, 3, small, small)]
    out = forward(network, images)
    with torch.no_grad():
        expected = torch.cat([plain.forward_features(i.flatten(0, 1))[:, 0].view(len(i), 3, -1) for i in images])
    torch.testing.assert_close(out.cls, expected, atol=1e-5, rtol=1e-5)


def test_masked_patches_are_hidden_from_the_student_only():
    network = Network(config())
    images = [torch.randn(2, 2, 3, 64, 64)]
    changed = images[0].clone()
    changed[0, 0, :, :16, :16] += 5  # patch 0 of crop 0
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[0, 0] = True
    hidden = [forward(network, [i], masks).cls for i in (images[0], changed)]
    shown = [forward(network, [i], masks, hide=False).cls for i in (images[0], changed)]
    torch.testing.assert_close(*hidden)
    assert (shown[0] - shown[1]).abs().max() > 1e-4


def test_drop_path_is_keyed_by_sample_and_has_its_rate():
    branches = drop_path([(4000, 1)], torch.arange(4000), 0.25, 3)
    kept = [branch.tokens for block in branches for branch in block]
    assert all(abs(len(tokens) / 4000 - 0.75) < 4 * (0.25 * 0.75 / 4000) ** 0.5 for tokens in kept)
    assert len({tuple(tokens.tolist()) for tokens in kept}) == 6  # every block and branch draws anew
    assert branches[0][0].scale == pytest.approx(4 / 3)
    # A crop's drops depend on its key alone, whatever stands beside it.
    two = drop_path([(2, 1)], torch.tensor([17, 3]), 0.25, 3)
    for block, alone in zip(branches, two):
        for many, few in zip(block, alone):
            assert [17 in many.tokens, 3 in many.tokens] == [0 in few.tokens, 1 in few.tokens]


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.97])
def test_drop_path_is_that_of_each_crop_by_itself(rate):
    torch.manual_seed(0)
    backbone = build_backbone(
        config("model.args={depth: 3, embed_dim: 48, num_heads: 3, init_values: 0.1}"), packed=True
    )
    groups = [torch.randn(4, 5, 48), torch.randn(6, 3, 48)]
    keys = torch.arange(10) + 100
    everything = packed_features(backbone, groups, keys, rate, torch.arange(4 * 5 + 6 * 3))
    packed = [part.view(group.shape) for part, group in zip(everything.split([20, 18]), groups)]
    dropped = 0
    for group, first, out in zip(groups, (0, 4), packed):
        for crop in range(len(group)):
            x = group[crop : crop + 1]
            for number, block in enumerate(backbone.blocks):
                branches = (lambda t, b=block: b.ls1(b.attn(b.norm1(t))), lambda t, b=block: b.ls2(b.mlp(b.norm2(t))))
                for branch, function in enumerate(branches):
                    if uniform(keys[first + crop], number, branch, DROP_PATH) >= rate:
                        x = x + function(x) / (1 - rate)
                    else:
                        dropped += 1
            torch.testing.assert_close(out[crop], backbone.norm(x)[0], atol=1e-5, rtol=1e-5)
    assert (dropped > 0) == (rate > 0)


def test_gradients_reach_everything_where_whole_branches_are_dropped():
    network = Network(config("model.drop_path=0.97", "model.args={depth: 1}"))
    images = [torch.randn(2, 1, 3, 64, 64)]
    forward(network, images, rate=0.97).cls_scores.sum().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert missing in ([], ["mask_token"])


def test_what_timm_cannot_build_is_one_line():
    for overrides in (["model.args={depht: 2}"], ["model.architecture=vit_huge_patch99_1"]):
        with pytest.raises(UserError, match="timm cannot build") as error:
            build_backbone(
                config("crops.global_size=99", "crops.local_size=99", *overrides)
                if "99" in overrides[0]
                else config(*overrides)
            )
        assert "\n" not in str(error.value)


def test_the_teacher_moves_by_its_momentum_exactly():
    model = StudentTeacher(config())
    for parameter in model.student.parameters():
        parameter.data += torch.randn_like(parameter)
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(0.9)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters()):
        torch.testing.assert_close(new - old, 0.1 * (student - old), atol=1e-6, rtol=1e-5)


def test_masks_have_exact_counts_and_depend_on_the_sample_only():
    masks = block_masks(torch.arange(200), 2, 14, seed=0, probability=0.5, ratio=[0.1, 0.5])
    share = masks.float().mean(dim=2)
    masked = share > 0
    assert abs(masked.float().mean().item() - 0.5) < 0.08
    assert share[masked].min() >= 0.095
    assert share[masked].max() <= 0.505
    alone = block_masks(torch.tensor([150]), 2, 14, seed=0, probability=0.5, ratio=[0.1, 0.5])
    assert torch.equal(alone[:, 0], masks[:, 150])
    # Blocks, not confetti: a masked patch has masked neighbors far more often than by chance.
    grid = masks[masked].view(-1, 14, 14)
    together = (grid[:, :, 1:] & grid[:, :, :-1]).float().mean() / grid.float().mean()
    assert together > 1.5 * grid.float().mean()


def test_schedules_meet_their_ends():
    teacher = "objective={teacher_temperature: [0.04, 0.07], teacher_temperature_warmup: 60}"
    optim = "optim={warmup: 10, lr: 4e-3, scaling: sqrt, freeze_last_layer: 10}"
    settings = config("run.steps=100", "data.batch=64", teacher, optim)
    assert base_lr(settings) == pytest.approx(4e-3 / 4)
    assert at(9, settings).lr == pytest.approx(1e-3)
    assert at(0, settings).lr == pytest.approx(1e-4)
    assert at(100, settings).lr == pytest.approx(1e-6)
    assert (at(0, settings).momentum, at(100, settings).momentum) == (pytest.approx(0.98), pytest.approx(1.0))
    assert at(0, settings).teacher_temperature == pytest.approx(0.04)
    assert at(60, settings).teacher_temperature == pytest.approx(0.07)
    assert at(9, settings).last_layer_frozen
    assert not at(10, settings).last_layer_frozen


def test_parameter_groups_follow_dinov2():
    settings = config("optim={layer_decay: 0.5, patch_embed_lr: 0.2, freeze_last_layer: 1}", "run.steps=100")
    network = Network(settings)
    optimizer = build_optimizer(network, settings)
    set_moment(optimizer, at(50, settings))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == len(list(network.parameters()))
    peak = at(50, settings)
    block = network.backbone.blocks[3].attn
    assert of[id(block.qkv.weight)]["lr"] == pytest.approx(peak.lr * 0.5)
    assert of[id(block.qkv.weight)]["weight_decay"] == peak.weight_decay
    assert of[id(block.qkv.bias)]["weight_decay"] == 0
    assert of[id(network.backbone.patch_embed.proj.weight)]["lr"] == pytest.approx(peak.lr * 0.5**5 * 0.2)
    assert of[id(network.dino_head.prototypes)]["lr"] == pytest.approx(peak.lr)
    set_moment(optimizer, at(0, settings))
    assert of[id(network.dino_head.prototypes)]["lr"] == 0


@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_the_backbone_waits_while_heads_and_mask_token_learn(layer_decay):
    settings = config(f"optim={{layer_decay: {layer_decay}, heads_only: 5, warmup: 10}}", "run.steps=100")
    network = Network(settings)
    optimizer = build_optimizer(network, settings)
    names = {id(p): name for name, p in network.named_parameters()}
    for step, frozen in ((0, True), (4, True), (5, False)):
        set_moment(optimizer, at(step, settings))
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(names)
        for name, rate in rates.items():
            assert (rate == 0) == (frozen and name.startswith("backbone.")), name


def test_checkpoints_from_before_the_backbone_could_wait_are_still_read():
    """A checkpoint holds the flags of the groups and is refused by an optimizer with others."""
    settings = config("optim.heads_only=0")
    groups = build_optimizer(Network(settings), settings).param_groups
    assert all({"factor", "decayed", "last_layer"} <= set(g) and "backbone" not in g for g in groups)


@pytest.mark.parametrize("recipe", configs.names())
def test_the_packed_pass_equals_timm_for_every_recipe(recipe):
    """Whole width, one block, at the recipe's own crop sizes."""
    given = load_config(recipe, ["data.shards=s", "run.dir=r"])
    settings = given.model_copy(
        update={
            "model": given.model.model_copy(update={"args": given.model.args | {"depth": 1}, "drop_path": 0.0}),
            "objective": given.objective.model_copy(
                update={"prototypes": 8, "ibot_prototypes": None, "hidden": 8, "bottleneck": 4, "ibot_bottleneck": None}
            ),
        }
    )
    network = Network(settings)
    size = settings.crops.global_size
    plain = timm.create_model(**model_arguments(settings.model), img_size=size)
    plain.load_state_dict(network.backbone.state_dict())
    sizes = [size, settings.crops.local_size] if settings.crops.local_count else [size]
    images = [torch.randn(1, 2, 3, s, s) for s in sizes]
    patches = (size // patch_size(settings.model)) ** 2
    with torch.no_grad():
        out = forward(network, images, masks=torch.zeros(2, patches, dtype=torch.bool))
        expected = torch.cat([plain.forward_features(i.flatten(0, 1))[:, 0].view(1, 2, -1) for i in images])
    torch.testing.assert_close(out.cls, expected, atol=1e-5, rtol=1e-5)
