import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from eosin.data_tools.embeddings import read_embeddings
from eosin.data_tools.errors import UserError
from eosin.eval.contamination import contamination
from eosin.eval.precomputed import import_features
from eosin.eval.task import load_task
from eosin.launch.cli import main

RNG = np.random.default_rng(0)


def write_hdf5(file, features, coords, **attributes):
    with h5py.File(file, "w") as archive:
        archive["features"] = features
        archive["coords"] = coords
        archive["coords"].attrs.update(attributes)


@pytest.fixture
def cohort(tmp_path):
    """Two slides as TRIDENT writes them, embedded by two encoders: 3 and 2 tiles."""
    places = {"a.1": np.array([[0, 0], [512, 0], [0, 512]]), "b 2": np.array([[0, 0], [1024, 512]])}
    features = {}
    for encoder, width in (("uni", 6), ("virchow", 4)):
        (tmp_path / encoder).mkdir()
        for slide, xy in places.items():
            found = features[encoder, slide] = RNG.normal(size=(len(xy), width)).astype(np.float32)
            shown = found[None] if slide == "b 2" else found  # as some encoders of slides write it
            attributes = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40}
            write_hdf5(tmp_path / encoder / f"{slide}.h5", shown, xy, **attributes, target_magnification=20)
    return tmp_path, places, features


def test_a_folder_of_slides_keeps_every_row_where_it_was(cohort):
    folder, places, features = cohort
    out = folder / "e.safetensors"
    (folder / "slides.csv").write_text("slide,patient,label\nb 2,p2,tumor\na.1,p1,normal\nother,p9,tumor\n")
    arguments = [f"precomputed:{folder / 'uni'}", "--out", str(out), "--slides", str(folder / "slides.csv")]
    assert main(["embed", *arguments]) == 0
    found = read_embeddings(out)
    np.testing.assert_array_equal(found.features, np.concatenate([features["uni", "a.1"], features["uni", "b 2"]]))
    assert found.features.dtype == np.float32
    assert found.name == "uni"
    assert list(found.table["slide"]) == ["a.1"] * 3 + ["b 2"] * 2
    assert list(found.table["patient"]) == ["p1"] * 3 + ["p2"] * 2
    assert list(found.table["label"]) == ["normal"] * 3 + ["tumor"] * 2
    np.testing.assert_array_equal(found.table[["x", "y"]], np.concatenate(list(places.values())))
    assert found.table["mpp"].isna().all()
    assert list(found.table["key"][3:]) == ["b=202_0_0", "b=202_1024_512"]
    before = out.stat().st_mtime_ns
    assert main(["embed", *arguments]) == 0
    assert out.stat().st_mtime_ns == before
    assert main(["embed", *arguments, "--name", "another"]) == 2


def test_known_scale_gives_the_keys_of_tiling(cohort):
    folder, places, features = cohort
    (folder / "one").mkdir()
    write_hdf5(folder / "one" / "a.1.h5", features["uni", "a.1"], places["a.1"], mpp=0.5)
    import_features(folder / "one", folder / "e.safetensors")
    table = read_embeddings(folder / "e.safetensors").table
    assert list(table["key"]) == ["a=2e1_0_0_500", "a=2e1_512_0_500", "a=2e1_0_512_500"]
    assert list(table["mpp"]) == [0.5] * 3


def test_encoders_on_the_same_tiles_are_compared_and_on_others_not(cohort):
    folder, places, features = cohort
    (folder / "slides.csv").write_text("slide,label\nb 2,tumor\na.1,normal\n")
    paths = [folder / "uni.safetensors", folder / "virchow.safetensors"]
    for path in paths:
        import_features(folder / path.stem, path, folder / "slides.csv")
    task = load_task(paths, "label", "slide")
    assert [e.features.shape for e in task.encoders] == [(5, 6), (5, 4)]
    # In one file, of another kind and in another order, they are the same tiles.
    flat = np.concatenate([features["virchow", slide] for slide in places])
    slides = np.repeat(["a.1", "b 2"], [3, 2])
    np.savez(
        folder / "one.npz", features=flat[::-1], slide=slides[::-1], coords=np.concatenate(list(places.values()))[::-1]
    )
    import_features(folder / "one.npz", folder / "one.safetensors", folder / "slides.csv")
    other = load_task([paths[0], folder / "one.safetensors"], "label", "slide").encoders[1]
    np.testing.assert_array_equal(other.features, flat)
    (folder / "uni" / "b 2.h5").unlink()
    import_features(folder / "uni", folder / "fewer.safetensors", folder / "slides.csv")
    with pytest.raises(UserError, match="do not hold the same tiles"):
        load_task([folder / "fewer.safetensors", paths[1]], "label", "slide")


