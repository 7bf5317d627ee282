import sys

import numpy as np
import pytest
import timm
import torch

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.eval.encoders import load_encoder
from eosin.launch.cli import main


def tiles(n=3, size=64, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Write a module into the working directory; each has a name of its own, since Python keeps what it imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def code(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return f"{name}:make"

    return code


def test_a_function_of_ones_own_embeds_from_the_command_line(code, tiny_shards, tmp_path):
    spec = code("own_mean", "def make():\n    return lambda tiles: tiles.float().mean(dim=(2, 3))\n")
    assert main(["embed", spec, str(tiny_shards), "--out", str(tmp_path / "e.safetensors"), "--name", "mine"]) == 0
    found = read_embeddings(tmp_path / "e.safetensors")
    assert (found.name, found.features.shape) == ("mine", (48, 3))
    color = tmp_path / "c.safetensors"
    assert main(["embed", "color", str(tiny_shards), "--out", str(color)]) == 0
    np.testing.assert_allclose(found.features / 255, read_embeddings(color).features[:, :3], atol=1e-6)


TIMM = """
import timm, torch
from timm.data import create_transform, resolve_model_data_config

def make():
    torch.manual_seed(SEED)
    model = timm.create_model("test_vit", num_classes=0).eval()
    return RESULT
"""
PAIR = "model, create_transform(**resolve_model_data_config(model))"


def test_a_pair_of_model_and_transform_is_used_as_timm_does(code, like_timm):
    network = code("own_pair", TIMM.replace("SEED", "0").replace("RESULT", PAIR))
    pair = load_encoder(network)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    torch.testing.assert_close(pair(tiles()), like_timm(model, tiles()))
    assert pair.tokens(tiles()).shape == (3, 10, 10, 64)
    assert load_encoder(network, pooling="cls+mean", layers=2)(tiles()).shape == (3, 3 * 64)
    alone = load_encoder(code("own_timm", TIMM.replace("SEED", "0").replace("RESULT", "model")))
    torch.testing.assert_close(alone(tiles()), like_timm(model, tiles()), atol=0.02, rtol=0.02)


def test_fingerprints_tell_weights_and_source_apart(code):
    first = code("own_a", TIMM.replace("SEED", "0").replace("RESULT", PAIR))
    a, again = load_encoder(first).fingerprint, load_encoder(first).fingerprint
    assert a == again
    b = load_encoder(code("own_b", TIMM.replace("SEED", "0").replace("RESULT", "model"))).fingerprint
    c = load_encoder(code("own_c", TIMM.replace("SEED", "1").replace("RESULT", "model"))).fingerprint
    assert a["weights"] == b["weights"] != c["weights"]
    assert len({a["source"], b["source"], c["source"]}) == 3
    inner = "def make():\n    def transform(picture):\n        pass\n    return len, transform\n"
    named = code("own_e", inner)  # whose address differs each time
    assert load_encoder(named).fingerprint == load_encoder(named).fingerprint
    assert "weights" not in load_encoder(code("own_d", "def make():\n    return len\n")).fingerprint


def test_errors_in_ones_own_code_are_one_line_that_names_it(code):
    for name, body, said in [
        (
            "own_bad1",
            "def make():\n    return 1 / 0",
            r"'own_bad1:make' failed with ZeroDivisionError: .*own_bad1.py line 2",
        ),
        ("own_bad2", "def make():\n    return 3", "'own_bad2:make' returned 'int'; an encoder is a function"),
        ("own_bad3", "def make(:", "'own_bad3:make' failed with SyntaxError"),
        ("own_bad4", "def mke():\n    pass", "module 'own_bad4' has no function 'make'; did you mean 'mke'"),
        ("own_bad5", "import nothing_here", "failed with ModuleNotFoundError: No module named 'nothing_here'"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load_encoder(code(name, body))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no Python module 'own_absent'"):
        load_encoder("own_absent:make")
    for name, body, said in [
        ("own_bad6", "def make():\n    return lambda tiles: tiles[0, 0]", r"gave a tensor of \[64, 64\] for 3 tiles"),
        ("own_bad7", "def make():\n    return lambda tiles: tiles.numpy() @ 3", "failed with .*own_bad7.py line 2"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load_encoder(code(name, body))(tiles())
        assert "\n" not in str(caught.value)
    nothing = code("own_bad8", "import torch\ndef make():\n    return lambda tiles: torch.ones(len(tiles), 0)")
    with pytest.raises(UserError, match=r"gave a tensor of \[3, 0\] for 3 tiles"):
        load_encoder(nothing)(tiles())
    changing = load_encoder(code("own_bad9", "def make():\n    return lambda tiles: tiles[:, 0, 0, : len(tiles)]"))
    changing(tiles(3))
    with pytest.raises(UserError, match=r"gave features of \[2, 3\] numbers"):
        changing(tiles(2))
    with pytest.raises(UserError, match="goes without its ending; give own_bad9:make"):
        load_encoder("own_bad9.py:make")
    with pytest.raises(UserError, match="need a timm model; 'own_bad7:make' decides that itself"):
        load_encoder("own_bad7:make", pooling="mean")(tiles())


def test_memory_that_runs_out_in_ones_own_code_is_not_its_fault(code):
    spec = code(
        "own_big", "import torch\ndef make():\n    def f(tiles):\n        raise torch.OutOfMemoryError\n    return f"
    )
    with pytest.raises(torch.OutOfMemoryError):
        load_encoder(spec)(tiles())


def test_a_folder_with_a_colon_is_a_folder(code, tmp_path):
    (tmp_path / "a:b").mkdir()
    with pytest.raises(UserError, match=r"holds neither config\.yaml"):
        load_encoder("a:b")
