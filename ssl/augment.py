"""Multi-crop augmentation, batched on the training device; but for the inner loops of resample, CPU and GPU run the
same lines.

Every draw is a hash of (seed, the sample's position in the stream, view, purpose), so a sample's crops do not depend
on its neighbors, the worker or the rank. A GPU makes many crops at once. A CPU makes those of one tile after another,
which keeps them in the cache, and leaves out what was not drawn for a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from eosin.data_tools.draws import hash32, purpose, uniform
from eosin.ssl import jpeg, resample
from eosin.ssl.config import Augment, Config
from eosin.ssl.stain.augment import Crops

TRIES = 10  # as torchvision.transforms.RandomResizedCrop
CACHED = 80_000  # pixels up to which a CPU makes all crops of a tile together; else it makes one after another
TILES_AT_ONCE = 64  # whose crops a GPU makes together, which bounds the memory that is taken
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision
# What is drawn for a crop besides its box: the key of each is the hash of its name.
DRAWN = (
    *("flip rows", "flip columns", "transpose", "rotate", "angle"),
    *("jitter", "brightness", "contrast", "saturation", "hue", "gray"),
    *("blur", "sigma", "solarize", "resolution", "resolution scale", "jpeg", "jpeg quality"),
)


class Drawn(NamedTuple):
    """What was drawn for crops: the first dimension of all is [N]."""

    image: torch.Tensor  # [N], number of its tile in the batch
    boxes: torch.Tensor  # [N, 4], top, left, height, width
    flips: torch.Tensor  # [N, 2] bool, rows and columns
    transpose: torch.Tensor  # bool, as all that follow and have no word of their own
    rotate: torch.Tensor
    angle: torch.Tensor  # radians
    matrix: torch.Tensor  # [N, 3, 3], of colors
    keep: torch.Tensor  # times the crop's mean luma is what is added to colors
    blur: torch.Tensor
    sigma: torch.Tensor  # pixels
    solarize: torch.Tensor
    resolution: torch.Tensor
    side: torch.Tensor  # pixels that the resolution is reduced to
    jpeg: torch.Tensor
    quality: torch.Tensor  # int64


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
    images = images.contiguous(memory_format=torch.channels_last)  # for the CPU's resize; decoders leave them so
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


def crop_boxes(keys: torch.Tensor, side: int, scale: list[float], aspect: list[float]) -> torch.Tensor:
    """Boxes of RandomResizedCrop, [N, 4] int64 (top, left, height, width), one for each key of [N].

    The first of ten drawn (area, aspect) pairs that fits is taken, else the whole image, as in torchvision.
    """
    tries = torch.arange(TRIES, device=keys.device)
    words = torch.tensor([[purpose("crop area")], [purpose("crop aspect")]], device=keys.device)
    areas, aspects = uniform(keys.view(-1, 1, 1), tries, words).unbind(1)  # [N, TRIES]
    area = side * side * (scale[0] + (scale[1] - scale[0]) * areas)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * aspects)
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


def color_maps(draws: dict[str, torch.Tensor], augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness, contrast, saturation and hue (with probability ``jitter``), then gray, as one affine map a crop.

    Each of these is linear in the color of a pixel, so a crop needs one 3×3 matrix and one offset and is clipped once,
    where torchvision clips after every step. Hue turns about the gray axis in YIQ, where torchvision turns in HSV.

    Args:
        draws: [N] in [0, 1) for each name of ``DRAWN``.

    Returns:
        Matrices [N, 3, 3] and shares [N] for :func:`recolored`.
    """

    def factor(name: str, strength: float) -> torch.Tensor:
        return (1 + strength * (2 * draws[name] - 1)).clamp(min=0).view(-1, 1, 1)

    one = torch.eye(3, device=draws["hue"].device)
    gray = one.new_tensor(GRAY).expand(3, 3)  # takes a color to its luma
    brightness, contrast = factor("brightness", augment.brightness), factor("contrast", augment.contrast)
    saturation = factor("saturation", augment.saturation)
    turn = 2 * math.pi * augment.hue * (2 * draws["hue"] - 1)
    matrices = _hue_rotation(turn) @ (saturation * one + (1 - saturation) * gray) * contrast * brightness
    shares = ((1 - contrast) * brightness).flatten()

    chosen = draws["jitter"] < augment.jitter
    matrices, shares = _where(chosen, matrices, one), _where(chosen, shares, torch.zeros_like(shares))
    # The offset is the same in all channels, and luma keeps it.
    return _where(draws["gray"] < augment.gray, gray.expand_as(matrices) @ matrices, matrices), shares


