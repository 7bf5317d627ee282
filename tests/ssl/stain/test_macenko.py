import importlib.util
import math
from dataclasses import replace

import cv2
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from skimage import color, exposure

from eosin.ssl.stain import macenko
from eosin.ssl.stain.macenko import CONVENTIONS
from eosin.ssl.stain.reference import BUILT_IN


def target():
    return BUILT_IN["eosin"].tensors()[:2]


def test_known_stain_vectors_are_recovered(bench):
    fits = macenko.fit(torch.stack([bench.tile(0), bench.tile(1, bench.he2)]))
    assert fits.good.all()
    for found, true in zip(fits.vectors, (bench.he, bench.he2)):
        assert bench.angle(found[0], true[0]) < 2
        assert bench.angle(found[1], true[1]) < 2


def test_known_maxima_and_residual(bench):
    fits = macenko.fit(torch.stack([bench.tile(0), bench.tile(0, strength=(0.5, 0.5))]))
    # Uniform amounts up to 1.5 and 1.0: the 99th percentile lies just below.
    torch.testing.assert_close(fits.maxima[0], torch.tensor([1.5, 1.0]), atol=0.08, rtol=0)
    torch.testing.assert_close(fits.maxima[0] / fits.maxima[1], torch.tensor([2.0, 2.0]), atol=0.1, rtol=0)
    assert (fits.residual < 0.03).all()
    noisy = bench.tile(0).float() + 12 * torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert macenko.fit(noisy.clamp(0, 255).byte()[None]).residual > 0.05


def test_a_white_point_given_is_taken_out(bench):
    tinted = bench.tile(0, white=(243, 230, 215))
    plain = macenko.fit(bench.tile(0)[None])
    found = macenko.fit(tinted[None], white=torch.tensor([243.0, 230.0, 215.0]))
    assert bench.angle(found.vectors[0, 0], plain.vectors[0, 0]) < 0.5
    assert bench.angle(found.vectors[0, 1], plain.vectors[0, 1]) < 0.5
    wrong = macenko.fit(tinted[None])
    assert bench.angle(wrong.vectors[0, 1], plain.vectors[0, 1]) > 2


@pytest.mark.parametrize(
    "color",
    [(0.39, 0.58, 0.71), (0.87, 0.48, 0.10), (0.30, 0.40, 0.86)],
    ids=["a yellow mounting", "blue ink", "brown"],
)
def test_what_is_no_hematoxylin_does_not_pass_for_it(bench, color):
    other = np.array(color) / np.linalg.norm(color)
    fits = macenko.fit(bench.tile(0, vectors=(other, bench.E))[None])
    assert macenko.REASONS[fits.reason[0]] == "not the colors of H&E"


def test_maxima_are_of_the_tissue_however_little_there_is(bench):
    full, sparse = (macenko.fit(bench.tile(0, tissue=t)[None]) for t in (0.9, 0.1))
    torch.testing.assert_close(full.maxima, sparse.maxima, atol=0.08, rtol=0)


def test_normalizing_two_stainings_of_one_section_brings_them_together(bench):
    # The same concentrations under another laboratory's vectors and strengths.
    pair = torch.stack([bench.tile(3), bench.tile(3, bench.he2, strength=(0.7, 1.2))])
    out = macenko.normalize(pair, macenko.fit(pair), *target()).float()
    before, after = (pair[0].float() - pair[1].float()).abs().mean(), (out[0] - out[1]).abs().mean()
    assert after < 0.25 * before


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_torchstains_convention_gives_torchstains_result(bench, backend):
    from torchstain.numpy.normalizers.macenko import NumpyMacenkoNormalizer
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    # Its NumPy half interpolates quantiles, its torch half does not.
    rules = replace(CONVENTIONS["torchstain"], interpolated=backend == "numpy")
    reference = BUILT_IN["torchstain"].tensors()
    for seed in range(4):
        image = bench.tile(seed, size=100)
        ours = macenko.normalize(image[None], macenko.fit(image[None], rules), *reference[:2], rules)[0]
        if backend == "torch":
            theirs = TorchMacenkoNormalizer().normalize(image, stains=False)[0].permute(2, 0, 1)
        else:
            peer = NumpyMacenkoNormalizer()
            theirs = torch.from_numpy(peer.normalize(image.permute(1, 2, 0).numpy(), stains=False)[0]).permute(2, 0, 1)
        assert (ours.float() - theirs.float()).abs().mean() < 0.05


