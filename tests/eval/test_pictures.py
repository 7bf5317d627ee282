"""Pictures of the report: mosaics, crops, patch tokens and attention, against what the tiles are known to hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet
from eosin.eval.report import pictures
from eosin.eval.report.material import gather
from eosin.ssl.crops_sheet import views
from eosin.ssl.feed import Phase
from eosin.ssl.whole_tiles import BACKGROUND


def laid(cells: list[tuple[int, int]], images: np.ndarray | None = None) -> pictures.Mosaic:
    images = np.zeros((len(cells), 8, 8, 3), np.uint8) if images is None else images
    return pictures.Mosaic(np.arange(len(cells)), images, np.array(cells), True, True)


def test_mosaic_puts_tiles_where_they_lie(tiny_shards):
    # Positions of slide 1: x = 64, 320, ... in one row, so 256 pixels from tile to tile.
    found = pictures.mosaic(ShardSet(tiny_shards), 1)
    assert found.cells.tolist() == [[0, i] for i in range(12)]
    assert found.tiles.tolist() == list(range(1, 48, 4))
    red, blue = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    image = laid([(0, 2), (1, 0)]).paint(np.stack([red, blue]))
    side = pictures.MOSAIC_PIXELS // 3
    assert image.shape == (2 * side, 3 * side, 3)
    assert image[side // 2, 2 * side + side // 2].tolist() == [255, 0, 0]
    assert image[side + side // 2, side // 2].tolist() == [0, 0, 255]
    assert (image[: side // 2, : 2 * side] == 255).all()


def test_places_follow_the_slides_resolution_across_gaps():
    # Tiles of 256 px at 0.5 µm/px on a slide of 0.2499 µm/px: 512.2 pixels apart, none beside another.
    places = np.array([[0, 0], [1024, 0], [round(40 * 512.2), round(77 * 512.2)]])
    assert pictures._cells(places, 512.2).tolist() == [[0, 0], [2, 0], [40, 77]]


def test_of_a_large_slide_the_fullest_window_is_shown():
    rng = np.random.default_rng(0)
    crowd = [(100 + r, 30 + c) for r in range(12) for c in range(12) if (r, c) != (3, 4)]
    strewn = [(int(r), int(c)) for r, c in rng.integers(0, 90, (200, 2))]
    cells = np.array(crowd + sorted(set(strewn)))
    assert sorted(pictures._window(cells, 12).tolist()) == list(range(len(crowd)))


def test_heat_is_gray_without_attention_and_vermilion_at_full():
    white = np.full((3, 8, 8, 3), 255, np.uint8)
    mosaic = laid([(0, 0), (0, 1), (0, 2)], white)
    image = pictures.heat(mosaic, np.array([0.0, 4.0, 8.0]), 4.0)
    side = image.shape[0]
    colors = [image[side // 2, side // 2 + i * side].tolist() for i in range(3)]
    full = [round(255 * 0.15 + c * 0.85) for c in pictures.HEAT]
    assert colors == [[255, 255, 255], full, full]


def test_crops_shown_are_the_tile_itself_when_augmentation_is_off(tiny_run):
    m = gather(tiny_run, [], None, None)
    config = m.config.model_copy(
        update={
            "crops": m.config.crops.model_copy(update={"global_size": 64, "global_scale": [1.0, 1.0]}),
            "augment": m.config.augment.model_copy(
                update={"flips": False, "rotate90": False, "jitter": 0.0, "gray": 0.0, "blur": [0.0, 0.0, 0.0]}
            ),
            "stain": m.config.stain.model_copy(update={"augment": []}),
            "objective": m.config.objective.model_copy(update={"mask_probability": 1.0, "mask_ratio": [0.5, 0.5]}),
        }
    )
    phase = Phase(range(config.run.steps), config, Mixture({m.shards.name: 1.0}), m.normalizer, None)
    found = views(phase, 4)
    assert sorted(v.slide for v in found) == [0, 1, 2, 3]
    for view in found:
        expected = pictures.normalized(m.normalizer, view.raw[None], [view.slide])[0]
        np.testing.assert_array_equal(view.normalized, expected)
        for crop in view.global_crops:
            hidden = (crop == 150).all(axis=2) | (crop == 105).all(axis=2)
            # Half of the 4 × 4 patches of 16 px.
            assert hidden.sum() == 8 * 16 * 16
            whole = np.abs(crop.astype(int) - expected.astype(int))[~hidden]
            # An aspect that happens to be near 1 can crop a few rows.
            assert np.median(whole) <= 1


def test_token_colors_are_the_principal_components(tiny_run):
    from sklearn.decomposition import PCA

    m = gather(tiny_run, [], None, None)
    purple, pink, white = (90, 60, 150), (230, 150, 190), (250, 250, 250)
    images = np.empty((2, 64, 64, 3), np.uint8)
    images[:, :, :32], images[:, :, 32:], images[1, 32:] = purple, pink, white
    rng = np.random.default_rng(0)
    images[1, :32] = rng.integers(0, 120, (32, 64, 3))
    mosaic = laid([(0, 0), (0, 1)], images)
    (image,), share = pictures.token_pictures(m.teacher, m.config, None, [(0, mosaic)])
    side = image.shape[0]
    quarter = side // 4
    left, right = image[quarter, quarter], image[quarter, side - quarter]
    assert np.abs(left.astype(int) - right).max() > 40  # the two halves of the first tile differ
    # The same color below, but for the patch's position.
    np.testing.assert_allclose(image[side - quarter, quarter].astype(int), left, atol=8)
    assert image[side - quarter, side + quarter].tolist() == [BACKGROUND] * 3

    tiles = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    small = torch.nn.functional.interpolate(tiles, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (m.config.augment.mean, m.config.augment.std))
    with torch.no_grad():
        tokens = m.teacher.forward_features((small - mean) / std)[:, 1:].reshape(8, -1)
    tissue = tokens[[0, 1, 2, 3, 4, 5]].double().numpy()
    assert share == pytest.approx(PCA(3).fit(tissue).explained_variance_ratio_.sum(), abs=1e-4)
