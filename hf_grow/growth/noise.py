"""Random numbers that depend only on (seed, key) and position: Gaussian noise in fixed chunks, and random subsets. Without torch."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

NOISE_CHUNK = 1 << 16

Floats = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def gaussian(seed: int, key: str, first: int, last: int, std: float) -> Floats:
    """Values [first, last) of the stream (seed, key), distributed as N(0, std^2)."""
    quantiles = normal_quantiles() * np.float32(std)
    values = np.empty(last - first, dtype=np.float32)
    for chunk in range(first // NOISE_CHUNK, -(-last // NOISE_CHUNK)):
        low, high = max(first, chunk * NOISE_CHUNK), min(last, (chunk + 1) * NOISE_CHUNK)
        bits = _random_bits(seed, key, chunk)[low - chunk * NOISE_CHUNK : high - chunk * NOISE_CHUNK]
        np.take(quantiles, bits, out=values[low - first : high - first], mode="clip")
    return values


def to_dtype_bytes(values: Floats, dtype: str) -> bytes:
    """The values as little-endian bytes of a safetensors dtype, rounded to nearest even as torch does."""
    match dtype:
        case "BF16":
            bits = values.view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        case "F16":
            return values.astype("<f2").tobytes()
        case "F64":
            return values.astype("<f8").tobytes()
        case _:
            return values.astype("<f4").tobytes()


def _random_bits(seed: int, key: str, chunk: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """NOISE_CHUNK random 16-bit numbers."""
    return _philox(seed, key, str(chunk)).random_raw(NOISE_CHUNK // 4).astype("<u8", copy=False).view("<u2")


@lru_cache(maxsize=16)
def random_subset(seed: int, key: str, size: int, count: int) -> Indices:
    """`count` of the integers below `size`, sorted: those with the smallest random 64-bit values."""
    order = np.argsort(_philox(seed, key, "subset").random_raw(size), kind="stable")
    chosen = np.sort(order[:count]).astype(np.int64)
    chosen.setflags(write=False)
    return chosen


def _philox(seed: int, *key: str) -> np.random.Philox:
    """A Philox generator (Salmon et al. 2011), whose raw stream numpy keeps stable across versions, unlike that of normal()."""
    digest = hashlib.blake2b("\0".join((str(seed), *key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


@cache
def normal_quantiles() -> Floats:
    """The standard normal distribution as 65,536 equally likely values (at most 4.3 in magnitude) of variance one.

    Looking them up is five times faster than drawing each value, and as fine as 16-bit weights can represent.
    """
    inverse = NormalDist().inv_cdf
    half = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)])
    values = np.concatenate([-half[::-1], half])
    return np.asarray(values / values.std(), dtype=np.float32)
