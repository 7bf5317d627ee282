import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eosin.data_tools.draws import purpose
from eosin.data_tools.errors import UserError
from eosin.eval.color import color_statistics
from eosin.eval.encoders import load_encoder, pick_device
from eosin.eval.features import pool, prepared
from eosin.ssl import checkpoint
from eosin.ssl.config import Stain, read_run_config
from eosin.ssl.network import Network, StudentTeacher
from eosin.ssl.stain.normalizer import describe
from eosin.ssl.whole_tiles import preprocess


def tiles(n=4, size=64, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_color_statistics_are_numpys():
    images = tiles(5, 20)
    images[1] = 255
    images[2] = 0
    pixels = images.numpy().reshape(5, 3, -1) / 255
    percentiles = [np.percentile(pixels, q, axis=2, method="inverted_cdf") for q in (10, 90)]
    expected = np.concatenate([pixels.mean(2), pixels.std(2), *percentiles], axis=1)
    np.testing.assert_allclose(load_encoder("color")(images).numpy(), expected, atol=1e-6)
    assert color_statistics(images).shape == (5, 12)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_preprocessing_resizes_as_pillow_does(size):
    images = tiles(2)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    found = preprocess(images, size, mean, std)
    for image, ours in zip(images.numpy(), found.numpy()):
        for channel in range(3):
            plane = Image.fromarray(image[channel].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
            expected = (np.asarray(plane).clip(0, 255) / 255 - mean[channel]) / std[channel]
            np.testing.assert_allclose(ours[channel], expected, atol=2e-3)


def test_poolings_are_timms_own():
    images = torch.randn(2, 3, 32, 32)
    common = {"img_size": 32, "num_classes": 0, "depth": 2, "embed_dim": 48, "num_heads": 3}
    for kind, pooling in (("token", "cls"), ("avg", "mean")):
        model = timm.create_model("vit_tiny_patch16_224", global_pool=kind, reg_tokens=2, **common).eval()
        tokens = model.forward_features(images)
        torch.testing.assert_close(pool(model, tokens, pooling), model(images))
    both = pool(model, tokens, "cls+mean")
    torch.testing.assert_close(both[:, 48:], model(images))
    assert both.shape == (2, 96)
    resnet = timm.create_model("test_resnet", num_classes=0).eval()
    torch.testing.assert_close(pool(resnet, resnet.forward_features(images), "mean"), resnet(images))
    with pytest.raises(UserError, match="no class token; give --pooling mean"):
        load_encoder("timm:test_resnet", pooling="cls")


def test_tokens_are_timms_patches_after_the_norm():
    encoder = load_encoder("timm:test_vit3", pooling="mean")
    with torch.random.fork_rng([]):
        torch.manual_seed(purpose("random encoder"))
        model = timm.create_model("test_vit3", num_classes=0).eval()
    preprocessing = encoder.fingerprint["preprocessing"]
    images = prepared(tiles(2), **preprocessing)
    with torch.no_grad():
        (maps,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)  # [B, D, h, w]
        maps = model.fc_norm(maps.permute(0, 2, 3, 1))
    tokens = encoder.tokens(tiles(2))
    torch.testing.assert_close(tokens, maps)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.flatten(1, 2).mean(1), encoder(tiles(2)))
    resnet = load_encoder("timm:test_resnet")
    assert resnet.fingerprint["pooling"] == "mean"
    torch.testing.assert_close(resnet.tokens(tiles(2)).flatten(1, 2).mean(1), resnet(tiles(2)))
    assert load_encoder("color").tokens is None


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
def test_several_layers_are_timms_intermediate_layers(tiny_run, pooling):
    encoder = load_encoder(str(tiny_run), pooling=pooling, layers=2)
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 0.1, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).eval()
    weights = load_file(checkpoint.latest(tiny_run) / checkpoint.TEACHER)
    model.load_state_dict(weights)
    config = read_run_config(tiny_run)
    images = preprocess(tiles(), config.crops.global_size, config.augment.mean, config.augment.std)
    with torch.no_grad():
        layers = model.get_intermediate_layers(images, n=2, return_prefix_tokens=True, norm=True)
    expected = [prefix[:, 0] for _, prefix in layers] + ([layers[-1][0].mean(dim=1)] if "mean" in pooling else [])
    torch.testing.assert_close(encoder(tiles()), torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)
    assert encoder.fingerprint["layers"] == 2


def test_layers_that_a_model_cannot_give_are_refused():
    for spec, options, said in [
        ("timm:test_resnet", {"layers": 2}, "no blocks with a class token"),
        ("timm:test_vit", {"layers": 99}, "fewer than 99 blocks"),
        ("timm:test_vit", {"layers": 2, "pooling": "mean"}, "give --pooling cls or cls"),
        ("timm:test_vit", {"layers": 0}, "give 1 or more"),
        ("torchvision:resnet18", {"layers": 2}, "torchvision's give one layer"),
    ]:
        with pytest.raises(UserError, match=said):
            load_encoder(spec, **options)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_reduced_precision_is_autocast_and_gives_float32(precision, dtype):
    full, reduced = load_encoder("timm:test_vit"), load_encoder("timm:test_vit", precision=precision)
    assert (full.fingerprint["precision"], reduced.fingerprint["precision"]) == ("fp32", precision)
    with torch.random.fork_rng([]):
        torch.manual_seed(purpose("random encoder"))
        model = timm.create_model("test_vit", num_classes=0).eval()
    images = prepared(tiles(), **full.fingerprint["preprocessing"])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = model(images).float()
    found = reduced(tiles())
    assert found.dtype == reduced.tokens(tiles()).dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert 0 < (found - full(tiles())).abs().max() < 0.1


