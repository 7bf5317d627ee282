import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.ssl import augment, resample
from eosin.ssl.augment import crop_boxes, multi_crop
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


def turned(image, rows, columns, transpose):
    """Flips and a transposition, as torch makes them."""
    image = image.flip(-2) if rows else image
    image = image.flip(-1) if columns else image
    return image.transpose(-2, -1) if transpose else image


@pytest.fixture
def drawn_crops(tiles):
    """Twelve crops of six tiles: arguments of resample.crop, in every orientation."""
    orientation = torch.tensor([[n >> bit & 1 for bit in range(3)] for n in range(12)], dtype=torch.bool)
    boxes = crop_boxes(torch.arange(12), 96, [0.05, 1.0], ASPECT)
    return tiles, torch.arange(12) % 6, boxes, orientation[:, :2], orientation[:, 2], 40, 96


def test_cropping_and_resizing_equal_torchvision(drawn_crops):
    tiles, image, boxes, flips, transpose, size, _ = drawn_crops
    ours = resample.crop_unrounded(*drawn_crops)
    for out, i, box, flip, swap in zip(ours, image, boxes.tolist(), flips, transpose):
        theirs = F.resized_crop(tiles[i].float(), *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        # Of 255. A level outside 0..255 is clipped here, and there with the pixel type.
        torch.testing.assert_close(out * 255, turned(theirs, *flip, swap).clamp(0, 255), atol=2e-2, rtol=0)


def test_the_crops_of_a_cpu_are_those_of_pillow_to_a_level(drawn_crops):
    tiles, image, boxes, flips, transpose, size, _ = drawn_crops
    ours = resample.crop(*drawn_crops) * 255
    for out, i, (top, left, height, width), flip, swap in zip(ours, image, boxes.tolist(), flips, transpose):
        box = F.to_pil_image(tiles[i]).crop((left, top, left + width, top + height))
        theirs = F.pil_to_tensor(box.resize((size, size), Image.Resampling.BICUBIC)).float()
        torch.testing.assert_close(out, turned(theirs, *flip, swap), atol=1.01, rtol=0)


def test_the_crops_of_a_cpu_are_rounded_and_else_those_of_a_gpu(drawn_crops):
    cpu, gpu = resample.crop(*drawn_crops) * 255, resample.crop_unrounded(*drawn_crops) * 255
    assert torch.equal(cpu, cpu.round())
    difference = (cpu - gpu).abs()
    assert difference.mean() < 0.5
    # Rounded along both axes; the negative lobes of the second make a little more of an error of the first.
    assert difference.max() < 2


def jittered(images, **strengths):
    """Apply color maps of the given strengths only; return the result and the matrices."""
    off = {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray": 0.0}
    draws = {name: uniform(torch.arange(len(images)), purpose(name)) for name in augment.DRAWN}
    matrices, shares = augment.color_maps(draws, Augment(**(off | strengths)))
    return augment.recolored(images, matrices, shares), matrices


def test_brightness_contrast_and_saturation_equal_torchvision(tiles):
    images = 0.4 + 0.1 * tiles.float() / 255  # far from where torchvision clips
    bright, matrices = jittered(images, brightness=0.4)
    contrast, contrast_matrices = jittered(images, contrast=0.4)
    saturated, _ = jittered(images, saturation=0.4)
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
    hued, _ = jittered(images, hue=0.1)
    for before, after in zip(images, hued):
        angles = []
        for old, new in zip(before.flatten(1).T.tolist(), after.flatten(1).T.tolist()):
            (y0, i0, q0), (y1, i1, q1) = colorsys.rgb_to_yiq(*old), colorsys.rgb_to_yiq(*new)
            assert y1 == pytest.approx(y0, abs=5e-3)  # colorsys rounds the luma weights
            assert math.hypot(i1, q1) == pytest.approx(math.hypot(i0, q0), abs=1e-2)
            angles.append(math.remainder(math.atan2(q1, i1) - math.atan2(q0, i0), 2 * math.pi))
        assert max(angles) - min(angles) < 0.1
        assert abs(angles[0]) <= 2 * math.pi * 0.1 + 0.05
    assert (hued - images).abs().max() > 0.02


def test_gray_and_blur_equal_torchvision(tiles):
    images = tiles.float() / 255
    gray, _ = jittered(images, gray=1.0)
    torch.testing.assert_close(gray, F.rgb_to_grayscale(images, 3), atol=1e-3, rtol=0)
    sigmas = torch.tensor([0.1, 0.3, 0.7, 1.2, 1.7, 2.0])
    kernels = torch.softmax(-0.5 * (torch.arange(-4, 5) / sigmas.unsqueeze(1)).square(), dim=1)
    theirs = torch.stack([F.gaussian_blur(i, [9, 9], [s, s]) for i, s in zip(images, sigmas.tolist())])
    for ours in (resample.blurred(images, sigmas), resample.filtered_by_sums(images, kernels)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_resolution_is_reduced_as_by_torchvision(tiles):
    images, sides = tiles.float() / 255, [96, 48, 51, 70, 95, 60]
    ours = resample.reduced(images, torch.tensor(sides).float(), 48)
    for out, image, side in zip(ours, images, sides):
        small = F.resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True)
        theirs = F.resize(small, [96, 96], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(out, theirs, atol=1e-4, rtol=0)


EVERYTHING = ["rotate=0.5", "solarize=0.5", "resolution=0.5", "jpeg=0.5", "blur=[0.5,0.5,0.5]"]


@pytest.mark.parametrize("overrides", [[], [f"augment.{o}" for o in EVERYTHING]], ids=["recipe", "everything"])
@pytest.mark.parametrize("sizes", [[], ["crops.global_size=208", "crops.local_count=3"]], ids=["small", "large"])
def test_no_bit_of_a_sample_depends_on_its_batch(tiles, overrides, sizes):
    positions = torch.arange(10, 16)
    together = crops(tiles, positions, [*overrides, *sizes])
    for order in ([3], [0], [5, 4, 3, 2, 1, 0], [3, 5, 3]):
        part = crops(tiles[order], positions[order], [*overrides, *sizes])
        for whole, some in zip(together, part):
            assert torch.equal(whole[:, order], some)


def test_what_a_gpu_runs_makes_the_crops_of_a_cpu(tiles, monkeypatch):
    given = ["augment.rotate=0.5", "augment.resolution=0.5", "augment.mean=[0,0,0]", "augment.std=[1,1,1]"]
    cpu = crops(tiles, torch.arange(6), given)
    monkeypatch.setattr(resample, "crop", resample.crop_unrounded)
    monkeypatch.setattr(resample, "filtered", resample.filtered_by_sums)
    for ours, theirs in zip(cpu, crops(tiles, torch.arange(6), given)):
        difference = (ours - theirs).abs() * 255
        assert 0 < difference.mean() < 0.5
        assert difference.max() < 6  # contrast and brightness make more of a level


@pytest.mark.gpu
def test_a_gpu_makes_the_crops_of_a_cpu(tiles, monkeypatch):
    monkeypatch.setattr(augment, "TILES_AT_ONCE", 4)
    config = load_config("demo", [*GIVEN, "augment.rotate=0.5", "augment.solarize=0", "stain.augment=none"])
    cpu = multi_crop(tiles, torch.arange(6), config)
    gpu = multi_crop(tiles.cuda(), torch.arange(6).cuda(), config)
    for ours, theirs in zip(cpu, gpu):
        difference = (ours - theirs.cpu()).abs() * 255 * 0.225  # levels
        assert difference.mean() < 1
        assert difference.max() < 6  # contrast and brightness make more of a level


def test_positions_and_views_differ(tiles):
    same = tiles[:1].expand(2, -1, -1, -1).contiguous()
    globals_, locals_ = crops(same, torch.tensor([1, 2]))
    assert not torch.equal(globals_[:, 0], globals_[:, 1])
    assert not torch.equal(globals_[0], globals_[1])
    assert len({v.sum().item() for v in locals_[:, 0]}) == len(locals_)


def test_with_everything_off_a_full_crop_is_the_tile(tiles):
    overrides = [f"augment.{o}" for o in OFF] + ["stain.augment=none", "crops.global_size=96"]
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


OFF = ["flips=false", "rotate90=false", "jitter=0", "gray=0", "blur=[0,0,0]", "mean=[0,0,0]", "std=[1,1,1]"]


@pytest.mark.parametrize("name", ["resolution", "jpeg"])
def test_resolution_and_jpeg_have_their_probability_and_are_last(tiles, name):
    many = tiles[:1].expand(300, -1, -1, -1)
    overrides = [f"augment.{o}" for o in OFF] + ["stain.augment=none", "crops.global_scale=[1,1]"]
    overrides.append("crops.local_count=0")
    plain, _ = crops(many[:1], torch.arange(1), overrides)
    changed, _ = crops(many, torch.arange(300), [*overrides, f"augment.{name}=0.3"])
    share = ((changed[0] - plain[0]).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 300)
    if name == "jpeg":  # the last thing done to a crop's pixels: what comes out is an image's levels
        always, _ = crops(tiles, torch.arange(6), ["augment.jpeg=1", "augment.mean=[0,0,0]", "augment.std=[1,1,1]"])
        torch.testing.assert_close(always * 255, (always * 255).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("given", ["jpeg_quality=[95,30]", "jpeg_quality=[0,30]", "resolution_scale=[0.5,1.5]"])
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(UserError, match=f"augment.{given.split('=')[0]}"):
        load_config("demo", [*GIVEN, f"augment.{given}"])


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
    overrides = [f"augment.{o}" for o in OFF] + ["stain.augment=none", "crops.global_scale=[1,1]", "augment.rotate=0.3"]
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
