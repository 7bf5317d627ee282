"""The geometry of a synthetic section: epithelium, stroma, fat, blood, tears, pen and dust as polygons in µm.

A scene is pure vector data and knows nothing of colors; :mod:`eosin.data_tools.phantom` renders it. Nothing here is
real tissue and nothing is learned from any.

The tissue classes differ in arrangement only. Carpets of epithelial cells, stromal cells and collagen fibers cover the
whole section; a two-phase pattern decides where the epithelial carpet shows and where the stromal ones do:

- ``nested``: epithelium inside the disks of a disordered hexagonal packing;
- ``cribriform``: epithelium outside the disks of the same packing, so that it is pierced by round holes. A pattern
  and its negative have the same power spectrum, and at equal areas the same histogram;
- ``trabecular``: epithelium in cords, whose spacing, width and beading are set so that the pattern has the spectrum
  of the disks as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from eosin.data_tools.draws import generator, purpose
from eosin.data_tools.phantom_shapes import (
    Floats,
    Labels,
    Layer,
    bend,
    blobs,
    full,
    inset,
    lattice,
    levels,
    lookup,
    paint,
    ribbons,
    rotate,
    waves,
)

CLASSES = ("cribriform", "trabecular", "nested")
RARE_CLASS = "whorl"
REGIONS = ("background", *CLASSES, "stroma", "fat", RARE_CLASS)

NUCLEUS_RADIUS_UM = 2.95
CELL_PITCH_UM = 7.6
EPITHELIUM = 0.45  # of the area; the rims of cells add the rest to one half
LOOKUP_MPP = 1.0


@dataclass(frozen=True)
class Scene:
    """One section: ``layers`` are painted in order, ``regions`` (level = index into REGIONS) likewise.

    ``key`` seeds the textures (chromatin, cytoplasm), which are fields over µm and so belong to the scene.
    """

    side_um: float
    layers: tuple[Layer, ...]
    regions: tuple[Layer, ...]
    key: int


def scene(
    kind: str,
    *,
    seed: int = 0,
    side_um: float = 1024.0,
    pitch_um: float = 45.0,
    nuclear_size: float = 1.0,
    nuclear_aspect: float = 1.3,
    rare: bool = False,
    pen: bool = False,
    dust: bool = False,
    defocus: bool = False,
) -> Scene:
    """Draw a square section of tissue of one class.

    Args:
        kind: one of CLASSES.
        seed: every random draw derives from it; each part has its own stream, so switching one leaves the others.
        side_um: side of the square glass area, µm.
        pitch_um: distance between neighboring groups of nuclei, µm.
        nuclear_size: factor on the radius of epithelial nuclei.
        nuclear_aspect: length over width of epithelial nuclei.
        rare: put one focus of RARE_CLASS into the tissue.
        pen, dust, defocus: put pen strokes, dust, and areas out of focus onto the slide.
    """
    if kind not in CLASSES:
        raise ValueError(f"kind is one of {CLASSES}, not {kind!r}")
    outline = _outline(_rng(seed, "outline"), side_um)
    tears = _tears(_rng(seed, "tears"), outline)
    layers = [Layer("tissue", outline, full(outline, 255)), Layer("tissue", tears, full(tears, 0))]
    regions = _regions(_rng(seed, "regions"), kind, outline, side_um, rare)
    mpp = LOOKUP_MPP
    labels = region_map(Scene(side_um, tuple(layers), tuple(regions), seed), mpp)
    layers += _stroma(_rng(seed, "stroma"), side_um)
    layers += _fat(_rng(seed, "fat"), labels, mpp)
    pattern = _pattern(_rng(seed, "pattern"), kind, regions, side_um, pitch_um)
    bed = paint(tuple(pattern), mpp, (0, 0, side_um, side_um)) * (labels > 0)
    layers += pattern
    layers += _epithelium(_rng(seed, "epithelium"), bed, mpp, nuclear_size, nuclear_aspect)
    layers += _whorl(_rng(seed, "whorl"), labels, mpp)
    layers += _stromal_cells(_rng(seed, "stromal cells"), labels, mpp, layers)
    layers += _vessels(_rng(seed, "vessels"), labels, mpp)
    if pen:
        layers += _pen(_rng(seed, "pen"), outline, side_um)
    if dust:
        layers += _dust(_rng(seed, "dust"), side_um)
    if defocus:
        layers += _defocus(_rng(seed, "defocus"), outline)
    return Scene(side_um, tuple(layers), tuple(regions), seed)


def region_map(scene: Scene, mpp: float) -> Labels:
    """Index into REGIONS of every pixel [H, W] of the whole slide; 0 is glass, also in tears."""
    whole = (0.0, 0.0, scene.side_um, scene.side_um)
    inside = paint(tuple(layer for layer in scene.layers if layer.plane == "tissue"), mpp, whole) > 127
    plane = np.zeros(inside.shape, np.uint8)
    for layer in scene.regions:
        mask = paint((Layer("region", layer.points, full(layer.points, 255)),), mpp, whole) > 127
        plane[mask] = layer.level[0]
    return plane * inside


def _rng(seed: int, name: str) -> np.random.Generator:
    return generator(seed, purpose(f"phantom {name}"))


def _outline(rng: np.random.Generator, side_um: float) -> Floats:
    """One or two pieces of tissue with a ragged edge, [1 or 2, K, 2]."""
    corners = 360
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    pieces = 1 + int(rng.random() < 0.5)
    tilt = rng.uniform(0, np.pi)
    outlines = []
    for piece in range(pieces):
        long, short = (0.43, 0.365) if pieces == 1 else (0.42, 0.195)
        radius = np.ones(corners)
        for harmonic in range(2, 80):
            size = rng.normal(0, 0.14 / harmonic**1.35)
            radius += size * np.cos(harmonic * turn + rng.uniform(0, 2 * np.pi))
        local = np.stack([radius * np.cos(turn) * long, radius * np.sin(turn) * short], axis=-1) * side_um
        shift = 0.0 if pieces == 1 else (piece - 0.5) * 0.47 * side_um
        quarter = round(tilt / (np.pi / 2)) * np.pi / 2 if pieces == 2 else tilt
        center = rotate(np.array([0.0, shift]), np.array(quarter)) + side_um / 2
        wiggle = rng.normal(0, 0.06) if pieces == 2 else 0.0
        outlines.append(rotate(local, np.array(quarter + wiggle)) + center)
    return np.clip(np.stack(outlines), 4, side_um - 4).astype(np.float32)


def _tears(rng: np.random.Generator, outline: Floats) -> Floats:
    """Cracks that run in from the edge, and a hole or two, [N, 24, 2]."""
    cracks = []
    for _ in range(int(rng.integers(1, 4))):
        piece = outline[rng.integers(len(outline))]
        start, center = piece[rng.integers(len(piece))], piece.mean(axis=0)
        inward = (center - start) / np.linalg.norm(center - start)
        steps = np.linspace(-10, rng.uniform(50, 120), 12)
        drift = np.cumsum(rng.normal(0, 2.5, 12))
        line = start + steps[:, None] * inward + drift[:, None] * np.array([-inward[1], inward[0]])
        cracks.append(ribbons(line[None], np.array([rng.uniform(2, 6)]))[0])
    for _ in range(int(rng.integers(0, 3))):
        piece = outline[rng.integers(len(outline))]
        center = piece.mean(axis=0) + (piece[rng.integers(len(piece))] - piece.mean(axis=0)) * rng.uniform(0.2, 0.7)
        size = rng.uniform(10, 22)
        cracks.append(blobs(rng, center[None], size, size * 0.6, rng.uniform(0, np.pi), wobble=0.15, corners=24)[0])
    return np.stack(cracks).astype(np.float32)


def _regions(rng: np.random.Generator, kind: str, outline: Floats, side_um: float, rare: bool) -> list[Layer]:
    index = REGIONS.index
    layers = [Layer("region", outline, full(outline, index(kind)))]
    center = outline.mean(axis=1)
    if rng.random() < 0.6:
        piece = int(rng.integers(len(outline)))
        rim = outline[piece][rng.integers(outline.shape[1])]
        size = rng.uniform(0.08, 0.12) * side_um
        fat = blobs(rng, (rim * 0.8 + center[piece] * 0.2)[None], size, size * 0.7, 0.0, wobble=0.1, corners=60)
        layers.append(Layer("region", fat, full(fat, index("fat"))))
    span = np.linspace(-0.6, 0.6, 24)[:, None] * side_um
    turn = rng.uniform(0, np.pi)
    sway = waves(rng, 150, 400)
    axis, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    line = center[0] + span * axis
    line = line + (sway(line) * 25 + rng.normal(0, 0.1) * side_um)[:, None] * across
    septum = ribbons(line[None], np.array([rng.uniform(8, 15)]))
    layers.append(Layer("region", septum, full(septum, index("stroma"))))
    if rare:
        piece = int(rng.integers(len(outline)))
        rim = outline[piece][rng.integers(outline.shape[1])]
        focus = center[piece] + (rim - center[piece]) * rng.uniform(0.15, 0.5)
        size = min(rng.uniform(58, 72), 0.12 * side_um)
        whorl = blobs(rng, focus[None], size, size * 0.9, rng.uniform(0, np.pi), corners=48)
        layers.append(Layer("region", whorl, full(whorl, index(RARE_CLASS))))
    return layers


def _fat(rng: np.random.Generator, labels: Labels, mpp: float) -> list[Layer]:
    """Fat cells: large empty vacuoles behind thin pink membranes, in a loose hexagonal packing."""
    centers = lattice(rng, labels.shape[0] * mpp, 46.0, jitter=1.2, warp_um=3.0)
    centers = centers[lookup(labels, centers, mpp) == REGIONS.index("fat")]
    size = rng.normal(20.5, 1.2, len(centers))
    cells = blobs(rng, centers, size * 1.06, size, rng.uniform(0, np.pi, len(centers)), wobble=0.05, corners=32)
    rims = blobs(rng, centers, size + 2, size + 2, 0.0, wobble=0.05, corners=32)
    return [Layer("fiber", rims, levels(rng, len(rims), 120, 15)), Layer("space", cells, full(cells, 255))]


def _pattern(rng: np.random.Generator, kind: str, regions: list[Layer], side_um: float, pitch_um: float) -> list[Layer]:
    """The two-phase pattern of a class, in plane "bed": 255 where epithelium is, over a fixed part of the area."""
    whole = (0.0, 0.0, side_um, side_um)
    shapes = (_cords if kind == "trabecular" else _disks)(rng, side_um, pitch_um)
    target = 1 - EPITHELIUM if kind == "cribriform" else EPITHELIUM
    for _ in range(2):
        now, less = (
            paint((Layer("bed", grown, full(grown, 255)),), 2 * LOOKUP_MPP, whole).mean() / 255
            for grown in (shapes, inset(shapes, 0.5))
        )
        shapes = inset(shapes, 0.5 * (now - target) / (now - less))
    square = np.array([[[0, 0], [side_um, 0], [side_um, side_um], [0, side_um]]], np.float32)
    ground, figure = (255, 0) if kind == "cribriform" else (0, 255)
    layers = [Layer("bed", square, full(square, ground)), Layer("bed", shapes, full(shapes, figure))]
    return layers + [Layer("bed", region.points, full(region.points, 0)) for region in regions[1:]]


def _disks(rng: np.random.Generator, side_um: float, pitch_um: float) -> Floats:
    centers = lattice(rng, side_um, pitch_um, jitter=0.05 * pitch_um)
    radius = 0.36 * pitch_um * np.exp(rng.normal(0, 0.08, len(centers)))
    return blobs(rng, centers, radius, radius, 0.0, wobble=0.06, corners=24)


def _cords(rng: np.random.Generator, side_um: float, pitch_um: float) -> Floats:
    """Wavy cords whose width swells and shrinks. The figures match the radial spectrum of :func:`_disks`."""
    step = 0.1 * pitch_um
    reach = int(0.8 * side_um / pitch_um) + 2
    along, row = np.meshgrid(np.arange(-reach * pitch_um, reach * pitch_um, step), np.arange(-reach, reach + 1))
    line = bend(rng, side_um)(np.stack([along, row * 0.88 * pitch_um], axis=-1))
    normal = np.gradient(line, axis=1)[..., ::-1] * (-1, 1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)

    def wander(reach_um: float) -> Floats:
        noise = cv2.GaussianBlur(rng.normal(0, 1, row.shape), (0, 0), sigmaX=reach_um / step, sigmaY=1e-3)
        return noise / noise.std()

    phase = rng.uniform(0, 2 * np.pi, (len(row), 1)) + np.cumsum(rng.normal(0, 0.12, row.shape), axis=1)
    beads = 1 + 0.58 * np.sin(2 * np.pi * along / (1.05 * pitch_um) + phase)
    half_width = 0.2 * pitch_um * beads * np.exp(0.14 * wander(pitch_um))
    line = line + normal * (0.065 * pitch_um * wander(0.4 * pitch_um))[..., None]
    side = normal * half_width[..., None]
    return np.concatenate([line + side, (line - side)[:, ::-1]], axis=1).astype(np.float32)


def _epithelium(
    rng: np.random.Generator, bed: Labels, mpp: float, nuclear_size: float, nuclear_aspect: float
) -> list[Layer]:
    """The epithelial carpet where the bed shows it: cells with their nuclei, set upright on the bed's edge."""
    places = lattice(rng, bed.shape[0] * mpp, CELL_PITCH_UM, jitter=1.0, warp_um=3.0)
    places = places[lookup(bed, places, mpp) > 127]
    count = len(places)
    slope = cv2.GaussianBlur(bed, (0, 0), 3.5 / mpp).astype(np.float32)
    upright = [lookup(cv2.Sobel(slope, cv2.CV_32F, *order), places, mpp) for order in ((1, 0), (0, 1))]
    steep = np.hypot(*upright) > 25 * mpp
    angle = np.where(
        steep, np.arctan2(upright[1], upright[0]) + rng.normal(0, 0.3, count), rng.uniform(0, np.pi, count)
    )
    size = NUCLEUS_RADIUS_UM * nuclear_size * np.exp(rng.normal(0, 0.11, count))
    stretch = nuclear_aspect**0.5 * np.exp(rng.normal(0, 0.06, count))
    nuclei = blobs(rng, places, size * stretch, size / stretch, angle)
    cells = blobs(rng, places, NUCLEUS_RADIUS_UM + 2.6, NUCLEUS_RADIUS_UM + 1.8, angle, wobble=0.1, corners=12)
    speckled = rng.random(count) < 0.5
    specks = blobs(rng, places[speckled] + rng.normal(0, 0.8, (int(speckled.sum()), 2)), 0.7, 0.6, 0.0, corners=8)
    return [
        Layer("cytoplasm", cells, levels(rng, count, 170, 24)),
        Layer("nucleus", nuclei, levels(rng, count, 165, 26)),
        Layer("nucleolus", specks, full(specks, 200)),
    ]


