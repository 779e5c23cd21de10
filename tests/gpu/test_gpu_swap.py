"""Blocks come back from pinned memory as they left, and sequences go on with them."""

from pathlib import Path

import pytest
import torch
from greedy_reference import GreedyReference

from engine import LLM, SamplingParams
from engine.scheduler import decode
from engine.scheduler.swap import BlockCopies
from engine.swap import HostBlocks
from protocol.layout import KVLayout

LAYOUT = KVLayout(
    model_fingerprint="m", num_layers=4, num_kv_heads=8, head_dim=64, block_size=16, dtype="float32"
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=GreedyReference.max_tokens)


def test_copies_follow_the_order_of_the_stream() -> None:
    pool = torch.randn(64, 4, 2, 8, 16, 64, device="cuda")
    before = pool.cpu()
    host = HostBlocks(pool, LAYOUT, 48)
    assert host._blocks.is_pinned()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    out = list(zip(order[:48], range(48), strict=True))
    host.run(BlockCopies(out=out))
    # Nobody waits: what is written behind the copies comes behind them.
    pool.fill_(-1.0)
    targets = order[16:]
    host.run(BlockCopies(back=list(zip(targets, range(48), strict=True))))
    expected = torch.full_like(before, -1.0)
    expected[targets] = before[order[:48]]
    assert torch.equal(pool.cpu(), expected)


def test_memory_can_be_pinned_again() -> None:
    pool = torch.randn(4, 4, 2, 8, 16, 64, device="cuda")
    for _ in range(3):
        host = HostBlocks(pool, LAYOUT, 256)
        host.run(BlockCopies(out=[(1, 3)]))
        torch.cuda.synchronize()
        del host
    torch.empty(1 << 20, device="cuda")


def test_swapped_sequences_go_on(
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,
    prompts: list[list[int]],
    reference: GreedyReference,
) -> None:
    # All are let in, with no room to grow.
    monkeypatch.setattr(decode, "WATERMARKS", (0.0, 0.0))
    batch = [prompt for prompt in prompts if len(prompt) <= 500]
    llm = LLM(
        str(model_dir),
        dtype="float32",
        gpu_memory_utilization=0.1,
        num_gpu_blocks_override=sum(-(-len(prompt) // 16) for prompt in batch) + 1,
        max_num_seqs=32,
        enable_prefix_caching=False,
        preemption_mode="swap",
        swap_space=0.25,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in batch], GREEDY, use_tqdm=False
    )
    expected = [reference(prompt) for prompt in batch]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert llm._loop.scheduler.stats.num_preemptions > 0
    assert llm._loop.scheduler.num_swapped == 0
