"""Tiling killed at every change of the disk, at random moments, by a time limit; a thousand slides, many broken."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eosin.data_tools.errors import DONE_WITH_REFUSALS, TO_BE_CONTINUED
from eosin.data_tools.shards import ShardSet
from eosin.data_tools.tile import tile_slides
from eosin.data_tools.verify import verify_shards

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def slides(section, pyramid, tmp_path_factory):
    """Fourteen slides of 512 x 512 px at .5 µm/px that differ."""
    folder = tmp_path_factory.mktemp("many") / "slides"
    folder.mkdir()
    for number in range(14):
        pyramid(folder / f"s{number:02d}.tif", section(512, 512, seed=number), 0.5)
    (folder / "broken.svs").write_bytes(b"nothing")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Runs one tiling in children that end, as by kill -9, at one of the next times they rename or remove something.
DYING = """
import json, os, sys
from pathlib import Path
import cv2, openslide, pandas, pyarrow.parquet, simplejpeg, tifffile  # once for all children
cv2.setNumThreads(1)
from eosin.data_tools import tile
sources, out, shard_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])

def work(changes):
    left = [changes]
    def dying(real):
        def call(path, *args, **kwargs):
            left[0] -= path.exists()  # what is removed already is no change
            if left[0] == 0:
                os._exit(9)
            return real(path, *args, **kwargs)
        return call
    for name in ("replace", "rename", "unlink"):
        setattr(Path, name, dying(getattr(Path, name)))
    tile.tile_slides([sources], out, tile_size=128, workers=1, mix=1)
    os._exit(0)

