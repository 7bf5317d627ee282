import subprocess
import sys
import textwrap
import time

import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_dir, atomic_path, read_csv, read_json, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "out") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_final_folder(tmp_path):
    code = f"""
        import time
        from eosin.data_tools.files import atomic_dir
        with atomic_dir({str(tmp_path / "out")!r}) as temporary:
            (temporary / "x").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "writing"
    process.kill()
    process.wait()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1  # what the killed process could not remove
    with atomic_dir(tmp_path / "out") as temporary:
        (temporary / "x").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "x").read_text() == "whole"


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="already holds something else"), atomic_dir(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "thesis.doc").read_text() == "mine"


def test_nan_never_reaches_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_csv_without_the_named_column_names_those_it_has(tmp_path):
    (tmp_path / "m.csv").write_text("path,klass\na,b\n")
    with pytest.raises(UserError, match=r"no column 'label'; its columns are: path, klass"):
        read_csv(tmp_path / "m.csv", ["path", "label"])


def test_ragged_csv_names_the_line(tmp_path):
    (tmp_path / "m.csv").write_text("path,label\na,b\nc\n")
    with pytest.raises(UserError, match="line 3"):
        read_csv(tmp_path / "m.csv", ["path"])


def test_csv_with_two_columns_of_one_name_is_refused_unless_they_have_none(tmp_path):
    (tmp_path / "m.csv").write_text("path,label,label\na,b,c\n")
    with pytest.raises(UserError, match="two columns 'label'"):
        read_csv(tmp_path / "m.csv", [])
    (tmp_path / "m.csv").write_text("path,label,,\na,b,,\n")
    assert read_csv(tmp_path / "m.csv", ["label"])[0]["label"] == "b"
    with pytest.raises(UserError, match="is no file"):
        read_csv(tmp_path, [])


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_broken_json_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json", "a thing")
    assert "a.json" in str(error.value)
    assert "\n" not in str(error.value)
