"""Counter-based random numbers: each is a function of its place, not of those drawn before it.

The generator is the output function of SplitMix64 (Steele et al. 2014) on a counter, so that a
batch is vectorised and each example can be computed alone.

Axes: B rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, stream: str, index: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Numbers (B, count) in [0, 1), each a function of (seed, stream, index, column) alone."""
    name = int.from_bytes(stream.encode()[:8].ljust(8, b"\0"), "little")
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(name))
        row = _mix(key + index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(row[:, None] + columns)
    return (bits >> np.uint64(11)) * (1.0 / (1 << 53))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
