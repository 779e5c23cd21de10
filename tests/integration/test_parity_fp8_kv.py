"""With keys and values of 8 bits: prefill and decode apart say what one worker says."""

from collections.abc import Iterator

import pytest
from greedy_reference import MAX_TOKENS
from tandem_stack import TandemStack
from test_parity_stack import ask

from engine import LLM, SamplingParams

# In bfloat16, where native kernels give a token the same keys to the bit in any batch: rounded to
# 8 bits, what differs a little may differ much.
FP8 = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
OPTIONS = ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8", "--disable-log-requests")


def offline(prompts: list[list[int]], **config: str) -> list[list[int]]:
    llm = LLM(num_gpu_blocks_override=1000, **config)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
        use_tqdm=False,
    )
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def short(prompts: list[list[int]]) -> list[list[int]]:
    return [prompt for prompt in prompts if len(prompt) <= 500]


@pytest.fixture(scope="module")
def expected(short: list[list[int]]) -> list[list[int]]:
    return offline(short, **FP8)


@pytest.fixture(scope="module", params=["1P1D", "colocated"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    colocated = ("--prefill-workers", "0") if request.param == "colocated" else ()
    chunks = ("--max-num-batched-tokens", "128", "--verify-kv-checksums")
    with TandemStack(log, *OPTIONS, *chunks, *colocated, name=request.param) as running:
        yield running


def test_apart_and_together(
    stack: TandemStack, short: list[list[int]], expected: list[list[int]]
) -> None:
    assert ask(stack, short).token_ids == expected
    assert ask(stack, short).token_ids == expected  # from the prefix cache, in part
    stack.wait_idle()
    received = stack.metric("tandem:kv_transfer_received_bytes_total", "decode-0")
    assert (received > 0) == (stack.name == "1P1D")
    assert "(float8_e4m3fn, " in stack.output()


def test_most_tokens_are_those_of_16_bits(
    short: list[list[int]], expected: list[list[int]]
) -> None:
    pairs = zip(expected, offline(short, dtype="bfloat16"), strict=True)
    equal = [[a == b for a, b in zip(*pair, strict=False)] for pair in pairs]
    assert sum(map(sum, equal)) > 0.5 * sum(map(len, equal))
