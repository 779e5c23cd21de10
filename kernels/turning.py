"""Keys of 8 bits are turned by a Hadamard matrix before they are rounded, and queries with them.

Rounding errs in proportion to each element, and a few elements of keys are far larger than others:
what they lose is most of a score's error. Turned, an element is a sum of many, with signs, so none
is. Scores stay as they are, since the matrix is orthogonal (as in QuaRot, arXiv:2404.00456). Each
half of a head is turned on its own: pairs that RoPE rotates, one from either half, had better not
be mixed. Values need no turn: their elements are of one size, and errors of many tokens' average
out.
"""

import torch
from torch import Tensor

from kernels.kv_format import FP8_DTYPES

# Half of it is the least that matrix instructions multiply.
_MIN_HEAD_DIM = 32


def turns(kv_pool: Tensor, rotary_dim: int) -> bool:
    """Whether `kernels.rope.rope_and_store_kv` turns what it rotates, for a pool like this one.

    All workers must agree, whatever they run on: those that compute prompts, and those that go on.
    """
    return kv_pool.dtype in FP8_DTYPES and can_turn(kv_pool.shape[-1], rotary_dim)


def can_turn(head_dim: int, rotary_dim: int) -> bool:
    """Whether all of a head rotates, and its halves have a matrix: powers of two do."""
    is_power_of_2 = head_dim & (head_dim - 1) == 0
    return head_dim == rotary_dim and head_dim >= _MIN_HEAD_DIM and is_power_of_2


def turned(x: Tensor) -> Tensor:
    """`x` [..., head_dim] in float32, each half of its last dimension times the Hadamard matrix of
    that size in natural order, made orthonormal. That is symmetric, so turning twice gives `x`."""
    half = x.shape[-1] // 2
    result = x.float()
    step = 1
    while step < half:
        first, second = result.unflatten(-1, (-1, 2, step)).unbind(-2)
        result = torch.stack((first + second, first - second), -2).reshape(x.shape)
        step *= 2
    return result * half**-0.5
