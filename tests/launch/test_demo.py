"""The demo, small: the whole road in one command, on phantoms and on a real slide."""

import json

import pytest

from eosin.launch.cli import main


@pytest.mark.slow
def test_the_demo_goes_the_whole_road_and_is_left_alone_when_done(tmp_path, capfd):
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--patients", "15", "--steps", "20"]
    assert main(arguments) == 0
    page = (out / "report.html").read_text()
    assert "synthetic" in page
    assert "not trained on: shards-ihc" in page
    for probe in ("knn", "linear", "mil"):
        results = json.loads((out / "results" / f"{probe}.json").read_text())
        assert {e["name"].split(" + ")[0] for e in results["encoders"]} == {"run", "random:run", "color"}
        # Matched sets of patients are never split, so the group is the set.
        assert (results["group"], results["groups"]) == ("block", 5)
    assert (out / "release" / "model.safetensors").is_file()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")} | {
        p: p.stat().st_mtime_ns for p in out.rglob("*.json")
    }
    assert main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    capfd.readouterr()
    assert main([*arguments[:-1], "21"]) == 2
    assert "holds a demo of other settings (steps)" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo_on_a_real_slide_says_why_it_has_no_probes(tmp_path, capfd, real_data):
    out = tmp_path / "mine"
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "CMU-1-Small-Region.svs").symlink_to(
        (real_data / "wsi" / "CMU-1-Small-Region.svs").resolve()
    )
    assert main(["demo", "--out", str(out), "--slides", str(tmp_path / "slides"), "--steps", "20"]) == 0
    assert "no probes: the slides have no column 'label'" in capfd.readouterr().out
    assert (out / "report.html").is_file()
    assert (out / "release" / "config.json").is_file()


def test_a_demo_in_a_folder_that_holds_something_else_is_refused(tmp_path, capfd):
    (tmp_path / "thesis.doc").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path / "new"), "--slides", str(tmp_path / "absent")]) == 2
    assert main(["demo", "--out", str(tmp_path / "new"), "--table", "t.csv"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
