import csv

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.data_tools.errors import DONE, DONE_WITH_REFUSALS, UserError
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.stream import decode
from eosin.data_tools.verify import verify_shards
from eosin.ssl.config import Stain
from eosin.ssl.stain import lab
from eosin.ssl.stain.convert import LISTED, normalize_folder, normalize_shards
from eosin.ssl.stain.fits import fit_slides
from eosin.ssl.stain.normalizer import describe, make_normalizer


@pytest.fixture
def folder(tmp_path, bench):
    where = tmp_path / "images"
    (where / "b").mkdir(parents=True)
    for name, image in (("a.png", bench.tile(0)), ("b/c.png", bench.tile(1, bench.he2)), ("w.png", bench.blank(255))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(where / name)
    return where


def test_a_folder_is_normalized_image_by_image(folder, tmp_path, bench):
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    description = describe(Stain(normalize="tile"))
    done = normalize_folder(folder, tmp_path / "out", description)
    assert (done.images, done.exit_code, done.raw.total()) == (3, DONE_WITH_REFUSALS, 1)
    made = make_normalizer(description, None)
    expected = made(bench.tile(1, bench.he2)[None], torch.zeros(1, dtype=torch.long)).images[0]
    found = np.asarray(Image.open(tmp_path / "out/b/c.png"))
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/w.png")), np.full((96, 96, 3), 255))
    with (tmp_path / "out" / LISTED).open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["image"], r["what"]) for r in rows] == [("w.png", "raw"), ("torn.png", "left out")]
    assert rows[0]["reason"] == "too little tissue"


def test_a_shard_set_is_normalized_into_another(shards, tmp_path):
    fit_slides(shards)
    done = normalize_shards(shards, tmp_path / "out", describe(Stain(normalize="slide")))
    assert (done.images, done.exit_code) == (16, DONE)
    assert done.raw == {"its slide is not H&E": 4}
    out = ShardSet(tmp_path / "out")
    assert verify_shards(out.folder, None)[0] == []
    assert [out.meta(i) for i in range(16)] == [shards.meta(i) for i in range(16)]
    assert "stain_fit" not in out.slides()
    before, after = (
        torch.cat([lab.statistics(torch.tensor(decode(s.image(i))).permute(2, 0, 1)[None]).mean for i in (0, 4, 8)])
        for s in (shards, out)
    )
    assert after.var(dim=0).sum() < 0.25 * before.var(dim=0).sum()
    # IHC is what it was but for the JPEG.
    pair = [decode(s.image(12)).astype(int) for s in (shards, out)]
    assert np.abs(pair[0] - pair[1]).mean() < 4
    # The same again gives the same bytes.
    again = normalize_shards(shards, tmp_path / "again", describe(Stain(normalize="slide")))
    assert again.images == 16
    assert ShardSet(tmp_path / "again").identity == out.identity


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(folder, tmp_path):
    description = describe(Stain(normalize="tile"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        normalize_folder(tmp_path / "empty", tmp_path / "out", description)
    Image.new("RGB", (8, 8)).save(folder / "a.bmp")
    with pytest.raises(UserError, match=r"both be written as a\.png"):
        normalize_folder(folder, tmp_path / "out", description)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no")
    with pytest.raises(UserError, match="nothing in"):
        normalize_folder(broken, tmp_path / "out", description)
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(UserError, match="already holds"):
        normalize_folder(tmp_path / "images" / "b", tmp_path / "taken", description)
