import numpy as np
import pytest
import torch
from skimage import color

from eosin.data_tools.errors import UserError
from eosin.data_tools.shards import ShardSet
from eosin.ssl.config import Stain
from eosin.ssl.stain import augment, lab
from eosin.ssl.stain.augment import make_augmenter
from eosin.ssl.stain.fits import fit_slides
from eosin.ssl.stain.normalizer import describe, make_normalizer

ON = torch.ones(3, dtype=torch.bool)


@pytest.fixture
def images(bench):
    return torch.stack([bench.tile(i) for i in range(3)]) / 255


@pytest.fixture
def operations(bench, images):
    """Every operation at a strength, as a function of (images, keys, on, strength)."""
    source = lab.statistics((images * 255).byte())
    means, deviations = source.mean + torch.randn(3, 3), source.std * torch.tensor([[1.0], [1.3], [0.8]])
    vectors = torch.tensor(np.stack([bench.he] * 3), dtype=torch.float32)
    return {
        "hed": lambda x, k, on, s: augment.hed(x, k, s, on),
        "perturb": lambda x, k, on, s: augment.perturb(x, k, vectors[: len(x)], s, s, s, on),
        "randstainna": lambda x, k, on, s: augment.randstainna(
            x, k, lab.Statistics(*(t[: len(x)] for t in source)), means, deviations, 10 * s, on
        ),
        "reinhard": lambda x, k, on, s: augment.reinhard(
            x, lab.Statistics(*(t[: len(x)] for t in source)), means[: len(x)] * (1 + s), deviations[: len(x)], on
        ),
    }


NAMES = ["hed", "perturb", "randstainna", "reinhard"]


@pytest.mark.parametrize("strength", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_white_stays_white_at_every_strength(operations, name, strength):
    white = torch.ones(3, 3, 8, 8)
    assert (operations[name](white, torch.arange(3), ON, strength) * 255 >= 254).all()


@pytest.mark.parametrize("name", NAMES)
def test_off_is_bit_for_bit_and_on_changes(operations, images, name):
    on = torch.tensor([True, False, True])
    out = operations[name](images, torch.arange(3), on, 0.2)
    assert torch.equal(out[1], images[1])
    assert (out[0] - images[0]).abs().mean() > 1e-3
    assert (out >= 0).all()
    assert (out <= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_result_depends_on_its_key_alone(operations, images, name):
    together = operations[name](images, torch.tensor([5, 6, 7]), ON, 0.2)
    alone = operations[name](images[:1], torch.tensor([5]), ON[:1], 0.2)
    assert torch.equal(together[0], alone[0])
    if name != "reinhard":  # it draws its partner elsewhere
        assert not torch.equal(operations[name](images[:1], torch.tensor([9]), ON[:1], 0.2), alone)


def test_hed_scales_concentrations_as_tellez_writes():
    # Where tissue is dense, c' = alpha c + beta in the basis of Ruifrok; recover alpha and beta by regression.
    basis = np.array(augment.HED) / np.linalg.norm(augment.HED, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.3, 0.8, (4096, 3))
    image = torch.from_numpy((256 * np.exp(-amounts @ basis) - 1) / 255).float().T.reshape(1, 3, 64, 64)
    out = augment.hed(image, torch.tensor([7]), 0.1, ON[:1]).double().reshape(3, -1).T * 255
    after = -np.log((out.numpy() + 1) / 256) @ np.linalg.inv(basis)
    for stain in range(3):
        slope, offset = np.polyfit(amounts[:, stain], after[:, stain], 1)
        residual = after[:, stain] - slope * amounts[:, stain] - offset
        assert 0.9 <= slope <= 1.1
        assert -0.1 <= offset <= 0.1
        assert abs(slope - 1) > 1e-3
        assert np.abs(residual).max() < 1e-3


def test_hed_at_zero_is_the_identity(images):
    assert torch.equal(augment.hed(images, torch.arange(3), 0.0, ON), images)


def test_perturbing_scales_the_images_own_stains(bench):
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.4, 1.0, (4096, 2))
    he = np.stack(bench.he)
    residual = np.cross(*he) * 0.05 * rng.standard_normal((4096, 1))  # outside the two stains: it stays
    image = torch.from_numpy((256 * np.exp(-amounts @ he - residual) - 1) / 255).float().T.reshape(1, 3, 64, 64)
    vectors = torch.tensor(he, dtype=torch.float32)[None]
    out = augment.perturb(image, torch.tensor([3]), vectors, 0.3, 0.1, 0.0, ON[:1])
    density = -np.log((out.double().reshape(3, -1).T.numpy() * 255 + 1) / 256)
    after = density @ np.linalg.pinv(he)
    for stain in (0, 1):
        slope, offset = np.polyfit(amounts[:, stain], after[:, stain], 1)
        assert 0.7 <= slope <= 1.3
        assert -0.1 <= offset <= 0.1
        assert abs(slope - 1) > 1e-3
        assert np.abs(after[:, stain] - slope * amounts[:, stain] - offset).max() < 2e-3
    np.testing.assert_allclose(density - after @ he, residual, atol=2e-3)


def test_randstainnas_templates_have_the_slides_distribution(bench):
    # Tissue without background reaches its template, so the templates can be read off the results.
    tile = bench.tile(0, size=32, strength=(1.0, 1.6), dense=True)
    count = 400
    images = tile[None].expand(count, -1, -1, -1)
    source = lab.Statistics(*(t.expand(count, *t.shape[1:]) for t in lab.statistics(tile[None])))
    rng = torch.Generator().manual_seed(0)
    means = torch.tensor([62.0, 25.0, -15.0]) + 2 * torch.randn(50, 3, generator=rng)
    deviations = torch.tensor([9.0, 5.0, 4.0]) + 0.3 * torch.randn(50, 3, generator=rng)
    out = augment.randstainna(
        images, torch.arange(count), source, means, deviations, 1.0, torch.ones(count, dtype=torch.bool)
    )
    found = np.stack([color.rgb2lab(i.permute(1, 2, 0).numpy()).reshape(-1, 3).mean(axis=0) for i in out])
    np.testing.assert_allclose(found.mean(axis=0), means.mean(dim=0), atol=0.5)
    np.testing.assert_allclose(found.std(axis=0), means.std(dim=0), rtol=0.15)


def test_drawn_deviations_stay_positive(bench):
    tile = bench.tile(0, size=32)
    source = lab.Statistics(*(t.expand(200, *t.shape[1:]) for t in lab.statistics(tile[None])))
    wild = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 20 + 6
    seen = []
    original = lab.transfer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "transfer", lambda i, scale, shift, on: seen.append(scale) or original(i, scale, shift, on))
        augment.randstainna(
            tile[None].expand(200, -1, -1, -1), torch.arange(200), source, wild, wild, 3.0, ON[:1].expand(200)
        )
    assert (seen[0] > 0).all()


