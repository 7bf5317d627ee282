import json

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.ssl.stain.fits import fit_slides
from eosin.ssl.stain.reference import BUILT_IN, find_reference, load_reference, make_reference, save_reference


def large(tile):
    """A tile twice as large, as a lens would show it: no stain is a single pixel."""
    return Image.fromarray(tile.permute(1, 2, 0).numpy().repeat(2, axis=0).repeat(2, axis=1))


@pytest.fixture
def image(tmp_path, bench):
    path = tmp_path / "he.png"
    large(bench.tile(0, bench.he2, size=128)).save(path)
    return path


def test_an_image_becomes_a_reference_and_comes_back_from_json(image, tmp_path, bench):
    made = make_reference([str(image)], "eosin")
    assert bench.angle(made.vectors[0], bench.H2) < 2
    assert bench.angle(made.vectors[1], bench.E2) < 2
    save_reference(tmp_path / "r.json", made)
    assert load_reference(tmp_path / "r.json") == made
    assert find_reference(str(tmp_path / "r.json"), "eosin") == made
    assert find_reference(str(image), "eosin") == made


def test_a_shard_set_becomes_a_reference_with_its_fits_and_without(shards, bench):
    without = make_reference([str(shards.folder)], "eosin")
    fit_slides(shards)
    made = make_reference([str(shards.folder)], "eosin")
    for reference in (without, made):  # two of three H&E slides have the first look
        assert bench.angle(reference.vectors[0], bench.H) < 4
        assert bench.angle(reference.vectors[1], bench.E) < 6


def test_several_targets_are_pooled_by_their_median(tmp_path, bench):
    names = []
    for number, vectors in enumerate([bench.he, bench.he2, bench.he2]):
        path = tmp_path / f"{number}.png"
        large(bench.tile(number, vectors, size=100)).save(path)
        names.append(str(path))
    made = make_reference(names, "eosin")
    assert bench.angle(made.vectors[0], bench.H2) < 2
    singles = [make_reference([name], "eosin") for name in names]
    np.testing.assert_allclose(made.maxima, np.median([s.maxima for s in singles], axis=0), atol=1e-5)


def test_a_real_slide_becomes_a_reference(real_data, bench):
    made = make_reference([str(real_data / "wsi/CMU-1-Small-Region.svs")], "eosin")
    h, e = made.vectors
    assert bench.angle(h, (0.65, 0.70, 0.29)) < 20
    assert bench.angle(e, (0.07, 0.99, 0.11)) < 30
    assert made.lab_std[0] > 3


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_references_are_stains(name):
    reference = find_reference(name, name)
    vectors, maxima, _, std = reference.tensors()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2), atol=1e-5, rtol=0)
    assert (vectors > 0).all()
    assert (maxima > 0).all()
    assert (std > 0).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("eosn", ["no stain reference 'eosn'", "eosin"]),
        ("nowhere.json", ["nowhere.json"]),
        ("torchstain", ["'torchstain', not 'eosin'"]),
    ],
)
def test_a_wrong_name_is_one_line(given, words):
    with pytest.raises(UserError) as error:
        find_reference(given, "eosin")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vectors": [[1, 0, 0]]}, "2 × 3"),
        ({"vectors": [[1, 0, 0], [5, 0, 0]]}, "length 1"),
        ({"maxima": [0.0, 1.0]}, "from 0.01"),
        ({"maxima": ["a", 1]}, r"maxima\.0"),
        ({"maxima": [1e300, 1]}, "from 0.01 to"),
        ({"vectors": [[1], [1, 2, 3]]}, "no lists of numbers"),
        ({"vectors": [[0.17, 0.88, 0.44], [0.61, 0.73, 0.31]]}, "more red than eosin"),
        ({"vectors": [[0.61, 0.73, 0.31], [0.61, 0.73, 0.31]]}, "more red than eosin"),
        ({"lab_mean": [1e39, 0, 0]}, "within ±130"),
        ({"name": "a\nb"}, "not printable"),
        ({"convention": "mine"}, "no convention 'mine'"),
        ({"schema_version": 9}, "schema 9"),
        ({"more": 1}, "more"),
        ({"lab_std": [1.0, 2.0, float("nan")]}, "finite"),
    ],
)
def test_a_broken_json_is_one_line(tmp_path, change, words):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(BUILT_IN["eosin"].model_dump() | change))
    with pytest.raises(UserError, match=words):
        load_reference(path)


def test_an_image_without_tissue_is_refused(tmp_path):
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(tmp_path / "white.png")
    with pytest.raises(UserError, match="too little tissue; give an image of H&E tissue"):
        make_reference([str(tmp_path / "white.png")], "eosin")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"torn\.png cannot be a stain reference"):
        make_reference([str(tmp_path / "torn.png")], "eosin")
    with pytest.raises(UserError, match="does not exist"):
        make_reference([str(tmp_path / "none.png")], "eosin")
