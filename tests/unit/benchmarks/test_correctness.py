"""Benchmarks on a GPU stop at results that are off, and look at few of many rows."""

import pytest
import torch
from attention_cases import make_batch, make_pool

from benchmarks.gpu.correctness import (
    ATTENTION_ERROR,
    FP8_RESULT_ERROR,
    MOST_ROWS,
    QUANTIZED_ERROR,
    RESULT_ERROR,
    Check,
    attention,
    product,
    sampled_rows,
)
from kernels.attention import paged_attention_reference
from kernels.fp8 import quantize_rows_reference
from kernels.fp8_linear import Fp8Linear, fp8_linear_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.1])
def test_a_wrong_result_ends_the_run(wrong: float) -> None:
    expected = torch.randn(4, 8)
    check = Check("a shape", expected, bound=RESULT_ERROR)
    assert 1e-4 < check("rounded", expected.bfloat16()) < RESULT_ERROR
    with pytest.raises(SystemExit, match=r"a shape: scaled has an error of"):
        check("scaled", expected * wrong)
    with pytest.raises(SystemExit, match="nan"):
        check("cut off", expected[:3])
    assert list(check.errors) == ["rounded"]


@pytest.mark.parametrize("num_rows", [1, MOST_ROWS, MOST_ROWS + 1, 16384])
def test_sampled_rows(num_rows: int) -> None:
    rows = sampled_rows(num_rows, CPU)
    assert len(rows) == min(num_rows, MOST_ROWS)
    assert (rows.min(), rows.max()) == (0, num_rows - 1)


def test_products() -> None:
    x, weight = torch.randn(300, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    rows = sampled_rows(300, CPU)
    check = Check("16 bits", product(x, weight, rows), bound=RESULT_ERROR, rows=rows)
    check("torch", torch.nn.functional.linear(x, weight))
    x8, weight8 = quantize_rows_reference(x), quantize_rows_reference(weight)
    actual = fp8_linear_reference(x8, Fp8Linear(weight8, None, None), dtype=torch.bfloat16)
    Check("8 bits", product(x8, weight8, rows), bound=FP8_RESULT_ERROR, rows=rows)("ours", actual)
    rounded = Check("inputs", product(x, weight8, rows), bound=QUANTIZED_ERROR, rows=rows)
    assert rounded("ours", actual) > FP8_RESULT_ERROR


@pytest.mark.parametrize("lengths", [(150, 320), (200, 200), (1, 90)])
def test_attention(lengths: tuple[int, int]) -> None:
    batch = make_batch([lengths] * 2, 16)
    pool = make_pool(batch, 2, 16, 64).nan_to_num().bfloat16()
    q = torch.randn(len(batch.slots), 4, 64).bfloat16()
    rows = sampled_rows(len(q), CPU)
    expected = attention(q, pool, 1, batch, rows, scale=0.1)
    check = Check("attention", expected, bound=ATTENTION_ERROR, rows=rows)
    check("ours", paged_attention_reference(q, pool, 1, batch, scale=0.1))
    with pytest.raises(SystemExit):
        check("another layer", paged_attention_reference(q, pool, 0, batch, scale=0.1))
