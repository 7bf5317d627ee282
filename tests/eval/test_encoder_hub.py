import shutil
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from eosin.data_tools.errors import UserError
from eosin.eval.encoder_hub import model_arguments
from eosin.eval.encoders import load_encoder
from eosin.launch.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As the Hub answers for files, from a folder of repositories; ``lab/gated`` wants a token."""

    share = 1.0  # of a file, after which it falls silent

    def __init__(self, folder, seen, *arguments):
        self.folder, self.seen = folder, seen
        super().__init__(*arguments)

    def do_HEAD(self):
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        file = self.folder / repository / rest.partition("/")[2]
        self.seen.append((self.command, self.path, self.headers.get("authorization")))
        if repository == "lab/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if not (self.folder / repository).is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{repository}/{file.name}"'}, file.read_bytes())

    do_GET = do_HEAD

    def answer(self, code, headers, body=b""):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: int(len(body) * self.share)])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this machine alone: the folder of its repositories, and what it was asked."""
    folder, seen = tmp_path / "hub", []
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, seen))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield folder, seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(hub):
    """A timm model on the Hub, and the same model here."""
    folder, _ = hub
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=7).eval()
    timm.models.save_for_hf(model, str(folder / "lab" / "vit"), safe_serialization=True)
    return model


def test_a_model_of_the_hub_is_timms_own(hub, published, like_timm, smooth_tiles):
    _, seen = hub
    encoder = load_encoder("hf-hub:lab/vit")
    published.reset_classifier(0)
    torch.testing.assert_close(encoder(smooth_tiles()), like_timm(published, smooth_tiles()), atol=0.02, rtol=0.02)
    assert encoder.name == "hf-hub:lab/vit"
    assert encoder.fingerprint["preprocessing"]["resize"] == int(160 / 0.95)
    assert encoder.seen is None
    asked = [(path, token) for _, path, token in seen if path.startswith("/lab/")]
    assert asked[0] == ("/lab/vit/resolve/main/config.json", "Bearer hf_secret")
    assert {path.split("/")[4] for path, _ in asked} == {"main", COMMIT}


def test_offline_a_model_comes_from_the_cache_or_is_one_line(hub, published, monkeypatch):
    folder, _ = hub
    online = load_encoder("hf-hub:lab/vit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_encoder("hf-hub:lab/vit").fingerprint == online.fingerprint
    with pytest.raises(UserError, match=r"'lab/other' of the Hub is not on this machine .* set HF_HOME"):
        load_encoder("hf-hub:lab/other")
    # What another program brought may lack the stain normalizer, unless it brought everything.
    cache = next((folder.parent / "cache").glob("models--*"))
    shutil.rmtree(cache / ".no_exist")
    with pytest.raises(UserError, match=r"has a preprocessing\.json is not known offline; run 'hf download lab/vit'"):
        load_encoder("hf-hub:lab/vit")
    (cache / "snapshots" / COMMIT / ".gitattributes").touch()
    assert load_encoder("hf-hub:lab/vit").fingerprint == online.fingerprint


def test_a_release_on_the_hub_brings_its_stain_normalizer(hub, tiny_run, smooth_tiles):
    folder, _ = hub
    assert main(["export", str(tiny_run), "--out", str(folder / "lab" / "tiny"), "--name", "tiny"]) == 0
    of_hub, run = load_encoder("hf-hub:lab/tiny"), load_encoder(str(tiny_run))
    assert of_hub.name == "hf-hub:lab/tiny"
    assert of_hub.stain == run.stain
    assert of_hub.seen == run.seen
    assert of_hub.fingerprint == run.fingerprint | {"name": "hf-hub:lab/tiny"}
    torch.testing.assert_close(of_hub(smooth_tiles()), run(smooth_tiles()), atol=1e-5, rtol=1e-5)


def test_what_the_hub_does_not_give_is_one_line_without_the_token(hub, published):
    folder, _ = hub
    bare = folder / "lab" / "bare"
    bare.mkdir(parents=True)
    other = shutil.copytree(folder / "lab" / "vit", folder / "lab" / "transformers")
    (other / "config.json").write_text('{"architectures": ["Dinov2Model"]}')
    short = shutil.copytree(folder / "lab" / "vit", folder / "lab" / "short")
    weights = load_file(short / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "norm.bias"}, short / "model.safetensors")
    for name, said in [
        ("lab/gated", "is gated: .* 'hf auth login'"),
        ("lab/absent", "does not exist or is private; .* 'hf auth login'"),
        ("lab/bare", "has no config.json"),
        ("lab/transformers", "does not describe a timm model"),
        ("lab/short", "norm.bias"),  # weights load in full or not at all
        ("vit", "names no repository"),
        ("../..", "is no name that the Hub allows"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            load_encoder(f"hf-hub:{name}")
        assert "\n" not in str(caught.value)
        assert "hf_secret" not in str(caught.value)


def test_a_hub_that_falls_silent_in_the_middle_of_a_file_is_one_line(hub, published, monkeypatch):
    monkeypatch.setattr(Hub, "share", 0.5)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    with pytest.raises(UserError, match=r"stopped answering .*; run the same command again") as caught:
        load_encoder("hf-hub:lab/vit")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_arguments_of_the_cards_give_the_published_sizes():
    # Widths, blocks and parameters as their cards and papers say.
    with torch.device("meta"):
        uni = timm.create_model("vit_large_patch16_224", num_classes=0, **model_arguments("MahmoodLab/UNI"))
        uni2 = timm.create_model("vit_giant_patch14_224", **model_arguments("MahmoodLab/UNI2-h"))
    assert (uni.num_features, len(uni.blocks)) == (1024, 24)
    assert abs(sum(p.numel() for p in uni.parameters()) - 303e6) < 1e6
    assert (uni2.num_features, len(uni2.blocks), uni2.num_prefix_tokens) == (1536, 24, 9)
    assert abs(sum(p.numel() for p in uni2.parameters()) - 681e6) < 1e6
    assert model_arguments("somebody/else") == {}
