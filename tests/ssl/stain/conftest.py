"""Beer-Lambert tiles with known stains."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch

from eosin.data_tools.shards import ShardSet, ShardWriter

H, E = np.array([0.60, 0.73, 0.33]), np.array([0.20, 0.90, 0.38])
H, E = H / np.linalg.norm(H), E / np.linalg.norm(E)
H2, E2 = np.array([0.55, 0.76, 0.35]), np.array([0.10, 0.85, 0.52])
H2, E2 = H2 / np.linalg.norm(H2), E2 / np.linalg.norm(E2)


def make_tile(seed, vectors=(H, E), strength=(1.0, 1.0), size=96, tissue=0.8, white=256.0, dense=False):
    """[3, size, size] uint8: pure hematoxylin, pure eosin and mixtures, and some background; all tissue if dense."""
    rng = np.random.default_rng(seed)
    shape = (size * size, 1)
    amount_h = strength[0] * rng.uniform(0.2, 1.5, shape) * (rng.random(shape) < 0.5)
    amount_e = strength[1] * rng.uniform(0.3, 1.0, shape) * ((rng.random(shape) < 0.6) | (amount_h == 0))
    if dense:
        amount_h, amount_e, tissue = amount_h.clip(0.3), amount_e.clip(0.3), 2.0
    density = (amount_h * vectors[0] + amount_e * vectors[1]) * (rng.random(shape) < tissue)
    image = (np.asarray(white) * np.exp(-density) - 1).clip(0, 255).round().astype(np.uint8)
    return torch.from_numpy(image.reshape(size, size, 3)).permute(2, 0, 1).contiguous()


def angle(a, b):
    """Degrees between two directions."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return math.degrees(math.acos(min(1.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))))


def blank(level, size=96):
    return torch.full((3, size, size), level, dtype=torch.uint8)


def pen(color):
    image = blank(250)
    image[:, 20:70] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
    return image


def one_tissue_pixel():
    image = blank(255)
    image[:, 5, 5] = torch.tensor([120, 60, 130], dtype=torch.uint8)
    return image


DEGENERATE = {
    "white": blank(255),
    "black": blank(0),
    "gray": blank(130),
    "one color": blank(200) - torch.tensor([20, 90, 30], dtype=torch.uint8).view(3, 1, 1),
    "one tissue pixel": one_tissue_pixel(),
    "green pen": pen((20, 160, 60)),
    "blue pen": pen((30, 40, 200)),
    "red pen": pen((200, 20, 30)),
    "black ink": pen((25, 25, 28)),
    "black line": torch.zeros(3, 96, 96, dtype=torch.uint8).index_fill_(1, torch.tensor([5]), 90),
    "one stain": make_tile(0, vectors=(H, H)),
}


@pytest.fixture(scope="session")
def bench():
    """The bench: ``tile``, ``angle``, ``blank``, ``degenerate`` and the vectors ``H``, ``E``, ``H2``, ``E2``."""
    return SimpleNamespace(
        tile=make_tile, angle=angle, blank=blank, degenerate=DEGENERATE, H=H, E=E, H2=H2, E2=E2, he=(H, E), he2=(H2, E2)
    )


@pytest.fixture
def shards(tmp_path):
    """Four slides: H&E of two stainings and of a scanner with a tinted white, and an IHC slide; 4 tiles each."""
    folder = tmp_path / "s"
    folder.mkdir()
    writer = ShardWriter(folder)
    looks = [((H, E), 256), ((H2, E2), 256), ((H, E), (243, 236, 225)), ((H, E), 256)]
    for slide, (vectors, white) in enumerate(looks):
        for i in range(4):
            image = make_tile(10 * slide + i, vectors, white=white).permute(1, 2, 0).contiguous().numpy()
            data = simplejpeg.encode_jpeg(image, 98, colorsubsampling="444")
            writer.add(f"s{slide}-{i}", data, "jpg", {"x": i, "y": 0, "mpp": 0.5}, slide)
    table = pd.DataFrame({"slide": ["a", "b", "c", "d"], "stain": ["H&E", "H&E", "H&E", "IHC"], "tiles": 4})
    writer.finish(table, tile_size=96, mpp=0.5, config={})
    return ShardSet(folder)


@pytest.fixture(scope="session")
def real_tiles(real_data):
    """Real H&E, some dozen images [3, h, w] uint8."""
    from PIL import Image

    files = [*sorted(real_data.glob("stain/randstainna/origin/*.png")), real_data / "stain/torchstain/source.png"]
    files += sorted(real_data.glob("lc25000_224/**/*.jp*g"))[::180]
    read = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    return [torch.from_numpy(i.copy()).permute(2, 0, 1).contiguous() for i in read]
