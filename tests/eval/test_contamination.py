"""What an encoder saw in pretraining is found in what it is scored on, and said."""

import shutil

import numpy as np
import pytest

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.results import read_results
from eosin.data_tools.shards import ShardSet
from eosin.eval.contamination import contamination, of_task
from eosin.eval.describe import describe
from eosin.eval.task import load_task, pool_task
from eosin.launch.cli import main


@pytest.fixture
def planted(tiny_shards, tmp_path):
    """A shard set that shares slide s0 with the one that was trained on, and of s1 only the patient."""
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    table = ShardSet(folder).slides()
    table["slide"], table["patient"] = ["s0", "n1", "n2", "n3"], ["p0", "p1", "q2", "q3"]
    table.to_parquet(folder / "slides.parquet", index=False)
    return folder


def test_planted_overlap_is_found_from_run_and_release(tiny_run, planted, tmp_path):
    release = tmp_path / "release"
    assert main(["export", str(tiny_run), "--out", str(release), "--name", "tiny"]) == 0
    bits = {"s0": 3, "n1": 2, "n2": 0, "n3": 0}
    for encoder, expected in [
        (str(tiny_run), bits),
        (str(release), bits),
        (f"random:{tiny_run}", dict.fromkeys(bits, 0)),
        ("color", dict.fromkeys(bits, 0)),
        ("timm:test_vit", dict.fromkeys(bits, 0)),
    ]:
        out = tmp_path / f"{encoder.replace('/', '')}.safetensors"
        assert main(["embed", encoder, str(planted), "--out", str(out), "--device", "cpu"]) == 0
        table = read_embeddings(out).table
        assert table["seen"].dtype == np.int8
        assert table["seen"].tolist() == [expected[slide] for slide in table["slide"]]
    (release / "seen.json").unlink()
    out = tmp_path / "unknown.safetensors"
    assert main(["embed", str(release), str(planted), "--out", str(out), "--device", "cpu"]) == 0
    assert "seen" not in read_embeddings(out).table


def test_a_release_names_nobody(tiny_run, tiny_shards, tmp_path):
    release = tmp_path / "release"
    assert main(["export", str(tiny_run), "--out", str(release), "--name", "tiny"]) == 0
    table = ShardSet(tiny_shards).slides()
    seen = (release / "seen.json").read_bytes()
    for name in (*table["slide"], *table["patient"]):
        assert f'"{name}"'.encode() not in seen
    card = (release / "README.md").read_text()
    assert "salted hashes of the 4 slides and 4 patients" in card


def test_every_kind_of_result_says_what_was_scored_with_seen(write, cohort, tmp_path):
    features, columns = cohort(3.0)
    marks = np.zeros(320, dtype=np.int8)
    marks[:8] = 3  # all of patient p0: eight tiles of slides p0-0 and p0-1
    marks[8:13] = [3, 2, 3, 2, 3]  # of p1's first five tiles: those of p1-0, and the patient of p1-1
    paths = [
        write("trained", features, **columns, seen=marks),
        write("clean", features, **columns, seen=np.zeros(320, dtype=np.int8)),
        write("strange", features, **columns),
    ]
    out = tmp_path / "knn.json"
    command = ["eval", "knn", *map(str, paths), "--label", "label", "--group", "patient", "--out", str(out)]
    assert main([*command, "--k", "5", "9"]) == 0
    results, _ = read_results(out)
    found = {e["encoder"]: e["contamination"] for e in results["encoders"]}
    assert found == {
        "trained": {"known": True, "samples": 13, "slides": 3, "patients": 2, "share": 13 / 320},
        "clean": {"known": True, "samples": 0, "slides": 0, "patients": 0, "share": 0.0},
        "strange": {"known": False, "samples": None, "slides": None, "patients": None, "share": None},
    }
    notes = [note for note in results["notes"] if note.startswith(("Seen before", "Not known"))]
    assert len(notes) == 2
    assert "4.1% of the scored samples (13)" in notes[0]
    assert "3 slides and 2 patients" in notes[0]
    assert "strange" in notes[1]
    assert "clean" not in notes[1]
    assert all(note in describe(results) for note in notes)


def test_rows_that_were_scored_count_once_and_others_do_not(write, cohort):
    features, columns = cohort(1.0)
    marks = np.zeros(320, dtype=np.int8)
    marks[[3, 5, 100]] = 1
    task = load_task([write("a", features, **columns, seen=marks)], "label", "patient")
    found = contamination(task.encoders, np.array([3, 3, 4, 5, 6]))["a"]
    assert found == {"known": True, "samples": 2, "slides": 1, "patients": 0, "share": 0.5}


def test_bags_count_as_their_slides(write, cohort):
    features, columns = cohort(1.0)
    slides = np.array(columns["slide"])
    marks = np.select([slides == "p7-1", np.char.startswith(slides, "p9-")], [3, 2], 0).astype(np.int8)
    task = load_task([write("a", features, **columns, seen=marks)], "label", "patient")
    bags, _ = pool_task(task, "slide")
    found = of_task(bags, np.arange(80))["a"]
    assert found == {"known": True, "samples": 3, "slides": 1, "patients": 2, "share": 3 / 80}
