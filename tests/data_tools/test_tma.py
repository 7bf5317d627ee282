"""Cores of drawn arrays, whose every name is known, of a real one, and of tissue that is no array."""

import cv2
import numpy as np
import pytest

from eosin.data_tools.slide import read_image
from eosin.data_tools.tissue import find_tissue
from eosin.data_tools.tma import dearray

MPP = 16.0
DIAMETER = 62  # 1 mm
PITCH = 84.0


def place_names(rows: int, columns: int) -> dict[str, tuple[float, float]]:
    """Column and row by name."""
    return {f"{chr(65 + row)}{column + 1}": (column, row) for row in range(rows) for column in range(columns)}


def draw(
    places: dict[str, tuple[float, float]],
    turn: float = 0.0,
    jitter: float = 0.0,
    sizes: float = 0.0,
    broken: tuple[str, ...] = (),
    pitch: tuple[float, float] = (PITCH, PITCH),
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An array turned by degrees about its middle: its mask and the pixels of each core.

    A core's place is drawn off by up to ``jitter`` pixels and its diameter by up to the share ``sizes``; what is broken
    has a crack of 7 pixels.
    """
    rng = np.random.default_rng(0)
    corners = np.array(list(places.values())) * pitch
    angle = np.radians(turn)
    turned = (corners - corners.mean(axis=0)) @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    turned += DIAMETER - turned.min(axis=0)
    width, height = (int(side) + 2 * DIAMETER for side in turned.max(axis=0))
    cores = {}
    for name, center in zip(places, turned):
        x, y = np.rint(center + rng.uniform(-jitter, jitter, 2)).astype(int).tolist()
        radii = np.rint(DIAMETER / 2 * (1 + rng.uniform(-sizes, sizes, 2))).astype(int).tolist()
        core = cv2.ellipse(np.zeros((height, width), np.uint8), (x, y), radii, 30, 0, 360, 1, -1)
        if name in broken:
            cv2.line(core, (x - DIAMETER, y - 12), (x + DIAMETER, y + 20), 0, 7)
        cores[name] = core > 0
    return np.logical_or.reduce(list(cores.values())), cores


def names_in(found, core: np.ndarray) -> set[str]:
    """Names of the cores that pixels were given to; "" for none."""
    return {found.names[label - 1] if label else "" for label in np.unique(found.labels[core]).tolist()}


@pytest.mark.parametrize("turn", [0, 3, -13])
def test_names_with_cores_missing_broken_and_unequal(turn):
    places = place_names(6, 9)
    for missing in ("A2", "A3", "B1", "C5", "D5", "F9"):
        del places[missing]
    broken = ("B4", "E7", "F1", "C9")
    mask, cores = draw(places, turn, jitter=6, sizes=0.12, broken=broken)
    found = dearray(mask, MPP)
    assert found.labels.dtype == np.int32
    assert found.names == list(places)
    np.testing.assert_array_equal(found.labels > 0, mask)
    assert all(names_in(found, core) == {name} for name, core in cores.items())
    pieces = cv2.connectedComponents(cores["B4"].astype(np.uint8))[0] - 1
    assert pieces == 2


def test_rows_and_columns_lie_apart_unequally():
    places = place_names(5, 6)
    mask, cores = draw(places, 3, jitter=4, pitch=(76, 115))
    found = dearray(mask, MPP)
    assert all(names_in(found, core) == {name} for name, core in cores.items())


def test_an_empty_row_and_column_keep_their_names():
    places = {name: at for name, at in place_names(7, 8).items() if at[0] != 3 and at[1] != 2}
    mask, cores = draw(places, 3, jitter=5)
    assert dearray(mask, MPP).names == list(places)
    assert "C1" not in places
    assert len(cores) == 42


def test_a_lane_counts_as_the_columns_it_is_nearest_to():
    places = {name: (x + 0.8 * (x > 3), y) for name, (x, y) in place_names(5, 8).items()}
    mask, cores = draw(places, 2, jitter=3)
    found = dearray(mask, MPP)
    for name, core in cores.items():
        column = int(name[1:])
        assert names_in(found, core) == {f"{name[0]}{column + (column > 4)}"}


def test_an_array_may_drift():
    """Rows that bend by three pitches from end to end, as they do where a ribbon is stretched."""
    places = {name: (x, y + 3 * (x / 19) ** 2) for name, (x, y) in place_names(4, 20).items()}
    mask, cores = draw(places, jitter=3)
    found = dearray(mask, MPP)
    assert all(names_in(found, core) == {name} for name, core in cores.items())


def test_cores_that_touch_are_parted():
    mask, cores = draw(place_names(5, 6))
    (left, _), (right, _) = (np.argwhere(cores[name].any(axis=0)).ravel()[[0, -1]] for name in ("C2", "C3"))
    row = np.argwhere(cores["C2"].any(axis=1)).ravel().mean().astype(int)
    mask[row - 4 : row + 5, left + DIAMETER // 2 : right + DIAMETER // 2] = True
    found = dearray(mask, MPP)
    assert found.names == list(cores)
    for name in ("C2", "C3"):
        assert (found.labels[cores[name]] == found.names.index(name) + 1).mean() > 0.99


def test_what_lies_outside_belongs_to_no_core():
    mask, cores = draw(place_names(5, 6))
    wide = np.pad(mask, ((0, 0), (0, 300)))
    wide[100:130, -100:-60] = True
    found = dearray(wide, MPP)
    assert found.names == list(cores)
    np.testing.assert_array_equal(found.labels[:, : mask.shape[1]] > 0, mask)
    assert not found.labels[:, mask.shape[1] :].any()


def test_rows_after_z():
    places = {str(number): (number % 2, number // 2) for number in range(2 * 29)}
    mask, _ = draw(places)
    assert dearray(mask, MPP).names[-6:] == ["AA1", "AA2", "AB1", "AB2", "AC1", "AC2"]


def test_tissue_that_is_no_array():
    none, every = np.zeros((400, 500), bool), np.ones((400, 500), bool)
    two, few = (draw(places)[0] for places in (place_names(1, 2), place_names(1, 5)))
    row = draw(place_names(1, 9))[0]
    staggered = draw({name: (x + 0.5 * (y % 2), 0.87 * y) for name, (x, y) in place_names(6, 6).items()})[0]
    bars = cv2.resize(draw(place_names(4, 4))[0].astype(np.uint8), None, fx=4, fy=1) > 0
    for mask in (none, every, two, few, row, staggered, bars):
        assert dearray(mask, MPP) is None
    whole, _ = draw(place_names(4, 5))
    assert dearray(whole, MPP) is not None
    assert dearray(whole, 1.0) is None  # round and regular, but of 62 µm


@pytest.mark.parametrize("seed", range(12))
def test_scattered_disks_are_no_array(seed):
    rng = np.random.default_rng(seed)
    mask, centers = np.zeros((900, 900), np.uint8), np.zeros((0, 2))
    for center in rng.integers(60, 840, (rng.integers(20, 120), 2)):
        if (np.linalg.norm(centers - center, axis=1) > 1.2 * DIAMETER).all():
            centers = np.vstack([centers, center])
            cv2.circle(mask, center.tolist(), DIAMETER // 2, 1, -1)
    assert len(centers) > 6
    assert dearray(mask > 0, MPP) is None


def test_real_array(real_data):
    image = read_image(real_data / "qc" / "histoprep" / "tma_spots.jpeg")
    found = dearray(find_tissue(image, 8.0).mask, 8.0)
    # As the eye counts: blocks of four by four, a column apart on the left, six cores missing.
    rows = "ABCD FGHI KLMN"
    expected = {f"{row}{column}" for row in rows.replace(" ", "") for column in (3, 4, 5, 6, 8, 9, 10, 11)}
    expected -= {"B11", "I9", "K8", "K9", "K10", "K11"}
    assert set(found.names) == expected | {"A1", "B1", "C1", "D1"}
