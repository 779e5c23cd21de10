"""FlashAttention 3 as a backend: against float64 references, and beside our own kernels."""

import gc
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import attend_naively, make_batch, make_pool
from test_gpu_engine import token_ids
from tiny_models import VOCAB_SIZE, write_tiny_model
from torch import Tensor

from engine import LLM
from kernels.attention import AttentionBatch, paged_attention
from kernels.fp8 import FP8
from kernels.gpu import attention, block_memory, flash_attention
from kernels.gpu.cards import is_hopper_card
from kernels.gpu.fp8 import saturate_rows
from kernels.kv_format import UNSCALED, KVScales
from kernels.rotated_attention import rotate_and_attend
from protocol.errors import StartupError


def _is_here() -> bool:
    try:
        flash_attention.library()
    except ImportError:
        return False
    return torch.cuda.is_available() and is_hopper_card(torch.device("cuda"))


needs_library = pytest.mark.skipif(not _is_here(), reason="needs a Hopper GPU and fa3-fwd")
# Whole prompts, one with a cached prefix, and sequences much shorter than the longest; ends at,
# before and behind the edges of blocks and of tiles of 128 to 224 tokens.
LENGTHS = [(300, 300), (512, 1313), (256, 256), (400, 896), (257, 897), (280, 2049), (16, 16)]
ENGINE: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.1}


def moved(batch: AttentionBatch) -> AttentionBatch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: x.cuda() for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)


