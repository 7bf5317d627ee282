"""Multi-crop augmentation, batched on the training device; the same lines run on CPU and GPU.

Every draw is a hash of (seed, the sample's position in the stream, view, purpose), so a sample's crops do not depend
on its neighbors, the worker or the rank. Cropping, resizing, flips and 90° turns are two matrix products a sample:
each output row is a weighted sum of input rows, so crops of any box are one batch.
"""

from __future__ import annotations

import math

import torch

from eosin.data_tools.draws import hash32, purpose, uniform
from eosin.ssl.config import Augment, Config
from eosin.ssl.stain.augment import Crops

TRIES = 10  # as torchvision.transforms.RandomResizedCrop
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision


def multi_crop(
    images: torch.Tensor, positions: torch.Tensor, config: Config, stain: Crops | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All crops of a batch of tiles.

    Args:
        images: [B, 3, T, T] uint8.
        positions: [B] int64, each sample's place in the stream.
        stain: the stain operations for these tiles, from :class:`~eosin.ssl.stain.augment.Augmenter`.

    Returns:
        Global crops [2, B, 3, G, G] and local crops [L, B, 3, S, S], float32, normalized by mean and std.
    """
    crops = config.crops
    globals_ = _views(images, positions, config, stain, [0, 1], crops.global_size, crops.global_scale)
    locals_ = _views(
        images,
        positions,
        config,
        stain,
        list(range(2, 2 + crops.local_count)),
        crops.local_size,
        crops.local_scale,
    )
    return globals_, locals_


def standardize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """``(images - mean) / std`` for float images [..., 3, H, W] in [0, 1]."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def crop_boxes(keys: torch.Tensor, side: int, scale: list[float], aspect: list[float]) -> torch.Tensor:
    """Boxes of RandomResizedCrop, [N, 4] int64 (top, left, height, width), one for each key of [N].

    The first of ten drawn (area, aspect) pairs that fits is taken, else the whole image, as in torchvision.
    """
    tries = torch.arange(TRIES, device=keys.device)
    key = keys.unsqueeze(1)
    area = side * side * (scale[0] + (scale[1] - scale[0]) * uniform(key, tries, purpose("crop area")))
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * uniform(key, tries, purpose("crop aspect")))
    width = torch.sqrt(area * ratio).round().long()
    height = torch.sqrt(area / ratio).round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.long().argmax(dim=1, keepdim=True)  # 0 when none fits
    found = fits.any(dim=1)
    height = torch.where(found, height.gather(1, first).squeeze(1), side)
    width = torch.where(found, width.gather(1, first).squeeze(1), side)
    top = (uniform(keys, purpose("crop top")) * (side - height + 1)).long()
    left = (uniform(keys, purpose("crop left")) * (side - width + 1)).long()
    return torch.stack([top, left, height, width], dim=1)


