"""The row-wise kernels against plain torch, in every dtype and for strided inputs."""

from pathlib import Path

import pytest
import torch

import kernels
from kernels.activation import silu_and_mul, silu_and_mul_reference
from kernels.linear import linear, linear_reference, pack_linear
from kernels.native.library import Operation, native_kernel
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_kernels_is_our_package():
    """A package of this name exists elsewhere; ours must win."""
    assert Path(kernels.__file__).parents[1] == Path(__file__).parents[3]


@pytest.mark.parametrize("dtype", DTYPES)
class TestNorm:
    @pytest.mark.parametrize("implementation", [rms_norm, rms_norm_reference])
    @pytest.mark.parametrize("shape", [(1, 576), (7, 64), (300, 129), (5, 3, 80), (2, 1), (0, 64)])
    def test_rms_norm(self, implementation, shape, dtype):
        torch.manual_seed(0)
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
        x64 = x.double()
        expected = x64 * (x64.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        assert_near(implementation(x, weight, 1e-5), expected)

    @pytest.mark.parametrize("implementation", [rms_norm, rms_norm_reference])
    def test_rms_norm_of_heads_in_a_fused_tensor(self, implementation, dtype):
        """QK norm sees [num_tokens, num_heads, head_dim] as a view of the qkv projection."""
        torch.manual_seed(0)
        fused = torch.randn(6, 5 * 64).to(dtype)
        heads = fused[:, 64:192].unflatten(1, (2, 64))
        weight = torch.randn(64).to(dtype)
        expected = rms_norm_reference(heads.double(), weight.double(), 1e-6)
        actual = implementation(heads, weight, 1e-6)
        assert actual.shape == heads.shape
        assert_near(actual, expected)

    @pytest.mark.parametrize("implementation", [add_rms_norm, add_rms_norm_reference])
    @pytest.mark.parametrize("shape", [(1, 576), (33, 100), (300, 64), (0, 64)])
    def test_add_rms_norm(self, implementation, shape, dtype):
        torch.manual_seed(0)
        x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight = torch.randn(shape[-1]).to(dtype)
        expected_sum = x + residual
        expected = rms_norm_reference(expected_sum.double(), weight.double(), 1e-5)
        normed, total = implementation(x.clone(), residual.clone(), weight, 1e-5)
        assert torch.equal(total, expected_sum)
        assert_near(normed, expected)

    def test_a_wrong_weight_is_refused(self, dtype):
        with pytest.raises(ValueError, match="weight is"):
            rms_norm(torch.zeros(2, 8, dtype=dtype), torch.zeros(7, dtype=dtype), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [silu_and_mul, silu_and_mul_reference])
@pytest.mark.parametrize("shape", [(1, 3072), (5, 26), (300, 128), (0, 8)])
def test_silu_and_mul(implementation, shape, dtype):
    torch.manual_seed(0)
    gate_up = (torch.randn(shape) * 4).to(dtype)
    gate_up[:, 0] = -100.0
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(implementation(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
class TestLinear:
    @pytest.mark.parametrize("implementation", [linear, linear_reference])
    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 12, 13, 31, 64, 301])
    @pytest.mark.parametrize("features", [(96, 64), (64, 576), (130, 33), (1, 1), (5, 7)])
    def test_products(self, implementation, num_tokens, features, dtype):
        torch.manual_seed(0)
        out_features, in_features = features
        weight = (torch.randn(features) / in_features**0.5).to(dtype)
        bias = torch.randn(out_features).to(dtype)
        x = torch.randn(num_tokens, in_features).to(dtype)
        expected = x.double() @ weight.double().T
        assert_near(implementation(x, pack_linear(weight)), expected)
        assert_near(implementation(x, pack_linear(weight, bias)), expected + bias.double())

    def test_a_strided_input(self, dtype):
        torch.manual_seed(0)
        x, weight = torch.randn(9, 128).to(dtype), torch.randn(40, 64).to(dtype)
        expected = x[:, 64:].double() @ weight.double().T
        torch.testing.assert_close(
            linear(x[:, 64:], pack_linear(weight)).double(), expected, atol=0.15, rtol=0.02
        )

    def test_packing_keeps_every_weight(self, dtype):
        weight = torch.arange(70 * 33).remainder(251).view(70, 33).to(dtype)
        packed = pack_linear(weight)
        ids = torch.tensor([0, 69, 31, 32, 0])
        assert torch.equal(packed.unpacked(), weight)
        assert torch.equal(packed.embed(ids), weight[ids])

    def test_a_part_of_the_output_channels(self, dtype):
        torch.manual_seed(0)
        weight, bias = torch.randn(150, 33).to(dtype), torch.randn(150).to(dtype)
        packed, x = pack_linear(weight, bias), torch.randn(5, 33).to(dtype)
        part = packed.from_channel(96)
        assert torch.equal(part.unpacked(), weight[96:])
        whole, shared = packed.weight.untyped_storage(), part.weight.untyped_storage()
        assert shared.data_ptr() == whole.data_ptr()
        assert_near(linear(x, part), x.double() @ weight[96:].double().T + bias[96:].double())

    def test_ids_outside_of_the_table_are_refused(self, dtype):
        packed = pack_linear(torch.zeros(4, 8, dtype=dtype))
        for wrong in (-1, 4):
            with pytest.raises(IndexError):
                packed.embed(torch.tensor([0, wrong]))

    def test_a_wrong_input_is_refused(self, dtype):
        packed = pack_linear(torch.zeros(4, 8, dtype=dtype))
        with pytest.raises(ValueError, match="expected"):
            linear(torch.zeros(2, 7, dtype=dtype), packed)


@pytest.mark.parametrize("shape", [(960, 576), (100, 1537)])
def test_a_token_gets_the_same_bits_in_any_batch(shape):
    """What makes greedy answers equal whether a request runs alone or with others."""
    if native_kernel(Operation.LINEAR, torch.empty(1, dtype=torch.bfloat16)) is None:
        pytest.skip("torch's own linear layers don't promise it")
    torch.manual_seed(0)
    packed = pack_linear(torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16())
    x = torch.randn(700, shape[1]).bfloat16()
    whole = linear(x, packed)
    for first, last in [(0, 1), (3, 5), (10, 23), (100, 164), (699, 700), (0, 333)]:
        assert torch.equal(linear(x[first:last], packed), whole[first:last])
