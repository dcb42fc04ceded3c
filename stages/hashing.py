"""Counter-based randomness: numbers that are hashes of what they are for, so no generator state exists to be lost."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 with good avalanche: SplitMix64's increment and finalizer (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash64(*parts: np.ndarray | int) -> np.ndarray:
    """One uint64 per element of the broadcast parts; every part and its place count. Integers are taken modulo 2^64."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        as_uint64 = np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64)
        state = mix(state ^ as_uint64)
    return state


def uniform(hashes: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of uint64 hashes."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
