"""On a GPU the engine's greedy output in float32 equals transformers', however steps fall."""

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from greedy_reference import GreedyReference

from engine import LLM, SamplingParams
from protocol.errors import StartupError

GREEDY = SamplingParams(temperature=0.0, max_tokens=GreedyReference.max_tokens)
FLOAT32 = {"dtype": "float32", "gpu_memory_utilization": 0.1}


def token_ids(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False
    )
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    llm.engine.pool.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """A worker has its process for itself: what others hold in there counts as its own."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def llm(model_dir: Path) -> LLM:
    return LLM(str(model_dir), **FLOAT32)


def test_auto_is_the_gpu_and_the_pool_fills_its_share(llm: LLM) -> None:
    assert llm.engine.kv_pool.is_cuda
    share_bytes = 0.1 * torch.cuda.mem_get_info()[1]
    assert 0.5 * share_bytes < llm.engine.kv_pool.nbytes < share_bytes


def test_alone_and_at_once(llm: LLM, prompts: list[list[int]], reference: GreedyReference) -> None:
    expected = [reference(prompt) for prompt in prompts]
    llm.engine.pool.reset_cache()
    assert [token_ids(llm, [prompt])[0] for prompt in prompts] == expected
    llm.engine.pool.reset_cache()
    assert token_ids(llm, prompts) == expected


def test_cached_prefix(llm: LLM, prompts: list[list[int]], reference: GreedyReference) -> None:
    prefix, *endings = prompts[-2], *prompts[1:5]
    batch = [prefix + ending for ending in endings]
    expected = [reference(prompt) for prompt in batch]
    llm.engine.pool.reset_cache()
    assert token_ids(llm, batch[:1]) == expected[:1]
    assert token_ids(llm, batch) == expected


def test_chunks_and_preemption(
    model_dir: Path, prompts: list[list[int]], reference: GreedyReference
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) <= 500]
    tight = LLM(
        str(model_dir),
        **FLOAT32,
        num_gpu_blocks_override=sum(-(-len(prompt) // 16) for prompt in batch) + 3,
        max_num_batched_tokens=48,
        max_num_seqs=32,
        enable_prefix_caching=False,
    )
    assert token_ids(tight, batch) == [reference(prompt) for prompt in batch]


def test_bfloat16_runs(model_dir: Path, prompts: list[list[int]]) -> None:
    llm = LLM(str(model_dir), dtype="bfloat16", gpu_memory_utilization=0.1)
    assert all(len(ids) == GREEDY.max_tokens or ids[-1] == 1 for ids in token_ids(llm, prompts))


def test_a_card_that_is_taken_is_said_at_start(model_dir: Path) -> None:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # Past torch's books, as another process would take it.
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    taken = ctypes.c_void_p()
    size = ctypes.c_size_t(free_bytes - total_bytes // 4)
    assert runtime.cudaMalloc(ctypes.byref(taken), size) == 0
    try:
        with pytest.raises(StartupError, match="more than the GPU has free"):
            LLM(str(model_dir), gpu_memory_utilization=0.5)
    finally:
        assert runtime.cudaFree(taken) == 0
