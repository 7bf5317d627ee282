"""Cropping, resizing and blurring of many images at once.

On a GPU all of them make rows of a result as weighted sums of a few rows of a source, along one axis and then the
other. That is what ``embedding_bag`` does, whatever the rows and weights of each image are. On a CPU, torch's 8-bit
kernel resizes and OpenCV blurs, one image after the other: both take a fraction of the time. That resize rounds to 8
bits along each axis, as Pillow's does, so that a CPU's crops are within about a level of a GPU's, where nothing is
rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import torch
import torch.nn.functional as F

BLUR_REACH = 4  # pixels to each side, DINOv2's kernel of 9


class Taps(NamedTuple):
    """Which rows of a source a row of the result takes, and how much of each."""

    rows: torch.Tensor  # [N, S, K] int64
    weights: torch.Tensor  # [N, S, K] float


def crop(
    images: torch.Tensor,
    image: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor,
    transpose: torch.Tensor,
    size: int,
    longest: int,
) -> torch.Tensor:
    """Crops of square images, resized to ``size`` and clipped to [0, 1]: [N, 3, size, size] float.

    Antialiased bicubic with a = -0.5, the filter of Pillow and of ``torchvision...resize(antialias=True)``.

    Args:
        images: [B, 3, T, T] uint8. A CPU is faster where channels are last in memory, as decoders leave them.
        image: [N], which of the images each crop is of.
        boxes: [N, 4] int64: top, left, height, width.
        flips: [N, 2] bool: upside down, left to right.
        transpose: [N] bool: exchange the axes, after the flips.
        longest: no side of a box is longer.
    """
    if images.device.type != "cpu":
        return crop_unrounded(images, image, boxes, flips, transpose, size, longest)
    crops = torch.empty(len(boxes), 3, size, size)
    drawn = (t.tolist() for t in (image, boxes, flips, transpose))
    for out, i, (top, left, height, width), (rows, columns), swapped in zip(crops.numpy(), *drawn, strict=True):
        box = images[i : i + 1, :, top : top + height, left : left + width]
        done = F.interpolate(box, size=(size, size), mode="bicubic", antialias=True)[0].numpy()
        done = done[:, :: -1 if rows else 1, :: -1 if columns else 1]
        out[...] = done.transpose(0, 2, 1) if swapped else done
    return crops.div_(255)


def crop_unrounded(
    images: torch.Tensor,
    image: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor,
    transpose: torch.Tensor,
    size: int,
    longest: int,
) -> torch.Tensor:
    """As :func:`crop`, without a loop, and without rounding to 8 bits."""
    count = len(boxes)
    # The axis made first is the last of the result. Flips and transposition only change the order of what is taken.
    swapped = transpose.unsqueeze(1)
    starts, sides, flips = (torch.where(swapped, t, t.flip(1)).flatten() for t in (boxes[:, :2], boxes[:, 2:], flips))
    origins, steps = torch.where(flips, sides, 0), torch.where(flips, -sides, sides) / size
    index, weights = _cubic_taps(origins, steps, sides, size, longest / size)
    index, weights = (t.view(count, 2, size, -1) for t in (index + starts.view(-1, 1, 1), weights))
    both = torch.stack([images.permute(0, 3, 1, 2), images.permute(0, 2, 1, 3)], dim=1)  # [B, 2, T, 3, T], x or y first
    rows = _sums(both.flatten(3).flatten(0, 1).float(), Taps(index[:, 0], weights[:, 0]), 2 * image + transpose)
    planes = rows.transpose(1, 2).reshape(3 * count, -1, size)
    crops = _sums(planes, _per_channel(Taps(index[:, 1], weights[:, 1])))
    return crops.view(count, 3, size, size).div_(255).clamp_(0, 1)


def reduced(images: torch.Tensor, sides: torch.Tensor, smallest: int) -> torch.Tensor:
    """``images``, [N, 3, S, S], resized to ``sides``, [N] float, and back, clipped to [0, 1].

    No side is below ``smallest``. The filter is that of :func:`crop`.
    """
    side = images.shape[-1]
    zero = torch.zeros_like(sides)
    images = _along_both(images, _cubic_taps(zero, side / sides, zero + side, side, side / smallest))
    return _along_both(images, _cubic_taps(zero, sides / side, sides, side, 1)).clamp_(0, 1)


def blurred(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of ``images``, [N, 3, S, S], with 9 taps, ``sigmas``, [N] px, and mirrored borders."""
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas.unsqueeze(1)).square())  # [N, 9]
    kernels = kernels * (kernels > 1e-9)  # subnormal weights change nothing, and are slow
    return filtered(images, kernels / kernels.sum(dim=1, keepdim=True))


