"""Draws and outputs of the augmentation over 10,000 draws, against torchvision's transforms and DINOv2's own class."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from eosin.data_tools.draws import hash32, purpose, uniform
from eosin.ssl import augment
from eosin.ssl.augment import crop_boxes, draw, multi_crop
from eosin.ssl.config import Augment, load_config

N = 10_000
CHECKOUT = Path(os.environ.get("DINOV2_CHECKOUT", ""))
GIVEN = ["data.shards=s", "run.dir=r", "model.args={patch_size: 8}", "crops.global_size=40", "crops.local_size=16"]
# As DINOv2's class: no turns, and flips from left to right only, of which neither changes a mean or a deviation.
CONFIG = ["augment.rotate90=false", "augment.solarize=0.2", "augment.mean=[0,0,0]", "augment.std=[1,1,1]"]


def config(*overrides):
    return load_config("dinov2", [*GIVEN, *CONFIG, *overrides])


def same(ours, theirs):
    """Two samples of a distribution: by Kolmogorov and Smirnov's test nothing speaks against it."""
    return ks_2samp(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)).pvalue > 1e-3


def as_often(share, probability):
    """A share of N draws, within four standard deviations of a probability."""
    return abs(float(share) - probability) <= 4 * math.sqrt(probability * (1 - probability) / N)


@pytest.mark.parametrize("scale", [[0.32, 1.0], [0.05, 0.32]], ids=["global", "local"])
def test_boxes_are_distributed_as_torchvisions(scale):
    torch.manual_seed(0)
    image = torch.zeros(3, 256, 256)
    theirs = np.array([T.RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(N)], dtype=float)
    ours = crop_boxes(torch.arange(N), 256, scale, [3 / 4, 4 / 3]).double().numpy()
    for of in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # aspect
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert same(of(ours), of(theirs))


def factors(name):
    """The drawn factors of one of the jitters, read from the color matrices that it alone makes, [n, 3, 3]."""
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {
        name: {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}[name]
    }
    draws = {n: uniform(torch.arange(N), purpose(n)) for n in augment.DRAWN}
    matrices = augment.color_maps(draws, Augment(jitter=0.8, gray=0.0, **strengths))[0].double()
    chosen = (matrices - torch.eye(3)).abs().amax(dim=(1, 2)) > 0
    if name in ("brightness", "contrast"):
        return chosen, matrices[:, 0, 0]
    if name == "saturation":
        return chosen, matrices[:, 1, 1] - matrices[:, 0, 1]
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    turned = yiq.double() @ matrices @ yiq.double().inverse()
    return chosen, torch.atan2(turned[:, 2, 1], turned[:, 1, 1]) / (2 * math.pi)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_is_drawn_as_torchvisions(name):
    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    limits = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    place = ["brightness", "contrast", "saturation", "hue"].index(name)
    theirs = [T.ColorJitter.get_params(*limits)[1 + place] for _ in range(N)]
    chosen, ours = factors(name)
    assert as_often(chosen.double().mean(), 0.8)
    assert same(ours[chosen], theirs)
    low, high = limits[place]
    assert low <= ours.min()
    assert ours.max() <= high