@pytest.fixture
def num_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number, of calls of the backend."""
    count = [0]
    attend = attention.flash_attention

    def counting(*arguments: Any, **options: Any) -> Tensor:
        count[0] += 1
        return attend(*arguments, **options)

    monkeypatch.setattr(attention, "flash_attention", counting)
    return count


@pytest.fixture
def _no_numbers_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind sequences in gathered blocks is whatever was there."""
    monkeypatch.setattr(block_memory, "_memories", {})
    empty = torch.empty

    def filled(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(255) if made.dtype is torch.uint8 else made

    monkeypatch.setattr(torch, "empty", filled)


@needs_library
@pytest.mark.usefixtures("_no_numbers_in_memory")
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((8, 2), 128), ((4, 4), 128), ((14, 2), 64), ((9, 3), 64), ((4, 2), 96), ((4, 1), 256)],
)
@pytest.mark.parametrize("block_size", [16, 128])
def test_against_the_reference(
    num_calls: list[int],
    kv_dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    torch.manual_seed(0)
    batch = make_batch(LENGTHS, block_size)
    pool = make_pool(batch, heads[1], block_size, head_dim).to(kv_dtype)
    q = torch.randn(batch.num_tokens, sum(heads), head_dim).bfloat16()[:, : heads[0]]
    scales = UNSCALED if kv_dtype is torch.bfloat16 else KVScales(k=0.75, v=1.5)
    wanted = replace(moved(batch), uses_flash_attention=True)
    scale = head_dim**-0.5
    actual = paged_attention(q.cuda(), pool.cuda(), 1, wanted, scale=scale, kv_scales=scales)
    assert num_calls == [1]
    assert actual.is_contiguous()
    queries = q if kv_dtype is torch.bfloat16 else saturate_rows(q.cuda()).cpu()
    expected = attend_naively(
        queries, pool, 1, batch, scale=scale, sliding_window=None, softcap=None, kv_scales=scales
    )
    # Of each row: weights are rounded to 8 bits, or to 16.
    errors = (actual.cpu().double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < (0.02 if kv_dtype is torch.bfloat16 else 0.15)
    assert errors.mean() < (0.004 if kv_dtype is torch.bfloat16 else 0.04)


@needs_library
def test_a_softcap(num_calls: list[int]) -> None:
    torch.manual_seed(0)
    batch = make_batch(LENGTHS, 16)
    pool = make_pool(batch, 2, 16, 128).bfloat16()
    q = torch.randn(batch.num_tokens, 8, 128).bfloat16()
    wanted = replace(moved(batch), uses_flash_attention=True)
    actual = paged_attention(q.cuda(), pool.cuda(), 1, wanted, scale=0.3, softcap=2.0)
    assert num_calls == [1]
    expected = attend_naively(q, pool, 1, batch, scale=0.3, sliding_window=None, softcap=2.0)
    torch.testing.assert_close(actual.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@needs_library
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_decodes", [0, 4])
def test_a_step_with_decode_rows(
    num_calls: list[int], kv_dtype: torch.dtype, head_dim: int, num_decodes: int
) -> None:
    """Decode rows are to the bit what they are without it; what is stored, where it isn't rounded
    by another kernel."""
    torch.manual_seed(0)
    lengths = [*[(1, 700), (1, 1), (1, 2100), (1, 90)][:num_decodes], (333, 333), (300, 1300)]
    heads = (14, 2)
    batch = make_batch(lengths, 16)
    pool = make_pool(batch, heads[1], 16, head_dim).nan_to_num().to(kv_dtype).cuda()
    qkv = torch.randn(batch.num_tokens, sum(heads) + heads[1], head_dim).bfloat16().cuda()
    angles = 100 * torch.rand(2100, head_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).cuda()
    found: list[tuple[Tensor, Tensor]] = []
    for wanted in (False, True):
        step = replace(moved(batch), uses_flash_attention=wanted)
        if num_decodes:
            # Our own kernels are to be those of parts, too.
            step = step.divided(num_decodes, (2100, 1300), attends_in_parts=True)
        q, k, v = qkv.clone().split([heads[0], heads[1], heads[1]], 1)
        target, scales = pool.clone(), KVScales(k=0.9, v=0.5)
        out = rotate_and_attend(q, k, v, cos_sin, step, target, 1, scale=0.1, kv_scales=scales)
        assert num_calls == [int(wanted)]
        found.append((out, target.float()))
    (expected, expected_stored), (actual, stored) = found
    torch.testing.assert_close(stored, expected_stored, atol=0, rtol=2**-3)
    assert torch.equal(actual[:num_decodes], expected[:num_decodes])
    difference = (actual - expected).double().norm() / expected.double().norm()
    assert difference < (0.01 if kv_dtype is torch.bfloat16 else 0.08)


@needs_library
def test_captured(num_calls: list[int]) -> None:
    torch.manual_seed(0)
    batch = make_batch(LENGTHS, 16)
    pool = make_pool(batch, 2, 16, 128).to(FP8).cuda()
    q = torch.randn(batch.num_tokens, 8, 128).bfloat16().cuda()
    wanted = replace(moved(batch), uses_flash_attention=True)
    expected = paged_attention(q, pool, 1, wanted, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = paged_attention(q, pool, 1, wanted, scale=0.1)
    actual.zero_()
    graph.replay()
    assert num_calls == [2]
    assert torch.equal(actual, expected)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def long_prompts() -> list[list[int]]:
    generator = random.Random(3)
    lengths = (257, 300, 500, 700, 1000, 1500, 1900)
    return [[generator.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@needs_library
@pytest.mark.parametrize(("kv_cache_dtype", "least_equal"), [("auto", 0.7), ("fp8", 0.4)])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_greedy_tokens(
    model_dir: Path,
    long_prompts: list[list[int]],
    num_calls: list[int],
    kv_cache_dtype: str,
    least_equal: float,
    *,
    enforce_eager: bool,
) -> None:
    """Alone and at once. Captured steps keep our own kernels; what they don't take, doesn't."""
    options = ENGINE | {"kv_cache_dtype": kv_cache_dtype, "enforce_eager": enforce_eager}
    llm = LLM(str(model_dir), **options)
    expected = [token_ids(llm, [prompt])[0] for prompt in long_prompts]
    assert num_calls == [0]
    del llm
    gc.collect()
    llm = LLM(str(model_dir), **options, attention_backend="flash-attn")
    alone = [token_ids(llm, [prompt])[0] for prompt in long_prompts]
    llm.engine.pool.reset_cache()
    at_once = token_ids(llm, long_prompts)
    assert num_calls[0] > 0
    for found in (alone, at_once):
        # Of random weights, some tokens are almost equally likely.
        first = [ids[0] == wanted[0] for ids, wanted in zip(found, expected, strict=True)]
        assert sum(first) >= least_equal * len(first)


@needs_library
def test_windows_in_all_layers_are_refused(tmp_path: Path) -> None:
    model_dir = write_tiny_model("mistral", tmp_path)
    with pytest.raises(StartupError, match="sliding windows"):
        LLM(str(model_dir), **ENGINE, attention_backend="flash-attn")


def test_what_to_install_is_said(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_hopper_card(torch.device("cuda")):
        with pytest.raises(StartupError, match="Hopper GPU"):
            LLM(str(model_dir), **ENGINE, attention_backend="flash-attn")
        return
    with pytest.raises(StartupError, match="float16"):
        LLM(str(model_dir), **(ENGINE | {"dtype": "float16"}), attention_backend="flash-attn")
    with pytest.raises(StartupError, match="float8_e5m2"):
        LLM(str(model_dir), **ENGINE, kv_cache_dtype="fp8_e5m2", attention_backend="flash-attn")

    def missing() -> None:
        raise ImportError("there is none")

    monkeypatch.setattr(flash_attention, "library", missing)
    with pytest.raises(StartupError, match=r"tandem\[flash-attn\].*there is none"):
        LLM(str(model_dir), **ENGINE, attention_backend="flash-attn")
