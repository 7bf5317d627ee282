import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from eosin.data_tools.errors import UserError
from eosin.eval.degrade import Degradation, blur, downsample, jpeg, magnify


@pytest.fixture
def tiles():
    rng = np.random.default_rng(0)
    low = rng.integers(60, 200, (3, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    return torch.from_numpy((low + rng.integers(-20, 20, low.shape)).clip(0, 255).astype(np.uint8))


def test_downsampling_keeps_the_mean_of_squares_and_nothing_finer():
    checker = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    checker[..., ::2, ::2] = 200  # in each square of 2 px one of four pixels
    assert (downsample(checker, 2) == 50).all()
    ramp = (4 * torch.arange(32)).expand(1, 3, 32, 32).to(torch.uint8)
    assert (downsample(ramp, 2).int() - ramp.int())[..., 4:28].abs().max() <= 1  # a slope has little detail to lose


def test_downsampling_as_opencv_where_squares_fit(tiles):
    cv2 = pytest.importorskip("cv2")
    for factor in (2, 4, 8):
        found = downsample(tiles, factor).int()
        for image, out in zip(tiles, found):
            pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
            small = cv2.resize(pixels, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
            truth = cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC).clip(0, 255)
            assert np.abs(out.permute(1, 2, 0).numpy() - truth).max() <= 0.51


def test_magnification_shows_the_middle(tiles):
    framed = tiles.clone()
    framed[..., :8, :] = framed[..., 24:, :] = 7
    framed[..., :8] = framed[..., 24:] = 9
    assert (magnify(framed, 2) == magnify(tiles, 2)).all()
    half = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    half[..., 16:] = 200  # an edge in the middle stays there
    found = magnify(half, 4)
    assert (found[..., :10] == 0).all()
    assert (found[..., 22:] == 200).all()


def test_jpeg_as_pillow(tiles):
    for quality in (10, 50, 95):
        for image, out in zip(tiles, jpeg(tiles, quality)):
            pixels, file = image.permute(1, 2, 0).contiguous().numpy(), io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
            truth, found = np.asarray(Image.open(file)).astype(int), out.permute(1, 2, 0).numpy().astype(int)
            # The two encoders round their cosine transforms differently; the loss itself is far larger.
            assert np.abs(found - truth).mean() < 0.2 * np.abs(truth - pixels).mean()
            decoded = Image.open(io.BytesIO(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)))
            assert np.array_equal(found, decoded)


def test_blur_as_scipy(tiles):
    for sigma in (0.5, 1, 3):
        truth = gaussian_filter(tiles.double().numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=4)
        assert np.abs(blur(tiles, sigma).numpy() - truth).max() <= 0.51
    point = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    point[..., 32, 32] = 255
    assert blur(point, 1)[0, 0, 32, 33] == round(255 * np.exp(-0.5) / (2 * np.pi))


def test_what_changes_nothing_gives_the_tiles_back(tiles):
    for none in (Degradation(), Degradation("downsample", 1), Degradation("magnification", 1), Degradation("blur", 0)):
        assert torch.equal(none(tiles), tiles)
    assert Degradation().name == "clean"
    assert Degradation("blur", 0.5).name == "blur 0.5"


def test_amounts_out_of_range_are_refused():
    for kind, amount in (("jpeg", 0), ("jpeg", 50.5), ("downsample", 0.5), ("blur", -1), ("magnification", np.nan)):
        with pytest.raises(UserError, match=f"--{kind} .* is out of range"):
            Degradation(kind, amount)
