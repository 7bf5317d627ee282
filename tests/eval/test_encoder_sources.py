import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.models import get_model, get_model_weights

from eosin.data_tools.errors import UserError
from eosin.eval.encoders import load_encoder
from eosin.eval.features import prepared


def tiles(n=3, size=64, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pictures(images):
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_gives_what_its_classifier_gets(name, monkeypatch, smooth_tiles):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: copy.deepcopy(model))
    model = get_model(name, weights=None).eval()
    encoder = load_encoder(f"torchvision:{name}")
    got = []
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    transform = get_model_weights(name).DEFAULT.transforms()
    images = smooth_tiles(2, transform.resize_size[0])  # so that nothing is resized, only cut
    with torch.no_grad():
        model(torch.stack([transform(picture) for picture in pictures(images)]))
    differ = (got[0][0] - got[0][1]).abs().max().item()  # random weights make all features alike
    torch.testing.assert_close(encoder(images), got[0], atol=0.01 * differ, rtol=0)
    tokens = encoder.tokens(images)
    assert tokens.shape[:3] == (2, 7, 7)
    if name == "resnet18":  # whose classifier gets the mean of the last map
        torch.testing.assert_close(tokens.flatten(1, 2).mean(1), encoder(images))
    assert (encoder.name, encoder.fingerprint["pooling"]) == (f"random:torchvision:{name}", "mean")
    with pytest.raises(UserError, match="no class token; give --pooling mean"):
        load_encoder(f"torchvision:{name}", pooling="cls")


def test_torchvisions_transformer_has_class_and_patches(monkeypatch):
    small = partial(torchvision.models.VisionTransformer, 224, 32, 2, 2, 16, 32)
    made = []
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: made.append(small()) or made[-1])
    both = load_encoder("torchvision:vit_b_32", pooling="cls+mean")
    images = tiles(2, 224)
    # Without resizing, and its class token is what its own forward gives.
    weights = get_model_weights("vit_b_32").DEFAULT.transforms()
    assert both.fingerprint["preprocessing"]["resize"] == weights.resize_size[0] == 256
    inputs = prepared(images, **both.fingerprint["preprocessing"])
    with torch.no_grad():
        expected = made[0](inputs)  # its head is gone
    torch.testing.assert_close(both(images)[:, :16], expected)
    assert both.tokens(images).shape == (2, 7, 7, 16)
    torch.testing.assert_close(both(images)[:, 16:], both.tokens(images).flatten(1, 2).mean(1))
    assert load_encoder("torchvision:vit_b_32").fingerprint["pooling"] == "cls"


def test_preprocessing_is_timms_transform(smooth_tiles):
    model = timm.create_model("resnet18", num_classes=0)  # bilinear or bicubic, and a cut of the middle
    config = resolve_model_data_config(model)
    for interpolation in ("bicubic", "bilinear"):
        config |= {"interpolation": interpolation, "crop_pct": 0.875}
        transform = create_transform(**config, is_training=False)
        expected = torch.stack([transform(picture) for picture in pictures(smooth_tiles(2, 100))])
        found = prepared(
            smooth_tiles(2, 100), 224, list(config["mean"]), list(config["std"]), 256, interpolation=interpolation
        )
        # Pillow rounds to whole levels after each of its two passes.
        assert (found - expected).abs().max() < 1.5 / 255 / min(config["std"])
    exact = create_transform(**config, is_training=False)(pictures(tiles(1, 256))[0])
    torch.testing.assert_close(prepared(tiles(1, 256), 224, config["mean"], config["std"], 256)[0], exact)


def test_what_sources_do_not_have_is_one_line():
    for spec, said in [
        ("torchvision:resnet18s", "no classifier 'resnet18s'; did you mean 'resnet18'"),
        ("torchvision:resnet18.V9", "no weights 'V9' of 'resnet18'; valid: IMAGENET1K_V1"),
        ("torchvision:squeezenet1_0", "no linear layer"),
        ("precomputed:features", "is features, not an encoder"),
        ("timm:coat_tiny", "gives several maps or token lists at once"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load_encoder(spec)
        assert "\n" not in str(caught.value)
