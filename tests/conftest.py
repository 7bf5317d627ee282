"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """Skip what needs a CUDA device where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real tissue; the test is skipped where it is absent."""
    folder = Path(os.environ.get("EOSIN_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip("real tissue is absent: set EOSIN_REAL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """A shard set of 48 noisy tiles of 64 px on 4 H&E slides of 4 patients, two labels; with stain fits."""
    import numpy as np
    import pandas as pd
    import simplejpeg

    from eosin.data_tools.shards import ShardSet, ShardWriter
    from eosin.ssl.stain.fits import fit_slides

    folder = tmp_path_factory.mktemp("shards") / "tiny"
    folder.mkdir()
    writer = ShardWriter(folder)
    rng = np.random.default_rng(0)
    stains = np.array([[0.60, 0.73, 0.33], [0.20, 0.90, 0.38]])
    for i in range(48):
        amounts = np.kron(rng.uniform(0, 1.2, (16, 16, 2)), np.ones((4, 4, 1)))
        image = (256 * np.exp(-amounts @ stains) - 1).clip(0, 255).astype(np.uint8)
        meta = {"x": 64 * i, "y": 0, "mpp": 0.5}
        writer.add(f"s{i % 4}_{64 * i}_0_500", simplejpeg.encode_jpeg(image, 95), "jpg", meta, slide=i % 4)
    slides = pd.DataFrame(
        {
            "slide": ["s0", "s1", "s2", "s3"],
            "patient": ["p0", "p1", "p2", "p3"],
            "site": ["a", "b", "a", "b"],
            "stain": "H&E",
            "tiles": 12,
            "label": ["x", "y", "x", "y"],
        }
    )
    writer.finish(slides, tile_size=64, mpp=0.5, config={})
    fit_slides(ShardSet(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> list[str]:
    """Arguments of ``eosin train`` for a run of 8 steps that takes a few seconds: recipe and overrides."""
    return [
        "demo",
        "model.args={depth: 2, embed_dim: 48, num_heads: 3, init_values: 0.1}",
        "model.drop_path=0.1",
        "crops={global_size: 32, local_size: 16, local_count: 2}",
        "objective={prototypes: 64, hidden: 32, bottleneck: 16, teacher_temperature_warmup: 4}",
        "optim={warmup: 2, freeze_last_layer: 1}",
        "data.batch=8",
        "run={steps: 8, checkpoint_every: 3, log_every: 1}",
    ]


@pytest.fixture(scope="session")
def tiny_run(tiny_shards, tiny_recipe, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe on the tiny shard set, in one process."""
    from eosin.launch.cli import main

    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *tiny_recipe, f"data.shards={tiny_shards}", f"run.dir={run}"]) == 0
    return run
