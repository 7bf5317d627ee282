import subprocess
import sys

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


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_mapped_and_changes_to_them_stay_in_memory(tmp_path, dtype):
    made = example()
    made.features = made.features.astype(dtype)
    write_embeddings(tmp_path / "e.safetensors", made)
    before = (tmp_path / "e.safetensors").read_bytes()
    read = read_embeddings(tmp_path / "e.safetensors")
    assert isinstance(read.features.base, np.memmap)
    assert read.features.dtype == dtype
    np.testing.assert_array_equal(read.features, load_file(tmp_path / "e.safetensors")["features"])
    read.features[0] = 7
    assert (tmp_path / "e.safetensors").read_bytes() == before
    # A file written in its place does not reach those who have read the old one.
    made.features = made.features + 100
    write_embeddings(tmp_path / "e.safetensors", made)
    assert read.features[1].tolist() == [4, 5, 6, 7]


def test_no_rows(tmp_path):
    made = example()
    empty = Embeddings(made.features[:0], made.table.iloc[:0], made.encoder)
    write_embeddings(tmp_path / "e.safetensors", empty)
    read = read_embeddings(tmp_path / "e.safetensors")
    assert read.features.shape == (0, 4)
    assert len(read.table) == 0


PROBES = """
import resource, sys
import numpy as np
import pandas
import torch
from eosin.data_tools.embeddings import read_embeddings
from eosin.eval import logistic
from eosin.ssl.metrics import knn_probabilities

torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = np.random.default_rng(0).normal(size=(300, 256)).astype(np.float32)
list(logistic.logistic_path(small, np.arange(300) % 4, [0.1], scale=logistic.Scale.of(small)))
knn_probabilities(small, small, np.arange(300) % 4, 4, [20])
start = peak()
features = read_embeddings(sys.argv[1]).features
read = peak() - start
labels = np.arange(len(features)) % 4
knn_probabilities(features[:200], features, labels, 4, [20])
knn = peak() - start
logistic.ITERATIONS = 2
(fit,) = logistic.logistic_path(features, labels, [0.1], scale=logistic.Scale.of(features))
print(features.nbytes, read, knn, peak() - start)
"""


def test_probes_of_many_rows_take_a_bounded_share_of_memory(tmp_path):
    """In a process of its own: reading takes none, kNN the file's pages, linear one copy more."""
    count = 200_000
    features = np.zeros((count, 256), dtype=np.float32)
    features[:] = np.random.default_rng(0).normal(size=(1000, 256)).repeat(200, axis=0)
    table = pd.DataFrame({"key": np.arange(count).astype(str), "slide": ["s"] * count})
    write_embeddings(tmp_path / "e.safetensors", Embeddings(features, table, {"name": "n"}))
    command = [sys.executable, "-c", PROBES, str(tmp_path / "e.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, read, knn, linear = map(int, done.stdout.split())
    room = 190 << 20  # blocks, and 200,000 keys; less than one more copy
    assert size == count * 1024
    assert read < room
    assert knn < size + room
    assert linear < 2 * size + room
