import colorsys
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eosin.ssl import augment
from eosin.ssl.augment import crop_boxes, multi_crop, resize_weights
from eosin.ssl.config import Augment, load_config
from eosin.ssl.stain.augment import Augmenter

ASPECT = [3 / 4, 4 / 3]
GIVEN = ["data.shards=s", "run.dir=r", "crops.global_size=64", "crops.local_size=32"]


@pytest.fixture
def tiles():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 12, 12, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=96, mode="bicubic").clamp(0, 1) * 255).byte()


def stain_operations(tiles, config):
    """The recipe's stain operations on tiles of one H&E slide."""
    if not config.stain.augment:
        return None
    one, rows = torch.ones(1, dtype=torch.bool), torch.ones(1, 3)
    made = Augmenter(config.stain, one, torch.zeros(1, dtype=torch.long), one, torch.eye(3)[None, :2], rows, rows)
    return made.of(tiles, torch.zeros(len(tiles), dtype=torch.long))


def crops(tiles, positions, overrides=()):
    config = load_config("demo", [*GIVEN, *overrides])
    return multi_crop(tiles, positions, config, stain_operations(tiles, config))


def test_cropping_and_resizing_equal_torchvision(tiles):
    boxes = crop_boxes(torch.arange(6), 96, [0.05, 1.0], ASPECT)
    rows = resize_weights(boxes[:, 0], boxes[:, 2], 96, 40)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], 96, 40)
    ours = rows.unsqueeze(1) @ tiles.float() @ columns.transpose(1, 2).unsqueeze(1)
    for tile, box, out in zip(tiles, boxes.tolist(), ours):
        theirs = F.resized_crop(tile.float(), *box, [40, 40], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(out, theirs, atol=2e-2, rtol=0)  # of 255


def test_boxes_have_the_distribution_of_torchvision():
    boxes = crop_boxes(torch.arange(4000), 200, [0.32, 1.0], ASPECT).numpy()
    image = torch.zeros(3, 200, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for of in (lambda b: b[:, 2] * b[:, 3] / 200**2, lambda b: np.log(b[:, 3] / b[:, 2]), lambda b: b[:, 0]):
        ours, reference = of(boxes.astype(float)), of(theirs.astype(float))
        error = 4 * math.hypot(ours.std(), reference.std()) / math.sqrt(4000)
        assert abs(ours.mean() - reference.mean()) < error
        assert abs(ours.std() - reference.std()) < 0.1 * reference.std()


def jittered(images, **strengths):
    """Apply color maps of the given strengths only; return the result and the maps."""
    off = {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray": 0.0}
    matrices, offsets = augment.color_maps(images, torch.arange(len(images)), Augment(**(off | strengths)))
    return (matrices @ images.flatten(2) + offsets).view_as(images), matrices, offsets


def test_brightness_contrast_and_saturation_equal_torchvision(tiles):
    images = 0.4 + 0.1 * tiles.float() / 255  # far from where torchvision clips
    bright, matrices, _ = jittered(images, brightness=0.4)
    contrast, contrast_matrices, _ = jittered(images, contrast=0.4)
    saturated, _, _ = jittered(images, saturation=0.4)
    for i, image in enumerate(images):
        torch.testing.assert_close(bright[i], F.adjust_brightness(image, matrices[i, 0, 0].item()))
        factor = contrast_matrices[i, 0, 0].item()
        torch.testing.assert_close(contrast[i], F.adjust_contrast(image, factor), atol=1e-4, rtol=0)
        chroma = [c - F.rgb_to_grayscale(c) for c in (saturated[i], image)]
        factor = ((chroma[0] * chroma[1]).sum() / chroma[1].square().sum()).item()
        torch.testing.assert_close(saturated[i], F.adjust_saturation(image, factor), atol=1e-3, rtol=0)
        assert abs(factor - 1) <= 0.4


def test_hue_turns_the_chroma_and_keeps_luma(tiles):
    images = tiles[:, :, :2, :2].float() / 255
    turned, _, _ = jittered(images, hue=0.1)
    for before, after in zip(images, turned):
        angles = []
        for old, new in zip(before.flatten(1).T.tolist(), after.flatten(1).T.tolist()):
            (y0, i0, q0), (y1, i1, q1) = colorsys.rgb_to_yiq(*old), colorsys.rgb_to_yiq(*new)
            assert y1 == pytest.approx(y0, abs=5e-3)  # colorsys rounds the luma weights
            assert math.hypot(i1, q1) == pytest.approx(math.hypot(i0, q0), abs=1e-2)
            angles.append(math.remainder(math.atan2(q1, i1) - math.atan2(q0, i0), 2 * math.pi))
        assert max(angles) - min(angles) < 0.1
        assert abs(angles[0]) <= 2 * math.pi * 0.1 + 0.05
    assert (turned - images).abs().max() > 0.02


def test_gray_and_blur_equal_torchvision(tiles):
    images = tiles.float() / 255
    gray, _, _ = jittered(images, gray=1.0)
    torch.testing.assert_close(gray, F.rgb_to_grayscale(images, 3), atol=1e-3, rtol=0)
    blurred = augment._blur(images, torch.arange(6), torch.ones(6), [1.2, 1.2])
    torch.testing.assert_close(blurred, F.gaussian_blur(images, [9, 9], [1.2, 1.2]), atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(tiles):
    together = crops(tiles, torch.arange(10, 16))
    alone = crops(tiles[3:4], torch.tensor([13]))
    for whole, single in zip(together, alone):
        assert torch.equal(whole[:, 3:4], single)


def test_positions_and_views_differ(tiles):
    same = tiles[:1].expand(2, -1, -1, -1).contiguous()
    globals_, locals_ = crops(same, torch.tensor([1, 2]))
    assert not torch.equal(globals_[:, 0], globals_[:, 1])
    assert not torch.equal(globals_[0], globals_[1])
    assert len({v.sum().item() for v in locals_[:, 0]}) == len(locals_)


def test_with_everything_off_a_full_crop_is_the_tile(tiles):
    off = ["flips=false", "rotate90=false", "jitter=0", "gray=0", "blur=[0,0,0]", "mean=[0,0,0]", "std=[1,1,1]"]
    overrides = [f"augment.{o}" for o in off] + ["stain.augment=none", "crops.global_size=96"]
    globals_, _ = crops(tiles, torch.arange(6), [*overrides, "crops.global_scale=[1,1]"])
    # No aspect ratio but 1 fits an area of 1, so every draw falls back to the whole image.
    torch.testing.assert_close(globals_[0], tiles / 255, atol=1e-5, rtol=0)


def test_all_eight_symmetries_occur():
    tile = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    tile[:, :, :16, :32] = 255  # an L-free mark that tells all eight apart
    tile[:, :, :8, 32:40] = 128
    off = ["jitter=0", "gray=0", "blur=[0,0,0]", "mean=[0,0,0]", "std=[1,1,1]"]
    overrides = [f"augment.{o}" for o in off] + ["stain.augment=none", "crops.global_scale=[0.99,1]"]
    globals_, _ = crops(tile.expand(100, -1, -1, -1), torch.arange(100), overrides)
    images = globals_[0, :, 0]
    quadrants = images.view(100, 2, 32, 2, 32).mean(dim=(2, 4)).flatten(1)
    corner = quadrants.argmax(dim=1)
    wide = (images > 0.9).any(dim=1).sum(dim=1) > (images > 0.9).any(dim=2).sum(dim=1)
    assert len(set(zip(corner.tolist(), wide.tolist()))) == 8


def test_no_local_crops_is_an_honest_zero(tiles):
    _, locals_ = crops(tiles, torch.arange(6), ["crops.local_count=0"])
    assert locals_.shape[0] == 0


def test_probabilities_are_met(tiles):
    many = tiles[:1].expand(400, -1, -1, -1)
    overrides = ["augment.gray=0.2", "stain.augment=none", "augment.mean=[0,0,0]", "augment.std=[1,1,1]"]
    globals_, _ = crops(many, torch.arange(400), overrides)
    gray = (globals_[0] - globals_[0].mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert abs(gray.float().mean().item() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 400)


def test_a_quarter_turn_is_that_of_torch_and_any_angle_is_scipys():
    from scipy.ndimage import rotate

    images = torch.rand(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    quarter = augment.rotated(images, torch.tensor([math.pi / 2, 0.0]))
    torch.testing.assert_close(quarter[0], torch.rot90(images[0], 1, (1, 2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(quarter[1], images[1], atol=1e-5, rtol=0)
    ours = augment.rotated(images[:1], torch.tensor([math.radians(30)]))[0].numpy()
    theirs = rotate(images[0].numpy(), 30, axes=(1, 2), reshape=False, order=1)
    inside = (slice(None), slice(9, 24), slice(9, 24))  # away from the border, which is mirrored here
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=0.02)


def test_free_rotation_has_its_probability_and_keeps_neighbors_apart(tiles):
    off = ["flips=false", "rotate90=false", "jitter=0", "gray=0", "blur=[0,0,0]", "mean=[0,0,0]", "std=[1,1,1]"]
    overrides = [f"augment.{o}" for o in off] + ["stain.augment=none", "crops.global_scale=[1,1]", "augment.rotate=0.3"]
    many = tiles[:1].expand(300, -1, -1, -1)
    plain, _ = crops(many[:1], torch.arange(1), [*overrides[:-1]])
    turned, _ = crops(many, torch.arange(300), overrides)
    changed = (turned[0] - plain[0]).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert abs(changed.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 300)
    alone, _ = crops(many[7:8], torch.arange(7, 8), overrides)
    assert torch.equal(turned[:, 7:8], alone)


def test_the_aspect_of_boxes_is_a_choice():
    boxes = crop_boxes(torch.arange(2000), 392, [0.294, 0.359], [0.95, 1.05]).double()
    ratio, side = boxes[:, 3] / boxes[:, 2], (boxes[:, 2] * boxes[:, 3]).sqrt()
    assert 0.94 < ratio.min() < 0.96
    assert 1.04 < ratio.max() < 1.06
    # Extended-context translation: 224-px crops of 392-px regions, scaled by .9 to 1.1 in area.
    assert abs(side.min() / 224 - math.sqrt(0.9)) < 0.01
    assert abs(side.max() / 224 - math.sqrt(1.1)) < 0.01
