"""Synthetic H&E slides with known truth: scenes rendered through Beer-Lambert and written as pyramidal TIFFs.

A set of phantoms is a crossed experiment. A patient has one class, one laboratory and one scanner; every nuisance
(NUISANCES) switches on separately and, off, leaves no trace. Everything is labeled synthetic wherever it appears.
These images test a pipeline; they say nothing about any disease and never stand in for real tissue.

``python -m eosin.data_tools.phantom --out DIR --patients 30 --seed 0`` writes a set.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from eosin.data_tools.draws import generator, hash32, purpose
from eosin.data_tools.errors import USER_ERROR, UserError, nearest
from eosin.data_tools.files import atomic_dir, write_json
from eosin.data_tools.phantom_scene import CLASSES, RARE_CLASS, REGIONS, Scene, region_map, scene
from eosin.data_tools.phantom_shapes import Floats, Labels, paint
from eosin.data_tools.progress import progress

NUISANCES = (
    "stain",
    "thickness",
    "focus",
    "sharpening",
    "jpeg",
    "illumination",
    "shape",
    "pen",
    "dust",
    "defocus",
)
Box = tuple[float, float, float, float]

MPP = 0.5
TRUTH_MPP = 4.0
TILE = 256
SMALLEST_SIDE_UM, LARGEST_SIDE_UM = 256.0, 4096.0
LEVELS = 3
BLOCK = 256
WHITE = 244.0
SOFTNESS_UM = 0.33
RIM_UM = 0.9
SHARPENING_UM = 0.8
DEFOCUS_UM = 2.4

# Rows: hematoxylin, eosin; columns: optical density in red, green, blue per unit of concentration.
Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Optics:
    """All that stands between a scene and its pixels.

    ``stains`` has the rows hematoxylin and eosin, unit vectors of optical density (natural logarithm) in R, G, B;
    ``thickness`` multiplies every concentration; ``focus_um`` is the standard deviation of the blur; ``sharpening``
    the amount of the unsharp mask; ``tint`` the white point as a fraction of WHITE; ``vignette`` the loss of light at
    the edge of a scan stripe; ``pen`` the optical density of the pen's ink.
    """

    stains: Matrix = ((0.59, 0.72, 0.37), (0.11, 0.86, 0.50))
    thickness: float = 1.0
    focus_um: float = 0.0
    sharpening: float = 0.0
    jpeg_quality: int = 90
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    vignette: float = 0.0
    pen: tuple[float, ...] = (1.9, 1.1, 0.25)


REFERENCE = Optics()
LABORATORIES: dict[str, Matrix] = {
    "lab-1": ((0.55, 0.74, 0.39), (0.08, 0.87, 0.48)),
    "lab-2": ((0.66, 0.69, 0.30), (0.18, 0.84, 0.51)),
}
SCANNERS: dict[str, dict[str, Any]] = {
    "scanner-a": {
        "focus_um": 0.20,
        "sharpening": 0.35,
        "jpeg_quality": 90,
        "tint": (1.0, 1.0, 0.99),
        "vignette": 0.01,
    },
    "scanner-b": {
        "focus_um": 0.45,
        "sharpening": 1.0,
        "jpeg_quality": 82,
        "tint": (0.97, 0.985, 1.0),
        "vignette": 0.03,
    },
    "scanner-c": {
        "focus_um": 0.60,
        "sharpening": 0.1,
        "jpeg_quality": 72,
        "tint": (0.99, 0.965, 0.92),
        "vignette": 0.05,
    },
}
SCANNER_KEYS = {
    "focus": ("focus_um",),
    "sharpening": ("sharpening",),
    "jpeg": ("jpeg_quality",),
    "illumination": ("tint", "vignette"),
}
DUST = (1.0, 1.05, 1.1)
PENS = {"blue": (1.9, 1.1, 0.25), "green": (1.9, 0.55, 1.3), "black": (2.0, 1.9, 1.7)}


def render(scene: Scene, mpp: float, box_um: Box | None = None, optics: Optics = REFERENCE) -> Labels:
    """Image a window of a scene as RGB [H, W, 3], 8 bits.

    Args:
        mpp: µm a pixel, any; what is coarser than 0.5 is rendered finer and averaged, as a camera's pixel does.
        box_um: x, y, width, height, µm; the whole slide by default.
        optics: stains, scanner and section; by default an ideal scanner, so that
            ``-log(image / WHITE) = concentrations @ stains`` up to rounding.
    """
    x, y, width, height = box_um or (0.0, 0.0, scene.side_um, scene.side_um)
    columns, rows = round(width / mpp), round(height / mpp)
    image = np.empty((rows, columns, 3), np.uint8)
    for top in range(0, rows, BLOCK):
        for left in range(0, columns, BLOCK):
            block = image[top : top + BLOCK, left : left + BLOCK]
            size = (block.shape[1] * mpp, block.shape[0] * mpp)
            block[:] = _render_block(scene, mpp, (x + left * mpp, y + top * mpp, *size), optics)
    return image


def _render_block(scene: Scene, mpp: float, box: Box, optics: Optics) -> Labels:
    folds = max(1, math.ceil(mpp / MPP - 1e-9))
    fine = mpp / folds
    planes = {plane for plane in ("tissue", "pen", "dust", "defocus") if has(scene, plane, box)}
    blurs = optics.focus_um, SHARPENING_UM * bool(optics.sharpening), DEFOCUS_UM * ("defocus" in planes)
    margin = math.ceil(4 * sum(blurs) / mpp) * folds
    wide = _widen(box, margin * fine)
    shape = (round(wide[3] / fine), round(wide[2] / fine))
    light = np.broadcast_to(_illumination(optics, fine, wide, shape), (*shape, 3))
    if planes:
        mixing = np.asarray(optics.stains, np.float32).T * np.float32(optics.thickness)
        density = cv2.transform(concentrations(scene, fine, wide), mixing)
        for plane, ink in (("pen", optics.pen), ("dust", DUST)):
            if plane in planes:
                density += _soft(scene, plane, fine, wide, 0.8)[..., None] * np.asarray(ink, np.float32)
        light = np.exp(-density) * light
    if "defocus" in planes:
        blurred = cv2.GaussianBlur(light, (0, 0), DEFOCUS_UM / fine)
        light += (blurred - light) * _soft(scene, "defocus", fine, wide, 6.0)[..., None]
    if planes and optics.focus_um:
        light = cv2.GaussianBlur(light, (0, 0), optics.focus_um / fine)
    if planes and optics.sharpening:
        light += optics.sharpening * (light - cv2.GaussianBlur(light, (0, 0), SHARPENING_UM / fine))
    light = light[margin : shape[0] - margin, margin : shape[1] - margin]
    if folds > 1:
        light = cv2.resize(light, (light.shape[1] // folds, light.shape[0] // folds), interpolation=cv2.INTER_AREA)
    return np.rint(np.clip(light, 0, 255)).astype(np.uint8)


def concentrations(scene: Scene, mpp: float, box_um: Box) -> Floats:
    """Hematoxylin and eosin [H, W, 2] in a window, per unit of section thickness: the truth behind :func:`render`."""
    soft = functools.partial(_soft, scene, mpp=mpp, box_um=box_um)
    texture = functools.partial(_texture, scene.key, mpp=mpp, box_um=box_um)
    tissue = soft("tissue")
    if not tissue.any():
        return np.zeros((*tissue.shape, 2), np.float32)
    fiber, cell, bed, space = (soft(plane) for plane in ("fiber", "cytoplasm", "bed", "space"))
    nucleolus, blood = soft("nucleolus"), soft("blood")
    pad = math.ceil(4 * RIM_UM / mpp)
    nucleus = _soft(scene, "nucleus", mpp, _widen(box_um, pad * mpp))
    rim = (nucleus - cv2.GaussianBlur(nucleus, (0, 0), RIM_UM / mpp))[pad:-pad, pad:-pad]
    nucleus = nucleus[pad:-pad, pad:-pad]
    chromatin, grain, cloud = (
        texture("chromatin", pitch_um=0.85),
        texture("grain", pitch_um=1.7),
        texture("cloud", pitch_um=9.0),
    )
    cell = np.maximum(cell, 0.55 * bed)
    bare = np.clip(1 - 1.6 * cell, 0, 1)
    there = tissue * (1 - space)
    hematoxylin = there * (0.03 + 0.01 * bare + cell * (0.56 + 0.05 * grain))
    hematoxylin += there * (nucleus * (1.75 + 0.30 * chromatin) + 1.2 * np.maximum(rim, 0))
    hematoxylin += there * 0.5 * nucleolus * nucleus
    eosin = there * (bare * (0.04 + 1.20 * fiber * (1 + 0.08 * grain + 0.12 * cloud)))
    eosin += there * cell * (0.62 + 0.08 * grain + 0.10 * cloud)
    eosin *= 1 - 0.4 * nucleus
    eosin += tissue * 1.75 * blood
    return np.maximum(np.stack([hematoxylin, eosin], axis=-1), 0)


def has(scene: Scene, plane: str, box_um: Box) -> bool:
    """Whether anything in a window, or near it, is painted into a plane."""
    x, y, width, height = _widen(box_um, 25.0)
    return any(
        bool(((layer.bounds[1] > (x, y)) & (layer.bounds[0] < (x + width, y + height))).all(axis=1).any())
        for layer in scene.layers
        if layer.plane == plane
    )


def _widen(box_um: Box, margin_um: float) -> Box:
    x, y, width, height = box_um
    return x - margin_um, y - margin_um, width + 2 * margin_um, height + 2 * margin_um


def _soft(scene: Scene, plane: str, mpp: float, box_um: Box, softness_um: float = SOFTNESS_UM) -> Floats:
    """A plane [H, W] from 0 to 1 with edges as soft as a section's thickness makes them."""
    pad = math.ceil(4 * softness_um / mpp)
    levels = paint(tuple(layer for layer in scene.layers if layer.plane == plane), mpp, _widen(box_um, pad * mpp))
    levels = cv2.GaussianBlur(levels, (0, 0), softness_um / mpp)
    return levels[pad:-pad, pad:-pad].astype(np.float32) * np.float32(1 / 255)