def test_what_is_drawn_has_its_probability_and_range():
    view = torch.arange(N) % 4
    keys = hash32(torch.arange(N), view, 0, purpose("augment"))
    on = config("augment.resolution=0.3", "augment.jpeg=0.4", "augment.rotate90=true", "augment.rotate=0.25")
    drawn = draw(keys, view, torch.zeros(N, dtype=torch.long), 64, 40, [0.32, 1.0], on)
    for flags, probability in [
        (drawn.flips[:, 0], 0.5),
        (drawn.flips[:, 1], 0.5),
        (drawn.transpose, 0.5),
        (drawn.rotate, 0.25),
        (drawn.resolution, 0.3),
        (drawn.jpeg, 0.4),
        # In a gray image all channels have the same weights.
        ((drawn.matrix - drawn.matrix[:, :1]).abs().amax(dim=(1, 2)) < 1e-6, 0.2),
    ]:
        assert as_often(flags.double().mean(), probability)
    for number, blur in enumerate([1.0, 0.1, 0.5, 0.5]):
        assert abs(drawn.blur[view == number].double().mean() - blur) <= 4 * math.sqrt(blur * (1 - blur) / (N / 4))
    assert abs(drawn.solarize[view == 1].double().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / (N / 4))
    assert not drawn.solarize[view != 1].any()
    assert kstest(drawn.sigma, "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert kstest(drawn.angle, "uniform", (0, 2 * math.pi)).pvalue > 1e-3
    assert torch.equal(drawn.quality.unique(), torch.arange(30, 96))
    assert torch.equal(drawn.side.unique(), torch.arange(20.0, 41.0))
    # No draw follows another: flips, turns and blur of a crop are independent.
    flags = torch.stack([*drawn.flips.T, drawn.transpose, drawn.rotate, drawn.jpeg, drawn.resolution]).double()
    assert (torch.corrcoef(flags) - torch.eye(len(flags))).abs().max() < 4 / math.sqrt(N)


def tiles():
    """Four tiles of 64 px that look like stained tissue: pink ground, violet nuclei, glass in one of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    out = []
    for number in range(4):
        nuclei = np.zeros((64, 64))
        for cy, cx, radius in zip(*rng.uniform([[0], [0], [2]], [[64], [64], [5]], (3, 30)), strict=True):
            nuclei = np.maximum(nuclei, 1 / (1 + np.exp(np.hypot(y - cy, x - cx) - radius)))
        ground = 0.6 + 0.4 * rng.random((64, 64))
        if number == 3:
            ground, nuclei = ground * (x > 24), nuclei * (x > 24)
        density = nuclei[..., None] * [0.75, 1.0, 0.45] + ground[..., None] * [0.08, 0.45, 0.2]
        out.append(255 * np.exp(-density))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).round().byte()


def summary(crops):
    """Mean over crops, and deviations between and within crops, of each channel: [3, 3], of crops [n, 3, S, S]."""
    means = crops.mean(dim=(2, 3))
    return torch.stack([means.mean(dim=0), means.std(dim=0), crops.flatten(2).std(dim=2).mean(dim=0)])


def our_crops(blur):
    """10,000 crops: 2,500 of each global view and 5,000 local ones."""
    made = config(f"augment.blur={blur}", "crops.local_count=2")
    pictures = tiles().repeat(N // 16, 1, 1, 1)
    return multi_crop(pictures, torch.arange(N // 4), made)


def agrees(ours, theirs):
    """Whether means are within 2 % of the range, and deviations within 8 % of themselves.

    Of 1,250 crops a mean is known to .5 %. The rest is the one clip where torchvision clips after every step, the
    fixed order of the jitters where it is drawn there, and hue in YIQ where torchvision's is in HSV.
    """
    ours, theirs = summary(ours), summary(theirs)
    return (ours[0] - theirs[0]).abs().max() < 0.02 and (ours[1:] / theirs[1:] - 1).abs().max() < 0.08


@pytest.mark.slow
def test_crops_have_the_statistics_of_torchvisions():
    torch.manual_seed(0)
    pictures = [to_pil_image(tile) for tile in tiles()]

    def transform(size, scale, blur, solarize=0.0):
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(0.2),
                T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
                T.RandomSolarize(128, solarize),
                T.ToTensor(),
            ]
        )

    globals_, locals_ = our_crops([1.0, 0.1, 0.5])
    first, second = transform(40, (0.32, 1), 1.0), transform(40, (0.32, 1), 0.1, 0.2)
    local = transform(16, (0.05, 0.32), 0.5)
    for ours, view in [(globals_[0], first), (globals_[1], second), (locals_.flatten(0, 1), local)]:
        assert agrees(ours, torch.stack([view(pictures[n % 4]) for n in range(len(ours) // 2)]))


@pytest.fixture
def peer(monkeypatch):
    """DINOv2's own class, without its normalization."""
    if not (CHECKOUT / "dinov2/data/augmentations.py").is_file():
        pytest.skip("set DINOV2_CHECKOUT to a checkout of facebookresearch/dinov2")
    monkeypatch.setattr(sys, "path", [str(CHECKOUT), *sys.path])
    from dinov2.data.augmentations import DataAugmentationDINO

    made = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 40, 16)
    for view in (made.global_transfo1, made.global_transfo2, made.local_transfo):
        view.transforms[-1] = T.ToTensor()
    return made


def test_dinov2s_class_blurs_what_it_says_it_leaves(peer):
    """It is built with the probabilities 1, .1 and .5, passes on 1 - p, and torchvision applies with what is passed.

    So that class never blurs the first global crop and blurs nine tenths of the second. The recipe has the other
    reading, that of DINO and of the class's own arguments.
    """
    torch.manual_seed(0)
    blurs = [
        peer.global_transfo1.transforms[1],
        peer.global_transfo2.transforms[1].transforms[0],
        peer.local_transfo.transforms[1],
    ]
    for blur, share in zip(blurs, [0.0, 0.9, 0.5], strict=True):
        blur.transforms = [lambda _: True]
        assert as_often(np.mean([blur(False) for _ in range(N)]), share)


@pytest.mark.slow
def test_crops_have_the_statistics_of_dinov2s(peer):
    torch.manual_seed(0)
    pictures = [to_pil_image(tile) for tile in tiles()]
    made = [peer(pictures[n % 4]) for n in range(N // 8)]
    globals_, locals_ = our_crops([0.0, 0.9, 0.5])  # as it blurs
    for number in range(2):
        assert agrees(globals_[number], torch.stack([m["global_crops"][number] for m in made]))
    assert agrees(locals_.flatten(0, 1), torch.stack([crop for m in made for crop in m["local_crops"]]))