def _whorl(rng: np.random.Generator, labels: Labels, mpp: float) -> list[Layer]:
    """The rare class: a pearl of flattened cells in concentric shells around a keratin core."""
    y, x = np.nonzero(labels == REGIONS.index(RARE_CLASS))
    if not len(x):
        return []
    center = np.array([x.mean(), y.mean()]) * mpp
    reach = (len(x) / np.pi) ** 0.5 * mpp
    phase, lean = rng.uniform(0, 2 * np.pi, 3), rng.normal(0, 0.12, 2) * reach

    def shell_at(shell: float, turn: Floats) -> Floats:
        bulge = 1 + 0.07 * np.cos(2 * turn + phase[0]) + 0.05 * np.cos(3 * turn + phase[1] + shell / 9)
        circle = np.stack([np.cos(turn), np.sin(turn) * 0.94], axis=-1)
        return center + lean * (1 - shell / reach) + (shell * bulge)[:, None] * circle

    lamellae, places, angles = [], [], []
    for shell in np.arange(10.0, 0.9 * reach, 6.0):
        pieces = max(3, int(shell * 2 * np.pi / 38))
        start = rng.uniform(0, 2 * np.pi)
        for piece in range(pieces):
            turn = start + (piece + np.linspace(0, 0.97, 14)) * 2 * np.pi / pieces
            lamellae.append(shell_at(shell + rng.normal(0, 0.9), turn))
        turn = start + np.arange(0, 2 * np.pi, 14.0 / shell)
        turn = (turn + rng.normal(0, 0.25, len(turn)) * 14.0 / shell)[rng.random(len(turn)) < 0.9]
        places.append(shell_at(shell + 2.6, turn) + rng.normal(0, 0.6, (len(turn), 2)))
        angles.append(turn + np.pi / 2 + rng.normal(0, 0.12, len(turn)))
    place, angle = np.concatenate(places), np.concatenate(angles)
    bands = ribbons(np.stack(lamellae), rng.uniform(1.2, 2.6, len(lamellae)))
    disc = blobs(rng, center[None], reach, reach * 0.94, 0.0, corners=48)
    core = blobs(rng, (center + lean)[None], 9.0, 8.0, 0.0, wobble=0.12, corners=24)
    size = NUCLEUS_RADIUS_UM * np.exp(rng.normal(0, 0.1, len(place)))
    nuclei = blobs(rng, place, size * 1.55, size * 0.62, angle)
    return [
        Layer("fiber", disc, full(disc, 110)),
        Layer("fiber", bands, levels(rng, len(bands), 215, 28)),
        Layer("fiber", core, full(core, 255)),
        Layer("nucleus", nuclei, levels(rng, len(nuclei), 165, 26)),
    ]


