import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.eval.encoders import load_encoder
from eosin.launch.cli import main
from eosin.launch.export import export


@pytest.fixture
def release(tiny_run, tmp_path):
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "release"), "--name", "tiny"]) == 0
    return tmp_path / "release"


def test_timm_reloads_the_features_of_the_run(release, tiny_run):
    model = timm.create_model(f"local-dir:{release}", pretrained=True).eval()
    # The run's own path: the packed network that was trained.
    from eosin.ssl.checkpoint import TEACHER, latest
    from eosin.ssl.config import read_run_config
    from eosin.ssl.network import Network

    network = Network(read_run_config(tiny_run)).eval()
    network.backbone.load_state_dict(load_file(latest(tiny_run) / TEACHER))
    images = torch.randn(1, 5, 3, 32, 32)
    masks = torch.zeros(5, 4, dtype=torch.bool)
    with torch.no_grad():
        trained = network([images], masks, torch.arange(5), hide=False, rate=0.0).cls[0]
        torch.testing.assert_close(model(images[0]), trained, atol=1e-5, rtol=1e-5)
        # Other sizes work too, as in training.
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 48)


def test_run_and_release_encode_alike(release, tiny_run, tiny_shards):
    shards = ShardSet(tiny_shards)
    tiles = torch.randint(0, 256, (3, 3, shards.tile_size, shards.tile_size), dtype=torch.uint8)
    run, released = load_encoder(str(tiny_run)), load_encoder(str(release))
    assert run.stain == released.stain
    assert run.stain["mode"] == "slide"
    assert run.fingerprint["weights"] == released.fingerprint["weights"]
    torch.testing.assert_close(released(tiles), run(tiles), atol=1e-5, rtol=1e-5)


def test_the_bundle_is_plain_data(release):
    assert sorted(p.name for p in release.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessing.json",
        "seen.json",
    ]
    config = json.loads((release / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    assert json.loads((release / "preprocessing.json").read_text())["stain"]["mode"] == "slide"


def test_the_card_says_what_it_must(release):
    card = (release / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm")
    for part in ("# tiny", "Not a medical device", "48 tiles of 64 px at 0.5 µm/px", "4 patients", "2 sites", "H&E"):
        assert part in card


def test_bad_input_leaves_nothing(tmp_path, tiny_run, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    for run, out, said in [
        (tmp_path / "absent", tmp_path / "new", "is not a run"),
        (tiny_run, tmp_path / "full", "already holds something else"),
    ]:
        with pytest.raises(UserError, match=said):
            export(run, out, results=[], name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    with pytest.raises(UserError, match="does not exist"):
        export(tiny_run, tmp_path / "new", results=[tmp_path / "absent.json"], name="x")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def run_with_history(tiny_shards, tiny_recipe, tmp_path):
    """A run that held patients out, skipped two steps and was rewound."""
    run = tmp_path / "run"
    more = ["health={held_out: 0.4, held_out_every: 4, pictures_every: 0}", "data.batch=4", "optim.accumulate=2"]
    train = ["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}", *more, "run.steps=4"]
    assert main(train) == 0
    (run / "bad_batches.jsonl").write_text('{"step": 2, "tiles": {}}\n{"step": 4, "tiles": {}}\n{"step": 9, "til')
    (run / "rewinds.jsonl").write_text('{"step": 3, "skip": 1}\n')
    return run


def test_card_and_report_say_how_a_model_was_trained(run_with_history, tmp_path):
    run, out = run_with_history, tmp_path / "release"
    assert main(["export", str(run), "--out", str(out), "--name", "tiny"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    # The draw of patients, from the loop's own list of tiles that it trains on.
    from eosin.ssl.config import read_run_config
    from eosin.ssl.feed import phases, stream

    made = phases(read_run_config(run), None, torch.device("cpu"))
    seen = {int(s) for _, batch in stream(made, 0) for s in batch["slide"]}
    left = 4 - len(seen)  # 16 draws of few slides reach each
    assert 0 < left < 4
    card, page = (out / "README.md").read_text(), (tmp_path / "report.html").read_text()
    for text in (card, page):
        assert f"{left} of 4 patients, {left} of 4 slides (health.held_out=0.4)" in text
        assert "1 process, float32, global batch 4" in text
        assert "share in 2 parts" in text
        assert "2 steps without a finite gradient changed nothing (2, 4)" in text
        assert "the run went back to step 3 and passed over 1 batch" in text


def test_a_run_without_trouble_says_so(release):
    card = (release / "README.md").read_text()
    assert "8 of 8 steps: 1 process, float32, global batch 8." in card
    assert "No step was skipped, none rewound." in card
    assert "Held out" not in card
