"""Parts of a tiling against the tiling of all, and parts that do not belong together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eosin.data_tools.errors import DONE_WITH_REFUSALS, UserError
from eosin.data_tools.merge import merge_parts
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.tile import tile_slides
from eosin.data_tools.verify import verify_shards


@pytest.fixture(scope="module")
def slides(section, pyramid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "slides"
    folder.mkdir()
    for number in range(7):
        pyramid(folder / f"s{number}.tif", section(450 + 40 * number, 460, seed=number), 0.5)
    (folder / "broken.svs").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def parts(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for k in (1, 2, 3):
        tile_slides([slides], folder / f"p{k}", tile_size=128, share=f"{k}/3", workers=1)
    return [folder / f"p{k}" for k in (1, 2, 3)]


def tiles(shards: ShardSet) -> dict[str, bytes]:
    return {shards.meta(number)["key"]: shards.image(number) for number in range(len(shards))}


def test_the_parts_together_are_the_whole(slides, parts, tmp_path):
    tile_slides([slides], tmp_path / "whole", tile_size=128, workers=1)
    summary = merge_parts([parts[2], parts[0], parts[1]], tmp_path / "merged")
    assert summary.refused == [("broken.svs", "not a slide of a known format")]
    whole, merged = ShardSet(tmp_path / "whole"), ShardSet(tmp_path / "merged")
    assert tiles(merged) == tiles(whole)
    assert merged.slides().equals(whole.slides())
    counts = np.bincount(merged.column("slide"), minlength=8)
    assert counts.tolist() == whole.slides()["tiles"].tolist()
    assert verify_shards(tmp_path / "merged").problems == []
    assert len(list((tmp_path / "merged" / "qc").iterdir())) == 7
    assert min(path.stat().st_nlink for path in (tmp_path / "merged").glob("*.tar")) == 2  # linked, not copied
    again = merge_parts(parts, tmp_path / "merged")
    assert "nothing to do" in again.lines[0]
    assert again.exit_code == DONE_WITH_REFUSALS


def test_pictures_that_were_removed_do_not_matter(parts, tmp_path):
    bare = shutil.copytree(parts[1], tmp_path / "bare")
    shutil.rmtree(bare / "qc")
    merge_parts([parts[0], bare, parts[2]], tmp_path / "merged")
    left = {path.name for part in (parts[0], parts[2]) for path in (part / "qc").iterdir()}
    assert {path.name for path in (tmp_path / "merged" / "qc").iterdir()} == left
    assert verify_shards(tmp_path / "merged").problems == []


def test_each_slide_is_in_one_part_and_parts_are_alike_in_size(parts):
    names = [ShardSet(part).slides()["slide"].tolist() for part in parts]
    assert sorted(name for part in names for name in part) == ["broken", *(f"s{n}" for n in range(7))]
    assert sorted(map(len, names)) == [2, 3, 3]


def test_parts_that_do_not_belong_together(slides, parts, tmp_path):
    tile_slides([slides], tmp_path / "other", tile_size=64, share="3/3", workers=1)
    tile_slides([slides], tmp_path / "whole", tile_size=128, workers=1)
    shutil.copytree(parts[0], tmp_path / "copy")
    for given, said in (
        (parts[:2], "of 3 parts these are missing: 3"),
        ([*parts[:2], tmp_path / "other"], r"made otherwise than the others \(tile_size: 128 there, 64 asked\)"),
        ([*parts, tmp_path / "copy"], "are both part 1 of 3"),
        ([*parts[:2], tmp_path / "whole"], "was not made by 'eosin tile --part'"),
        ([*parts[:2], tmp_path / "gone"], "gone does not exist"),
        ([], "no part was given"),
    ):
        with pytest.raises(UserError, match=said):
            merge_parts(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_may_be_of_refused_slides_only_and_none_without_slides(slides, tmp_path):
    for name in ("s0.tif", "broken.svs"):
        (tmp_path / "two").mkdir(exist_ok=True)
        os.link(slides / name, tmp_path / "two" / name)
    made = [tile_slides([tmp_path / "two"], tmp_path / f"p{k}", tile_size=128, share=f"{k}/2") for k in (1, 2)]
    assert sorted(len(ShardSet(tmp_path / f"p{k}")) == 0 for k in (1, 2)) == [False, True]
    assert sorted(summary.exit_code for summary in made) == [0, DONE_WITH_REFUSALS]
    merged = merge_parts([tmp_path / "p1", tmp_path / "p2"], tmp_path / "merged")
    assert merged.refused == [("broken.svs", "not a slide of a known format")]
    assert ShardSet(tmp_path / "merged").slides()["state"].tolist() == ["refused", "done"]
    with pytest.raises(UserError, match="--part 1/3 of 2 slides leaves parts without any"):
        tile_slides([tmp_path / "two"], tmp_path / "p3", share="1/3")


@pytest.mark.slow
def test_ranks_take_a_part_each(slides, tmp_path):
    command = [sys.executable, "-m", "eosin.launch", "tile", str(slides), "--out", str(tmp_path / "parts")]
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([*command, "--tile-size", "128"], env=environment, capture_output=True, check=False)
        assert ran.returncode in (0, DONE_WITH_REFUSALS), ran.stderr
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["part-1-of-2", "part-2-of-2"]
    merge_parts(sorted(Path(tmp_path, "parts").iterdir()), tmp_path / "merged")
    assert len(ShardSet(tmp_path / "merged").slides()) == 8
