"""What JPEG does to pixels, without the coding: batched, on any device, each image at a quality of its own.

ITU-T T.81 with the tables of its annex K, scaled as in the Independent JPEG Group's library, chroma at half resolution
(4:2:0), and that library's triangle filter to bring chroma back.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Annex K, tables K.1 and K.2; a row is a vertical frequency.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF 1.02: rows Y, Cb, Cr of R, G, B, and back.
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def compressed(images: torch.Tensor, qualities: torch.Tensor) -> torch.Tensor:
    """``images``, [N, 3, H, W] float in [0, 1], as a JPEG file of ``qualities``, [N] in 1..100, shows them."""
    height, width = images.shape[2:]
    levels = (images * 255).round()
    padded = F.pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
    luma, chroma = _mixed(padded, TO_YCC).round().split([1, 2], dim=1)
    luma = _quantized(luma - 128, quantization(LUMA, qualities)) + 128
    chroma = _quantized(F.avg_pool2d(chroma, 2).round(), quantization(CHROMA, qualities))
    chroma = F.interpolate(chroma.clamp(-128, 127), scale_factor=2, mode="bilinear").round()
    done = _mixed(torch.cat([luma.clamp(0, 255), chroma], dim=1), TO_RGB)[:, :, :height, :width]
    return done.round().clamp(0, 255).div(255)


def quantization(table: tuple[tuple[int, ...], ...], qualities: torch.Tensor) -> torch.Tensor:
    """A table at ``qualities``, [N] in 1..100: [N, 8, 8] in 1..255, as ``jpeg_set_quality`` of the IJG's library."""
    qualities = qualities.view(-1, 1, 1)
    percent = torch.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    return ((torch.tensor(table, device=qualities.device) * percent + 50) // 100).clamp(1, 255)


def _quantized(planes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``planes``, [N, C, H, W] with sides of whole blocks, after the transform, ``table``, [N, 8, 8], and back."""
    count, channels, height, width = planes.shape
    cosine = _cosine_transform(planes.device)
    blocks = cosine @ planes.reshape(-1, 8, width)  # down each block
    blocks = blocks.view(-1, 8) @ cosine.T  # and along
    steps = table.view(count, 1, 1, 8, 1, 8).float()
    blocks = blocks.view(count, channels, height // 8, 8, width // 8, 8)
    blocks = (blocks / steps).round_() * steps
    blocks = (blocks.view(-1, 8) @ cosine).view(-1, 8, width)
    return (cosine.T @ blocks).view(planes.shape).round_()


def _cosine_transform(device: torch.device) -> torch.Tensor:
    """The orthonormal DCT-II of 8 points, [8, 8]: rows are frequencies."""
    frequency = torch.arange(8, device=device).view(-1, 1)
    rows = torch.cos(math.pi / 16 * frequency * (2 * torch.arange(8, device=device) + 1)) / 2
    return torch.where(frequency == 0, math.sqrt(1 / 8), rows)


def _mixed(images: torch.Tensor, matrix: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    return (images.new_tensor(matrix) @ images.flatten(2)).view(images.shape)
