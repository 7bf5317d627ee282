"""Color statistics in CIE L*a*b* and their transfer: Reinhard's method, batched, on CPU or GPU.

Lab is CIE 1976 of sRGB under D65: L in [0, 100], a and b about [-100, 100]. An affine map in Lab is one in the cube
roots below it, so a transfer is: sRGB → linear light → 3×3 → cube root → affine → cube → 3×3 → sRGB.

Reinhard et al., "Color transfer between images", IEEE Computer Graphics and Applications 2001, eq. 10 and 11.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from eosin.ssl.stain.density import by_pixels

# IEC 61966-2-1: linear sRGB to XYZ; and the D65 white that makes (1, 1, 1) L = 100, a = b = 0.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
D65 = (0.950456, 1.0, 1.088754)
# Lab = SPREAD @ f + OFFSET for f, the cube roots of XYZ over white.
SPREAD = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
OFFSET = (-16.0, 0.0, 0.0)
TOE, TOE_SLOPE, TOE_F = 0.008856, 7.787, 16 / 116  # below, CIE's cube root is a straight line
KNEE, KNEE_SLOPE = 0.0031308, 12.92  # below, sRGB is a straight line
SHADES = 1 << 13  # steps of the root of light in which its 8-bit level is looked up
TISSUE_L, GLASS_L = 87.5, 95.6  # L of grays of optical density .15, where tissue begins, and .05, where glass does
PIXELS = 1 << 12  # of an image that statistics look at, on a regular grid
MIN_TISSUE = 0.02  # least fraction of tissue pixels for statistics
MIN_DEVIATION = 0.5  # of a channel; a smaller one would be blown up


class Statistics(NamedTuple):
    """Means and standard deviations of L, a, b over tissue pixels, [B, 3] each, and whether there is enough, [B]."""

    mean: torch.Tensor
    std: torch.Tensor
    good: torch.Tensor


def from_rgb(rgb: torch.Tensor) -> torch.Tensor:
    """Lab, [B, 3, ...], of sRGB in [0, 1]."""
    spread, offset, to_xyz, _ = _constants(rgb.device)
    value = to_xyz @ _to_light(rgb.flatten(2))
    # A sum of the curve at or above the toe and of the line below it; choosing by a mask is ten times slower.
    curve = value.clamp(min=TOE)
    roots = curve ** (1 / 3) + (value - curve) * TOE_SLOPE
    return (spread @ roots).add_(offset.unsqueeze(1)).view(rgb.shape)


def to_rgb(colors: torch.Tensor) -> torch.Tensor:
    """SRGB in [0, 1], [B, 3, ...], of Lab; colors out of gamut are clipped."""
    spread, offset, _, to_light = _constants(colors.device)
    roots = torch.linalg.inv(spread) @ (colors.flatten(2) - offset.unsqueeze(1))
    curve = roots.clamp(min=TOE_SLOPE * TOE + TOE_F)
    value = curve**3 + (roots - curve) / TOE_SLOPE
    return _to_srgb((to_light @ value).clamp_(0, 1)).view(colors.shape)


def statistics(images: torch.Tensor) -> Statistics:
    """Statistics over the tissue pixels of ``images``, [B, 3, H, W], uint8, or float in [0, 1]."""
    step = max(1, images.shape[2] * images.shape[3] // PIXELS)
    rgb = images.flatten(2)[:, :, ::step]
    rgb = rgb.float() / 255 if images.dtype == torch.uint8 else rgb
    colors = from_rgb(rgb.nan_to_num(1.0))
    tissue = (colors[:, :1] < TISSUE_L).float()  # [B, 1, P]
    count = tissue.sum(dim=2)  # [B, 1]
    mean = (colors * tissue).sum(dim=2) / count.clamp(min=1)
    square = ((colors - mean.unsqueeze(2)).square() * tissue).sum(dim=2)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    good = (count.squeeze(1) >= max(16, MIN_TISSUE * tissue.shape[2])) & torch.isfinite(rgb).flatten(1).all(1)
    return Statistics(mean, std, good & (std[:, 0] > 2 * MIN_DEVIATION))


def transfer(
    images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, on: torch.Tensor | None = None, fade: bool = True
) -> torch.Tensor:
    """Map Lab to ``scale`` · Lab + ``shift`` in every pixel of tissue.

    Args:
        images: [B, 3, H, W], uint8, or float in [0, 1].
        scale, shift: [B, 3].
        on: [B] bool; where False the image comes back as it is.
        fade: the change fades out from L = 87.5 to 95.6, that of empty glass; else it is the same everywhere.

    Returns:
        Images of the same type.
    """
    spread, offset, to_xyz, back = _constants(images.device)
    inverse = torch.linalg.inv(spread)
    eye = torch.eye(3, device=images.device)
    # The change of the cube roots: f' = f + change @ f + constant.
    change = inverse @ (scale.unsqueeze(2) * spread) - eye  # [B, 3, 3]
    constant = ((scale - 1) * offset + shift) @ inverse.T  # [B, 3]
    levels = _to_light(torch.arange(256, device=images.device).view(1, 1, -1) / 255).view(-1)
    shades = _shades(images.device)

    def pixels(part: torch.Tensor, change: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        eight_bits = part.dtype == torch.uint8
        light = levels.index_select(0, part.reshape(-1).int()).view(part.shape) if eight_bits else _to_light(part)
        value = (to_xyz.expand(len(part), 3, 3) @ light).clamp_(min=TOE)
        roots = value.log().mul_(1 / 3).exp_()  # [b, 3, p]
        moved = (change @ roots).add_(constant.unsqueeze(2))
        if fade:
            # L = 116 f_y - 16, so (GLASS_L - L) / (GLASS_L - TISSUE_L) is linear in the middle root.
            slope = 116 / (GLASS_L - TISSUE_L)
            moved.mul_((roots[:, 1:2] * -slope).add_(slope * (GLASS_L + 16) / 116).clamp_(0, 1))
        roots.add_(moved)
        # Only the difference is turned back, so that no change is exactly none, below the toe too.
        light = (back.expand(len(part), 3, 3) @ (roots * roots).mul_(roots).sub_(value)).add_(light).clamp_(0, 1)
        if eight_bits:
            return shades.index_select(0, light.sqrt_().mul_(SHADES).int().view(-1)).view(part.shape)
        return _to_srgb(light).clamp_(0, 1)

    return by_pixels(pixels, images, on, change, constant)


def matching(source: Statistics, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, [B, 3] each, that bring the statistics of ``source`` to ``mean`` and ``std``, [B or 1, 3]."""
    scale = std / source.std.clamp(min=MIN_DEVIATION)
    return scale, mean - scale * source.mean


