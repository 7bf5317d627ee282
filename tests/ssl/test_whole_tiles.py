import numpy as np
import pytest
import torch

from eosin.ssl.backbone import build_backbone
from eosin.ssl.config import load_config
from eosin.ssl.network import Network
from eosin.ssl.whole_tiles import BACKGROUND, on_tissue, preprocess, token_colors, tokens

TINY = ["data.shards=s", "run.dir=r", "objective={prototypes: 16, hidden: 16, bottleneck: 8}"]
CROPS = "crops={global_size: 32, local_size: 16, local_count: 2}"


@pytest.mark.parametrize("more", ["{}", "{reg_tokens: 2}"])
def test_tokens_are_those_of_the_plain_network(more):
    args = f"model.args={{depth: 2, embed_dim: 48, num_heads: 3, init_values: 0.1, {more[1:-1]}}}"
    config = load_config("demo", [*TINY, CROPS, args])
    network = Network(config).requires_grad_(False)
    plain = build_backbone(config)
    plain.load_state_dict(network.backbone.state_dict())
    tiles = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    given = preprocess(tiles, 32, config.augment.mean, config.augment.std)
    found = tokens(network, given)
    torch.testing.assert_close(found, plain.eval().forward_features(given), rtol=1e-4, atol=1e-5)
    assert not network.backbone.norm._forward_hooks


def likeness(spread=(3.0, 2.0, 1.0), seed=0, patches=400, width=12):
    """Patches along three directions of a space of ``width``, some of them on glass."""
    rng = np.random.default_rng(seed)
    inner = rng.uniform(-1, 1, (patches, 3)) * spread
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0][:, :3]
    tissue = torch.ones(patches, dtype=torch.bool)
    tissue[:20] = False
    return torch.from_numpy(inner @ basis.T), tissue


def differing(a, b, tissue):
    return (a[tissue].int() - b[tissue].int()).abs().max().item()


def test_colors_stay_while_the_space_of_features_turns():
    features, tissue = likeness()
    colors, scores, share = token_colors(features, tissue)
    assert share == pytest.approx(1)
    assert (colors[~tissue] == BACKGROUND).all()
    turned = features @ torch.from_numpy(np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0])
    again, _, _ = token_colors(turned, tissue, scores)
    assert differing(again, colors, tissue) <= 1
    # Without what was before, a component may be shown as its opposite: this turn is such a one.
    assert differing(token_colors(turned, tissue)[0], colors, tissue) > 100


def test_colors_stay_while_components_change_places():
    features, tissue = likeness()
    colors, scores, _ = token_colors(features, tissue)
    # The second direction becomes the strongest: red and green would trade places.
    swapped, _ = likeness(spread=(2.6, 2.8, 1.0))
    near = token_colors(swapped, tissue, scores)[0]
    free = token_colors(swapped, tissue)[0]
    assert differing(near, colors, tissue) < 60
    assert differing(free, colors, tissue) > 100


def test_colors_are_of_tissue():
    tiles = torch.full((1, 3, 32, 32), 245, dtype=torch.uint8)
    tiles[..., :16, 16:] = torch.tensor([150, 80, 160], dtype=torch.uint8).view(1, 3, 1, 1)
    assert on_tissue(tiles, 2).tolist() == [False, True, False, False]
