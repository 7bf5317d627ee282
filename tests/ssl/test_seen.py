import hashlib
import json
import shutil

import numpy as np
import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.mixture import Mixture
from eosin.data_tools.shards import ShardSet
from eosin.launch.cli import main
from eosin.ssl.held_out import held_out_slides
from eosin.ssl.seen import NOTHING, read_seen, write_seen

NAMES = [f"{kind}{n}" for kind in "sp" for n in range(4)]


def hashes(kind, names, salt):
    """Keyed BLAKE2b as RFC 7693 has it."""
    return sorted(
        hashlib.blake2b(f"{kind}\0{name}".encode(), key=bytes.fromhex(salt), digest_size=16).hexdigest()
        for name in names
    )


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy whose slides table may be changed."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def change(folder, **columns):
    table = ShardSet(folder).slides()
    for name, values in columns.items():
        table[name] = values
    table.to_parquet(folder / "slides.parquet", index=False)


def test_only_slides_with_tiles_that_are_not_held_out_are_noted(shards, tmp_path):
    change(shards, tiles=[12, 12, 0, 12], patient=["p0", "p0", "p2", ""])
    write_seen(tmp_path, [(Mixture({str(shards): 1.0}), frozenset({1}))], None)
    text = (tmp_path / "seen.json").read_text()
    found = json.loads(text)
    assert found["slides"] == hashes("slides", ["s0", "s3"], found["salt"])
    assert found["patients"] == hashes("patients", ["p0"], found["salt"])
    assert (found["schema"], found["before"], found["complete"]) == (1, [], True)
    assert not any(f'"{name}"' in text for name in NAMES)


def test_a_run_notes_its_training_side_when_it_begins(tiny_shards, tiny_recipe, tmp_path):
    run = tmp_path / "run"
    given = [f"data.shards={tiny_shards}", f"run.dir={run}", "run.steps=2", "health.held_out=0.5"]
    assert main(["train", *tiny_recipe, *given]) == 0
    held = held_out_slides(Mixture({str(tiny_shards): 1.0}), 0.5, 0)
    assert 0 < len(held) < 4
    kept = [n for n in range(4) if n not in held]
    found = json.loads((run / "seen.json").read_text())
    assert found["slides"] == hashes("slides", [f"s{n}" for n in kept], found["salt"])
    assert found["patients"] == hashes("patients", [f"p{n}" for n in kept], found["salt"])
    marks = read_seen(run).marks([f"s{n}" for n in range(4)], [f"p{n}" for n in range(4)])
    assert marks.tolist() == [0 if n in held else 3 for n in range(4)]


def test_further_data_is_added_under_the_same_salt(shards, tmp_path):
    given = [(Mixture({str(shards): 1.0}), frozenset())]
    write_seen(tmp_path, given, None)
    path = tmp_path / "seen.json"
    first = json.loads(path.read_text())
    before = path.stat().st_mtime_ns
    write_seen(tmp_path, given, None)
    assert path.stat().st_mtime_ns == before  # nothing new, nothing written
    change(shards, patient=["p0", "p1", "p2", "q"])
    write_seen(tmp_path, given, None)
    second = json.loads(path.read_text())
    assert second["salt"] == first["salt"]
    assert second["slides"] == first["slides"]
    assert second["patients"] == hashes("patients", ["p0", "p1", "p2", "p3", "q"], first["salt"])


def test_the_salt_is_of_the_data_alone_and_without_it_nothing_is_found(tiny_shards, tmp_path):
    given = [(Mixture({str(tiny_shards): 1.0}), frozenset())]
    for name in "ab":
        write_seen(tmp_path / name, given, None)
    found = json.loads((tmp_path / "a" / "seen.json").read_text())
    assert (tmp_path / "a" / "seen.json").read_bytes() == (tmp_path / "b" / "seen.json").read_bytes()
    unsalted = {hashlib.blake2b(t.encode(), digest_size=16).hexdigest() for n in NAMES for t in (n, f"slides\0{n}")}
    assert not unsalted & set(found["slides"] + found["patients"])
    names = [["s0", "s1"], ["p0", "p1"]]
    assert read_seen(tmp_path / "a").marks(*names).tolist() == [3, 3]
    (tmp_path / "a" / "seen.json").write_text(json.dumps(found | {"salt": "00" * 16}))
    assert read_seen(tmp_path / "a").marks(*names).tolist() == [0, 0]
    assert NOTHING.marks(*names).tolist() == [0, 0]
    assert NOTHING.marks(*names).dtype == np.int8


def test_weights_bring_what_they_saw(shards, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    write_seen(first, [(Mixture({str(shards): 1.0}), frozenset({1, 2, 3}))], None)
    change(shards, slide=["a", "b", "c", "d"], patient=["e", "f", "g", "h"])
    other = [(Mixture({str(shards): 1.0}), frozenset({1, 2, 3}))]
    weights = first / "checkpoints" / "step-00000001" / "teacher.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    for place in (first, weights):
        shutil.rmtree(second, ignore_errors=True)
        write_seen(second, other, str(place))
        seen = read_seen(second)
        assert seen.marks(["s0", "a", "b"], ["p1", "p0", "e"]).tolist() == [1, 3, 2]
        assert seen.complete
    write_seen(third, other, "timm:vit_small_patch14_dinov2.lvd142m")  # whose slides nobody listed
    assert not read_seen(third).complete
    assert read_seen(third).marks(["s0", "a"], ["", ""]).tolist() == [0, 1]


def test_broken_lists_are_refused_in_a_line(tmp_path):
    assert read_seen(tmp_path) is None
    for text, said in [
        ("{}", "no list of what"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1, "salt": "x", "slides": [], "patients": [], "before": [], "complete": true}', "no list of what"),
        ("nothing", "not readable as a list"),
    ]:
        (tmp_path / "seen.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_seen(tmp_path)
