import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, JpegImagePlugin

from eosin.ssl.jpeg import CHROMA, LUMA, compressed, quantization


@pytest.fixture
def images():
    """Pictures with smooth parts and with edges, of which two sides are no multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(112, 104), mode="bicubic").clamp(0, 1)
    edges = (smooth > 0.5) * 0.5 + 0.1 * torch.rand(smooth.shape, generator=generator)
    return (torch.where(torch.arange(104) < 50, smooth, edges).clamp(0, 1) * 255).byte()


def pillow(image, quality):
    """The file that Pillow writes, at 4:2:0, and what it shows."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=2)
    return Image.open(file)


def turbo(image, quality):
    data = simplejpeg.encode_jpeg(image, quality, colorsubsampling="420", fastdct=False)
    return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)


@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 95, 100])
def test_the_tables_are_those_in_a_file(quality):
    stored = pillow(np.zeros((16, 16, 3), np.uint8), quality).quantization
    for number, table in enumerate((LUMA, CHROMA)):
        ours = quantization(table, torch.tensor([quality]))[0].flatten().tolist()
        assert ours == list(stored[number])


@pytest.mark.parametrize("other", [lambda i, q: np.asarray(pillow(i, q)), turbo], ids=["Pillow", "simplejpeg"])
@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_a_round_trip_is_that_of_a_jpeg_library(images, quality, other):
    ours = compressed(images.float() / 255, torch.full((3,), quality)) * 255
    for before, out in zip(images, ours):
        theirs = (
            torch.from_numpy(other(before.permute(1, 2, 0).contiguous().numpy(), quality).copy())
            .permute(2, 0, 1)
            .float()
        )
        lost = (theirs - before).square().mean().sqrt()
        # Rounding differs, and a coefficient between two steps may fall to the other.
        assert (out - theirs).abs().mean() < (1.2 if other is not turbo else 2)  # of 255
        assert 20 * abs(torch.log10((out - before).square().mean().sqrt() / lost)) < 0.05  # PSNR, dB
    assert torch.equal(ours.round(), ours.round().clamp(0, 255))


def test_each_image_has_its_own_quality(images):
    qualities = torch.tensor([20, 60, 90])
    together = compressed(images.float() / 255, qualities)
    for i in range(3):
        assert torch.equal(together[i : i + 1], compressed(images[i : i + 1].float() / 255, qualities[i : i + 1]))
    lost = (together - images / 255).square().mean(dim=(1, 2, 3))
    assert lost[0] > lost[1] > lost[2]


def test_pillow_writes_four_two_zero(images):
    assert JpegImagePlugin.get_sampling(pillow(images[0].permute(1, 2, 0).numpy(), 50)) == 2
