import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from eosin.data_tools.embeddings import Embeddings, read_embeddings, write_embeddings
from eosin.data_tools.errors import UserError


def example():
    table = pd.DataFrame(
        {
            "key": ["a_0_0_500", "b=c3=a9_1_0_500", "c"],
            "slide": ["S1", "S2 é", ""],
            "label": ["x", None, "y"],
            "x": [0, 1, 2],
            "mpp": [0.5, np.nan, 0.25],
        }
    )
    return Embeddings(np.arange(12, dtype=np.float32).reshape(3, 4), table, {"name": "n", "sha256": "f"})


def test_what_is_written_is_read(tmp_path):
    write_embeddings(tmp_path / "e.safetensors", example())
    read = read_embeddings(tmp_path / "e.safetensors")
    assert (read.features == example().features).all()
    assert read.table["slide"].tolist() == ["S1", "S2 é", ""]
    assert read.table["label"].tolist() == ["x", "", "y"]
    assert read.table["x"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(read.table["mpp"], [0.5, np.nan, 0.25])
    assert read.encoder == {"name": "n", "sha256": "f"}


def test_safetensors_alone_reads_the_features(tmp_path):
    write_embeddings(tmp_path / "e.safetensors", example())
    tensors = load_file(tmp_path / "e.safetensors")
    assert tensors["features"].shape == (3, 4)
    assert bytes(tensors["column/key"][0]).rstrip(b"\0") == b"a_0_0_500"


def test_other_files_are_refused_in_one_line(tmp_path):
    save_file({"features": np.zeros((2, 2))}, tmp_path / "other.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 50)
    for name in ("other.safetensors", "noise.safetensors", "absent.safetensors"):
        with pytest.raises(UserError) as error:
            read_embeddings(tmp_path / name)
        assert name in str(error.value)