def test_torchstains_convention_on_real_tissue(real_tiles):
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    rules = CONVENTIONS["torchstain"]
    peer = TorchMacenkoNormalizer()
    compared = 0
    for image in real_tiles:
        fits = macenko.fit(image[None], rules)
        if fits.good:
            ours = macenko.normalize(image[None], fits, *BUILT_IN["torchstain"].tensors()[:2], rules)[0]
            theirs = peer.normalize(image, stains=False)[0].permute(2, 0, 1)
            assert (ours.float() - theirs.float()).abs().mean() < 0.5
            compared += 1
    assert compared >= 0.8 * len(real_tiles)


def tiatoolbox_by_its_formulas(image):
    """tiatoolbox's Macenko extractor and concentrations, written from its documentation: vectors [2, 3], maxima [2]."""
    low, high = np.percentile(image, (2, 98))
    bright = exposure.rescale_intensity(image, in_range=(low, high), out_range=(0.0, 255.0)).astype(np.uint8)
    tissue = cv2.cvtColor(bright, cv2.COLOR_RGB2LAB)[..., 0] / 255 < 0.8
    od = np.maximum(-np.log(np.maximum(image, 1) / 255), 1e-6).reshape(-1, 3)
    inside = od[tissue.ravel()]
    vectors = np.linalg.eigh(np.cov(inside, rowvar=False))[1][:, [2, 1]]
    vectors = vectors * np.where(vectors[0] < 0, -1, 1)
    phi = np.arctan2(*(inside @ vectors).T[::-1])
    ends = [vectors @ (np.cos(a), np.sin(a)) for a in np.percentile(phi, (1, 99))]
    he = np.array(sorted(ends, key=lambda v: -v[0]))
    he /= np.linalg.norm(he, axis=1, keepdims=True)
    return he, np.percentile(np.linalg.lstsq(he.T, od.T, rcond=None)[0], 99, axis=1)


def test_tiatoolboxes_convention_is_its_formulas(bench):
    for seed in range(3):
        image = bench.tile(seed, size=100)
        fits = macenko.fit(image[None], CONVENTIONS["tiatoolbox"])
        vectors, maxima = tiatoolbox_by_its_formulas(image.permute(1, 2, 0).numpy())
        assert bench.angle(fits.vectors[0, 0], vectors[0]) < 0.2
        assert bench.angle(fits.vectors[0, 1], vectors[1]) < 0.2
        np.testing.assert_allclose(fits.maxima[0], maxima, rtol=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("tiatoolbox") is None, reason="tiatoolbox is not installed")
def test_tiatoolboxes_convention_gives_tiatoolboxes_result(bench, real_tiles):
    from tiatoolbox.tools.stainnorm import MacenkoNormalizer

    rules = CONVENTIONS["tiatoolbox"]
    fitted = bench.tile(9, bench.he2, size=128)
    peer = MacenkoNormalizer()
    peer.fit(fitted.permute(1, 2, 0).numpy().copy())
    fits = macenko.fit(fitted[None], rules)
    for image in real_tiles:
        source = macenko.fit(image[None], rules)
        if source.good:
            ours = macenko.normalize(image[None], source, fits.vectors[0], fits.maxima[0], rules)[0]
            theirs = torch.from_numpy(peer.transform(image.permute(1, 2, 0).numpy().copy())).permute(2, 0, 1)
            assert (ours.float() - theirs.float()).abs().mean() < 0.5


