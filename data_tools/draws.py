"""Random draws by counter: every draw is a hash of (seed, position, purpose), never the state of a generator.

The same lines run on Python integers, NumPy int64 arrays and torch int64 tensors (CPU and GPU), so that a sample's
draws do not depend on the worker, the rank, the device or its neighbors in the batch.
"""

from __future__ import annotations

import math
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

    A generalized Feistel network over pairs of numbers, of which there are hardly more than ``size``, walked along its
    cycle where a result is out of range: constant memory, any position at once (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002, method 3). A key is made of integers, or of arrays in the shape of ``index`` where
    each position is of a permutation of its own.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    value = np.array(index, dtype=np.int64, copy=True).reshape(-1)
    own = hash32(*key)
    keys: list[Any] = [mix(own + number * 0x9E3779B9) for number in range(4)]
    if np.ndim(own):
        keys = [part.astype(np.uint32).reshape(-1) for part in keys]
    else:
        keys = [np.full(1, part, dtype=np.uint32) for part in keys]
    walking: Any = slice(None)
    while True:
        left, right = (part.astype(np.uint32) for part in np.divmod(value[walking], columns))
        for number, part in enumerate(keys):
            round_key = part[walking] if len(part) == len(value) else part
            if number % 2:
                _add(right, _mix32(left + round_key), columns)
            else:
                _add(left, _mix32(right + round_key), rows)
        value[walking] = left.astype(np.int64) * columns + right
        outside = np.flatnonzero(value >= size)
        if not len(outside):
            return value.reshape(np.shape(index))
        walking = outside


def _add(words: np.ndarray, more: np.ndarray, modulus: int) -> None:
    """Add to uint32 words below ``modulus``, which is below 2^31, in place and modulo it."""
    words += more % np.uint32(modulus)
    words -= (words >= modulus) * np.uint32(modulus)


def _mix32(words: np.ndarray) -> np.ndarray:
    """:func:`mix` of uint32 words, in place."""
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return words
