import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import yaml
from PIL import Image

from eosin.data_tools.errors import UserError
from eosin.data_tools.results import read_results
from eosin.data_tools.shards import ShardSet
from eosin.eval import suite as suites
from eosin.eval.suite import COMPARED, WATCHED, find_data, held
from eosin.eval.suite_file import load_suite
from eosin.launch.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ENCODERS = ("color", "timm:test_vit")


@pytest.fixture
def suite(tmp_path, tiny_shards):
    """Write a suite of the given tasks, each of which is of the tiny shards where it does not say otherwise."""

    def suite(embedding=None, **tasks) -> Path:
        common = {"label": "label", "group": "patient", "folds": 2, "probes": [{"knn": {"k": [3]}}]}
        full = {
            name: ({} if "embeddings" in task else {"data": str(tiny_shards)}) | common | task
            for name, task in tasks.items()
        }
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({"name": "mine", "embedding": embedding or {}, "tasks": full}))
        return path

    return suite


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a suite into RESULTS, by default without its page; its exit code, what was printed and what was said."""
    draw = suites.write_comparison

    def run(suite, *arguments, encoders=ENCODERS, page=False):
        monkeypatch.setattr(suites, "write_comparison", draw if page else lambda *_: None)
        capsys.readouterr()
        given = [*(["--encoders", *encoders] if encoders else []), "--out", str(tmp_path / "results"), *arguments]
        code = main(["eval", "suite", str(suite), *map(str, given)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def answers(results):
    """Every result's content and its time of writing, by its path."""
    found = [path for path in (results / "results").glob("*/*.json") if not path.name.endswith(".asked.json")]
    return {p.relative_to(results / "results").as_posix(): (p.read_text(), p.stat().st_mtime_ns) for p in found}


def test_a_suite_says_what_the_single_commands_say(suite, run, tiny_shards, tmp_path):
    asked = [{"knn": {"k": [1, 3]}}, {"linear": {"preset": "uni-linear"}}, "retrieval"]
    code, _, _ = run(suite(a={"probes": asked, "by": ["site"], "seed": 7}, b={"group": "slide"}))
    assert code == 0
    files = []
    for encoder in ENCODERS:
        files.append(str(tmp_path / f"{encoder.replace(':', '-')}.safetensors"))
        assert main(["embed", encoder, str(tiny_shards), "--out", files[-1]]) == 0
    of_both = ["--label", "label", "--group", "patient", "--seed", "7", "--out"]
    folds = ["--folds", "2", "--by", "site"]
    for name, command in {
        "knn": ["knn", *files, "--k", "1", "3", *folds],
        "linear-uni-linear": ["linear", *files, "--preset", "uni-linear", *folds],
        "retrieval": ["retrieval", *files],
    }.items():
        assert main(["eval", *command, *of_both, str(tmp_path / f"{name}.json")]) == 0
        figures, predictions = read_results(tmp_path / f"{name}.json")
        found, samples = read_results(tmp_path / f"results/results/a/{name}.json")
        assert found == figures
        pd.testing.assert_frame_equal(samples, predictions)
    assert read_results(tmp_path / "results/results/b/knn.json")[0]["group"] == "slide"
    # Both tasks are of one data, so there is one file an encoder.
    assert len(list((tmp_path / "results").rglob("*.safetensors"))) == 2


