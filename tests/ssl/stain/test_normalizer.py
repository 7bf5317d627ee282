import json

import pytest
import torch

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.ssl.config import Stain
from eosin.ssl.stain import lab, macenko
from eosin.ssl.stain.fits import fit_slides
from eosin.ssl.stain.normalizer import (
    REASONS,
    describe,
    describe_run,
    make_normalizer,
    read_normalization,
    save_description,
)


def normalizer(mode, shards=None, **more):
    return make_normalizer(describe(Stain(normalize=mode, **more)), shards and ShardSet(shards.folder))


def test_off_is_none(shards):
    assert normalizer("off", shards) is None


def test_slide_mode_needs_fits_and_leaves_ihc_raw(shards, bench):
    with pytest.raises(UserError, match="eosin stain fit"):
        normalizer("slide", shards)
    fit_slides(shards)
    images = torch.stack([bench.tile(0), bench.tile(0)])
    out, reason = normalizer("slide", shards)(images, torch.tensor([0, 3]))
    assert [REASONS[r] for r in reason] == ["", "its slide is not H&E"]
    assert not torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1])
    assert normalizer("slide", shards).raw_slides() == {"its slide is not H&E": 1}


@pytest.mark.parametrize("method", ["macenko", "reinhard", "reinhard-modified"])
@pytest.mark.parametrize("mode", ["tile", "slide"])
def test_every_method_brings_two_stainings_together_and_leaves_what_it_must(shards, bench, mode, method):
    fit_slides(shards)
    made = normalizer(mode, shards, method=method)
    pair = torch.stack([bench.tile(10), bench.tile(10, bench.he2), bench.tile(10), bench.blank(255)])
    out, reason = made(pair, torch.tensor([0, 1, 3, 0]))
    assert torch.equal(out[2], pair[2])
    assert (out[3] >= 254).all()
    assert reason.tolist()[:3] == [0, 0, REASONS.index("its slide is not H&E")]
    assert (reason[3] > 0) == (mode == "tile")
    before, after = lab.statistics(pair), lab.statistics(out)
    gap = [(s.mean[0] - s.mean[1]).norm() for s in (before, after)]
    if method != "reinhard-modified":
        assert gap[1] < 0.5 * gap[0]
    # a and b are matched by every method.
    assert (after.mean[0, 1:] - after.mean[1, 1:]).norm() < 0.5 * (before.mean[0, 1:] - before.mean[1, 1:]).norm() + 0.5


def test_a_slides_white_point_becomes_white(shards):
    fit_slides(shards)
    glass = torch.tensor([242, 235, 224], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8).contiguous()
    out, _ = normalizer("slide", shards)(glass, torch.tensor([2]))
    assert (out >= 252).all()
    plain, _ = normalizer("slide", shards)(glass, torch.tensor([0]))
    assert (plain[0, 2] < 245).all()


@pytest.mark.parametrize("mode", ["tile", "slide"])
def test_batches_do_not_matter(shards, bench, mode):
    fit_slides(shards)
    made = normalizer(mode, shards)
    images = torch.stack([*bench.degenerate.values(), *(bench.tile(i) for i in range(5))])
    slides = torch.arange(len(images)) % 4
    whole = made(images, slides)
    for i in range(len(images)):
        alone = made(images[i : i + 1], slides[i : i + 1])
        assert torch.equal(whole.images[i], alone.images[0])
        assert whole.reason[i] == alone.reason[0]


def test_threads_do_not_matter(bench):
    images = torch.stack([bench.tile(i) for i in range(4)])
    made = normalizer("tile")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = made(images, torch.zeros(4, dtype=torch.long)).images
        torch.set_num_threads(2)
        two = made(images, torch.zeros(4, dtype=torch.long)).images
    finally:
        torch.set_num_threads(before)
    assert (one.int() - two.int()).abs().max() <= 1


def test_torchstains_convention_holds_from_fit_to_tile(shards, bench):
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    made = normalizer("tile", method="macenko", convention="torchstain", reference="torchstain")
    image = bench.tile(3)
    theirs = TorchMacenkoNormalizer().normalize(image, stains=False)[0].permute(2, 0, 1)
    ours = made(image[None], torch.zeros(1, dtype=torch.long)).images[0]
    assert (ours.float() - theirs.float()).abs().mean() < 0.05
    fit_slides(shards)
    with pytest.raises(UserError, match="--convention torchstain"):
        normalizer("slide", shards, convention="torchstain", reference="torchstain")
    fit_slides(ShardSet(shards.folder), convention="torchstain")
    out = normalizer("slide", shards, convention="torchstain", reference="torchstain")(image[None], torch.tensor([0]))
    assert out.reason.tolist() == [0]


def test_a_description_is_plain_data_and_a_run_keeps_it(tmp_path):
    stain = Stain(normalize="tile", method="reinhard")
    found = describe(stain)
    assert read_normalization(json.loads(json.dumps(found)), tmp_path) == found
    save_description(tmp_path, found)
    assert describe_run(tmp_path, stain) == found
    assert describe_run(tmp_path, Stain()) is None
    for broken in ({}, found | {"method": "magic"}, found | {"mode": "off"}, found | {"reference": {"name": 1}}):
        with pytest.raises(UserError, match="not one that this version of Eosin can apply"):
            read_normalization(broken, tmp_path)


def test_reasons_of_fits_are_numbered_first():
    assert REASONS[: len(macenko.REASONS)] == macenko.REASONS


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_cpu_and_gpu_agree_to_a_level(shards, bench, method):
    fit_slides(shards)
    made = normalizer("slide", shards, method=method)
    images, slides = torch.stack([bench.tile(i) for i in range(4)]), torch.arange(4)
    ours, theirs = made(images, slides).images.int(), made(images.cuda(), slides.cuda()).images.cpu().int()
    assert (ours - theirs).abs().max() <= 1