def _texture(key: int, name: str, pitch_um: float, *, mpp: float, box_um: Box) -> Floats:
    """Value noise [H, W] with unit variance at its knots: a random lattice over µm, interpolated by cubic splines."""
    knots = _knots(key, name)
    x, y, width, height = box_um
    shape = (round(width / mpp), round(height / mpp))
    left, top = math.floor(x / pitch_um) - 2, math.floor(y / pitch_um) - 2
    columns = np.arange(left, left + math.ceil(width / pitch_um) + 6) % len(knots)
    rows = np.arange(top, top + math.ceil(height / pitch_um) + 6) % len(knots)
    scale = mpp / pitch_um
    shift = (x / pitch_um - left + 0.5 * scale, y / pitch_um - top + 0.5 * scale)
    there = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return cv2.warpAffine(knots[np.ix_(rows, columns)], there, shape, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)


@functools.lru_cache(maxsize=8)
def _knots(key: int, name: str) -> Floats:
    return generator(key, purpose(f"phantom texture {name}")).standard_normal((512, 512)).astype(np.float32)


def _illumination(optics: Optics, mpp: float, box_um: Box, shape: tuple[int, ...]) -> Floats:
    """White light [1 or H, W, 3], darker toward the edges of scan stripes 230 µm wide."""
    white = WHITE * np.asarray(optics.tint, np.float32)
    if not optics.vignette:
        return white[None, None]
    x = box_um[0] + (np.arange(shape[1], dtype=np.float32) + 0.5) * mpp
    across = (x / 230) % 1 * 2 - 1
    return (1 - optics.vignette * across**2)[None, :, None] * white