def matching_modified(source: Statistics, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`matching`, by the modified method: L keeps its mean and is stretched a little, a and b are shifted.

    Roy et al., "Novel color normalization method for hematoxylin & eosin stained histopathology images", IEEE Access
    2019, sec. III: L is stretched by 1 + q, q the share by which its deviation falls short, at least .05.
    """
    short = (std[:, :1] - source.std[:, :1]) / std[:, :1].clamp(min=MIN_DEVIATION)
    stretch = 1 + torch.where(short <= 0, 0.05, short)  # [B, 1]
    scale = torch.cat([stretch, torch.ones_like(source.mean[:, 1:])], dim=1)
    shift = torch.cat([source.mean[:, :1] * (1 - stretch), mean[:, 1:] - source.mean[:, 1:]], dim=1)
    return scale, shift


def _shades(device: torch.device) -> torch.Tensor:
    """The 8-bit sRGB level of linear light whose root is i / SHADES, [SHADES + 1]."""
    root = (torch.arange(SHADES + 1, device=device) + 0.5) / SHADES
    return _to_srgb((root * root).clamp(max=1).view(1, 1, -1)).view(-1).mul(255).round().to(torch.uint8)


def _to_srgb(light: torch.Tensor) -> torch.Tensor:
    """SRGB of linear light in [0, 1], which is overwritten."""
    curve = light.clamp(min=KNEE)
    below = light.sub_(curve)
    return curve.log_().mul_(1 / 2.4).exp_().mul_(1.055).sub_(0.055).add_(below, alpha=KNEE_SLOPE)


def _to_light(rgb: torch.Tensor) -> torch.Tensor:
    curve = rgb.clamp(min=KNEE * KNEE_SLOPE)
    below = rgb - curve
    return curve.add_(0.055).mul_(1 / 1.055).log_().mul_(2.4).exp_().add_(below, alpha=1 / KNEE_SLOPE)


def _constants(device: torch.device) -> tuple[torch.Tensor, ...]:
    """SPREAD, OFFSET, and the matrices from linear light to XYZ over white and back."""
    to_xyz = torch.tensor(XYZ, device=device) / torch.tensor(D65, device=device).unsqueeze(1)
    return torch.tensor(SPREAD, device=device), torch.tensor(OFFSET, device=device), to_xyz, torch.linalg.inv(to_xyz)
