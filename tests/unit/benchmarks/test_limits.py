"""Limits of whole workloads, against figures worked out by hand."""

import pytest

from benchmarks.gpu.limits import Ceilings, Workload, limit_tokens_per_s, needed_s

CEILINGS = Ceilings(matmul_tflops=800.0, fp8_tflops=1600.0, read_gb_per_s=3000.0)
# Of Llama-3.1-8B: 6.98e9 weights in layers, 0.525e9 in the head, 131,072 bytes of keys and values
# a token in 16 bits.
LAYERS, HEAD, KV_BYTES = 6.98e9, 0.525e9, 131072


def test_prompts_alone() -> None:
    """One output each, which comes with the prompt."""
    workload = Workload(num_requests=4, prompt_len=1000, output_len=1, num_streams=4)
    for is_fp8, tflops in ((False, 800.0), (True, 1600.0)):
        prompts_s, reading_s = needed_s(workload, CEILINGS, is_fp8=is_fp8)
        assert reading_s == 0.0
        # Of the last layer, little is needed; attention adds some percent.
        products = 4 * 2 * 31 / 32 * LAYERS * 1000 / (tflops * 1e12)
        assert prompts_s == pytest.approx(products, rel=0.05)


def test_decode_steps() -> None:
    workload = Workload(num_requests=64, prompt_len=1, output_len=2001, num_streams=32)
    _, reading_s = needed_s(workload, CEILINGS, is_fp8=False)
    step_bytes = 2 * (LAYERS + HEAD) + 32 * 1001.5 * KV_BYTES
    assert reading_s == pytest.approx(4000 * step_bytes / 3000e9, rel=1e-3)
    _, fp8_s = needed_s(workload, CEILINGS, is_fp8=True)
    step_bytes = LAYERS + 2 * HEAD + 32 * 1001.5 * KV_BYTES / 2
    assert fp8_s == pytest.approx(4000 * step_bytes / 3000e9, rel=1e-3)


def test_both_one_after_the_other() -> None:
    workload = Workload(num_requests=8, prompt_len=4096, output_len=256, num_streams=8)
    total_s = sum(needed_s(workload, CEILINGS, is_fp8=True))
    assert limit_tokens_per_s(workload, CEILINGS, is_fp8=True) == pytest.approx(8 * 256 / total_s)
