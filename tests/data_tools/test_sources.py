"""Names and lists of inputs; how tables join is shown by the tests of tiling and packing."""

from pathlib import Path

import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.sources import find_slides, fingerprint, shorten, unique_names


def test_names_are_unique_and_short():
    def names(*paths: str) -> list[str]:
        return unique_names([(Path(Path(path).name), Path(path)) for path in paths])

    assert names("a/TCGA-1.x.svs", "b/c.tif") == ["TCGA-1.x", "c"]
    assert names("p1/s.tif", "p2/s.tif", "t.tif") == ["p1/s", "p2/s", "t"]
    assert names("s.tif", "s.svs") == ["s.tif", "s.svs"]
    assert len(set(names("s.tif", "s.svs", "s.tif.svs", "x/s.tif"))) == 4


def test_names_that_cannot_be_told_apart():
    with pytest.raises(UserError, match=r"two files are both called 's\.tif'"):
        unique_names([(Path("s.tif"), Path("s.tif"))] * 2)


def test_folders_prefer_slides_to_pictures(tmp_path):
    (tmp_path / "case" / ".cache").mkdir(parents=True)
    for name in ("b.svs", "case/a.TIF", "macro.png", ".hidden.svs", "case/.cache/c.svs", "notes.txt"):
        (tmp_path / name).touch()
    assert [source.listed for source in find_slides([tmp_path])] == ["b.svs", "a.TIF"]
    assert [source.listed for source in find_slides([tmp_path / "macro.png"])] == ["macro.png"]
    (tmp_path / "b.svs").unlink()
    (tmp_path / "case" / "a.TIF").unlink()
    assert [source.slide for source in find_slides([tmp_path])] == ["macro"]


def test_fingerprint_follows_names_sizes_and_order(tmp_path):
    one, two = tmp_path / "1.svs", tmp_path / "2.svs"
    one.write_bytes(b"a")
    two.write_bytes(b"bb")
    first = fingerprint([one, two])
    assert first == fingerprint([one, two])
    assert first != fingerprint([two, one])
    one.write_bytes(b"aa")
    assert first != fingerprint([one, two])


def test_shorten():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(list("abcdefg"), limit=2) == "a, b and 5 more"
