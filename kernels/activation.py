"""The gated activation of Llama-like feed-forward layers."""

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` for `gate_up` [num_tokens, 2 * intermediate], gate half first."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has an odd last dimension: {tuple(gate_up.shape)}")
    return silu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_and_mul` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
