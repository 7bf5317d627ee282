"""Shipped suites: each is valid, of public data that is known, and asks for columns that the data is said to have."""

import pytest

from eosin import configs
from eosin.eval.datasets import DATASETS
from eosin.eval.suite_file import load_suite

# What the tasks of public data are to be split by: nothing finer, since that would leak.
GROUPS = {"lc25000": {"group", "pseudo_slide"}, "pannuke": {"fold"}}


def test_the_shipped_suites():
    assert configs.names(configs.SUITES) == ["public", "tiles"]
    assert not set(configs.names()) & set(configs.names(configs.SUITES))


@pytest.mark.parametrize("name", configs.names(configs.SUITES))
def test_a_suite_is_a_screen_of_known_data(name):
    lines = configs.path(name, configs.SUITES).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 65
    assert max(map(len, lines)) <= 120
    assert "Our choice" in lines[0]
    suite = load_suite(name)
    assert suite.name == name
    for task in suite.tasks.values():
        known = DATASETS[task.data]
        assert (task.group or known.group) in GROUPS.get(task.data, {known.group})
        assert task.split != "fixed" or known.side
        assert task.about.endswith(".")


def test_tiles_are_split_by_copies_by_pseudo_slides_and_by_blocks():
    tasks = load_suite("tiles").tasks.values()
    assert [(t.data, t.group, t.split) for t in tasks] == [
        ("lc25000", "group", "kfold"),
        ("lc25000", "pseudo_slide", "kfold"),
        ("pbc", "id_block", "kfold"),
    ]


def test_public_names_every_public_set_and_scores_its_official_side():
    tasks = load_suite("public").tasks
    assert {task.data for task in tasks.values()} == set(DATASETS)
    official = {name for name, known in DATASETS.items() if known.side}
    assert {t.data for t in tasks.values() if t.split == "fixed"} | {"pannuke"} == official