NAMES = ["white", "black", "gray", "one color", "one tissue pixel", "green pen", "blue pen", "red pen"]
NAMES += ["black ink", "black line", "one stain"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_tile_without_a_fit_is_marked_and_its_neighbors_are_untouched(bench, name, convention):
    assert set(NAMES) == set(bench.degenerate)
    bad, good, rules = bench.degenerate[name], bench.tile(0), CONVENTIONS[convention]
    alone = macenko.fit(good[None], rules)
    fits = macenko.fit(torch.stack([bad, good]), rules)
    assert not fits.good[0]
    assert macenko.REASONS[fits.reason[0]]
    assert fits.good[1]
    for key in ("vectors", "maxima", "residual"):
        assert torch.equal(getattr(fits, key)[1], getattr(alone, key)[0])
    out = macenko.normalize(torch.stack([bad, good]), fits, *target(), rules)
    assert torch.equal(out[0], bad)
    assert torch.equal(out[1], macenko.normalize(good[None], alone, *target(), rules)[0])
    assert not torch.equal(out[1], good)


def test_one_blank_among_63_good_changes_none_of_them(bench):
    good = torch.stack([bench.tile(i, size=32 + 7) for i in range(63)])
    batch = torch.cat([good[:20], bench.blank(255, 39)[None], good[20:]])
    fits = macenko.fit(batch)
    assert fits.good.tolist() == [i != 20 for i in range(64)]
    out = macenko.normalize(batch, fits, *target())
    for i in range(63):
        place = i + (i >= 20)
        one = macenko.fit(good[i : i + 1])
        assert torch.equal(fits.vectors[place], one.vectors[0])
        assert torch.equal(out[place], macenko.normalize(good[i : i + 1], one, *target())[0])


def test_a_tile_with_nan_is_marked_and_its_neighbors_are_untouched(bench):
    good = bench.tile(0) / 255
    bad = good.clone()
    bad[1, 3, 3] = math.nan
    fits = macenko.fit(torch.stack([bad, good]))
    assert macenko.REASONS[fits.reason[0]] == "no finite solution"
    out = macenko.normalize(torch.stack([bad, good]), fits, *target())
    assert torch.equal(out[0].nan_to_num(), bad.nan_to_num())
    alone = macenko.normalize(good[None], macenko.fit(good[None]), *target())
    assert torch.equal(out[1], alone[0])


def test_one_pixel_images_do_not_raise():
    assert not macenko.fit(torch.zeros(2, 3, 1, 1, dtype=torch.uint8)).good.any()


@pytest.mark.parametrize("convention", CONVENTIONS)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    image=hypothesis.extra.numpy.arrays(
        np.uint8, st.tuples(st.just(3), st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 255)
    )
)
def test_no_image_breaks_it(convention, image):
    rules = CONVENTIONS[convention]
    images = torch.from_numpy(image)[None].repeat_interleave(4, dim=3).repeat_interleave(4, dim=2)
    fits = macenko.fit(images, rules)
    out = macenko.normalize(images, fits, *target(), rules)
    if fits.good:
        assert torch.isfinite(fits.vectors).all()
        assert torch.isfinite(fits.maxima).all()
        assert math.isclose(float(fits.vectors[0, 0].norm()), 1, abs_tol=1e-4)
        # Green absorbs most or nearly so: nothing turns green, and white stays white.
        assert (fits.vectors[..., 1] > fits.vectors[..., 2] - 0.2).all()
        white = macenko.normalize(torch.full_like(images, 255), fits, *target(), rules)
        assert convention == "torchstain" or (white >= 254).all()
    else:
        assert torch.equal(out, images)


def test_white_stays_white_under_every_fit(bench):
    fits = macenko.fit(torch.stack([bench.tile(0), bench.tile(1, bench.he2, strength=(0.2, 0.3))]))
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    assert (macenko.normalize(white, fits, *target()) >= 254).all()


def test_luminosity_is_that_of_opencv(bench):
    image = bench.tile(0)
    levels = image.flatten(1)[None].float()
    ours = macenko._tissue(levels, levels, CONVENTIONS["tiatoolbox"])[0].view(96, 96)
    low, high = np.percentile(image.numpy(), (2, 98))
    stretched = exposure.rescale_intensity(
        image.permute(1, 2, 0).numpy(), in_range=(low, high), out_range=(0.0, 255.0)
    ).astype(np.uint8)
    theirs = color.rgb2lab(stretched)[..., 0] < 80
    assert (ours.numpy() == theirs).mean() > 0.999


@pytest.mark.gpu
def test_cpu_and_gpu_agree_to_a_level(bench):
    images = torch.stack([bench.tile(i) for i in range(8)] + list(bench.degenerate.values()))
    on_cpu, on_gpu = macenko.fit(images), macenko.fit(images.cuda())
    assert torch.equal(on_cpu.reason, on_gpu.reason.cpu())
    ours = macenko.normalize(images, on_cpu, *target()).int()
    theirs = macenko.normalize(images.cuda(), on_gpu, *(t.cuda() for t in target())).cpu().int()
    assert (ours - theirs).abs().max() <= 1