def test_partners_are_other_fitted_slides():
    fitted = torch.tensor([True, False, True, True, False])
    slides = torch.arange(5).repeat(500)
    partner = augment.draw_partner(torch.arange(2500), slides, fitted.nonzero().squeeze(1))
    assert fitted[partner].all()
    assert (partner != slides).all()
    for slide in range(5):
        drawn = torch.bincount(partner[slides == slide], minlength=5)
        others = [s for s in (0, 2, 3) if s != slide]
        assert (drawn[others] > 500 / len(others) * 0.7).all()


def recipe(*operations, **more):
    return Stain.model_validate({"augment": [{"op": o} if isinstance(o, str) else o for o in operations], **more})


def test_the_recipes_order_and_probabilities_hold(shards, bench):
    fit_slides(shards)
    images, slides = torch.stack([bench.tile(i) for i in range(4)]), torch.tensor([0, 1, 2, 3])
    crops, keys, tile = images / 255, torch.arange(4), torch.arange(4)

    def run(*operations):
        return make_augmenter(recipe(*operations), ShardSet(shards.folder)).of(images, slides)(crops, keys, tile)

    strong = {"op": "hed", "sigma": 0.4}
    assert not torch.equal(run(strong, "reinhard"), run("reinhard", strong))
    assert torch.equal(run({"op": "hed", "p": 0.0}), crops)
    out = run("perturb", strong, "randstainna", "reinhard")
    assert torch.equal(out[3], crops[3])  # IHC
    assert all(not torch.equal(out[i], crops[i]) for i in range(3))
    many = torch.zeros(600, dtype=torch.long)
    half = make_augmenter(recipe({"op": "hed", "p": 0.3}), shards).of(images, slides)(
        crops[:1].expand(600, -1, -1, -1), torch.arange(600), many
    )
    changed = (half != crops[:1]).flatten(1).any(dim=1).float().mean()
    assert abs(float(changed) - 0.3) < 4 * (0.3 * 0.7 / 600) ** 0.5


def test_after_normalization_the_stains_are_the_references(shards, bench):
    fit_slides(shards)
    stain = recipe({"op": "perturb"}, normalize="slide")
    normalizer = make_normalizer(describe(stain), ShardSet(shards.folder))
    made = make_augmenter(stain, ShardSet(shards.folder), normalizer)
    for vectors in made.vectors:
        assert torch.equal(vectors, normalizer.reference.tensors()[0])
    assert made.known.tolist() == [True, True, True, False]


def test_what_cannot_work_is_refused_in_a_line(shards):
    with pytest.raises(UserError, match="eosin stain fit"):
        make_augmenter(recipe("reinhard"), shards)
    table = fit_slides(shards)
    alone = table.assign(stain=["H&E", "IHC", "IHC", "IHC"])
    from eosin.data_tools.shards import write_slides

    write_slides(shards.folder, alone)
    fit_slides(ShardSet(shards.folder))
    with pytest.raises(UserError, match="colors of other slides"):
        make_augmenter(recipe("randstainna"), ShardSet(shards.folder))
    write_slides(shards.folder, table.assign(stain="none"))
    with pytest.raises(UserError, match=r"no slide of .* is; set stain\.augment=none"):
        make_augmenter(recipe("hed"), ShardSet(shards.folder))
