import json
import math

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet, ShardWriter
from eosin.ssl.stain import macenko
from eosin.ssl.stain.jitter import hed_jitter
from eosin.ssl.stain.normalizer import fit_slides, make_normalizer

H, E = np.array([0.60, 0.73, 0.33]), np.array([0.20, 0.90, 0.38])
H, E = H / np.linalg.norm(H), E / np.linalg.norm(E)


def tile(seed, vectors=(H, E), strength=(1.0, 1.0), size=96, tissue=0.8):
    """A Beer-Lambert tile with known stain vectors: pure hematoxylin, pure eosin and mixtures, some background."""
    rng = np.random.default_rng(seed)
    shape = (size * size, 1)
    amount_h = strength[0] * rng.uniform(0.2, 1.5, shape) * (rng.random(shape) < 0.5)
    amount_e = strength[1] * rng.uniform(0.3, 1.0, shape) * ((rng.random(shape) < 0.6) | (amount_h == 0))
    density = (amount_h * vectors[0] + amount_e * vectors[1]) * (rng.random(shape) < tissue)
    image = (256 * np.exp(-density) - 1).clip(0, 255).round().astype(np.uint8)
    return torch.from_numpy(image.reshape(size, size, 3)).permute(2, 0, 1)


def degrees(a, b):
    return math.degrees(math.acos(min(1.0, float(np.dot(a, b)))))


def blank(level):
    return torch.full((3, 96, 96), level, dtype=torch.uint8)


def pen(color):
    image = torch.full((3, 96, 96), 250, dtype=torch.uint8)
    image[:, 20:70] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
    return image


def test_known_stain_vectors_are_recovered():
    others = (np.array([0.55, 0.76, 0.35]), np.array([0.10, 0.85, 0.52]))
    others = tuple(v / np.linalg.norm(v) for v in others)
    fits = macenko.fit(torch.stack([tile(0), tile(1, others)]))
    assert fits.good.all()
    for found, true in zip(fits.vectors.numpy(), [(H, E), others]):
        assert degrees(found[0], true[0]) < 2
        assert degrees(found[1], true[1]) < 2


def test_density_and_intensity_are_inverse_for_every_level():
    levels = torch.arange(256)
    assert torch.equal(macenko.intensity(macenko.optical_density(levels)).round(), levels.float())
    assert macenko.optical_density(torch.tensor(255)).item() == 0


def test_normalizing_two_stainings_of_one_section_brings_them_together():
    # The same concentrations under another laboratory's vectors and strengths.
    others = (np.array([0.55, 0.76, 0.35]), np.array([0.10, 0.85, 0.52]))
    others = tuple(v / np.linalg.norm(v) for v in others)
    pair = torch.stack([tile(3), tile(3, others, strength=(0.7, 1.2))])
    fits = macenko.fit(pair)
    matrices = macenko.transform(fits.vectors, fits.maxima, *macenko.reference())
    out = macenko.apply(pair, matrices).float()
    before, after = (pair[0].float() - pair[1].float()).abs().mean(), (out[0] - out[1]).abs().mean()
    assert after < 0.25 * before


def test_the_identity_gives_back_every_byte_and_white_stays_white():
    images = torch.stack([tile(0), blank(255)])
    identity = torch.eye(3).repeat(2, 1, 1)
    assert torch.equal(macenko.apply(images, identity), images)
    fits = macenko.fit(tile(0)[None])
    matrices = macenko.transform(fits.vectors, fits.maxima, *macenko.reference())
    assert (macenko.apply(blank(255)[None], matrices) >= 254).all()


@pytest.mark.parametrize(
    "bad",
    [
        blank(255),
        blank(0),
        blank(130),
        pen((20, 160, 60)),
        pen((30, 40, 200)),
        pen((200, 20, 30)),
        torch.zeros(3, 96, 96, dtype=torch.uint8).index_fill_(1, torch.tensor([5]), 90),
        tile(0, vectors=(H, H)),
    ],
    ids=["white", "black", "gray", "green pen", "blue pen", "red pen", "black line", "one stain"],
)
def test_a_tile_without_a_fit_is_marked_and_its_neighbors_are_untouched(bad):
    alone = macenko.fit(tile(0)[None])
    fits = macenko.fit(torch.stack([bad, tile(0)]))
    assert not fits.good[0]
    assert fits.reason[0]
    assert fits.good[1]
    torch.testing.assert_close(fits.vectors[1], alone.vectors[0])
    torch.testing.assert_close(fits.maxima[1], alone.maxima[0])
    normalizer = make_normalizer("tile", None)
    out = normalizer(torch.stack([bad, tile(0)]), torch.zeros(2, dtype=torch.long))
    assert torch.equal(out[0], bad)
    assert not torch.equal(out[1], tile(0))


