"""Tiles made worse on purpose: less detail, less field of view, JPEG, blur.

Each takes uint8 tiles [B, 3, T, T] and gives uint8 tiles of the same shape, on the same device; the amount that changes
nothing gives them back as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools.errors import UserError

TRUNCATE = 4  # standard deviations at which the Gaussian is cut
THREADS = 4


def downsample(tiles: torch.Tensor, factor: float) -> torch.Tensor:
    """Mean over squares of ``factor`` px, brought back to T px by bicubic interpolation: same field, less detail."""
    if factor == 1:
        return tiles
    side = tiles.shape[-1]
    small = F.adaptive_avg_pool2d(tiles.float(), max(1, round(side / factor)))
    return _bytes(F.interpolate(small, size=(side, side), mode="bicubic"))


def magnify(tiles: torch.Tensor, factor: float) -> torch.Tensor:
    """The middle 1 / ``factor`` of each side, brought to T px by bicubic interpolation: less field, no new detail."""
    if factor == 1:
        return tiles
    side = tiles.shape[-1]
    inner = max(1, round(side / factor))
    low = (side - inner) // 2
    middle = tiles[..., low : low + inner, low : low + inner].float()
    return _bytes(F.interpolate(middle, size=(side, side), mode="bicubic"))


def jpeg(tiles: torch.Tensor, quality: float) -> torch.Tensor:
    """Compressed to JPEG of ``quality``, 1 to 100, with chroma halved, as most writers do, and decoded."""
    import simplejpeg

    def through(image: np.ndarray) -> np.ndarray:
        data = simplejpeg.encode_jpeg(image, int(quality), "RGB", "420", fastdct=False)
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False)

    images = np.ascontiguousarray(tiles.permute(0, 2, 3, 1).cpu().numpy())
    with ThreadPoolExecutor(THREADS) as pool:
        done = np.stack(list(pool.map(through, images)))
    return torch.from_numpy(done).permute(0, 3, 1, 2).contiguous().to(tiles.device)


def blur(tiles: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of standard deviation ``sigma`` px, cut at 4 of them; tiles are mirrored at their edges."""
    if sigma == 0:
        return tiles
    radius = min(int(TRUNCATE * sigma + 0.5), tiles.shape[-1] - 1)
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(tiles.device, torch.float32)
    planes = F.pad(tiles.float().flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")  # [B·3, 1, T + 2r, T + 2r]
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return _bytes(planes[:, 0].view_as(tiles))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Kind:
    """A way to make tiles worse.

    Attributes:
        title: for plots.
        function: tiles, amount -> tiles.
        amounts: of the curve, from mild to strong.
        valid: least and most that an amount may be.
    """

    title: str
    function: Callable[[torch.Tensor, float], torch.Tensor]
    amounts: tuple[float, ...]
    valid: tuple[float, float]


KINDS = {
    "magnification": Kind("magnification ×", magnify, (1.5, 2, 3, 4), (1, 16)),
    "downsample": Kind("downsampling factor", downsample, (2, 4, 8), (1, 64)),
    "jpeg": Kind("JPEG quality", jpeg, (95, 75, 50, 30, 10), (1, 100)),
    "blur": Kind("blur, σ in px", blur, (0.5, 1, 2, 4), (0, 64)),
}


@dataclass(frozen=True)
class Degradation:
    """One kind at one amount, or none: tiles as they are.

    Raises UserError for an amount out of range.
    """

    kind: str = ""
    amount: float = 0

    def __post_init__(self) -> None:
        if self.kind:
            low, high = KINDS[self.kind].valid
            whole = self.kind != "jpeg" or self.amount == int(self.amount)
            if not (math.isfinite(self.amount) and low <= self.amount <= high and whole):
                kind = "a whole number " if self.kind == "jpeg" else ""
                raise UserError(f"--{self.kind} {self.amount:g} is out of range; valid: {kind}from {low:g} to {high:g}")

    @property
    def name(self) -> str:
        """Such as "jpeg 50"; "clean" for none."""
        return f"{self.kind} {self.amount:g}" if self.kind else "clean"

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Tiles [B, 3, T, T], uint8, made worse."""
        return KINDS[self.kind].function(tiles, self.amount) if self.kind else tiles
