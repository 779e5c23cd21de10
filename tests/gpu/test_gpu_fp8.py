"""Fp8 weights on a GPU: kernels at the sizes that models have, and engines end to end."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tandem_stack import TandemStack
from test_gpu_stack import ask
from torch import Tensor

from engine import LLM, SamplingParams
from kernels.activation import silu_and_mul_fp8, silu_and_mul_fp8_reference
from kernels.fp8 import Fp8Rows, quantize_rows, quantize_rows_reference
from kernels.fp8_linear import (
    Fp8Linear,
    fp8_linear,
    fp8_linear_reference,
    gated_fp8_linear,
    multiplies_fp8,
)
from kernels.norm import add_rms_norm_fp8, add_rms_norm_fp8_reference

DTYPE = torch.bfloat16
NUM_TOKENS = (1, 3, 16, 33, 64, 65, 300)
# bfloat16 keeps 8 bits of a result; of an input, fp8 keeps 4.
RESULT_ERROR, INPUT_ERROR = 4e-3, 4e-2
OPTIONS = {"dtype": "bfloat16", "gpu_memory_utilization": 0.1, "quantization": "fp8"}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def assert_rows_equal(actual: Fp8Rows, expected: Fp8Rows) -> None:
    """But for sums of another order, which move a number in a hundred to its neighbour."""
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-3, atol=0)
    differing = actual.values.float() != expected.values.float()
    assert differing.float().mean() < 0.02
    assert relative_error(actual.dequantized(DTYPE), expected.dequantized(DTYPE)) < 1e-2


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [4096, 14336, 576])
@pytest.mark.parametrize("scale", [None, 0.02])
def test_quantizing(size: int, scale: float | None) -> None:
    static = None if scale is None else torch.tensor([scale], device="cuda")
    x, residual, norm = random(70, size), random(70, size), random(size)
    assert_rows_equal(quantize_rows(x, static), quantize_rows_reference(x, static))
    expected, stream = add_rms_norm_fp8_reference(x, residual, norm, 1e-5, scale=static)
    actual, actual_stream = add_rms_norm_fp8(x, residual.clone(), norm, 1e-5, scale=static)
    assert_rows_equal(actual, expected)
    assert torch.equal(actual_stream, stream)
    gate_up = random(70, 2 * size)
    scales = torch.rand(70, device="cuda") + 0.1, torch.rand(2 * size, device="cuda") + 0.1
    for each in (None, scales):
        assert_rows_equal(
            silu_and_mul_fp8(gate_up, scale=static, scales=each),
            silu_and_mul_fp8_reference(gate_up, scale=static, scales=each),
        )


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (960, 576), (48, 80)])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_products(shape: tuple[int, int], num_tokens: int) -> None:
    assert multiplies_fp8(torch.device("cuda"), DTYPE)
    x = random(num_tokens, shape[1])
    packed = Fp8Linear(quantize_rows(random(*shape)), random(shape[0]), None)
    rows = quantize_rows(x)
    expected = fp8_linear_reference(rows, packed, dtype=torch.float32)
    assert relative_error(fp8_linear(rows, packed, dtype=DTYPE), expected) < RESULT_ERROR
    unquantized = x.float() @ packed.weight.dequantized(torch.float32).T + packed.bias.float()
    assert relative_error(fp8_linear(x, packed, dtype=DTYPE), unquantized) < INPUT_ERROR
    static = Fp8Linear(packed.weight, packed.bias, torch.tensor([0.02], device="cuda"))
    assert relative_error(fp8_linear(x, static, dtype=DTYPE), unquantized) < INPUT_ERROR


@pytest.mark.parametrize("num_tokens", [*NUM_TOKENS, 2100])
def test_gated_products(num_tokens: int) -> None:
    rows = quantize_rows(random(num_tokens, 512))
    packed = Fp8Linear(quantize_rows(0.05 * random(1920, 512)), None, None)
    product = fp8_linear_reference(rows, packed, dtype=torch.float32)
    expected = silu_and_mul_fp8_reference(product).dequantized(torch.float32)
    actual = gated_fp8_linear(rows, packed, dtype=DTYPE, then=packed)
    if isinstance(actual, Fp8Rows):
        actual = actual.dequantized(torch.float32)
    assert relative_error(actual, expected) < INPUT_ERROR


def prompt_logprobs(llm: LLM, prompts: list[list[int]]) -> list[Tensor]:
    """Of each token of a prompt but its first."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    logprobs: list[Tensor] = []
    for prompt, output in zip(prompts, llm.generate(inputs, sampling, use_tqdm=False), strict=True):
        pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        logprobs.append(torch.tensor([known[token].logprob for token, known in pairs]))
    return logprobs


@pytest.mark.parametrize("eager", [False, True])
def test_engine(model_dir: Path, prompts: list[list[int]], *, eager: bool) -> None:
    """Close to the unquantized model, and decoding to prefilling: their kernels differ."""
    llm = LLM(str(model_dir), **OPTIONS, enforce_eager=eager)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, ignore_eos=True)
    texts: list[list[int]] = []
    decoded: list[Tensor] = []
    for output in llm.generate(inputs, sampling, use_tqdm=False):
        answer = output.outputs[0]
        texts.append(output.prompt_token_ids + answer.token_ids)
        given = zip(answer.token_ids, answer.logprobs, strict=True)
        decoded.append(torch.tensor([known[token].logprob for token, known in given]))
    prefilled = prompt_logprobs(llm, texts)
    ends = torch.cat([logprobs[-16:] for logprobs in prefilled])
    assert (torch.cat(decoded) - ends).abs().mean() < 0.25
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    unquantized = prompt_logprobs(LLM(str(model_dir), **OPTIONS | {"quantization": None}), texts)
    expected = torch.cat(unquantized)
    difference = (torch.cat(prefilled) - expected).abs().mean()
    assert difference < 0.08 * expected.abs().mean()


def test_prefill_and_decode_workers(
    model_dir: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """What one worker says, two say."""
    arguments = ("--model", str(model_dir), "--served-model-name", "tiny", "--dtype", "bfloat16")
    options = ("--quantization", "fp8", "--max-num-batched-tokens", "256")
    share = ("--gpu-memory-utilization", "0.2")
    answers: list[list[list[int]]] = []
    for name, layout in {"colocated": ("--prefill-workers", "0"), "1P1D": ()}.items():
        with TandemStack(
            tmp_path / name, *arguments, *options, *share, *layout, name=name
        ) as stack:
            answers.append([ask(stack, [prompt])[0] for prompt in prompts])
            stack.wait_idle()
            received = stack.metric("tandem:kv_transfer_received_bytes_total", "decode-0")
            assert (received > 0) == (name == "1P1D")
    assert answers[0] == answers[1]
