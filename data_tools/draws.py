"""Random draws by counter: every draw is a hash of (seed, position, purpose), never the state of a generator.

The same lines run on Python integers, NumPy int64 arrays and torch int64 tensors (CPU and GPU), so that a sample's
draws do not depend on the worker, the rank, the device or its neighbors in the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MASK = 0xFFFFFFFF


def mix(value: Any) -> Any:
    """Scramble 32-bit words held in 64-bit integers (the finalizer of MurmurHash3, which is in the public domain)."""
    value = value & MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & MASK
    return value ^ (value >> 16)


def hash32(*words: Any) -> Any:
    """Hash integers (scalars, arrays or tensors that broadcast; 64 bits each) to words in [0, 2^32)."""
    state: Any = 0x9E3779B9
    for word in words:
        state = mix((state * 5 + 0xE6546B64) ^ (word & MASK))
        state = mix((state * 5 + 0xE6546B64) ^ ((word >> 32) & MASK))
    return mix(state ^ (2 * len(words)))


def uniform(*words: Any) -> Any:
    """Hash integers to floats in [0, 1), on a grid of 2^-24 that float32 holds exactly."""
    return (hash32(*words) >> 8) * (1.0 / (1 << 24))


def purpose(name: str) -> int:
    """The word that stands for a purpose such as ``"crop area"`` in :func:`hash32`."""
    state = 0
    for byte in name.encode():
        state = hash32(state, byte)
    return state


def generator(*words: int) -> np.random.Generator:
    """A NumPy generator keyed by integers, for draws too irregular for :func:`uniform`."""
    return np.random.Generator(np.random.Philox(key=[hash32(*words, 0), hash32(*words, 1)]))


def permute(index: Any, size: int, *key: Any) -> Any:
    """Where position ``index`` (a NumPy int64 array in [0, size)) goes in a keyed permutation of ``range(size)``.

    A Feistel network over as many bits as hold the size, walked along its cycle until the value is in range: constant
    memory, any position at once (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). A key is
    made of integers, or of arrays in the shape of ``index`` where each position is of a permutation of its own.
    """
    bits = max(2, (size - 1).bit_length())
    shape = np.shape(index)
    value = np.array(index, dtype=np.int64, copy=True).reshape(-1)
    own = np.atleast_1d(np.asarray(hash32(*key), dtype=np.int64))
    keys = [mix(own + number * 0x9E3779B9).astype(np.uint32) for number in range(4)]
    keys = [np.broadcast_to(part, shape or 1).reshape(-1) for part in keys]
    walking: Any = slice(None)
    while True:
        low, high = bits // 2, bits - bits // 2  # widths of the right and the left part, which change places
        here = value[walking]
        left, right = (here >> low).astype(np.uint32), (here & ((1 << low) - 1)).astype(np.uint32)
        for round_key in keys:
            left, right = right, left ^ (_mix32(right + round_key[walking]) & np.uint32((1 << high) - 1))
            low, high = high, low
        value[walking] = (left.astype(np.int64) << low) | right
        outside = np.flatnonzero(value >= size)
        if not len(outside):
            return value.reshape(shape)
        walking = outside


def _mix32(words: np.ndarray) -> np.ndarray:
    """:func:`mix` of uint32 words, in place."""
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return words