real = tile._tile_all
tile._tile_all = lambda *given: real(*given[:5], shard_bytes, *given[6:])
codes = []
while (not codes or codes[-1] == 9) and len(codes) < 60:
    pid = os.fork()
    if pid == 0:
        work(LEFT)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_killed_at_every_few_changes_of_the_disk_it_ends_with_the_same_bytes(slides, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for name in ("s00.tif", "s01.tif", "broken.svs"):
        os.link(slides / name, some / name)
    ends = {}
    for name, left in (("killed", "2 + len(codes) % 7"), ("whole", "-1")):
        code = DYING.replace("LEFT", left)
        command = [sys.executable, "-c", code, str(some), str(tmp_path / name / "out"), "80000"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
        ends[name] = json.loads(ran.stdout.splitlines()[-1])
    assert ends["whole"] == [0]
    assert ends["killed"] == [9] * (len(ends["killed"]) - 1) + [0]
    assert len(ends["killed"]) > 12
    found, truth = (bytes_of(tmp_path / name / "out") for name in ("killed", "whole"))
    assert len([name for name in truth if name.endswith(".tar")]) == 2
    assert found == truth
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_every_tile_is_there_once(slides, tmp_path, seed):
    chance = random.Random(seed)
    command = [sys.executable, "-m", "eosin.launch", "tile", str(slides), "--out", str(tmp_path / "out")]
    command += ["--tile-size", "64", "--workers", "2"]
    kills = 0
    while kills < 4:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, env=ENVIRONMENT)
        states = chance.randrange(1, 5) + len(list((tmp_path / "out.unfinished" / "parts").glob("*.json")))
        while process.poll() is None and len(list((tmp_path / "out.unfinished" / "parts").glob("*.json"))) < states:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
        assert _left(process.pid) == []  # the workers went with their parent
        assert not (tmp_path / "out").exists()
    assert kills > 1
    ran = subprocess.run(command, capture_output=True, check=False, env=ENVIRONMENT)
    assert ran.returncode == DONE_WITH_REFUSALS, ran.stderr
    tile_slides([slides], tmp_path / "truth" / "out", tile_size=64, workers=1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "truth" / "out")
    assert not (tmp_path / "out.unfinished").exists()
    assert verify_shards(tmp_path / "out").problems == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_told_to_stop_it_says_that_it_is_to_be_continued(slides, tmp_path, number):
    # As a launcher runs a verb: the rank's own end, where its code is left, is reached.
    code = "import sys; from eosin.launch.ranks import run_verb; c = run_verb(sys.argv[1:]); print(c); sys.exit(c)"
    command = [sys.executable, "-c", code, "tile", str(slides), "--out", str(tmp_path / "out"), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, env=ENVIRONMENT, text=True, start_new_session=True)
    while process.poll() is None and not list((tmp_path / "out.unfinished" / "parts").glob("*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, number)  # all processes of a job get it
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (TO_BE_CONTINUED, f"{TO_BE_CONTINUED}\n")
    assert "stopped; the same command goes on" in said
    assert _left(process.pid) == []
    assert (tmp_path / "out.unfinished" / "settings.json").exists()


def _left(session: int) -> list[int]:
    """Processes of a session that do not end within a minute; multiprocessing's tracker ends a moment after all."""
    deadline = time.monotonic() + 60
    while (members := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return members


def _members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


# Tiles in a process of its own and says the largest memory that it and its workers had, MiB.
MEASURED = """
import json, resource, sys
from eosin.data_tools.tile import tile_slides
summary = tile_slides([sys.argv[1]], sys.argv[2], tile_size=128, workers=2)
peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([summary.exit_code, len(summary.refused), *peaks]))
"""


@pytest.mark.slow
def test_a_thousand_slides_of_which_fifty_are_broken(section, pyramid, tmp_path):
    import tifffile
    from PIL import Image

    folder, few, rng = tmp_path / "slides", tmp_path / "few", np.random.default_rng(0)
    folder.mkdir()
    few.mkdir()
    image = section(440, 440)
    for number in range(950):
        shown = np.clip(image.astype(np.int16) + rng.integers(-2, 3), 0, 255).astype(np.uint8)
        shown[0, 0] = rng.integers(0, 256, 3)
        path = pyramid(folder / f"good{number:03d}.tif", shown, 0.5)
        if number < 60:
            os.link(path, few / path.name)
    good = (folder / "good000.tif").read_bytes()
    tag = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None, "photometric": "rgb"}

    def noise(suffix, size):
        return lambda path: path.with_suffix(suffix).write_bytes(rng.bytes(size))

    def tiff(pixels, **given):
        def write(path):
            pixels[0, 0] = rng.integers(0, 256, 3)
            tifffile.imwrite(path.with_suffix(".tif"), pixels, tile=(64, 64), **(tag | given))

        return write

    ways = [
        lambda path: path.with_suffix(".svs").write_bytes(b"x" * rng.integers(1, 99)),
        noise(".ndpi", 5000),
        noise(".mrxs", 3000),
        lambda path: path.with_suffix(".tif").write_bytes(good[: int(rng.integers(100, len(good) // 2))]),
        lambda path: path.with_suffix(".tif").write_bytes(good[:8] + rng.bytes(len(good) - 8)),
        tiff(np.full((440, 440, 3), 240, np.uint8)),
        tiff(image.copy(), resolution=(1, 1), resolutionunit="NONE"),
        tiff(image.copy(), resolution=(1000, 1000)),
        tiff(image[:100, :100].copy()),
        lambda path: (
            Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(path.with_suffix(".png"))
            or path.with_suffix(".png").rename(path.with_suffix(".svs"))
        ),
    ]
    for number in range(50):
        ways[number % 10](folder / f"bad{number:02d}")
    said = {}
    for name in ("few", "slides"):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / name), str(tmp_path / f"{name}.out")]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
        said[name] = json.loads(ran.stdout.splitlines()[-1])
    assert said["few"][:2] == [0, 0]
    assert said["slides"][:2] == [DONE_WITH_REFUSALS, 50]
    assert said["slides"][2] < said["few"][2] + 100  # MiB, of the parent: a thousand rows, not their tiles
    assert said["slides"][3] < said["few"][3] + 50  # of a worker
    shards = ShardSet(tmp_path / "slides.out")
    table = shards.slides().set_index("slide")
    assert len(table) == 1000
    bad = table[table["state"] == "refused"]
    assert sorted(bad.index) == sorted(f"bad{number:02d}" for number in range(50))
    assert (bad["reason"].str.len() > 10).all()
    assert bad["reason"].nunique() >= 8
    counts = table.loc[table["state"] == "done", "tiles"]
    assert counts.nunique() == 1  # all good ones show the same
    assert len(shards) == 950 * counts.iloc[0]
    assert verify_shards(tmp_path / "slides.out", sample=100).problems == []