def resize_weights(start: torch.Tensor, length: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Weights that crop ``[start, start + length)`` of ``side`` pixels and resize it to ``size``, [N, size, side].

    Antialiased bicubic with a = -0.5, the filter of Pillow and of ``torchvision...resize(antialias=True)``.
    """
    start, length = (t.view(-1, 1, 1).float() for t in (start, length))
    scale = length / size
    support = scale.clamp(min=1)
    out = torch.arange(size, device=start.device).view(1, -1, 1)
    pixel = torch.arange(side, device=start.device).view(1, 1, -1)
    center = start + (out + 0.5) * scale
    distance = ((pixel + 0.5 - center) / support).abs()
    weights = _cubic(distance) * ((pixel >= start) & (pixel < start + length))
    return weights / weights.sum(dim=2, keepdim=True)


def _views(
    images: torch.Tensor,
    positions: torch.Tensor,
    config: Config,
    stain: Crops | None,
    views: list[int],
    size: int,
    scale: list[float],
) -> torch.Tensor:
    """Crops of the numbered views, [V, B, 3, size, size]."""
    if not views:
        return torch.zeros(0, len(images), 3, size, size, device=images.device)
    count, batch, side = len(views), len(images), images.shape[-1]
    view = torch.tensor(views, device=images.device)
    keys = hash32(positions.unsqueeze(1), view, config.run.seed, purpose("augment")).flatten()  # [B·V]
    augment = config.augment

    boxes = crop_boxes(keys, side, scale, config.crops.aspect)
    rows = resize_weights(boxes[:, 0], boxes[:, 2], side, size)  # [B·V, S, T]
    columns = resize_weights(boxes[:, 1], boxes[:, 3], side, size)
    if augment.flips:
        rows = _where(uniform(keys, purpose("flip rows")) < 0.5, rows.flip(1), rows)
        columns = _where(uniform(keys, purpose("flip columns")) < 0.5, columns.flip(1), columns)
    # Rows for all views and channels at once, [B, V·S, T] @ [B, T, 3·T]; then columns.
    pixels = images.permute(0, 2, 1, 3).reshape(batch, side, 3 * side).float().div_(255)
    out = rows.view(batch, count * size, side) @ pixels
    out = out.view(batch * count, size * 3, side) @ columns.transpose(1, 2)
    out = out.view(batch * count, size, 3, size).transpose(1, 2).clamp(0, 1)
    if augment.rotate90:  # with both flips, a transposition reaches all eight symmetries of a square
        out = _where(uniform(keys, purpose("transpose")) < 0.5, out.transpose(2, 3), out)

    if augment.rotate:
        angles = 2 * math.pi * uniform(keys, purpose("angle"))
        out = _where(uniform(keys, purpose("rotate")) < augment.rotate, rotated(out, angles), out)
    if stain is not None:
        out = stain(out, keys, torch.arange(batch, device=out.device).repeat_interleave(count))
    matrices, offsets = color_maps(out, keys, augment)
    out = (matrices @ out.flatten(2)).add_(offsets).clamp_(0, 1).view_as(out)
    blur = torch.tensor([augment.blur[min(v, 2)] for v in views], device=out.device).repeat(batch)
    out = _blur(out, keys, blur, augment.blur_sigma)
    if augment.solarize and 1 in views:
        chosen = (view.repeat(batch) == 1) & (uniform(keys, purpose("solarize")) < augment.solarize)
        out = _where(chosen, torch.where(out >= 0.5, 1 - out, out), out)
    out = standardize(out, augment.mean, augment.std)
    return out.view(batch, count, 3, size, size).transpose(0, 1)


def rotated(images: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn ``images``, [N, 3, S, S], counterclockwise by ``angles``, [N] radians; what comes in is mirrored."""
    cos, sin = torch.cos(angles), torch.sin(angles)
    zero = torch.zeros_like(angles)
    turns = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(turns, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def color_maps(images: torch.Tensor, keys: torch.Tensor, augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness, contrast, saturation and hue (with probability ``jitter``), then gray, as one affine map a crop.

    Each of these is linear in the color of a pixel, so a crop needs one 3×3 matrix and one offset and is clipped once,
    where torchvision clips after every step. Hue turns about the gray axis in YIQ, where torchvision turns in HSV.

    Args:
        images: [N, 3, H, W] in [0, 1], for the mean gray that contrast keeps.
        keys: [N] int64.

    Returns:
        Matrices [N, 3, 3] and offsets [N, 1, 1]: new color = matrix @ color + offset.
    """

    def factor(name: str, strength: float) -> torch.Tensor:
        drawn = 1 + strength * (2 * uniform(keys, purpose(name)) - 1)
        return drawn.clamp(min=0).view(-1, 1, 1)

    one = torch.eye(3, device=images.device)
    gray = images.new_tensor(GRAY).expand(3, 3)  # takes a color to its luma
    brightness, contrast = factor("brightness", augment.brightness), factor("contrast", augment.contrast)
    saturation = factor("saturation", augment.saturation)
    turn = 2 * math.pi * augment.hue * (2 * uniform(keys, purpose("hue")) - 1)
    matrices = _hue_rotation(turn) @ (saturation * one + (1 - saturation) * gray) * contrast * brightness
    luma = (images.mean(dim=(2, 3)) * gray[0]).sum(dim=1).view(-1, 1, 1)
    offsets = (1 - contrast) * brightness * luma

    chosen = uniform(keys, purpose("jitter")) < augment.jitter
    matrices, offsets = _where(chosen, matrices, one), _where(chosen, offsets, torch.zeros_like(offsets))
    grayed = uniform(keys, purpose("gray")) < augment.gray
    # The offset is the same in all channels, and luma keeps it.
    return _where(grayed, gray.expand_as(matrices) @ matrices, matrices), offsets


def _hue_rotation(angle: torch.Tensor) -> torch.Tensor:
    """Matrices [N, 3, 3] that turn the chroma of RGB by ``angle``, [N] radians, in the NTSC's YIQ."""
    to_yiq = torch.tensor(
        [GRAY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], device=angle.device
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, unit = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack([unit, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    # Expanded, so that each crop is a product of its own, whose last bits do not depend on the number of crops.
    return torch.linalg.inv(to_yiq).expand_as(rotation) @ rotation @ to_yiq.expand_as(rotation)


def _blur(images: torch.Tensor, keys: torch.Tensor, probability: torch.Tensor, sigma: list[float]) -> torch.Tensor:
    """Gaussian blur of 9 taps with reflected borders, as two products with banded matrices."""
    size = images.shape[-1]
    chosen = uniform(keys, purpose("blur")) < probability
    sigmas = (sigma[0] + (sigma[1] - sigma[0]) * uniform(keys, purpose("sigma"))).view(-1, 1, 1)
    taps = torch.arange(-4, 5, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigmas) ** 2)  # [N, 1, 9]
    kernel = kernel / kernel.sum(dim=2, keepdim=True)
    # Not blurred is the kernel of one tap, so that every crop takes the same path.
    kernel = torch.where(chosen.view(-1, 1, 1), kernel, (taps == 0).float())
    source = (torch.arange(size, device=images.device).unsqueeze(1) + taps).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)  # [size, 9]
    band = torch.zeros(len(images), size, size, device=images.device)
    band.scatter_add_(2, source.expand(len(images), -1, -1), kernel.expand(-1, size, -1).contiguous())
    return band.unsqueeze(1) @ images @ band.transpose(1, 2).unsqueeze(1)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _where(chosen: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Choose a whole sample by ``chosen``, [N]."""
    return torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)
