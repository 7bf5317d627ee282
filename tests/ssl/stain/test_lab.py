import numpy as np
import pytest
import torch
from skimage import color

from eosin.ssl.stain import lab


def phantom_tissue(bench):
    """A tile without background, [3, 96, 96] uint8, where a fade plays no part."""
    image = bench.tile(0, strength=(1.0, 1.6), dense=True)
    assert (lab.from_rgb(image[None] / 255)[:, 0] < lab.TISSUE_L).all()
    return image


def test_lab_is_that_of_scikit_image_and_back():
    rgb = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    rgb[0, :, :4] *= 0.02  # below the toe
    found = lab.from_rgb(rgb)
    for image, colors in zip(rgb, found):
        np.testing.assert_allclose(colors.permute(1, 2, 0), color.rgb2lab(image.permute(1, 2, 0).numpy()), atol=0.02)
    assert (lab.to_rgb(found) - rgb).abs().max() * 255 < 0.05


@pytest.mark.parametrize("fade", [True, False])
def test_the_identity_is_exact(bench, fade):
    ramp = torch.stack(torch.meshgrid(*[torch.arange(0, 256, 5)] * 3, indexing="ij")).flatten(1).view(1, 3, 52, -1)
    one, zero = torch.ones(1, 3), torch.zeros(1, 3)
    assert torch.equal(lab.transfer(ramp.byte(), one, zero, fade=fade), ramp.byte())
    floats = ramp / 255
    assert (lab.transfer(floats, one, zero, fade=fade) - floats).abs().max() * 255 < 0.05


@pytest.mark.parametrize("strength", [0.5, 2.0, 20.0])
def test_white_stays_white(strength):
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    shift = torch.full((1, 3), 10 * strength)
    assert (lab.transfer(white, torch.full((1, 3), strength), shift) >= 254).all()
    assert (lab.transfer(white / 255, torch.full((1, 3), strength), -shift) >= 254 / 255).all()


@pytest.mark.parametrize("method", [None, "modified"])
def test_transfer_is_torchstains_reinhard(bench, method, monkeypatch):
    from torchstain.torch.normalizers.reinhard import TorchReinhardNormalizer

    monkeypatch.setattr(lab, "PIXELS", 1 << 20)  # all, as torchstain
    image, target = phantom_tissue(bench), bench.tile(5, bench.he2, strength=(1.0, 1.6), dense=True)
    peer = TorchReinhardNormalizer(method=method)
    peer.fit(target)
    theirs = peer.normalize(image).float().permute(2, 0, 1)
    match = lab.matching_modified if method else lab.matching
    aim = lab.statistics(target[None])
    ours = lab.transfer(image[None], *match(lab.statistics(image[None]), aim.mean, aim.std), fade=False)[0].float()
    # torchstain cuts the fraction off, where ours is rounded.
    assert (ours - theirs).abs().max() <= 1
    plain = lab.transfer(image[None] / 255, *match(lab.statistics(image[None]), aim.mean, aim.std), fade=False)[0] * 255
    assert (plain.floor() - theirs).abs().mean() < 0.1


def test_a_transfer_reaches_the_statistics_asked_for(bench):
    image = phantom_tissue(bench)[None]
    mean, std = torch.tensor([[62.0, 24.0, -14.0]]), torch.tensor([[9.0, 5.0, 4.0]])
    out = lab.transfer(image, *lab.matching(lab.statistics(image), mean, std))
    colors = color.rgb2lab(out[0].permute(1, 2, 0).numpy()).reshape(-1, 3)
    np.testing.assert_allclose(colors.mean(axis=0), mean[0], atol=0.7)
    np.testing.assert_allclose(colors.std(axis=0), std[0], atol=0.7)


def test_statistics_are_of_tissue_only(bench):
    tissue = phantom_tissue(bench)
    half = torch.cat([tissue, torch.full_like(tissue, 244)], dim=2)
    whole, part = lab.statistics(tissue[None]), lab.statistics(half[None])
    torch.testing.assert_close(whole.mean, part.mean, atol=0.5, rtol=0)
    assert not lab.statistics(torch.full_like(half, 255)[None]).good
    expected = color.rgb2lab(tissue.permute(1, 2, 0).numpy()).reshape(-1, 3)[:: 96 * 96 // lab.PIXELS]
    np.testing.assert_allclose(whole.mean[0], expected.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(whole.std[0], expected.std(axis=0, ddof=1), atol=0.05)


def test_neighbors_do_not_matter(bench):
    images = torch.stack([*bench.degenerate.values(), bench.tile(0)])
    scale, shift = 0.5 + torch.rand(len(images), 3), torch.randn(len(images), 3)
    whole = lab.transfer(images, scale, shift)
    for i in range(len(images)):
        assert torch.equal(whole[i], lab.transfer(images[i : i + 1], scale[i : i + 1], shift[i : i + 1])[0])


@pytest.mark.gpu
def test_cpu_and_gpu_agree_to_a_level(bench):
    images = torch.stack([bench.tile(i) for i in range(8)])
    scale, shift = torch.full((8, 3), 1.2), torch.full((8, 3), 2.0)
    ours = lab.transfer(images, scale, shift).int()
    assert (lab.transfer(images.cuda(), scale.cuda(), shift.cuda()).cpu().int() - ours).abs().max() <= 1