def _stroma(rng: np.random.Generator, side_um: float) -> list[Layer]:
    """Wavy collagen fibers over the whole slide, with clefts between them."""
    count = int((side_um / 1000) ** 2 * 9000)
    point = rng.uniform(0, side_um, (count, 2))
    heading, wave = waves(rng, 200, 600), waves(rng, 25, 60)
    steps = [point]
    stride = rng.uniform(2.5, 7.0, (count, 1))
    for _ in range(9):
        turn = heading(point) * 1.3 + wave(point) * 0.45
        point = point + stride * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
        steps.append(point)
    fibers = ribbons(np.stack(steps, axis=1), rng.uniform(0.5, 2.2, count))
    level = levels(rng, count, 165, 45)
    level[rng.random(count) < 0.16] = 0
    ground = np.array([[[0, 0], [side_um, 0], [side_um, side_um], [0, side_um]]], np.float32)
    return [Layer("fiber", ground, full(ground, 66)), Layer("fiber", fibers, level)]


def _stromal_cells(rng: np.random.Generator, labels: Labels, mpp: float, layers: list[Layer]) -> list[Layer]:
    """The stromal carpet where no epithelium, fat or pearl is: spindle nuclei along fibers, and lymphocytes."""
    side = labels.shape[0] * mpp
    taken = paint(tuple(layer for layer in layers if layer.plane == "cytoplasm"), mpp, (0, 0, side, side))
    kept = (labels > 0) & (labels != REGIONS.index("fat")) & (labels != REGIONS.index(RARE_CLASS)) & (taken < 40)
    free = kept.astype(np.uint8)
    fibers = next(layer.points for layer in layers if layer.plane == "fiber" and len(layer.points) > 1)
    fibers = fibers[rng.random(len(fibers)) < 0.3]
    half = fibers.shape[1] // 2
    middle, ahead = fibers[:, half // 2], fibers[:, half // 2 + 1]
    bare = lookup(free, middle, mpp) > 0
    middle, ahead = middle[bare], ahead[bare]
    lean = np.arctan2(*(ahead - middle).T[::-1])
    spindles = blobs(rng, middle, rng.uniform(4.0, 7.5, len(lean)), rng.uniform(0.9, 1.6, len(lean)), lean, wobble=0.05)
    point = rng.uniform(0, side, (int((side / 1000) ** 2 * 7000), 2))
    clump = waves(rng, 60, 160)
    point = point[rng.random(len(point)) < np.clip(0.02 + 0.10 * (clump(point) - 0.8), 0.02, 0.3)]
    point = point[lookup(free, point, mpp) > 0]
    small = rng.uniform(2.2, 2.8, len(point))
    lymphocytes = blobs(rng, point, small, small * 0.93, 0.0)
    return [
        Layer("nucleus", spindles, levels(rng, len(spindles), 190, 25)),
        Layer("nucleus", lymphocytes, levels(rng, len(lymphocytes), 225, 15)),
    ]


def _vessels(rng: np.random.Generator, labels: Labels, mpp: float) -> list[Layer]:
    """Capillaries in the septa: a lumen, a flat endothelial nucleus and red blood cells."""
    side = labels.shape[0] * mpp
    septum = (labels == REGIONS.index("stroma")).astype(np.uint8)
    septum = cv2.erode(septum, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(5 / mpp) + 1,) * 2))
    point = rng.uniform(0, side, (6000, 2))
    point = point[lookup(septum, point, mpp) > 0][: max(1, int((side / 1000) ** 2 * 14))]
    count = len(point)
    long, short, angle = rng.uniform(7, 14, count), rng.uniform(4, 7, count), rng.uniform(0, np.pi, count)
    wall = blobs(rng, point, long + 1.6, short + 1.6, angle, corners=24)
    lumen = blobs(rng, point, long, short, angle, corners=24)
    owner = rng.integers(0, max(count, 1), count * 4)
    offset = rng.uniform(-0.72, 0.72, (len(owner), 2)) * np.stack([long, short], -1)[owner]
    cells = point[owner] + rotate(offset, angle[owner])
    size = rng.uniform(2.6, 3.3, len(cells))
    red = blobs(rng, cells, size, size * rng.uniform(0.7, 1, len(cells)), rng.uniform(0, np.pi, len(cells)))
    pole = point + rotate(np.stack([np.zeros(count), short + 0.8], -1), angle)
    lining = blobs(rng, pole, 4.6, 1.1, angle)
    return [
        Layer("fiber", wall, full(wall, 210)),
        Layer("space", lumen, full(lumen, 255)),
        Layer("blood", red, levels(rng, len(red), 215, 25)),
        Layer("nucleus", lining, levels(rng, count, 200, 20)),
    ]


