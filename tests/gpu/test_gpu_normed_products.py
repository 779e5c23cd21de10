"""Products that take the RMS norm of their inputs on the way, at the sizes that models have."""

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul_reference
from kernels.fp8 import quantize_rows
from kernels.fp8_linear import Fp8Linear, fp8_linear, gated_fp8_linear
from kernels.gpu import linear as few_tokens
from kernels.linear import linear, pack_linear
from kernels.norm import Unnormalised, rms_norm_reference

DTYPE = torch.bfloat16
SHAPES = [(6144, 4096), (28672, 4096), (960, 576)]
NUM_TOKENS = (1, 3, 4, 16, 33)
# bfloat16 keeps 8 bits of a result; of an input, fp8 keeps 4.
RESULT_ERROR, INPUT_ERROR = 5e-3, 4e-2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=NUM_TOKENS)
def num_tokens(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
class TestProducts:
    """By the kernel itself, and by what chooses whether a norm comes before."""

    def inputs(self, num_tokens: int, size: int) -> tuple[Unnormalised, Tensor]:
        x = Unnormalised(20 * random(num_tokens, size), random(size), 1e-5)
        return x, rms_norm_reference(x.rows.float(), x.weight.float(), x.eps)

    def test_dense(self, num_tokens: int, shape: tuple[int, int]) -> None:
        x, normed = self.inputs(num_tokens, shape[1])
        packed = pack_linear(random(*shape), random(shape[0]))
        expected = normed @ packed.weight.float().T + packed.bias.float()
        for actual in (few_tokens.linear(x, packed.weight, packed.bias), linear(x, packed)):
            assert relative_error(actual, expected) < RESULT_ERROR

    def test_fp8(self, num_tokens: int, shape: tuple[int, int]) -> None:
        x, normed = self.inputs(num_tokens, shape[1])
        packed = Fp8Linear(quantize_rows(0.02 * random(*shape)), None, None)
        expected = normed @ packed.weight.dequantized(torch.float32).T
        product = few_tokens.fp8_linear(x, packed.weight, None, dtype=DTYPE)
        for actual in (product, fp8_linear(x, packed, dtype=DTYPE)):
            assert relative_error(actual, expected) < INPUT_ERROR
        gated = few_tokens.fp8_linear(x, packed.weight, None, dtype=DTYPE, gated=True)
        for actual in (gated, gated_fp8_linear(x, packed, dtype=DTYPE, then=None)):
            assert relative_error(actual, silu_and_mul_reference(expected)) < INPUT_ERROR
