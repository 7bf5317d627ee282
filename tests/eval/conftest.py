from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eosin.data_tools.embeddings import Embeddings, write_embeddings


@pytest.fixture
def write(tmp_path):
    """Write an embeddings file of given features and columns; keys, slides and patients are made up if not given."""

    def write(name: str, features: np.ndarray, shards: str = "one set", **columns) -> Path:
        n = len(features)
        table = {"key": [f"t{i}" for i in range(n)], "slide": [f"s{i}" for i in range(n)], "x": np.arange(n)} | columns
        path = tmp_path / f"{name}.safetensors"
        encoder = {"name": name, "shards": shards} | ({"seen": {"complete": True}} if "seen" in columns else {})
        write_embeddings(path, Embeddings(features.astype(np.float32), pd.DataFrame(table), encoder))
        return path

    return write


@pytest.fixture
def cohort():
    """Make a cohort: 40 patients of two classes, 8 tiles each on 2 slides; features that tell the class or not."""

    def cohort(signal: float, seed: int = 0, dimension: int = 8):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(40), 8)
        of_patient = rng.permutation(np.arange(40) % 2)
        label = of_patient[patient]
        features = rng.normal(size=(320, dimension)) + rng.normal(size=(40, dimension))[patient]
        features[:, 0] += signal * label
        columns = {
            "patient": [f"p{p}" for p in patient],
            "slide": [f"p{p}-{i % 2}" for i, p in enumerate(patient)],
            "label": np.where(label == 1, "tumor", "normal"),
        }
        return features, columns

    return cohort


@pytest.fixture
def smooth_tiles():
    """Tiles without the noise that resizing in bytes and in floats rounds differently, [n, 3, size, size] uint8."""
    import torch

    def smooth_tiles(n=3, size=64):
        rough = torch.randint(0, 256, (n, 3, 5, 5), generator=torch.Generator().manual_seed(1)).float()
        return torch.nn.functional.interpolate(rough, (size, size), mode="bilinear").to(torch.uint8)

    return smooth_tiles


@pytest.fixture
def like_timm():
    """What timm's own transform and forward give of uint8 tiles."""
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    def like_timm(model, tiles):
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        pictures = [Image.fromarray(tile) for tile in tiles.permute(0, 2, 3, 1).numpy()]
        with torch.no_grad():
            return model(torch.stack([transform(picture) for picture in pictures]))

    return like_timm