def _pen(rng: np.random.Generator, outline: Floats, side_um: float) -> list[Layer]:
    """A pen line that brushes the edge of a piece."""
    piece = np.roll(outline[rng.integers(len(outline))], int(rng.integers(outline.shape[1])), axis=0)
    line = piece[: int(rng.integers(50, 90)) : 4]
    line = (
        line + (line - piece.mean(axis=0)) * rng.uniform(0.0, 0.05) + np.cumsum(rng.normal(0, 2.0, line.shape), axis=0)
    )
    stroke = ribbons(line[None], np.array([rng.uniform(0.018, 0.028) * side_um]))
    return [Layer("pen", stroke, levels(rng, 1, 200, 20))]


def _dust(rng: np.random.Generator, side_um: float) -> list[Layer]:
    """Specks and a hair lying on the cover glass."""
    count = int(rng.integers(6, 16))
    place = rng.uniform(0, side_um, (count, 2))
    size = rng.uniform(1.5, 7.0, count)
    specks = blobs(rng, place, size, size * rng.uniform(0.4, 0.9, count), rng.uniform(0, np.pi, count), wobble=0.2)
    bend = np.cumsum(rng.normal(0, 0.12, 30)) + rng.uniform(0, 2 * np.pi)
    hair = rng.uniform(0.2, 0.8, 2) * side_um + np.cumsum(np.stack([np.cos(bend), np.sin(bend)], -1) * 6, axis=0)
    ribbon = ribbons(hair[None], np.array([1.6]))
    return [Layer("dust", specks, levels(rng, count, 190, 40)), Layer("dust", ribbon, full(ribbon, 170))]


def _defocus(rng: np.random.Generator, outline: Floats) -> list[Layer]:
    """An area of tissue out of the focal plane."""
    piece = outline[rng.integers(len(outline))]
    size = np.ptp(piece, axis=0).max() * rng.uniform(0.14, 0.22)
    center = piece.mean(axis=0) + (piece[rng.integers(len(piece))] - piece.mean(axis=0)) * 0.55
    area = blobs(rng, center[None], size, size * 0.7, rng.uniform(0, np.pi), wobble=0.08, corners=48)
    return [Layer("defocus", area, full(area, 255))]