def test_content_decides_the_fingerprint_and_the_place_does_not(cohort):
    folder, _, _ = cohort
    moved = shutil.copytree(folder / "uni", folder / "elsewhere" / "uni")
    prints = []
    for number, path in enumerate((folder / "uni", moved, moved)):
        if number == 2:
            with h5py.File(moved / "a.1.h5", "r+") as archive:
                archive["features"][0, 0] += 1
        import_features(path, folder / f"{number}.safetensors")
        prints.append(read_embeddings(folder / f"{number}.safetensors").encoder)
    assert prints[0] == prints[1] != prints[2]
    assert prints[0]["shards"] == prints[2]["shards"]


def test_nothing_that_leads_out_of_an_hdf5_file_is_read(cohort):
    folder, _, _ = cohort
    file, secret = folder / "uni" / "a.1.h5", folder / "secret.h5"
    with h5py.File(secret, "w") as other:
        other["label"] = ["secret"] * 3
        other["numbers"] = np.arange(3.0)
    (folder / "bytes").write_bytes(np.arange(3.0).tobytes())
    with h5py.File(file, "a") as archive:
        archive["label"] = h5py.ExternalLink(str(secret), "label")
        archive["site"] = h5py.SoftLink("/label")
        archive.create_dataset("raw", (3,), "f8", external=[(str(folder / "bytes"), 0, 24)])
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "numbers", (3,))
        archive.create_virtual_dataset("virtual", layout)
        archive["grade"] = ["low", "high", "low"]
    out = folder / "e.safetensors"
    assert main(["embed", f"precomputed:{file}", "--out", str(out)]) == 0
    table = read_embeddings(out).table
    assert list(table["grade"]) == ["low", "high", "low"]
    assert table.columns.isin(["label", "site", "raw", "virtual"]).sum() == 0
    with h5py.File(file, "a") as archive:
        del archive["features"]
        archive["features"] = h5py.ExternalLink(str(folder / "uni" / "b 2.h5"), "features")
    with pytest.raises(UserError, match="its features lie elsewhere, behind a link"):
        import_features(file, folder / "f.safetensors")