def write_phantoms(
    out: Path,
    *,
    patients: int = 30,
    slides_per_patient: int = 2,
    seed: int = 0,
    side_um: float = 1024.0,
    nuisances: Collection[str] | None = None,
    workers: int | None = None,
) -> Path:
    """Write a set of synthetic slides with their truth; the same seed gives the same bytes.

    A slide depends on the seed, its patient and its own number, never on how many others there are. The folder holds
    ``slides/*.tif``, ``truth/<slide>_{tissue,pen,regions}.png`` at TRUTH_MPP, ``truth/regions.json`` (the legend),
    ``truth/stains.json`` and ``slides.csv``, whose ``path`` column is relative to ``out``.

    Args:
        out: a new or empty folder; it appears when all is written.
        side_um: side of a slide, µm; 1024 µm hold about 30 tissue tiles of 128 µm.
        nuisances: which of NUISANCES are on; all by default.
        workers: processes; one a core by default.

    Returns:
        The path of ``slides.csv``.

    Raises:
        UserError: a bad argument, or ``out`` holds something already.
    """
    active = frozenset(NUISANCES if nuisances is None else nuisances)
    unknown = sorted(active - set(NUISANCES))
    if unknown:
        raise UserError(f"no nuisance is called '{unknown[0]}'; {nearest(unknown[0], list(NUISANCES))}")
    for name, value in (("patients", patients), ("slides_per_patient", slides_per_patient), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give at least 1")
    if not SMALLEST_SIDE_UM <= side_um <= LARGEST_SIDE_UM:
        raise UserError(
            f"a phantom of {side_um:g} µm a side is not possible; give {SMALLEST_SIDE_UM:g} to {LARGEST_SIDE_UM:g}"
        )
    jobs = [(patient, number) for patient in range(patients) for number in range(slides_per_patient)]
    with atomic_dir(out) as folder:
        (folder / "slides").mkdir()
        (folder / "truth").mkdir()
        write = functools.partial(_write_slide, folder, seed=seed, side_um=side_um, active=active)
        rows = list(
            progress(_map(write, jobs, workers or os.cpu_count() or 1), total=len(jobs), desc="phantoms", unit="slides")
        )
        stains = {row["slide"]: row.pop("stains") for row in rows}
        legend = {str(index): name for index, name in enumerate(REGIONS)}
        write_json(folder / "truth" / "regions.json", {"synthetic": True, "mpp": TRUTH_MPP, "regions": legend})
        write_json(
            folder / "truth" / "stains.json",
            {"synthetic": True, "white": WHITE, "density": "natural logarithm", "slides": stains},
        )
        with (folder / "slides.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    return Path(out) / "slides.csv"


def design(patient: int) -> dict[str, str]:
    """Class, laboratory, scanner and splits of a patient.

    Every six patients hold each class in each laboratory once, and the scanner changes from six to six, so that over
    18 patients all three are crossed.
    """
    kind, rank = patient % len(CLASSES), patient // len(CLASSES)
    scanner = ("scanner-a", "scanner-b", "scanner-c")[rank // 2 % 3]
    return {
        "label": CLASSES[kind],
        "site": tuple(LABORATORIES)[rank % 2],
        "scanner": scanner,
        "split_patient": "test" if (rank + rank // 6 + kind) % 3 == 2 else "train",
        "split_scanner": "test" if scanner == "scanner-b" else "train",
    }


def factors(seed: int, patient: int, number: int, nuisances: Collection[str]) -> dict[str, Any]:
    """The arguments of :func:`scene` for one slide: its biology, the shape of its nuclei, what lies on the glass.

    They follow a patient's rank within the class, as everything in :func:`optics` does: the patients of one rank are
    matched, so that no factor tells the class in complete sets of three.
    """
    rank = patient // len(CLASSES)
    nature = generator(seed, rank, purpose("phantom nature"))
    shape = generator(seed, rank, purpose("phantom shape"))
    size, aspect = shape.uniform(0.88, 1.16), shape.uniform(1.12, 1.65)
    laid = {
        "pen": (rank + 3 * number) % 6 == 5,
        "dust": (rank + number) % 3 == 1,
        "defocus": (2 * rank + number) % 5 == 3,
    }
    return {
        "pitch_um": float(nature.uniform(38.0, 52.0)),
        "nuclear_size": float(size) if "shape" in nuisances else 1.0,
        "nuclear_aspect": float(aspect) if "shape" in nuisances else 1.3,
        "rare": (rank + 2 * number) % 5 < 2,
        **{name: on and name in nuisances for name, on in laid.items()},
    }


def optics(seed: int, patient: int, number: int, nuisances: Collection[str]) -> Optics:
    """The stains, section and scanner of one slide; what is not among ``nuisances`` is as in REFERENCE."""
    plan = design(patient)

    def rng(name: str) -> np.random.Generator:
        return generator(seed, patient // len(CLASSES), number, purpose(f"phantom {name}"))

    changes: dict[str, Any] = {"pen": PENS[sorted(PENS)[int(rng("ink").integers(len(PENS)))]]}
    if "stain" in nuisances:
        rows = np.asarray(LABORATORIES[plan["site"]]) + rng("stain").normal(0, 0.014, (2, 3))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        changes["stains"] = tuple(tuple(round(float(value), 5) for value in row) for row in rows)
    if "thickness" in nuisances:
        changes["thickness"] = round(float(np.exp(rng("thickness").normal(0, 0.16))), 4)
    scanner = SCANNERS[plan["scanner"]]
    for name, keys in SCANNER_KEYS.items():
        if name in nuisances:
            changes |= {key: scanner[key] for key in keys}
    return replace(REFERENCE, **changes)


def _map(function: Any, jobs: list[tuple[int, int]], workers: int) -> Iterator[dict[str, Any]]:
    if min(workers, len(jobs)) == 1:
        yield from map(function, jobs)
        return
    # Fork is unsafe once a library has started threads.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)), cv2.setNumThreads, (1,)) as pool:
        yield from pool.imap(function, jobs)


def _write_slide(
    folder: Path, job: tuple[int, int], *, seed: int, side_um: float, active: frozenset[str]
) -> dict[str, Any]:
    """Write one slide and its truth; return its row of the table, with the stain matrix under ``stains``."""
    patient, number = job
    name = f"synthetic-p{patient:03d}-s{number}"
    plan = design(patient)
    drawing = factors(seed, patient, number, active)
    imaging = optics(seed, patient, number, active)
    key = int(hash32(seed, patient, number, purpose("phantom")))
    drawn = scene(plan["label"], seed=key, side_um=side_um, **drawing)
    _write_tiff(folder / "slides" / f"{name}.tif", render(drawn, MPP, optics=imaging), imaging.jpeg_quality, name)
    whole = (0.0, 0.0, side_um, side_um)
    regions = region_map(drawn, TRUTH_MPP)
    pen = paint(tuple(layer for layer in drawn.layers if layer.plane == "pen"), TRUTH_MPP, whole) > 127
    for kind, mask in (("tissue", (regions > 0) * np.uint8(255)), ("pen", pen * np.uint8(255)), ("regions", regions)):
        (folder / "truth" / f"{name}_{kind}.png").write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    area = max(int((regions > 0).sum()), 1)
    shown = asdict(replace(imaging, pen=imaging.pen if drawing["pen"] else ()))
    shown["hematoxylin"], shown["eosin"] = shown.pop("stains")
    shown["ink"] = shown.pop("pen")
    return {
        "path": f"slides/{name}.tif",
        "slide": name,
        "patient": f"synthetic-p{patient:03d}",
        # Matched patients, one a class: a split that keeps them together gives nuisances no say, for or against.
        "block": f"synthetic-b{patient // len(CLASSES):02d}",
        "site": plan["site"],
        "scanner": plan["scanner"],
        "stain": "H&E",
        "label": plan["label"],
        "mpp": MPP,
        "synthetic": "true",
        "split_patient": plan["split_patient"],
        "split_scanner": plan["split_scanner"],
        **{key: _text(value) for key, value in (drawing | shown).items()},
        "tissue_mm2": f"{area * TRUTH_MPP**2 / 1e6:.4f}",
        "rare_fraction": f"{(regions == REGIONS.index(RARE_CLASS)).sum() / area:.4f}",
        "truth_mpp": TRUTH_MPP,
        "stains": {"hematoxylin": imaging.stains[0], "eosin": imaging.stains[1], "thickness": imaging.thickness},
    }


def _text(value: Any) -> str:
    """A factor as the table holds it: numbers short, vectors with spaces, truth values as 0 and 1."""
    if isinstance(value, tuple):
        return " ".join(f"{number:.5g}" for number in value)
    return f"{value:.5g}" if isinstance(value, float) else str(int(value))


def _write_tiff(path: Path, image: Labels, quality: int, name: str) -> None:
    """Write a pyramid of JPEG tiles that OpenSlide reads as generic-tiff, with the resolution of each level."""
    import tifffile

    description = f"SYNTHETIC H&E phantom {name}: generated by eosin, not tissue of any patient"
    with tifffile.TiffWriter(path) as tiff:
        for level in range(LEVELS):
            if level:
                half = (image.shape[1] // 2, image.shape[0] // 2)
                image = cv2.resize(image, half, interpolation=cv2.INTER_AREA)
            per_cm = 1e4 / (MPP * 2**level)
            tiff.write(
                _jpeg_tiles(image, quality),
                shape=image.shape,
                dtype=image.dtype,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                description=description,
                software="eosin phantom",
                metadata=None,
            )


def _jpeg_tiles(image: Labels, quality: int) -> Iterator[bytes]:
    import simplejpeg

    height, width = (-size % TILE for size in image.shape[:2])
    whole = cv2.copyMakeBorder(image, 0, height, 0, width, cv2.BORDER_REPLICATE)
    for y in range(0, whole.shape[0], TILE):
        for x in range(0, whole.shape[1], TILE):
            tile = np.ascontiguousarray(whole[y : y + TILE, x : x + TILE])
            yield simplejpeg.encode_jpeg(tile, quality, "RGB", "420")


def main() -> None:
    """Write a set of phantoms from the command line."""
    parser = argparse.ArgumentParser(prog="python -m eosin.data_tools.phantom", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--patients", type=int, default=30)
    parser.add_argument("--slides-per-patient", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side-um", type=float, default=1024.0, help="side of a slide, µm (default 1024)")
    parser.add_argument("--nuisances", nargs="*", metavar="NAME", help=f"which are on (default all): {NUISANCES}")
    parser.add_argument("--workers", type=int, default=None, help="processes (default one a core)")
    try:
        print(write_phantoms(**vars(parser.parse_args())))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