def filtered(images: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """``images``, [N, 3, S, S], times kernels of 9 taps, [N, 9], along rows and columns, with mirrored borders."""
    if images.device.type != "cpu":
        return filtered_by_sums(images, kernels)
    out = torch.empty_like(images)
    for planes, done, kernel in zip(images.numpy(), out.numpy(), kernels.numpy(), strict=True):
        for plane, filled in zip(planes, done, strict=True):
            cv2.sepFilter2D(plane, -1, kernel, kernel, dst=filled, borderType=cv2.BORDER_REFLECT_101)
    return out


def filtered_by_sums(images: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """As :func:`filtered`, without a loop."""
    count, side = len(images), images.shape[-1]
    source = torch.arange(-BLUR_REACH, side + BLUR_REACH, device=images.device).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    index = source.unfold(0, 2 * BLUR_REACH + 1, 1)  # [S, 9]
    return _along_both(images, Taps(index.expand(count, -1, -1), kernels.unsqueeze(1).expand(-1, side, -1)))


def _cubic_taps(origins: torch.Tensor, steps: torch.Tensor, lengths: torch.Tensor, size: int, most: float) -> Taps:
    """Taps of ``size`` pixels of each result, [N, size, K].

    Args:
        origins: [N], where in the source the result begins.
        steps: [N], source pixels a pixel of the result; below 0 it runs backwards.
        lengths: [N], pixels of the source.
        most: no step is larger.
    """
    steps, last = steps.unsqueeze(1), lengths.unsqueeze(1) - 1
    centers = origins.unsqueeze(1) + (torch.arange(size, device=origins.device) + 0.5) * steps - 0.5  # [N, size]
    scale = steps.abs().clamp(min=1)
    pixels = (centers - 2 * scale + 1).floor()
    index, weights = [], []
    for _ in range(math.ceil(4 * max(most, 1)) + 1):
        inside = pixels.clamp(min=0).minimum(last)
        index.append(inside)
        weights.append(_cubic((pixels - centers).abs_().div_(scale)).mul_(inside == pixels))
        pixels = pixels + 1
    weight = torch.stack(weights, dim=2)
    total = weight.sum(dim=2, keepdim=True)
    # Without any weight are only rows of `reduced` that its second step does not look at.
    return Taps(torch.stack(index, dim=2).long(), weight / (total + (total == 0)))


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution kernel with a = -0.5: u²(u - 1)/2 - v²(2v - 1) of u = 2 - d and v = 1 - d, or 0."""
    far = (2 - distance).clamp_(min=0)
    near = (1 - distance).clamp_(min=0)
    outer = (far - 1).mul_(far).mul_(far).mul_(0.5)
    return outer.sub_((near - 0.5).mul_(near).mul_(near), alpha=2)


def _along_both(images: torch.Tensor, taps: Taps) -> torch.Tensor:
    """The same taps along rows and columns of ``images``, [N, 3, S, S]."""
    planes, taps = images.flatten(0, 1), _per_channel(taps)
    for _ in range(2):
        planes = _sums(planes, taps).transpose(1, 2).contiguous()
    return planes.view(images.shape)


def _per_channel(taps: Taps) -> Taps:
    """Taps of images for their planes, [3·N, S, K]."""
    return Taps(*(t.repeat_interleave(3, dim=0) for t in taps))


def _sums(sources: torch.Tensor, taps: Taps, source: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted sums of rows of ``sources``, [B, L, C] float: [N, S, C].

    The n-th result is of source ``source[n]``, or of the n-th.
    """
    if source is None:
        source = torch.arange(len(taps.rows), device=sources.device)
    numbers = taps.rows + source.view(-1, 1, 1) * sources.shape[1]
    sums = F.embedding_bag(
        numbers.flatten(0, 1), sources.flatten(0, 1), mode="sum", per_sample_weights=taps.weights.flatten(0, 1)
    )
    return sums.view(*taps.rows.shape[:2], sources.shape[2])
