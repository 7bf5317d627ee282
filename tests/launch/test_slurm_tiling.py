"""A real SLURM array that tiles, killed twice, against tiling in one go."""

import subprocess
import sys
import time

import pytest

from eosin.data_tools.merge import merge_parts
from eosin.data_tools.phantom import write_phantoms
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.tile import tile_slides
from eosin.data_tools.verify import verify_shards

SCRIPT = """#!/bin/bash
#SBATCH --array=1-2 --ntasks=1 --output={folder}/%a.log
export OMP_NUM_THREADS=1
{python} -m eosin.launch tile {slides} --out {folder}/parts --part $SLURM_ARRAY_TASK_ID/2 --tile-size 128 --workers 1
"""


@pytest.mark.slow
def test_an_array_that_is_killed_twice_ends_with_every_tile_once(slurm, tmp_path):
    slides = write_phantoms(tmp_path / "phantoms", patients=6, workers=2).parent / "slides"
    script = tmp_path / "array.sh"
    script.write_text(SCRIPT.format(folder=tmp_path, python=sys.executable, slides=slides))
    parts = tmp_path / "parts"

    def done():
        return len(list(parts.glob("*.unfinished/parts/*.json")))

    def submitted():
        ran = subprocess.run(["sbatch", "--parsable", script], check=True, capture_output=True, text=True)
        return [f"{ran.stdout.strip()}_{task}" for task in (1, 2)]

    for kill in range(2):
        before, jobs = done(), submitted()
        end = time.monotonic() + 120
        while done() < before + 2 and time.monotonic() < end:
            time.sleep(0.01)
        subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], check=True)
        for job in jobs:
            assert slurm.wait(job, "FAILED", "CANCELLED", "COMPLETED", "NODE_FAIL")["JobState"] != "COMPLETED", kill
    for job in submitted():
        assert slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert sorted(path.name for path in parts.iterdir()) == ["part-1-of-2", "part-2-of-2"]
    merge_parts(list(parts.iterdir()), tmp_path / "merged")
    tile_slides([slides], tmp_path / "whole", tile_size=128, workers=2)
    found, truth = ShardSet(tmp_path / "merged"), ShardSet(tmp_path / "whole")
    tiles = [{s.meta(n)["key"]: s.image(n) for n in range(len(s))} for s in (found, truth)]
    assert tiles[0] == tiles[1]
    assert found.slides().equals(truth.slides())
    assert verify_shards(found.folder).problems == []
