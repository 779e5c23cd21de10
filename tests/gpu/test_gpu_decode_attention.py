"""Decode attention whose last program of a head merges: in graphs, again and again, and behind
kernels that let it start before they end."""

from dataclasses import fields, replace
from typing import Any

import attention_cases
import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionBatch, prepare
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import DecodePlan, plan_contexts
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.rope import rope_and_store_kv
from kernels.kv_format import UNSCALED, KVScales
from kernels.norm import HeadNorms
from kernels.rotated_attention import rotate_and_attend

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
LENGTHS = [1168, 1, 0, 64, 65, 4000, 129, 700]
OPTIONS = {"scale": HEAD_DIM**-0.5, "sliding_window": None, "softcap": None}


NUM_BLOCKS = len(LENGTHS) * -(-max(LENGTHS) // BLOCK_SIZE)


def make_batch(lengths: list[int], first_block: int) -> AttentionBatch:
    """In `NUM_BLOCKS` blocks of its own."""
    num_seqs, num_blocks = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    order = torch.randperm(NUM_BLOCKS, dtype=torch.int32) + first_block
    tables = order[: num_seqs * num_blocks].view(num_seqs, num_blocks)
    last = [max(0, length - 1) for length in lengths]
    slots = [
        int(tables[i, end // BLOCK_SIZE]) * BLOCK_SIZE + end % BLOCK_SIZE if length else -1
        for i, (length, end) in enumerate(zip(lengths, last, strict=True))
    ]
    return AttentionBatch(
        query_starts=torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda"),
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        block_tables=tables.cuda(),
        slots=torch.tensor(slots, device="cuda"),
        positions=torch.tensor(last, device="cuda"),
        max_query_len=1,
        max_kv_len=max(lengths),
        num_seqs=num_seqs,
    )


def make_norms(head_dim: int) -> HeadNorms:
    weights = torch.rand(2, head_dim, device="cuda", dtype=torch.bfloat16) + 0.5
    return HeadNorms(weights[0], weights[1], 1e-6)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("has_norms", [False, True])
def test_in_graphs(kv_dtype: torch.dtype, *, has_norms: bool) -> None:
    norms = make_norms(HEAD_DIM) if has_norms else None
    batches = [make_batch(LENGTHS[:num], i * NUM_BLOCKS) for i, num in enumerate((1, 3, 8))]
    shape = (len(batches) * NUM_BLOCKS, 3, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool = torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(kv_dtype)
    cos_sin = torch.rand(max(LENGTHS), HEAD_DIM, device="cuda")

    def attend(qkv: Tensor, batch: AttentionBatch, plan: DecodePlan, *, rotates: bool) -> Tensor:
        """Layer after layer, each with a query that the one before it made. It's one kernel that
        also rotates, or else two."""
        out = torch.zeros(batch.num_seqs, HEADS, HEAD_DIM, device="cuda", dtype=qkv.dtype)
        for layer in range(3):
            q, k, v = (qkv + out.mean()).split([HEADS, KV_HEADS, KV_HEADS], 1)
            new = NewTokens(k, v, cos_sin, UNSCALED, norms) if rotates else None
            if new is None:
                rope_and_store_kv(q, k, v, cos_sin, batch, pool, layer, norms=norms)
            out = decode_attention(q, pool, layer, batch, new=new, plan=plan, **OPTIONS)
        return out

    # A graph keeps its own memory, not what it reads.
    inputs: list[Tensor] = []
    cases: list[tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = []
    for batch, num_shares in zip(batches, (32, 16, 500), strict=True):
        heads = (batch.num_seqs, HEADS + 2 * KV_HEADS, HEAD_DIM)
        qkv = torch.randn(heads, device="cuda", dtype=torch.bfloat16)
        inputs.append(qkv)
        whole = plan_contexts(batch, pool, None, num_shares=1)
        plan = plan_contexts(batch, pool, None, num_shares=num_shares)
        inputs += [whole.pieces, plan.pieces]
        expected = attend(qkv, batch, whole, rotates=False)
        attend(qkv, batch, plan, rotates=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(qkv, batch, plan, rotates=True)
        cases.append((graph, out, expected))
    firsts: list[Tensor] = []
    for round_ in range(20):
        for i, (graph, out, expected) in enumerate(cases):
            graph.replay()
            if round_ == 0:
                firsts.append(out.clone())
                torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
            assert torch.equal(out, firsts[i])
    assert not arrival_counters(1, pool.device).any()


def test_contexts_change_between_replays() -> None:
    """A captured step makes its plan of what it finds, for its layers."""
    torch.manual_seed(0)
    shape = (NUM_BLOCKS, 2, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    cos_sin = torch.rand(max(LENGTHS), HEAD_DIM, device="cuda")
    # The longest is the first, so that it's the one with most of the others' blocks.
    captured = make_batch(sorted(LENGTHS, reverse=True), 0)
    heads = (captured.num_seqs, HEADS + 2 * KV_HEADS, HEAD_DIM)
    qkv = torch.randn(heads, device="cuda", dtype=torch.bfloat16)

    def step(batch: AttentionBatch) -> Tensor:
        # Made anew by each step, as an engine does.
        batch = replace(batch)
        prepare(batch, pool, [None])
        out = qkv.new_zeros(batch.num_seqs, HEADS, HEAD_DIM)
        for layer in range(2):
            q, k, v = (qkv + out.mean()).split([HEADS, KV_HEADS, KV_HEADS], 1)
            out = rotate_and_attend(q, k, v, cos_sin, batch, pool, layer, scale=0.1)
        return out

    step(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for turn in range(len(LENGTHS)):
        lengths = LENGTHS[turn:] + LENGTHS[:turn]
        other = make_batch(lengths, 0)
        for field in ("kv_lens", "block_tables", "slots", "positions"):
            getattr(captured, field).copy_(getattr(other, field))
        graph.replay()
        torch.testing.assert_close(out, step(other), atol=2e-2, rtol=2e-2)


def moved(batch: AttentionBatch) -> AttentionBatch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{at: x.cuda() for at, x in tensors.items() if isinstance(x, Tensor)})


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
# In attention's kernel and, where heads are no power of two or rotate in part, before it.
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (96, 96), (128, 128), (128, 64), (256, 256)]
)
def test_norms_of_heads(kv_dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    torch.manual_seed(0)
    decodes, prompts = [(1, 700), (1, 1), (1, 64)], [(33, 90), (64, 64)]
    whole = attention_cases.make_batch(decodes + prompts, BLOCK_SIZE)
    pool = attention_cases.make_pool(whole, 2, BLOCK_SIZE, head_dim).nan_to_num().to(kv_dtype)
    angles = torch.outer(torch.arange(700), torch.rand(rotary_dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norms, scales = make_norms(head_dim), KVScales(k=0.02, v=0.5)
    qkv = torch.randn(whole.num_tokens, 10, head_dim).bfloat16()
    options: dict[str, Any] = {"scale": 0.05, "kv_scales": scales}
    q, k, v = qkv.clone().split([6, 2, 2], 1)
    expected_pool, on_cpu = pool.clone(), HeadNorms(norms.q.cpu(), norms.k.cpu(), norms.eps)
    expected = rotate_and_attend(q, k, v, cos_sin, whole, expected_pool, 1, norms=on_cpu, **options)
    batch = moved(whole)
    for case in (batch, batch.divided(3, (700, 90))):
        q, k, v = qkv.cuda().split([6, 2, 2], 1)
        actual_pool = pool.cuda()
        actual = rotate_and_attend(
            q, k, v, cos_sin.cuda(), case, actual_pool, 1, norms=norms, **options
        )
        torch.testing.assert_close(actual.cpu(), expected, atol=2e-2, rtol=2e-2)
        # What is rounded twice may fall to the next value but one.
        rtol = 2**-6 if kv_dtype is torch.bfloat16 else 2**-2
        torch.testing.assert_close(
            actual_pool.cpu().float(), expected_pool.float(), atol=2e-2, rtol=rtol
        )
