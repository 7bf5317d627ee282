import numpy as np
import pandas as pd
import pytest

from eosin.data_tools.errors import UserError
from eosin.eval.task import identities, load_task, pool_task, text


def test_labels_from_a_csv_by_tile_slide_and_patient(write, tmp_path):
    path = write("e", np.eye(6), slide=list("aabbcc"), patient=list("ppppqq"))
    for key, rows, expected in [
        ("tile", [("t0", "x"), ("t4", "y"), ("elsewhere", "y")], {"t0": "x", "t4": "y"}),
        ("slide", [("a", "x"), ("c", "y")], {"t0": "x", "t1": "x", "t4": "y", "t5": "y"}),
        ("patient", [("q", "y"), ("p", "x")], {"t0": "x", "t1": "x", "t2": "x", "t3": "x", "t4": "y", "t5": "y"}),
    ]:
        pd.DataFrame(rows, columns=[key, "grade"]).to_csv(tmp_path / "x.csv", index=False)
        task = load_task([path], "grade", "patient", tmp_path / "x.csv", key)
        assert dict(zip(task.keys, np.array(task.classes)[task.labels])) == expected
        np.testing.assert_array_equal(task.encoders[0].features, np.eye(6)[[int(k[1]) for k in task.keys]])
        left = 6 - len(expected)
        assert task.left_out == ({"no label in 'grade'": left} if left else {})


def test_rows_without_label_or_group_are_left_out_and_counted(write):
    path = write("e", np.eye(5), label=["x", "", "y", "x", None], patient=["p", "p", "", "q", ""])
    task = load_task([path], "label", "patient")
    assert list(task.keys) == ["t0", "t3"]
    assert task.left_out == {"no label in 'label'": 2, "no group in 'patient'": 1}


def test_files_in_another_order_are_aligned_by_key(write):
    order = np.array([3, 1, 0, 2])
    a = write("a", np.eye(4), label=list("xxyy"), patient=list("pqrs"))
    b = write("b", np.eye(4)[order], key=[f"t{i}" for i in order], label=["?"] * 4, patient=["?"] * 4)
    task = load_task([a, b], "label", "patient")
    np.testing.assert_array_equal(task.encoders[1].features, np.eye(4))
    assert [e.name for e in task.encoders] == ["a", "b"]


def test_features_of_others_are_compared_by_their_keys(write):
    known = {"label": list("xxyy"), "patient": list("pqrs")}
    ours = write("ours", np.eye(4), **known)
    theirs = write("theirs", np.eye(4)[::-1], shards="keys 1a2b", key=["t3", "t2", "t1", "t0"], **known)
    task = load_task([ours, theirs], "label", "patient")
    np.testing.assert_array_equal(task.encoders[1].features, np.eye(4))


def test_bags(write):
    path = write("e", np.eye(6), slide=list("bbaacc"), label=[1.0, 1, 0, 0, 1, 1], patient=list("qqppqq"))
    task, bags = pool_task(load_task([path], "label", "patient"), "slide")
    assert list(task.keys) == ["a", "b", "c"]
    assert list(bags) == [1, 1, 0, 0, 2, 2]
    assert [task.classes[i] for i in task.labels] == ["0", "1", "1"]
    assert [task.group_names[i] for i in task.groups] == ["p", "q", "q"]


def test_text_of_a_column():
    assert list(text(pd.Series([1.0, np.nan, 2.5]))) == ["1", "", "2.5"]
    assert list(text(pd.Series([" a ", None, "b"]))) == ["a", "", "b"]
    assert list(text(pd.Series([3, 4]))) == ["3", "4"]


def refusal(*arguments):
    """The one line with which a task is refused."""
    with pytest.raises(UserError) as caught:
        load_task(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused(write, tmp_path):
    good = {"label": list("xxyy"), "patient": list("pqrs")}
    a = write("a", np.eye(4), **good)
    assert "no column 'labels' for --label; did you mean 'label'" in refusal([a], "labels", "patient")
    assert "no column 'patients' for --group; did you mean 'patient'" in refusal([a], "label", "patients")
    assert "does not exist" in refusal([tmp_path / "absent.safetensors"], "label", "patient")
    assert "different shard sets" in refusal([a, write("b", np.eye(4), shards="another", **good)], "label", "patient")
    other = write("c", np.eye(4), key=["t0", "t1", "t2", "u"], **good)
    assert "do not hold the same tiles" in refusal([a, other], "label", "patient")
    nan = np.eye(4)
    for value in (np.nan, np.inf, -np.inf, -1e16):
        nan[2, 1] = value
        assert "NaN, infinite or huge features in 1 of 4 rows, the first of tile 't2'" in refusal(
            [write("d", nan, **good)], "label", "patient"
        )
    assert "'t1' twice" in refusal([write("e", np.eye(4), key=["t0", "t1", "t1", "t3"], **good)], "label", "patient")
    assert "nothing is left" in refusal(
        [write("f", np.eye(4), label=[""] * 4, patient=list("pqrs"))], "label", "patient"
    )
    assert "go by the name" in refusal([a, a], "label", "patient")


def test_a_labels_file_that_does_not_fit_is_refused(write, tmp_path):
    path, csv = write("a", np.eye(2), patient=list("pq")), tmp_path / "x.csv"
    for body, said in [
        ("slide,grade\ns0,x\ns0,y\n", "names slide 's0' twice"),
        ("slide,other\ns0,x\n", "no column 'grade'"),
        ("slide,grade\nz,x\n", "names no slide of the embeddings"),
        ("slide,grade\n", "no rows"),
    ]:
        csv.write_text(body)
        assert said in refusal([path], "grade", "patient", csv, "slide")


def test_bags_that_mix_labels_or_groups_are_refused(write):
    path = write("a", np.eye(4), slide=list("aabb"), label=list("xyyy"), patient=list("ppqr"))
    task = load_task([path], "label", "patient")
    with pytest.raises(UserError, match="bag 'a' holds tiles of two labels"):
        pool_task(task, "slide")
    task.labels[:2] = 1
    with pytest.raises(UserError, match="bag 'b' holds tiles of two groups"):
        pool_task(task, "slide")
    with pytest.raises(UserError, match="no column 'slides' for --bag; did you mean 'slide'"):
        pool_task(task, "slides")


def test_classes_that_are_numbers_are_in_their_order(write):
    path = write("e", np.eye(4), label=["10", "2", "1", "2"], patient=list("pqrs"))
    task = load_task([path], "label", "patient")
    assert task.classes == ["1", "2", "10"]
    assert list(task.labels) == [2, 1, 0, 1]
    assert task.ordered
    assert not load_task([write("f", np.eye(2), label=["1", "x"], patient=list("pq"))], "label", "patient").ordered


def test_what_identifies_a_tile(write):
    same = {"crc32": np.array([7, 7, 7], dtype=np.uint32), "size": np.array([9, 9, 8], dtype=np.int32)}
    path = write("e", np.eye(3), label=list("xyx"), site=list("aab"), patient=["p", "", "q"], **same)
    found = identities(load_task([path], "label", "site"), "site")
    assert list(found) == ["site", "patient", "slide", "image"]
    assert list(found["patient"]) == ["p", "", "q"]
    assert found["image"][0] == found["image"][1] != found["image"][2]
