"""The layout's promises: imports go down only, Python's ssl is not shadowed, verbs explain themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from eosin import configs
from eosin.launch.cli import VERBS

ROOT = Path(__file__).parent.parent
ORDER = ["configs", "data_tools", "ssl", "eval", "launch"]
SOURCES = [p for room in ORDER for p in (ROOT / room).rglob("*.py")]


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "eosin":
            names = [f"eosin.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("eosin.")}
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = {"configs": set(), "data_tools": {"data_tools"}}.get(room, set(ORDER[: ORDER.index(room) + 1]))
    assert imported_rooms(path.read_text()) <= allowed


def test_the_layering_check_sees_an_upward_import():
    assert imported_rooms("def f():\n    from eosin.launch.cli import main") == {"launch"}
    assert imported_rooms("from eosin import configs") == {"configs"}


def test_no_package_file_where_it_would_shadow():
    assert not (ROOT / "ssl" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_command_line_imports_nothing_heavy():
    code = "import sys, eosin.launch.cli; print(*sorted({'torch', 'pandas', 'numpy', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_contents_fit_a_screen(capsys):
    from eosin.launch.cli import main

    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 110 for line in lines)
    assert all(any(line.strip().startswith(verb) for line in lines) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(verb, capsys):
    from eosin.launch.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 50
    assert f"eosin {verb}" in out.split("example", 1)[1]


def test_unknown_verb_is_one_line(capsys):
    from eosin.launch.cli import main

    assert main(["trian"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "eosin: there is no verb 'trian'; did you mean 'train'?; see 'eosin --help'"
    ]


def test_full_disk_is_one_line_and_exit_code_2(capsys, monkeypatch):
    import errno

    from eosin.launch import cli

    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/tiles.tar")

    monkeypatch.setattr(cli, "run", full)
    assert cli.main(["tile"]) == 2
    assert "No space left on device (/somewhere/tiles.tar)" in capsys.readouterr().err


@pytest.mark.parametrize("name", configs.names())
def test_every_recipe_is_valid_and_fits_a_screen(name):
    from eosin.ssl.config import load_config

    load_config(name, ["data.shards=s", "run.dir=r"])
    assert len(configs.path(name).read_text().splitlines()) <= 50
