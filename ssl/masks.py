"""Block masks for iBOT, keyed by sample: which patches of a global crop the student does not see.

Rectangles are added until the wanted number of patches is reached (BEiT, Bao et al. 2022, algorithm 1; used as in
DINOv2: aspect ratios .3 to 1/.3, at least 4 patches a rectangle).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from eosin.data_tools.draws import generator, purpose

MASK = purpose("ibot mask")
ASPECT = 0.3
LEAST = 4


def block_masks(
    positions: torch.Tensor,
    views: int,
    grid: int,
    *,
    seed: int,
    probability: float,
    ratio: tuple[float, float] | list[float],
) -> torch.Tensor:
    """Masks of ``views`` global crops for each of B samples, [views, B, grid·grid] bool, on the CPU.

    Args:
        positions: [B] place of each sample in the stream.
        grid: patches a side.
        probability: that a crop is masked at all.
        ratio: lowest and highest fraction of masked patches of a masked crop.
    """
    masks = np.zeros((views, len(positions), grid, grid), dtype=bool)
    for view in range(views):
        for i, position in enumerate(positions.tolist()):
            rng = generator(MASK, seed, position, view)
            if rng.random() < probability:
                _fill(masks[view, i], round(grid * grid * rng.uniform(ratio[0], ratio[1])), rng)
    return torch.from_numpy(masks).flatten(2)


def _fill(mask: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    grid = len(mask)
    while (left := wanted - int(mask.sum())) > 0:
        area = rng.uniform(min(LEAST, left), left)
        aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        height = min(max(round(math.sqrt(area * aspect)), 1), grid)
        width = min(max(round(math.sqrt(area / aspect)), 1), grid)
        top, start = rng.integers(0, grid - height + 1), rng.integers(0, grid - width + 1)
        block = mask[top : top + height, start : start + width]
        fresh = np.flatnonzero(~block)
        # The last rectangle is cut so that the count is exact.
        block[np.unravel_index(fresh[:left], block.shape)] = True