def test_a_stain_normalizer_can_be_asked_for_where_there_is_none(tiny_run):
    encoder = load_encoder("timm:test_vit", stain="tile", name="mine")
    assert encoder.stain == describe(Stain(normalize="tile"))
    assert encoder.fingerprint["stain"] == "tile"
    assert (encoder.name, encoder.fingerprint["name"]) == ("mine", "mine")
    assert load_encoder("color", stain="slide").stain == describe(Stain(normalize="slide"))
    assert load_encoder("timm:test_vit", stain="off").stain is None
    with pytest.raises(UserError, match="comes with its own stain normalization; leave --stain off out"):
        load_encoder(str(tiny_run), stain="off")


def test_timm_with_random_weights_is_the_same_every_time():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = load_encoder("timm:test_vit")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    again = load_encoder("timm:test_vit")
    assert first.fingerprint == again.fingerprint
    assert torch.equal(first(tiles()), again(tiles()))
    assert "random" in first.name
    assert first.fingerprint["preprocessing"]["size"] == 160


def test_a_run_is_its_teacher_with_its_preprocessing(tiny_run):
    encoder = load_encoder(str(tiny_run))
    config = read_run_config(tiny_run)
    network = Network(config).eval()
    network.backbone.load_state_dict(load_file(checkpoint.latest(tiny_run) / checkpoint.TEACHER))
    images = preprocess(tiles(), config.crops.global_size, config.augment.mean, config.augment.std)
    masks = torch.zeros(4, 4, dtype=torch.bool)
    with torch.no_grad():
        expected = network([images[None]], masks, torch.arange(4), hide=False, rate=0.0).cls[0]
    torch.testing.assert_close(encoder(tiles()), expected, atol=1e-5, rtol=1e-5)
    assert (encoder.name, encoder.stain["mode"]) == (tiny_run.name, "slide")
    assert load_encoder(str(tiny_run), pooling="cls+mean")(tiles()).shape == (4, 96)


def test_random_of_a_run_is_what_its_training_began_with(tiny_run):
    config = read_run_config(tiny_run)
    torch.manual_seed(config.run.seed)
    start = StudentTeacher(config).teacher.backbone.eval()
    encoder = load_encoder(f"random:{tiny_run}")
    images = preprocess(tiles(), config.crops.global_size, config.augment.mean, config.augment.std)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tiles()), start(images), atol=1e-5, rtol=1e-5)
    trained = load_encoder(str(tiny_run))
    assert encoder.fingerprint["weights"] != trained.fingerprint["weights"]
    assert {k: v for k, v in encoder.fingerprint.items() if k not in ("weights", "name")} == {
        k: v for k, v in trained.fingerprint.items() if k not in ("weights", "name")
    }
    assert encoder.name == f"random:{tiny_run.name}"


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


def test_weights_load_in_full_or_not_at_all(copy):
    path = checkpoint.latest(copy) / checkpoint.TEACHER
    weights = load_file(path)
    for change in (
        {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc1.bias"},
        weights | {"extra": torch.zeros(1)},
        weights | {"norm.weight": torch.zeros(3)},
    ):
        save_file(change, path)
        with pytest.raises(UserError, match="does not fit the configured backbone"):
            load_encoder(str(copy))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not fit"):
        load_encoder(str(copy))


def test_what_is_no_encoder_is_refused(tmp_path, copy):
    shutil.rmtree(copy / "checkpoints")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    for spec, said in [
        ("coloor", "does not exist; give a run folder"),
        (str(tmp_path), "holds neither config.yaml"),
        (str(copy), "no checkpoint yet"),
        (str(broken), "no key 'num_classes'"),
        ("timm:vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load_encoder(spec)
        assert "\n" not in str(caught.value)


def test_a_release_that_asks_for_what_it_should_not_is_refused(tmp_path):
    good = {
        "architecture": "test_vit",
        "num_classes": 0,
        "model_args": {"img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "elsewhere.pt")

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps(good | changes))
        return load_encoder(f"random:{tmp_path}")

    assert load()(tiles()).shape == (4, 64)
    for changes, said in [
        ({"architecture": "hf-hub:lab/model"}, "'hf-hub:lab/model', which timm has not"),
        ({"architecture": 3}, "'3', which timm has not"),
        ({"model_args": {"checkpoint_path": str(tmp_path / "elsewhere.pt")}}, "multiple values.*checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "multiple values.*pretrained"),
        ({"pretrained_cfg": good["pretrained_cfg"] | {"input_size": []}}, "describes no input"),
        ({"pretrained_cfg": good["pretrained_cfg"] | {"std": [0, 1, 1]}}, "describes no input"),
        ({"pretrained_cfg": good["pretrained_cfg"] | {"mean": ["a", 1, 1]}}, "describes no input"),
        ({"pretrained_cfg": good["pretrained_cfg"] | {"input_size": [3, 33, 33]}}, "cannot be run on its own input"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load(**changes)
        assert "\n" not in str(caught.value)


def test_devices_that_compute_nothing_and_steps_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="there is no device 'meta'"):
        pick_device("meta")
    with pytest.raises(UserError, match="run@²': the folder does not exist"):
        load_encoder("run@²")
