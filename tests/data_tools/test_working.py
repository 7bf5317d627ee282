"""The folder of unfinished work against a second process, other settings and a kill."""

import subprocess
import sys

import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.working import publish, tidy, working_folder


def test_work_is_seen_only_when_it_is_done(tmp_path):
    out = tmp_path / "out"
    with working_folder(out, {"a": 1}) as folder:
        (folder / "x").mkdir()
        (folder / "x" / "y").write_text("z")
        assert not out.exists()
        publish(folder, out)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "x", "y"}


def test_what_an_error_stops_stays_and_is_gone_on_with(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="full"), working_folder(out, {"a": 1}) as folder:
        (folder / "kept").touch()
        (folder / ".part.partial-123.tar").touch()  # of a writer that was killed
        raise OSError("full")
    with working_folder(out, {"a": 1}) as folder:
        assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] in (
            ["kept", "settings.json"],
            ["settings.json", "kept"],
        )
        assert not list(folder.glob(".part*"))
    with pytest.raises(UserError, match=r"unfinished work of other settings \(a: 1 there, 2 asked\)"):
        working_folder(out, {"a": 2}).__enter__()
    assert (tmp_path / "out.unfinished" / "kept").exists()


def test_bad_input_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing"), working_folder(tmp_path / "out", {}) as folder:
        (folder / "kept").touch()
        raise UserError("nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_never_work_on_one_output(tmp_path):
    code = "import sys; from eosin.data_tools.working import working_folder; from pathlib import Path\n"
    code += "with working_folder(Path(sys.argv[1]), {}): print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is making"):
            working_folder(tmp_path / "out", {}).__enter__()
        other.kill()
    with working_folder(tmp_path / "out", {}) as folder:
        assert folder.exists()


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match="already holds something else"):
        working_folder(tmp_path / "out", {}).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_after_the_rename_left_is_removed(tmp_path):
    (tmp_path / "settings.json").touch()
    tidy(tmp_path)
    tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []
