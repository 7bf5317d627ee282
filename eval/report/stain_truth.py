"""What is left of known changes of color after each normalization, on synthetic tissue.

Another laboratory's stains follow Beer and Lambert's law, as Macenko's method does; a nonlinear table of colors and a
shift in Lab do not, and show what each method cannot undo.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch

from eosin.data_tools.phantom import LABORATORIES, MPP, REFERENCE, TILE, Optics, render
from eosin.data_tools.phantom_scene import scene
from eosin.eval.report.page import Block, Picture, Section, Table, Words, photo
from eosin.ssl.stain import lab
from eosin.ssl.stain.normalizer import METHODS, Normalizer
from eosin.ssl.stain.reference import Reference

SEED = 0
SHOWN_PIXELS = 150
SCENE_UM = 512.0
TRUTH_TILES = 3
CUBE = 17  # knots a side of the color cube
GAMMA, TWIST = (0.85, 1.2, 0.95), 0.12
LAB_SCALE, LAB_SHIFT = (0.92, 1.15, 0.85), (3.0, -7.0, 6.0)
THICKNESS = 1.2
NOTICEABLE = 2.3  # CIE76 (Mahy et al. 1994)

Row = list[str | list[Picture]]


def known_truth(reference: Reference) -> Section:
    """What is left of known changes of color after each method, on synthetic tissue."""
    truth = phantom_tiles(REFERENCE)
    changed = {name: change(truth) for name, change in OPERATORS.items()}
    tissue = lab.from_rgb(truth.float() / 255)[:, 0] < lab.TISSUE_L
    none = torch.zeros(0, dtype=torch.uint8)
    normalizers = [Normalizer(method, "tile", reference, none) for method in METHODS]
    slides = torch.zeros(len(truth), dtype=torch.long)
    aims = [n(truth, slides) for n in normalizers]
    rows, raw = [], 0
    shown: list[Row] = [["truth", _small(truth), *(_small(aim.images) for aim in aims)]]
    said: list[str] = []
    shares: dict[tuple[str, str], float] = {}
    for name, images in changed.items():
        done = [n(images, slides) for n in normalizers]
        raw += sum(int(((d.reason > 0) | (aim.reason > 0)).sum()) for d, aim in zip(done, aims))
        start = color_difference(images, truth, tissue)
        left = [color_difference(d.images, aim.images, tissue) for d, aim in zip(done, aims)]
        rows.append([name, f"{start:.1f}", *(f"{v:.1f} ({_percent(v / start)})" for v in left)])
        shown.append([name, _small(images), *(_small(d.images) for d in done)])
        said.append(_remains(name, start, left))
        shares |= {(method, name): value / start for method, value in zip(METHODS, left)}
    head = ["changed by", "before", *METHODS]
    caption = (
        f"Mean color difference (CIE76) over the tissue of {len(truth)} synthetic tiles between the changed and the "
        f"true image, both normalized by the method; in brackets, what is left. About {NOTICEABLE} is just noticeable."
    )
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    said.append(
        f"From best to worst, {_percent(shares[least])} ({least[0]}; {least[1]}) to {_percent(shares[most])} "
        f"({most[0]}; {most[1]}) of a difference remains, and what remains is what that method cannot undo."
    )
    if raw:
        said.append(f"In {raw} cases a tile could not be fitted and stayed raw; its difference counts as it is.")
    synthetic = "SYNTHETIC: these tiles are phantoms, drawn by a program. They show no tissue of any patient."
    lead = (
        "One synthetic piece of tissue in its true colors and changed in three known ways: how much of each change "
        "does a method take back, tile by tile?"
    )
    blocks: list[Block] = [Words([synthetic], "warning"), Table(head, rows, caption), Words(said, "list")]
    blocks.append(Table(head, shown, "One of the synthetic tiles, changed and normalized."))
    return Section("truth", "Known truth beyond the model", lead, blocks)


def phantom_tiles(optics: Optics) -> torch.Tensor:
    """The tiles of a synthetic section that hold most tissue, [n, 3, 256, 256] uint8, the same whatever the optics."""
    drawn = scene("nested", seed=SEED, side_um=SCENE_UM)
    truth, image = (_cut(render(drawn, MPP, optics=o)) for o in (REFERENCE, optics))
    share = (lab.from_rgb(truth.float() / 255)[:, 0] < lab.TISSUE_L).float().mean(dim=(1, 2))
    return image[share.argsort(descending=True, stable=True)[:TRUTH_TILES]]


def another_laboratory(_: torch.Tensor) -> torch.Tensor:
    """The phantom with another laboratory's stains in a thicker section: Beer and Lambert's law holds."""
    return phantom_tiles(Optics(stains=LABORATORIES["lab-2"], thickness=THICKNESS))


def color_cube(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] uint8 through a smooth table of colors with trilinear interpolation, as a scanner's profile.

    A gamma curve a channel, then each channel is bent by the other two. Black and white stay.
    """
    axis = torch.linspace(0, 1, CUBE)
    knots = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))  # [3, R, G, B]
    curved = knots ** torch.tensor(GAMMA).view(3, 1, 1, 1)
    after, before = curved.roll(-1, 0), curved.roll(1, 0)
    cube = (curved + TWIST * torch.sin(torch.pi * after) * (before - after)).clamp(0, 1)
    # The sampler takes the last axis, blue, first.
    places = (images.float() / 127.5 - 1).permute(0, 2, 3, 1).flip(-1).unsqueeze(1)  # [B, 1, H, W, 3]
    table = cube.unsqueeze(0).expand(len(images), -1, -1, -1, -1)
    found = torch.nn.functional.grid_sample(table, places, mode="bilinear", align_corners=True)
    return (found.squeeze(2) * 255).round().to(torch.uint8)


def lab_transfer(images: torch.Tensor) -> torch.Tensor:
    """Images with lightness, a and b of their tissue scaled and shifted."""
    scale, shift = (torch.tensor([v]).expand(len(images), 3) for v in (LAB_SCALE, LAB_SHIFT))
    return lab.transfer(images, scale, shift, fade=True)


OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another laboratory's stains": another_laboratory,
    "nonlinear color table": color_cube,
    "shift of lightness and color": lab_transfer,
}


def color_difference(a: torch.Tensor, b: torch.Tensor, tissue: torch.Tensor) -> float:
    """Mean CIE76 difference of images [B, 3, H, W] uint8 where there is ``tissue``, [B, H, W] bool."""
    first, second = (lab.from_rgb(i.float() / 255) for i in (a, b))
    return float((first - second).norm(dim=1)[tissue].mean())


def _remains(name: str, start: float, left: list[float]) -> str:
    parts = []
    for method, value in zip(METHODS, left):
        parts.append(f"{method} {'leaves' if value < start else 'makes it'} {_percent(value / start)}")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{name[0].upper()}{name[1:]}: of a mean difference of {start:.1f}, {listed}."


def _cut(image: np.ndarray) -> torch.Tensor:
    """An image [H, W, 3] in tiles [n, 3, 256, 256]."""
    whole = torch.from_numpy(image).permute(2, 0, 1)
    return whole.unfold(1, TILE, TILE).unfold(2, TILE, TILE).permute(1, 2, 0, 3, 4).reshape(-1, 3, TILE, TILE)


def _small(images: torch.Tensor) -> list[Picture]:
    first = images[0].permute(1, 2, 0).numpy()
    size = (SHOWN_PIXELS, SHOWN_PIXELS)
    return [photo(cv2.resize(first, size, interpolation=cv2.INTER_AREA), "a synthetic tile")]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"
