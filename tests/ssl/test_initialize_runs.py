"""Released weights in whole runs: fetched from a Hub, and what training begins with and goes on from."""

import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from eosin.data_tools.errors import UserError
from eosin.launch.cli import main
from eosin.ssl import checkpoint
from eosin.ssl.config import load_config
from eosin.ssl.network import StudentTeacher
from eosin.ssl.optimizer import build_optimizer


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self):
        body = self.files.get(self.path, b"")
        repository = any(path.split("/resolve")[0] == self.path.split("/resolve")[0] for path in self.files)
        self.send_response(200 if body else 403 if "gated" in self.path else 404)
        if "gated" in self.path:
            self.send_header("X-Error-Code", "GatedRepo")
        elif not body:
            self.send_header("X-Error-Code", "EntryNotFound" if repository else "RepoNotFound")
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_the_hub(tmp_path):
    """A process of its own against a server on this machine: what is there, what is not, and no token in any line."""
    small = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small).state_dict()
    safe, old, named = (tmp_path / name for name in ("a.safetensors", "a.bin", "a.pth"))
    save_file(state, safe)
    torch.save({"state_dict": state}, old)
    torch.save({"teacher": state}, named)
    Hub.files = {
        "/me/safe/resolve/main/model.safetensors": safe.read_bytes(),
        "/me/old/resolve/main/pytorch_model.bin": old.read_bytes(),
        "/me/named/resolve/main/deep/last.pth": named.read_bytes(),
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ["me/safe", "me/old", "me/named/deep/last.pth", "me/named", "me/none", "me/gated", "me/safe/x.pth", "m e/x"]
    script = f"""
from huggingface_hub import constants
from eosin.data_tools.errors import UserError
from eosin.ssl.initialize import read_weights
for number, name in enumerate({[*names, "me/safe", "me/none"]!r}):
    constants.HF_HUB_OFFLINE = number >= {len(names)}
    try:
        print(len(read_weights("hf-hub:" + name).tensors))
    except UserError as error:
        print(error)
"""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    run = [sys.executable, "-c", script]
    try:
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=True)
    finally:
        server.shutdown()
        server.server_close()
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) + 2, done.stdout
    assert lines[:3] == ["54", "54", "54"]
    assert "me/named holds no model.safetensors or pytorch_model.bin; give hf-hub:OWNER/REPO/FILE" in lines[3]
    assert "the Hub has no me/none" in lines[4]
    assert "asks for consent" in lines[5]
    assert "me/safe holds no x.pth" in lines[6]
    assert "cannot be fetched" in lines[7]
    assert "hf_secret" not in done.stdout + done.stderr
    # Without network, what has been fetched is still there.
    assert lines[8] == "54"
    assert "the Hub is not reached" in lines[9]


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tiny_shards):
    """The tiny recipe's arguments; optim without what it sets of its own."""
    return [*tiny_recipe, f"data.shards={tiny_shards}", "run={steps: 1, checkpoint_every: 1, log_every: 1, keep: 9}"]


def teachers(run):
    return [load_file(folder / checkpoint.TEACHER) for folder in checkpoint.steps(run)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_begins_with_the_teacher_of_a_run_or_release(tiny_run, recipe, tmp_path, capsys):
    (source,) = teachers(tiny_run)[-1:]
    release = tmp_path / "release"
    assert main(["export", str(tiny_run), "--out", str(release), "--name", "tiny"]) == 0
    still = ["objective.momentum=[1.0,1.0]", "optim={warmup: 0, freeze_last_layer: 0}"]
    for number, path in enumerate((tiny_run, release, checkpoint.latest(tiny_run))):
        run = tmp_path / f"run{number}"
        assert main(["train", *recipe, *still, f"run.dir={run}", f"model.init_from={path}"]) == 0
        assert f"{len(source)} of {len(source)} backbone tensors loaded from {path}" in capsys.readouterr().out
        assert equal(teachers(run)[0], source)


def test_only_heads_learn_in_the_first_steps(tiny_run, recipe, tmp_path):
    source, run = teachers(tiny_run)[-1], tmp_path / "run"
    overrides = ["optim={warmup: 0, freeze_last_layer: 0, heads_only: 2}", "run.steps=3"]
    arguments = [*recipe, *overrides, f"run.dir={run}", f"model.init_from={tiny_run}"]
    assert main(["train", *arguments]) == 0
    assert [equal(t, source) for t in teachers(run)] == [True, True, False]
    config = load_config(arguments[0], arguments[1:])
    before = StudentTeacher(config)
    shutil.rmtree(checkpoint.latest(run))
    after = StudentTeacher(config)
    assert checkpoint.resume(run, after, build_optimizer(after.student, config), {}) == 2
    assert equal(after.student.backbone.state_dict(), source)
    assert not torch.equal(after.student.mask_token, before.student.mask_token)
    assert not after.student.mask_token.isnan().any()
    before, after = before.student.dino_head.state_dict(), after.student.dino_head.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_continued_run_does_not_need_the_file(tiny_run, recipe, tmp_path, capsys):
    source, run = tmp_path / "w.safetensors", tmp_path / "run"
    shutil.copy(checkpoint.latest(tiny_run) / checkpoint.TEACHER, source)
    arguments = ["train", *recipe, "optim.warmup=0", "run.steps=2", f"run.dir={run}", f"model.init_from={source}"]
    assert main(arguments) == 0
    shutil.rmtree(checkpoint.latest(run))
    source.unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "goes on after step 1" in capsys.readouterr().out
    # A run that has not begun does, and leaves nothing behind.
    fresh = tmp_path / "fresh"
    assert main([*arguments, f"run.dir={fresh}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"eosin: model.init_from: {source} does not exist")
    assert not (fresh / "config.yaml").exists()


def test_heads_only_is_checked_against_the_length_of_the_run():
    with pytest.raises(UserError, match=r"optim\.heads_only: 301 steps are more than run\.steps=300"):
        load_config("demo", ["data.shards=s", "run.dir=r", "optim.heads_only=301"])
    for value, said in (("-1", "optim.heads_only"), ("''", "model.init_from")):
        key = said + "=" + value
        with pytest.raises(UserError, match=said):
            load_config("demo", ["data.shards=s", "run.dir=r", key])