def recolored(images: torch.Tensor, matrices: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Color becomes ``matrices`` @ color + ``shares`` · the image's mean luma, for ``images``, [N, 3, H, W]; unclipped.

    The mean luma is what contrast keeps.
    """
    luma = (images.mean(dim=(2, 3)) * images.new_tensor(GRAY)).sum(dim=1)
    return torch.baddbmm((shares * luma).view(-1, 1, 1), matrices, images.flatten(2)).view(images.shape)


def rotated(images: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn ``images``, [N, 3, S, S], counterclockwise by ``angles``, [N] radians; what comes in is mirrored."""
    cos, sin = torch.cos(angles), torch.sin(angles)
    zero = torch.zeros_like(angles)
    turns = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(turns, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


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
    if not views or not len(images):
        return torch.zeros(len(views), len(images), 3, size, size, device=images.device)
    count, batch, side = len(views), len(images), images.shape[-1]
    view = torch.tensor(views, device=images.device)
    keys = hash32(positions.unsqueeze(1), view, config.run.seed, purpose("augment")).flatten()  # [B·V]
    image = torch.arange(batch, device=images.device).repeat_interleave(count)
    drawn = draw(keys, view.repeat(batch), image, side, size, scale, config)

    step = TILES_AT_ONCE * count
    if images.device.type == "cpu":
        step = count if count * size * size <= CACHED else 1
    parts = [Drawn(*part) for part in zip(*(t.split(step) for t in drawn), strict=True)]
    longest = _longest_side(side, scale, config.crops.aspect)
    crops = (
        _crop(images, range(start // count, -(-(start + step) // count)), part, size, longest, config.augment)
        for start, part in zip(range(0, len(keys), step), parts, strict=True)
    )
    if stain is not None:
        crops = iter(stain(torch.cat(list(crops)), keys, image).split(step))
    done = torch.empty(len(keys), 3, size, size, device=images.device)
    for crop, part, place in zip(crops, parts, done.split(step), strict=True):
        standardize(_finish(crop, part, config.augment), config.augment.mean, config.augment.std, out=place)
    return done.view(batch, count, 3, size, size).transpose(0, 1)


def draw(
    keys: torch.Tensor,
    view: torch.Tensor,
    image: torch.Tensor,
    side: int,
    size: int,
    scale: list[float],
    config: Config,
) -> Drawn:
    """Draw what is done to crops of ``size`` px of tiles of ``side`` px, of keys, views and tiles numbered [N]."""
    augment = config.augment
    words = torch.tensor([purpose(name) for name in DRAWN], device=keys.device)
    draws = dict(zip(DRAWN, uniform(keys.unsqueeze(1), words).unbind(1), strict=True))

    def between(name: str, limits: list[float]) -> torch.Tensor:
        return limits[0] + (limits[1] - limits[0]) * draws[name]

    matrices, shares = color_maps(draws, augment)
    low, high = augment.jpeg_quality
    return Drawn(
        image=image,
        boxes=crop_boxes(keys, side, scale, config.crops.aspect),
        flips=torch.stack([draws["flip rows"], draws["flip columns"]], dim=1) < (0.5 if augment.flips else 0),
        # With both flips, a transposition reaches all eight symmetries of a square.
        transpose=draws["transpose"] < (0.5 if augment.rotate90 else 0),
        rotate=draws["rotate"] < augment.rotate,
        angle=2 * math.pi * draws["angle"],
        matrix=matrices,
        keep=shares,
        blur=draws["blur"] < keys.new_tensor(augment.blur, dtype=torch.float32)[view.clamp(max=2)],
        sigma=between("sigma", augment.blur_sigma),
        solarize=(draws["solarize"] < augment.solarize) & (view == 1),
        resolution=draws["resolution"] < augment.resolution,
        side=(size * between("resolution scale", augment.resolution_scale)).round().clamp(min=1),
        jpeg=draws["jpeg"] < augment.jpeg,
        quality=low + (draws["jpeg quality"] * (high - low + 1)).long(),
    )


def _crop(images: torch.Tensor, tiles: range, drawn: Drawn, size: int, longest: int, augment: Augment) -> torch.Tensor:
    """The drawn crops, [N, 3, size, size] in [0, 1], of no other than the numbered tiles."""
    images, image = images[tiles.start : tiles.stop], drawn.image - tiles.start
    out = resample.crop(images, image, drawn.boxes, drawn.flips, drawn.transpose, size, longest)
    return _chosen(rotated, drawn.rotate, out, drawn.angle) if augment.rotate else out


def _finish(crops: torch.Tensor, drawn: Drawn, augment: Augment) -> torch.Tensor:
    """Colors and pixels of crops, [N, 3, S, S] in [0, 1], in the order of a scanner: light, lens, sensor, file."""
    out = recolored(crops, drawn.matrix, drawn.keep).clamp_(0, 1)
    if any(augment.blur):
        out = _chosen(resample.blurred, drawn.blur, out, drawn.sigma)
    if augment.solarize:
        out = _chosen(lambda x: torch.where(x >= 0.5, 1 - x, x), drawn.solarize, out)
    # A sensor's pixels and a file's blocks come last: anything after them would smear or hide what they leave.
    if augment.resolution:
        smallest = max(round(crops.shape[-1] * augment.resolution_scale[0]), 1)
        out = _chosen(lambda x, side: resample.reduced(x, side, smallest), drawn.resolution, out, drawn.side)
    if augment.jpeg:
        out = _chosen(jpeg.compressed, drawn.jpeg, out, drawn.quality)
    return out


def standardize(
    images: torch.Tensor, mean: list[float], std: list[float], out: torch.Tensor | None = None
) -> torch.Tensor:
    """``(images - mean) / std`` for float images [..., 3, H, W] in [0, 1]."""
    means, stds = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return torch.addcmul(-means / stds, images, 1 / stds, out=out)


def _longest_side(side: int, scale: list[float], aspect: list[float]) -> int:
    """What no side of a box exceeds; where a drawn pair may fail to fit, the whole image may be the box."""
    return min(side, math.ceil(side * math.sqrt(scale[1] * max(aspect[1], 1 / aspect[0]))))


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


def _chosen(
    function: Callable[..., torch.Tensor], on: torch.Tensor, images: torch.Tensor, *rows: torch.Tensor
) -> torch.Tensor:
    """``function(images, *rows)`` where ``on``, [N] bool, and ``images``, which may be overwritten, elsewhere."""
    if images.device.type == "cpu":  # a GPU would have to stop for the answer
        if not on.any():
            return images
        if on.all():
            return function(images, *rows)
        images[on] = function(images[on], *(row[on] for row in rows))
        return images
    return _where(on, function(images, *rows), images)


def _where(chosen: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Choose a whole sample by ``chosen``, [N]."""
    return torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)