def test_the_closing_table_and_the_page_hold_every_task_and_encoder(suite, run, tmp_path):
    code, out, _ = run(suite(first={"probes": [{"knn": {"k": [1, 3]}}]}, second={"group": "slide"}), page=True)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["metric", "color", "random:test_vit", "chance"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["first knn k = 1", "first knn k = 3", "second knn"]
    figures = read_results(tmp_path / "results/results/first/knn.json")[0]["encoders"]
    value = {(e["encoder"], e["variant"]): e["metrics"]["balanced_accuracy"] for e in figures}
    for line, variant in zip(lines[1:3], ("k = 1", "k = 3")):
        cells = [cell for cell in line.split("  ") if "[" in cell]
        of = [value[encoder, variant] for encoder in ("color", "random:test_vit")]
        assert [c.strip() for c in cells] == [f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in of]
        assert line.split()[-1] == "0.500"
    page = (tmp_path / "results/index.html").read_text()
    assert all(word in page for word in ("first", "second", "random:test_vit"))


def test_only_what_changed_is_done_again(suite, run, tiny_shards, tmp_path):
    data = str(shutil.copytree(tiny_shards, tmp_path / "shards"))
    tasks = {"a": {"data": data}, "b": {"data": data, "probes": [{"knn": {"k": [5]}}, "retrieval"]}}
    assert run(suite(**tasks))[0] == 0
    results = tmp_path / "results"
    first = answers(results)
    assert len(first) == 3
    assert run(suite(**tasks))[0] == 0
    assert answers(results) == first
    tasks["b"]["probes"][0] = {"knn": {"k": [6]}}
    assert run(suite(**tasks))[0] == 0
    second = answers(results)
    assert {name for name in second if second[name] != first[name]} == {"b/knn.json"}
    assert json.loads(second["b/knn.json"][0])["parameters"]["k"] == [6]
    assert run(suite(**tasks, embedding={"pooling": "mean"}))[0] == 0
    third = answers(results)
    assert all(third[name][1] > second[name][1] for name in third)
    assert json.loads(third["a/knn.json"][0])["encoders"][1]["fingerprint"]["pooling"] == "mean"
    slides = ShardSet(data).slides().assign(label=["y", "x", "x", "y"])
    slides.to_parquet(Path(data) / "slides.parquet", index=False)
    assert run(suite(**tasks, embedding={"pooling": "mean"}))[0] == 0
    truth = read_results(results / "results/a/knn.json")[1].set_index("key").label
    assert {key[:2]: label for key, label in truth.items()} == {"s0": "y", "s1": "x", "s2": "x", "s3": "y"}


# Runs a suite in children that end, as by kill -9, at one of the next times they rename or remove something; and one
# that does not.
DYING = """
import json, os, sys
from pathlib import Path
import pyarrow.parquet, sklearn.model_selection, eosin.eval.retrieval, eosin.ssl.metrics  # once for all children
from eosin.eval import suite
from eosin.eval.suite_file import load_suite
suite.write_comparison = lambda *_: None
asked, out = load_suite(sys.argv[1]), Path(sys.argv[2])

def work(folder, changes):
    left = [changes]
    def dying(real):
        def call(path, *args, **kwargs):
            left[0] -= path.exists()
            if left[0] == 0:
                os._exit(9)
            return real(path, *args, **kwargs)
        return call
    for name in ("replace", "unlink"):
        setattr(Path, name, dying(getattr(Path, name)))
    suite.run_suite(asked, ["color"], {}, out / folder)
    os._exit(0)

def child(*given):
    pid = os.fork()
    if pid == 0:
        work(*given)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

codes = []
while (not codes or codes[-1] == 9) and len(codes) < 20:
    codes.append(child("killed", 2 + 4 * len(codes)))
print(json.dumps([codes, child("whole", -1)]))
"""


def test_killed_again_and_again_it_ends_with_the_same_results(suite, tmp_path):
    path = suite(a={}, b={"group": "slide", "probes": ["retrieval"]})
    command = [sys.executable, "-c", DYING, str(path), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    killed, whole = json.loads(ran.stdout.splitlines()[-1])
    assert whole == 0
    assert killed == [9] * (len(killed) - 1) + [0]
    assert len(killed) > 2
    found, truth = (
        {p.relative_to(tmp_path / end).as_posix(): p.read_bytes() for p in (tmp_path / end).rglob("*") if p.is_file()}
        for end in ("killed", "whole")
    )
    assert {name: data for name, data in found.items() if ".partial-" not in name} == truth
    assert len([name for name in truth if name.endswith(".predictions.parquet")]) == 2


def test_a_mistake_in_one_task_is_listed_and_the_others_go_on(suite, run, tmp_path):
    tasks = {
        "leaks": {"group": "key"},  # each tile by itself, so that slides stand on both sides
        "alike": {"label": "stain"},
        "absent": {"label": "grade"},
        "gone": {"embeddings": [str(tmp_path / "gone.safetensors")]},
        "fine": {},
    }
    code, _, said = run(suite(**tasks), encoders=("color",), page=True)
    assert code == 3
    assert list(answers(tmp_path / "results")) == ["fine/knn.json"]
    known = json.loads((tmp_path / "results/suite.json").read_text())["tasks"]
    whys = {task["name"]: [refusal["why"] for refusal in task["refused"]] for task in known}
    assert "would stand on both sides of a split" in whys["leaks"][0]
    assert "has one class only ('H&E')" in whys["alike"][0]
    assert "no column 'grade'" in whys["absent"][0]
    assert "gone.safetensors does not exist" in whys["gone"][0]
    assert whys["fine"] == []
    assert "leaks: knn was refused: " in said
    assert "would stand on both sides of a split" in (tmp_path / "results/index.html").read_text()


def test_what_is_refused_now_leaves_no_earlier_answer_in_sight(suite, run, tmp_path):
    assert run(suite(a={}), encoders=("color",))[0] == 0
    first = answers(tmp_path / "results")
    assert run(suite(a={"label": "stain"}), encoders=("color",))[0] == 3
    assert [path.name for path in (tmp_path / "results/results/a").iterdir()] == [".earlier"]
    # Asked again, the earlier answer is back and nothing is computed.
    assert run(suite(a={}), encoders=("color",))[0] == 0
    assert answers(tmp_path / "results") == first
    assert run(suite(a={"label": "stain"}), encoders=("color",))[0] == 3
    assert run(suite(a={"folds": 3}), encoders=("color",))[0] == 0  # another question is not answered by it
    assert json.loads(answers(tmp_path / "results")["a/knn.json"][0])["parameters"]["folds"] == 3


def test_embeddings_that_exist_need_no_encoders(suite, run, write, cohort):
    features, columns = cohort(3.0)
    path = write("good", features, **columns)
    code, out, _ = run(suite(a={"embeddings": [str(path)], "folds": 5}), encoders=())
    assert code == 0
    assert "good" in out.splitlines()[0]
    assert " 0.500 [" not in out
    # The same name and fingerprint, other features: answered again.
    write("good", np.zeros_like(features), **columns)
    code, out, _ = run(suite(a={"embeddings": [str(path)], "folds": 5}), encoders=())
    assert " 0.500 [" in out


@pytest.fixture
def masks(tiny_shards, tmp_path):
    """Masks of the tiny shards: two halves, of another share in each tile."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, key in enumerate(ShardSet(tiny_shards).table()["key"]):
        mask = np.ones((64, 64), np.uint8)
        mask[:, 8 + number :] = 2
        Image.fromarray(mask).save(folder / f"{key}.png")
    (folder / "legend.csv").write_text("value,class\n1,left\n2,right\n")
    return folder


def test_dense_probes_say_what_the_single_command_says(suite, run, tiny_shards, masks, tmp_path):
    tasks = {"places": {"masks": str(masks), "label": None, "probes": [{"dense": {"patches": 300}}]}}
    code, out, _ = run(suite(**tasks), page=True)
    assert code == 0
    command = ["eval", "dense", *ENCODERS, str(tiny_shards), "--masks", str(masks), "--group", "patient"]
    assert main([*command, "--folds", "2", "--patches", "300", "--out", str(tmp_path / "d.json")]) == 0
    figures, predictions = read_results(tmp_path / "d.json")
    found, samples = read_results(tmp_path / "results/results/places/dense.json")
    assert found == figures
    pd.testing.assert_frame_equal(samples, predictions)
    assert found["classes"] == ["left", "right"]
    assert "places dense" in out
    assert f"{found['encoders'][1]['metrics']['dice']['value']:.3f} [" in out
    assert not (tmp_path / "results/embeddings").exists()  # no probe reads any
    page = (tmp_path / "results/index.html").read_text()
    assert "tiles, what is true of them, and what the probe of each encoder tells" in page
    assert "Dice of each class by each encoder" in page
    assert f"--masks {masks} --patches 300 --group patient --folds 2 --seed 0" in page
    first = answers(tmp_path / "results")
    assert run(suite(**tasks))[0] == 0
    assert answers(tmp_path / "results") == first
    (masks / "legend.csv").write_text("value,class\n1,west\n2,east\n")
    assert run(suite(**tasks))[0] == 0
    assert read_results(tmp_path / "results/results/places/dense.json")[0]["classes"] == ["west", "east"]


def test_encoders_without_patch_tokens_are_left_out_of_dense_probes_only(suite, run, masks, tmp_path, monkeypatch):
    (tmp_path / "blind_one.py").write_text("def plain():\n    return lambda images: images.float().mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    given = ("color", "blind_one:plain")
    path = suite(both={"masks": str(masks), "probes": ["dense", {"knn": {"k": [3]}}]})
    code, _, said = run(path, encoders=given, page=True)
    assert code == 3
    both = tmp_path / "results/results/both"
    assert [e["name"] for e in read_results(both / "dense.json")[0]["encoders"]] == ["color"]
    assert len(read_results(both / "knn.json")[0]["encoders"]) == 2
    assert "both: dense of blind_one:plain was left out: 'blind_one:plain' has no patch tokens" in said
    assert "dense of blind_one:plain was left out" in (tmp_path / "results/index.html").read_text().replace(
        "&#39;", "'"
    )
    code, _, said = run(path, encoders=given[1:])
    assert (code, "dense was refused: no encoder has patch tokens" in said) == (3, True)
    assert sorted(p.name for p in both.glob("*.json")) == ["knn.asked.json", "knn.json"]


def test_refusals_speak_of_the_suite_s_keys(suite, run):
    said = run(suite(a={"group": "key"}, b={"folds": 9}), encoders=("color",))[2]
    assert "or give allow_leak 'REASON'" in said
    assert "give folds 4 or fewer" in said
    assert "--" not in said


def blood(folder):
    """A few images as PBC has them: two types, in two blocks of numbers each."""
    rng = np.random.default_rng(0)
    for kind, short, level in (("basophil", "BA", 60), ("platelet", "PLATELET", 180)):
        (folder / kind).mkdir(parents=True)
        for number in range(12):
            image = rng.integers(level, level + 40, (360, 360, 3), dtype=np.uint8)
            name = f"{short}_{1000 * (number % 2) + number + 1}.jpg"
            (folder / kind / name).write_bytes(simplejpeg.encode_jpeg(image, 90))
    return folder


def test_public_data_is_packed_once_and_what_has_no_path_is_skipped(suite, run, tmp_path):
    common = {"label": None, "group": None}
    path = suite(cells={"data": "pbc"} | common, lungs={"data": "lc25000"} | common)
    place = blood(tmp_path / "PBC_dataset_normal_DIB")
    code, _, said = run(path, "--data", f"pbc={place}", encoders=("color",))
    assert code == 0
    assert "skipped: lungs, its data has no path; give --data lc25000=PATH: Download LC25000.zip" in said
    figures, _ = read_results(tmp_path / "results/results/cells/knn.json")
    assert (figures["label"], figures["group"], figures["n"]) == ("label", "id_block", 24)
    assert figures["encoders"][0]["metrics"]["balanced_accuracy"]["value"] == 1.0  # as color tells them apart
    before = answers(tmp_path / "results")
    shutil.rmtree(place)
    assert run(path, encoders=("color",))[0] == 0  # packed already, so that no path is needed
    assert answers(tmp_path / "results") == before


def test_nothing_to_do_is_refused_with_how_to_get_the_data(suite, run, tmp_path):
    code, _, said = run(suite(cells={"data": "pbc"}), encoders=("color",))
    assert code == 2
    assert "give --data pbc=PATH" in said
    assert "https://data.mendeley.com" in said
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"lable": "x"}, "there is no key 'tasks.a.lable'; did you mean 'label'?"),
        ({"probes": ["knnn"]}, "tasks.a.probes.0: there is no probe 'knnn'; did you mean 'knn'?"),
        ({"probes": [{"knn": {"kk": [1]}}]}, "tasks.a.probes.0: there is no key 'knn.kk'; did you mean 'k'?"),
        ({"probes": [{"knn": {"k": ["one"]}}]}, "tasks.a.probes.0: knn.k.0: 'one' is not valid: input should be a"),
        ({"probes": [{"linear": {"preset": "uni-liner"}}]}, "there is no 'uni-liner'; did you mean 'uni-linear'?"),
        ({"probes": [{"knn": {"preset": "uni-knn", "k": [1]}}]}, "knn.preset: a preset has its own k"),
        ({"probes": ["knn", {"knn": {"k": [1]}}]}, "tasks.a: probe 'knn' is asked twice"),
        ({"by": [""]}, "tasks.a.by.0: '' is not valid"),
        ({"probes": []}, "tasks.a.probes: [] is not valid: list should have at least 1 item"),
        ({"split": "kfolds"}, "tasks.a.split: 'kfolds' is not valid: input should be 'kfold'"),
        ({"folds": "5"}, "tasks.a.folds: '5' is not valid: input should be a valid integer"),
        ({"masks": "m"}, "tasks.a: masks are for the probe 'dense', which is not asked"),
        ({"probes": ["dense"]}, "tasks.a: probe 'dense' needs masks, a folder of annotations"),
        ({"probes": [{"dense": {"masks": "m"}}]}, "there is no key 'dense.masks'"),
        (
            {"data": None, "embeddings": ["e"], "masks": "m", "probes": ["dense"]},
            "'dense' looks at patch tokens, which",
        ),
        ({"data": None}, "tasks.a: give either data (a shard set or a public set) or embeddings"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(suite, run, change, complaint):
    code, out, said = run(suite(a=change))
    assert (code, out) == (2, "")
    assert len(said.splitlines()) == 1
    assert complaint in said


def test_other_mistakes_are_one_line(suite, run, tmp_path):
    path = suite(a={})
    for arguments, encoders, complaint in [
        (["--data", "b=x"], ENCODERS, "--data b: no task of suite 'mine' has this data"),
        (["--data", "b"], ENCODERS, "--data b is not NAME=PATH"),
        ([], (), "give --encoders"),
        ([], ["nothing"], "no encoder 'nothing'"),
        (["--once"], ENCODERS, "--once is for --watch RUN"),
        (["--watch", "r"], ENCODERS, "leave --encoders out"),
    ]:
        code, _, said = run(path, *arguments, encoders=encoders)
        assert code == 2
        assert complaint in said.splitlines()[-1]
    assert "'../a' is not a name; use letters" in run(suite(**{"../a": {}}))[2]
    assert run(suite(a={"data": "lc25001"}))[2].endswith("did you mean 'lc25000'?\n")
    assert run("tile")[2].endswith("did you mean 'tiles'?\n")
    assert "encoders" not in [p.name for p in (tmp_path / "results").rglob("*")]


def test_a_folder_of_something_else_or_in_use_is_refused(suite, tmp_path):
    asked = load_suite(str(suite(a={})))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no suite's results"), held(tmp_path / "other", asked, WATCHED):
        pass
    with held(tmp_path / "mine", asked, WATCHED):
        with pytest.raises(UserError, match="another process works on"), held(tmp_path / "mine", asked, WATCHED):
            pass
        assert load_suite(str(tmp_path / "mine/suite.yaml")) == asked
    for name, other in ((WATCHED, COMPARED), (COMPARED, WATCHED)):
        (tmp_path / "mine" / name).touch()
        with pytest.raises(UserError, match=f"holds .*{name}"), held(tmp_path / "mine", asked, name):
            pass
        with held(tmp_path / "mine", asked, other):
            (tmp_path / "mine" / name).unlink()


def test_data_by_a_name_of_the_users_own(suite, tiny_shards, tmp_path):
    asked = load_suite(str(suite(a={"data": "ours"})))
    assert find_data(asked, {"ours": tiny_shards}, tmp_path) == {"ours": tiny_shards}
    with pytest.raises(UserError, match="there is no folder 'ours', nor a public set"):
        find_data(asked, {}, tmp_path)
