"""Random numbers that are a pure function of (request's seed, output position).

Whoever samples a request's token number `position`, prefill or decode worker, first attempt or
retry, alone or in a batch, draws the same number for it.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): state k·γ through Stafford's mix 13.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def row_key(seed: int | None, *, request_id: str, root_seed: int) -> int:
    """A request's 64-bit stream key: of its seed, or of its id when it came without one."""
    text = f"request {root_seed} {request_id}" if seed is None else f"seed {seed}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) a row, of 53 random bits."""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA
    state ^= state >> np.uint64(30)
    state *= _MULTIPLIER_1
    state ^= state >> np.uint64(27)
    state *= _MULTIPLIER_2
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
