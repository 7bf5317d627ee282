"""Optical density: what every stain operation here works in, and the one place where densities are mixed.

Light that passes a stain falls off exponentially (Beer and Lambert), so stains add up in ``-ln(I / white)``. White has
density 0 and stays white whatever the mixing matrix is.

On a CPU the tiles of a batch go through one by one, in blocks of pixels that fit into the cache: that is faster, and no
bit of a tile can depend on its neighbors. On a GPU they go through together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WHITE = 256.0  # density is -ln((I + 1) / WHITE): white is exactly 0, black is finite, and the inverse is exact
BLOCK = 1 << 15  # pixels that a CPU core works on at a time
TISSUE = 0.15  # least mean density of a tissue pixel (beta of Macenko, sec. 2)
GLASS = 0.05  # mean density up to which a pixel is empty glass: nothing is added to it


def optical_density(levels: torch.Tensor, white: float | torch.Tensor = WHITE) -> torch.Tensor:
    """Optical density of levels in [0, 255], any shape: ``-ln((I + 1) / white)``; in [0, 5.55] for white = 256."""
    return -torch.log((levels.float() + 1) / white)


def intensity(density: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`optical_density`, clipped to [0, 255], float."""
    return (WHITE * torch.exp(-density) - 1).clamp(0, 255)


def unmixing(vectors: torch.Tensor) -> torch.Tensor:
    """Least-squares unmixing matrices [B, 3, 2] of stain vectors [B, 2, 3]: concentrations = density @ unmixing."""
    a, d = (vectors * vectors).sum(dim=2).unbind(1)
    b = (vectors[:, 0] * vectors[:, 1]).sum(dim=1)
    determinant = (a * d - b * b).clamp(min=1e-6)
    inverse = torch.stack([torch.stack([d, -b], 1), torch.stack([-b, a], 1)], 1) / determinant.view(-1, 1, 1)
    return vectors.transpose(1, 2) @ inverse


def mix(
    images: torch.Tensor,
    matrices: torch.Tensor,
    white: torch.Tensor | None = None,
    on: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a matrix to the densities of each image.

    Args:
        images: [B, 3, H, W], uint8, or float in [0, 1].
        matrices: [B, 3, 3]; densities are rows. The identity gives an image back (uint8: bit for bit).
        white: [B, 3], the level + 1 of each source's white point; what is as bright has density 0. WHITE by default.
        on: [B] bool; where False the image comes back as it is.

    Returns:
        Images of the same type; their white is 255.
    """
    table = optical_density(torch.arange(256, device=images.device))

    def pixels(part: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        density = _density(part, table)
        if shift is not None:
            density = density.add_(shift.unsqueeze(2)).clamp_(min=0)
        return _light(matrix @ density, part)

    shifts = None if white is None else (white / WHITE).log()
    return by_pixels(pixels, images, on, matrices.transpose(1, 2), shifts)


def mix_and_shift(images: torch.Tensor, matrices: torch.Tensor, shifts: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """Densities times ``matrices`` plus ``shifts`` [B, 3], which fade out where there is no tissue.

    ``images``, ``on`` and the result are as in :func:`mix`; white stays white.
    """
    table = optical_density(torch.arange(256, device=images.device))

    def pixels(part: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        density = _density(part, table)
        tissue = density.mean(dim=1, keepdim=True).sub_(GLASS).div_(TISSUE - GLASS).clamp_(0, 1)  # [b, 1, p]
        return _light((matrix @ density).add_(tissue * shift.unsqueeze(2)), part)

    return by_pixels(pixels, images, on, matrices.transpose(1, 2), shifts)


def by_pixels(
    function: Callable[..., torch.Tensor], images: torch.Tensor, on: torch.Tensor | None, *rows: torch.Tensor | None
) -> torch.Tensor:
    """Images of ``function(pixels, *rows)``, which changes pixels [b, 3, p] one by one.

    Each of ``rows`` has a row an image, or is None. Images that are not ``on``, [B] bool, come back as they are.
    """
    flat = images.flatten(2)
    if images.device.type != "cpu":
        done = function(flat, *rows).view(images.shape)
        return done if on is None else torch.where(on.view(-1, 1, 1, 1), done, images)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for i in range(len(flat)):
        if on is not None and not on[i]:
            out[i] = flat[i]
            continue
        row = [None if r is None else r[i : i + 1] for r in rows]
        for start in range(0, flat.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            out[i : i + 1, :, block] = function(flat[i : i + 1, :, block], *row)
    return out.view(images.shape)


def _density(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Densities of pixels [b, 3, p], uint8 (by the table) or float in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return table.index_select(0, pixels.reshape(-1).int()).view(pixels.shape)
    return (pixels * (255 / WHITE)).add_(1 / WHITE).log_().neg_()


def _light(density: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Pixels of the type of ``like`` with densities ``density``, which are overwritten."""
    light = density.neg_().exp_()
    if like.dtype == torch.uint8:
        # Rounded by the cast of I + 1/2; by way of int32 it is faster.
        return light.mul_(WHITE).sub_(0.5).clamp_(0, 255).int().to(torch.uint8)
    return light.mul_(WHITE / 255).sub_(1 / 255).clamp_(0, 1)
