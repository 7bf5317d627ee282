"""The folder ``ssl/`` never hides Python's own ``ssl``: not for what runs from the checkout's root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import ssl
from pathlib import Path

ssl.create_default_context()
print("ssl is", ssl.__file__)
import eosin.ssl
assert not hasattr(eosin.ssl, "create_default_context")
"""
RANK = f"""
def check():
    exec({CHECK!r})
    return 0
"""
DATASET = f"""
class Dataset:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        exec({CHECK!r})
        return index
"""


def run(folder: Path, *arguments: str) -> str:
    """Run Python in the checkout's root, which is then the first place where it looks for modules."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_in_a_command(tmp_path):
    assert "ssl is" in run(tmp_path, "-c", CHECK)


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    (tmp_path / "rank_of_the_test.py").write_text(RANK)
    code = "import rank_of_the_test, sys; from eosin.launch.torchrun import torchrun\n"
    assert "ssl is" in run(tmp_path, "-c", code + "sys.exit(torchrun(rank_of_the_test.check, nproc=1))")


@pytest.mark.slow
def test_in_a_spawned_loader_worker(tmp_path):
    (tmp_path / "dataset_of_the_test.py").write_text(DATASET)
    code = (
        "from dataset_of_the_test import Dataset; from torch.utils.data import DataLoader\n"
        "print(list(DataLoader(Dataset(), num_workers=1, multiprocessing_context='spawn')))"
    )
    assert "ssl is" in run(tmp_path, "-c", code)


@pytest.mark.slow
def test_in_a_slurm_job(slurm, tmp_path):
    (tmp_path / "rank_of_the_test.py").write_text(RANK)
    code = (
        "import rank_of_the_test; from pathlib import Path; from eosin.launch.slurm import Request, submit\n"
        f"print(submit(rank_of_the_test.check, Request(Path({str(tmp_path / 'job')!r}), partition='low')).job_id)"
    )
    job_id = run(tmp_path, "-c", code).strip()
    state = slurm.wait(job_id, "COMPLETED", "FAILED")["JobState"]
    log = (tmp_path / "job" / f"{job_id}_0_log.out").read_text()
    assert state == "COMPLETED", log
    assert "ssl is" in log