def test_one_pixel_images_do_not_raise():
    assert not macenko.fit(torch.zeros(2, 3, 1, 1, dtype=torch.uint8)).good.any()


@pytest.fixture
def shards(tmp_path):
    """Three slides: H&E of two stainings, and an IHC slide."""
    folder = tmp_path / "s"
    folder.mkdir()
    writer = ShardWriter(folder)
    for slide, vectors in enumerate([(H, E), (np.array([0.5, 0.8, 0.33]), E), (H, E)]):
        for i in range(4):
            image = tile(10 * slide + i, vectors).permute(1, 2, 0).contiguous().numpy()
            data = simplejpeg.encode_jpeg(image, 98, colorsubsampling="444")
            writer.add(f"s{slide}-{i}", data, "jpg", {"x": i, "y": 0, "mpp": 0.5}, slide)
    table = pd.DataFrame({"slide": ["a", "b", "c"], "stain": ["H&E", "H&E", "IHC"]})
    writer.finish(table, tile_size=96, mpp=0.5, config={})
    return ShardSet(folder)


def test_slide_fits_land_in_the_table_and_ihc_gets_none(shards):
    table = fit_slides(shards)
    assert table["stain_fit"].map(bool).tolist() == [True, True, False]
    assert table["stain_tiles"].tolist() == [4, 4, 0]
    assert "not H&E" in table["stain_reason"][2]
    found = json.loads(shards.slides()["stain_fit"][0])
    assert degrees(np.array(found["vectors"][0]), H) < 3
    assert degrees(np.array(found["vectors"][1]), E) < 3


def test_slide_mode_needs_fits_and_leaves_ihc_raw(shards):
    with pytest.raises(UserError, match="eosin stain fit"):
        make_normalizer("slide", shards)
    fit_slides(shards)
    normalizer = make_normalizer("slide", ShardSet(shards.folder))
    images = torch.stack([tile(0), tile(0)])
    out = normalizer(images, torch.tensor([0, 2]))
    assert not torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1])


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_jitter_keeps_white_and_identity(sigma):
    keys, on = torch.arange(3), torch.ones(3, dtype=torch.bool)
    white = torch.ones(3, 3, 8, 8)
    assert (hed_jitter(white, keys, sigma, on) * 255 >= 254).all()
    images = torch.stack([tile(i) for i in range(3)]).float() / 255
    assert torch.equal(hed_jitter(images, keys, 0.0, on), images)
    assert torch.equal(hed_jitter(images, keys, sigma, ~on), images)
    assert (hed_jitter(images, keys, sigma, on) - images).abs().mean() > 0.1 * sigma / (1 + sigma) / 10


def test_jitter_scales_concentrations_as_tellez_writes():
    # Where tissue is dense, c' = alpha c + beta in the basis of Ruifrok; recover alpha and beta by regression.
    from eosin.ssl.stain.jitter import HED

    basis = np.array(HED) / np.linalg.norm(HED, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.3, 0.8, (4096, 3))
    image = torch.from_numpy((256 * np.exp(-amounts @ basis) - 1) / 255).float().T.reshape(1, 3, 64, 64)
    out = hed_jitter(image, torch.tensor([7]), 0.1, torch.ones(1, dtype=torch.bool)).double().reshape(3, -1).T * 255
    after = -np.log((out.numpy() + 1) / 256) @ np.linalg.inv(basis)
    for stain in range(3):
        slope, offset = np.polyfit(amounts[:, stain], after[:, stain], 1)
        residual = after[:, stain] - slope * amounts[:, stain] - offset
        assert 0.9 <= slope <= 1.1
        assert -0.1 <= offset <= 0.1
        assert abs(slope - 1) > 1e-3
        assert np.abs(residual).max() < 1e-3
