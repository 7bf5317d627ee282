"""Polygons in µm and their antialiased rasterization: the vocabulary that phantoms are drawn in. No colors here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Floating point, and 8 bits; OpenCV's type stubs know neither.
Floats = NDArray[Any]
Labels = NDArray[Any]

SUBPIXEL_BITS = 5
BRUSH_PIXELS = 0.6


@dataclass(frozen=True)
class Layer:
    """Polygons of one kind. ``points`` [N, K, 2] are x, y in µm; ``level`` [N] is what each paints, 0 to 255."""

    plane: str
    points: Floats
    level: Labels

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """The lowest and the highest x, y of every polygon, [N, 2] each."""
        return self.points.min(axis=1), self.points.max(axis=1)

    @cached_property
    def inward(self) -> Floats:
        """Unit normals into the polygons at their corners, [N, K, 2]."""
        return inward(self.points)


def paint(layers: tuple[Layer, ...], mpp: float, box_um: tuple[float, float, float, float]) -> Labels:
    """Rasterize layers in order into one antialiased plane [H, W] of levels.

    Args:
        mpp: µm a pixel.
        box_um: x, y, width, height of the window, µm.
    """
    x, y, width, height = box_um
    plane = np.zeros((round(height / mpp), round(width / mpp)), np.uint8)
    scale = (1 << SUBPIXEL_BITS) / mpp
    for layer in layers:
        low, high = layer.bounds
        seen = np.flatnonzero(((high > (x, y)) & (low < (x + width, y + height))).all(axis=1))
        # OpenCV's antialiased edge reaches beyond the polygon. It counts from pixel centers, half a pixel in.
        points = layer.points[seen] + layer.inward[seen] * (BRUSH_PIXELS * mpp)
        corners = (points - (x, y)) * scale - (1 << SUBPIXEL_BITS) / 2
        for polygon, level in zip(np.rint(corners).astype(np.int32), layer.level[seen].tolist()):
            cv2.fillPoly(plane, [polygon], level, cv2.LINE_AA, SUBPIXEL_BITS)
    return plane


def full(points: Floats, level: int) -> Labels:
    """The same gray level, 0 to 255, for each of N shapes: [N] uint8."""
    return np.full(len(points), level, np.uint8)


def levels(rng: np.random.Generator, count: int, mean: float, spread: float) -> Labels:
    """Gray levels of ``count`` shapes, normally distributed and clipped to 1 to 255: [count] uint8."""
    return np.clip(rng.normal(mean, spread, count), 1, 255).astype(np.uint8)


def blobs(
    rng: np.random.Generator,
    centers: Floats,
    long: Floats | float,
    short: Floats | float,
    angle: Floats | float,
    *,
    wobble: float = 0.04,
    corners: int = 20,
    power: float = 2.0,
) -> Floats:
    """Rounded closed outlines [N, corners, 2]; ``power`` above 2 squares them off (a superellipse)."""
    count = len(centers)
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = np.ones((count, corners))
    for harmonic in (2, 3, 4, 5):
        phase = rng.uniform(0, 2 * np.pi, (count, 1))
        radius += rng.normal(0, wobble / harmonic**0.5, (count, 1)) * np.cos(harmonic * turn + phase)
    radius *= (np.abs(np.cos(turn)) ** power + np.abs(np.sin(turn)) ** power) ** (-1 / power)
    local = np.stack([radius * np.cos(turn) * _column(long, count), radius * np.sin(turn) * _column(short, count)], -1)
    return (rotate(local, _column(angle, count)) + centers[:, None]).astype(np.float32)


def ribbons(line: Floats, half_width: Floats) -> Floats:
    """Tapered ribbons [N, 2S, 2] along center lines [N, S, 2]."""
    along = np.gradient(line, axis=1)
    normal = np.stack([-along[..., 1], along[..., 0]], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-6
    taper = np.sin(np.linspace(0.15, np.pi - 0.15, line.shape[1])) ** 0.6
    offset = normal * (half_width[:, None] * taper)[..., None]
    return np.concatenate([line + offset, (line - offset)[:, ::-1]], axis=1).astype(np.float32)


def waves(
    rng: np.random.Generator, shortest_um: float, longest_um: float, count: int = 8
) -> Callable[[Floats], Floats]:
    """A smooth random function of x, y with variance 1: a sum of plane waves."""
    turn, phase = rng.uniform(0, 2 * np.pi, (2, count))
    number = 2 * np.pi / rng.uniform(shortest_um, longest_um, count)
    vector = np.stack([np.cos(turn), np.sin(turn)]) * number

    def field(points: Floats) -> Floats:
        return np.cos(points @ vector + phase).sum(axis=-1) * (2 / count) ** 0.5

    return field


def bend(rng: np.random.Generator, side_um: float, warp_um: float = 9.0) -> Callable[[Floats], Floats]:
    """A map of the plane that turns it, centers it on the slide and warps it gently."""
    turn = rng.uniform(0, np.pi)
    warp_x, warp_y = waves(rng, 180, 420), waves(rng, 180, 420)

    def bent(points: Floats) -> Floats:
        turned = rotate(points, np.array(turn))
        return turned + np.stack([warp_x(turned), warp_y(turned)], axis=-1) * warp_um + side_um / 2

    return bent


def lattice(rng: np.random.Generator, side_um: float, pitch_um: float, jitter: float, warp_um: float = 9.0) -> Floats:
    """Points [N, 2] of a hexagonal lattice, bent, and moved by a normal jitter (µm), on a slide of ``side_um``."""
    reach = int(0.75 * side_um / pitch_um) + 3
    tall = int(reach * 1.16)
    column, row = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-tall, tall + 1))
    flat = np.stack([column + 0.5 * (row % 2), row * 3**0.5 / 2], axis=-1).reshape(-1, 2) * pitch_um
    points = bend(rng, side_um, warp_um)(flat)
    points = points + rng.normal(0, jitter, points.shape)
    return points[((points > -pitch_um) & (points < side_um + pitch_um)).all(axis=1)]


def lookup(labels: Labels, points: Floats, mpp: float) -> Labels:
    """Labels [...] under points [..., 2]; 0 outside the map."""
    index = np.floor(points / mpp).astype(int)
    inside = ((index >= 0) & (index < labels.shape[0])).all(axis=-1)
    index = np.where(inside[..., None], index, 0)
    return np.where(inside, labels[index[..., 1], index[..., 0]], 0).astype(labels.dtype)


def rotate(points: Floats, angle: Floats) -> Floats:
    """Turn points [..., 2] by angles that broadcast to [...]."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1)


def inset(points: Floats, distance: float) -> Floats:
    """Move every corner of polygons [N, K, 2] inward."""
    return points + distance * inward(points)


def inward(points: Floats) -> Floats:
    """Unit normals [N, K, 2] into polygons at their corners."""
    along = np.roll(points, -1, axis=1) - np.roll(points, 1, axis=1)
    x, y = np.moveaxis(points - points[:, :1], -1, 0)
    clockwise = np.sign((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1))
    normal = np.stack([-along[..., 1], along[..., 0]], axis=-1) * clockwise[:, None, None]
    return normal / (np.linalg.norm(along, axis=-1, keepdims=True) + 1e-6)


def _column(value: Floats | float, count: int) -> Floats:
    return np.broadcast_to(np.asarray(value, np.float32).reshape(-1, 1), (count, 1))
