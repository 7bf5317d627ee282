import pytest
import torch

from eosin.ssl.stain import density


def test_density_and_intensity_are_inverse_for_every_level():
    levels = torch.arange(256)
    assert torch.equal(density.intensity(density.optical_density(levels)).round(), levels.float())
    assert density.optical_density(torch.tensor(255)).item() == 0


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_the_identity_gives_an_image_back(bench, kind):
    images = torch.stack([bench.tile(0), bench.blank(255)])
    images = images if kind == "uint8" else images / 255
    out = density.mix(images, torch.eye(3).repeat(2, 1, 1))
    assert out.dtype == images.dtype
    if kind == "uint8":
        assert torch.equal(out, images)
    else:
        assert (out - images).abs().max() * 255 < 0.01


def test_uint8_and_float_agree(bench):
    images = bench.tile(0)[None]
    matrix = torch.tensor([[[0.9, 0.1, 0.0], [0.0, 1.1, 0.1], [0.05, 0.0, 0.8]]])
    whole = density.mix(images, matrix).float()
    assert (density.mix(images / 255, matrix) * 255 - whole).abs().max() <= 0.51


def test_mixing_is_the_formula(bench):
    # 256 exp(-M' d) - 1 in double precision.
    images = bench.tile(1)[None]
    matrix = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.6
    d = -torch.log((images.double() + 1) / 256).flatten(2)
    expected = (256 * torch.exp(-(matrix.double().transpose(1, 2) @ d)) - 1).clamp(0, 255).view(images.shape)
    assert (density.mix(images, matrix).double() - expected).abs().max() <= 0.501


def test_what_is_as_bright_as_the_white_point_becomes_white():
    white = torch.tensor([[243.0, 236.0, 225.0]])
    glass = (white - 1).to(torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous()
    matrix = torch.tensor([[[0.9, 0.1, 0.0], [0.0, 1.1, 0.1], [0.05, 0.0, 0.8]]])
    assert (density.mix(glass, matrix, white) == 255).all()
    assert (density.mix(torch.full_like(glass, 255), matrix, white) == 255).all()


def test_off_images_come_back_bit_for_bit(bench):
    images = torch.stack([bench.tile(0), bench.tile(1)]) / 255
    on = torch.tensor([False, True])
    out = density.mix(images, 1.2 * torch.eye(3).repeat(2, 1, 1), on=on)
    assert torch.equal(out[0], images[0])
    assert not torch.equal(out[1], images[1])


def test_least_squares_unmixing_is_the_pseudoinverse():
    vectors = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(density.unmixing(vectors), torch.linalg.pinv(vectors), atol=1e-4, rtol=1e-4)


def test_mixing_compiles_into_one_graph(bench):
    compiled = torch.compile(density.mix, fullgraph=True, backend="aot_eager")
    images, matrices = bench.tile(0)[None], torch.eye(3)[None] * 0.9
    assert torch.equal(compiled(images, matrices), density.mix(images, matrices))


@pytest.mark.gpu
def test_cpu_and_gpu_agree_to_a_level(bench):
    images = torch.stack([bench.tile(i) for i in range(8)])
    matrices = torch.rand(8, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.6
    out = density.mix(images.cuda(), matrices.cuda()).cpu()
    assert (out.int() - density.mix(images, matrices).int()).abs().max() <= 1