def test_npz_brings_its_columns(tmp_path):
    features = RNG.normal(size=(4, 3)).astype(np.float16)
    names = np.array(["x/1.png", "x/2.png", "y/1.png", "y/2.png"])
    patients = np.array([b"p1", b"p1", b"p2", b"p2"])
    scalar = np.array("resnet")
    np.savez(
        tmp_path / "e.npz", embeddings=features, labels=[1, 0, 1, 0], filenames=names, patient=patients, model=scalar
    )
    import_features(tmp_path / "e.npz", tmp_path / "e.safetensors", name="mine")
    found = read_embeddings(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(found.features, features.astype(np.float32))
    assert found.name == "mine"
    assert list(found.table["key"]) == list(names)
    assert list(found.table["label"]) == [1, 0, 1, 0]
    assert list(found.table["patient"]) == ["p1", "p1", "p2", "p2"]
    # Rows of one file need not be of one slide, so that a slide of all of them would be on both sides of each split.
    assert set(found.table["slide"]) == {""}
    assert found.table["x"].isna().all()


def test_tensors_of_torch_and_safetensors(tmp_path):
    for name in ("clam", "flat"):
        (tmp_path / name).mkdir()
    expected = {}
    for slide in ("s1", "s2"):
        found = torch.from_numpy(RNG.normal(size=(2, 3))).to(torch.bfloat16)
        expected[slide] = found.float().numpy()
        torch.save(found, tmp_path / "clam" / f"{slide}.pt")
        coords = np.array([[0, 0], [7, 0]])
        save_file({"features": expected[slide], "coords": coords}, tmp_path / "flat" / f"{slide}.safetensors")
    for name in ("clam", "flat"):
        import_features(tmp_path / name, tmp_path / f"{name}.safetensors")
        found = read_embeddings(tmp_path / f"{name}.safetensors")
        np.testing.assert_array_equal(found.features, np.concatenate(list(expected.values())))
    assert list(found.table["key"]) == ["s1_0_0", "s1_7_0", "s2_0_0", "s2_7_0"]
    assert list(read_embeddings(tmp_path / "clam.safetensors").table["key"]) == ["s1_0", "s1_1", "s2_0", "s2_1"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_what_is_broken_is_one_line_and_leaves_nothing(cohort, monkeypatch, capsys):
    folder, places, features = cohort
    monkeypatch.chdir(folder)
    good, xy = features["uni", "a.1"], places["a.1"]
    torch.save(Evil(), "evil.pt")
    np.savez("evil.npz", features=np.array([Evil()], dtype=object))
    (folder / "cut.h5").write_bytes((folder / "uni" / "a.1.h5").read_bytes()[:500])
    np.savez("none.npz", other=good)
    np.savez("flat.npz", features=good[0])
    np.savez("nan.npz", features=np.where(good > 0, np.nan, good))
    np.savez("twice.npz", features=good, keys=["a", "b", "a"])
    write_hdf5("short.h5", good, xy[:2])
    write_hdf5("scale.h5", good, xy, mpp=np.inf)
    np.savez("words.npz", features=good, x=["a", "b", "c"], y=[1, 2, 3])
    np.savez("void.npz", features=good[:, :0])
    np.savez("bytes.npz", features=good, slide=[b"\xff", b"a", b"b"])
    np.savez("double.npz", features=good, label=[1, 2, 3], labels=[3, 2, 1])
    save_file({"features": good, "column/x": np.arange(3)}, "ours.safetensors")
    for name in ("mixed", "nested/h5_files", "empty", "widths"):
        (folder / name).mkdir(parents=True)
    shutil.copy("uni/a.1.h5", "mixed/a.h5")
    shutil.copy("flat.npz", "mixed/b.npz")
    shutil.copy("uni/a.1.h5", "nested/h5_files/a.h5")
    shutil.copy("uni/a.1.h5", "widths/a.h5")
    shutil.copy("virchow/a.1.h5", "widths/b.h5")
    (folder / "few.csv").write_text("slide\na.1\n")
    (folder / "notes.txt").write_text("")
    uni = "precomputed:uni"
    for arguments, said in [
        (["precomputed:evil.pt"], "evil.pt is not readable as pt without unpickling"),
        (["precomputed:evil.npz"], "evil.npz is not readable as npz without unpickling"),
        (["precomputed:cut.h5"], "cut.h5 is not readable as h5"),
        (["precomputed:none.npz"], "holds no features or embeddings or feats; it has: other"),
        (["precomputed:flat.npz"], "features is float32 of shape [6], not numbers [N, D]"),
        (["precomputed:nan.npz"], "values that are not finite in 3 of 3 rows"),
        (["precomputed:twice.npz"], "two rows of the key 'a'"),
        (["precomputed:short.h5"], "coords of shape [2, 2] do not belong to 3 features"),
        (["precomputed:scale.h5"], "scale.h5: mpp holds inf, which cannot be"),
        (["precomputed:words.npz"], "words.npz: x holds what is no number"),
        (["precomputed:void.npz"], "features is float32 of shape [3, 0], not numbers"),
        (["precomputed:bytes.npz"], "bytes.npz holds a text that is not UTF-8"),
        (["precomputed:double.npz"], "holds the column 'label' twice"),
        (["precomputed:ours.safetensors"], "ours.safetensors is a file of 'eosin embed' already"),
        (["precomputed:"], "names no features"),
        (["precomputed:mixed"], "files of several kinds (.h5, .npz)"),
        (["precomputed:nested"], "give one of its folders: h5_files"),
        (["precomputed:empty"], "empty holds no .npz"),
        (["precomputed:widths"], "b.h5 holds features of 4 numbers and widths/a.h5 of 6"),
        (["precomputed:absent"], "absent does not exist"),
        (["precomputed:notes.txt"], "is of no kind that is known"),
        ([uni, "--slides", "few.csv"], "few.csv has no row of 1 of the 2 slides, such as 'b 2'"),
        ([uni, "--slides", "absent.csv"], "absent.csv does not exist"),
        ([uni, "shards"], "leave SHARDS out"),
        ([uni, "--pooling", "mean"], "--pooling is for what embeds"),
        ([uni, "--mpp", "1"], "--mpp is for what embeds"),
        (["color"], "give what 'color' is to embed"),
    ]:
        assert main(["embed", *arguments, "--out", "e.safetensors"]) == 2, arguments
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eosin")]
        assert said in line
    assert not (folder / "e.safetensors").exists()
    assert not (folder / "unpickled").exists()


def test_tensors_of_training_and_bfloat16_and_tables_that_name_tiles_are_read(cohort):
    folder, places, _ = cohort
    torch.save(torch.ones(3, 2, requires_grad=True), folder / "grad.pt")
    save_torch({"features": torch.full((3, 2), 0.5, dtype=torch.bfloat16)}, folder / "half.safetensors")
    for name, value in (("grad.pt", 1.0), ("half.safetensors", 0.5)):
        out = folder / f"{name}.out"
        import_features(folder / name, out)
        assert (read_embeddings(out).features == value).all()
    # A slide's own scale and places are not those of its tiles.
    (folder / "slides.csv").write_text("slide,key,x,mpp,seen,label\nb 2,k,7,0.25,yes,tumor\na.1,k,7,0.25,no,normal\n")
    import_features(folder / "uni", folder / "e.safetensors", folder / "slides.csv")
    table = read_embeddings(folder / "e.safetensors").table
    assert table["key"].is_unique
    assert table["mpp"].isna().all()
    np.testing.assert_array_equal(table["x"], np.concatenate(list(places.values()))[:, 0])
    # And a column that is called as ours says nothing of pretraining.
    found = contamination([read_embeddings(folder / "e.safetensors")], np.arange(5))
    assert found["uni"]["known"] is False
    assert found["uni"]["samples"] is None
