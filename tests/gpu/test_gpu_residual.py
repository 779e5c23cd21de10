"""Products that add to the residual stream on their way: the sum that two kernels would make."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import quantize_rows
from kernels.fp8_linear import Fp8Linear, add_fp8_linear, fp8_linear_reference
from kernels.linear import add_linear, linear_reference, pack_linear

DTYPE = torch.bfloat16
SHAPES = [(4096, 14336), (960, 576), (48, 80)]
NUM_TOKENS = (1, 16, 33, 64, 65, 300)
# bfloat16 keeps 8 bits.
ERROR = 4e-3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_dense(shape: tuple[int, int], num_tokens: int, *, has_bias: bool) -> None:
    x, residual = random(num_tokens, shape[1]), random(num_tokens, shape[0])
    packed = pack_linear(random(*shape), random(shape[0]) if has_bias else None)
    stream = residual.clone()
    if add_linear(x, packed, stream):
        exact = pack_linear(packed.weight.double(), None)
        bias = 0.0 if packed.bias is None else packed.bias.double()
        expected = linear_reference(x.double(), exact) + bias + residual.double()
        assert relative_error(stream, expected) < ERROR
    else:
        assert has_bias
        assert torch.equal(stream, residual)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_fp8(shape: tuple[int, int], num_tokens: int) -> None:
    x, residual = random(num_tokens, shape[1]), random(num_tokens, shape[0])
    packed = Fp8Linear(quantize_rows(random(*shape)), random(shape[0]), None)
    rows, stream = quantize_rows(x), residual.clone()
    if add_fp8_linear(rows, packed, stream):
        expected = fp8_linear_reference(rows, packed, dtype=torch.float32) + residual.float()
        assert relative_error(stream, expected) < ERROR
    else:
        assert num_tokens > 64
        assert torch.equal(stream, residual)
