"""Our kernels as compiled: in how many variants, and for which cards. `test_kernels_launching.py`
runs these in a process of its own."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from attention_cases import make_batch
from compiled_cases import Log, kernel_log, memory_of, renew  # noqa: F401  (a fixture)
from triton.compiler import CompiledKernel

from kernels.gpu import block_copy
from kernels.gpu import decode_attention as decode_module
from kernels.gpu import prefill_attention as prefill_module
from kernels.gpu import rope as rope_module
from kernels.gpu import widened_blocks as widened_module
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.launching import compile_ahead
from kernels.gpu.prefill_attention import prefill_attention
from kernels.kv_format import KVScales

OPTIONS: dict[str, Any] = {"scale": 1.0, "sliding_window": None, "softcap": None}


# Ada, Hopper, and Blackwell for datacenters and for desks.
@pytest.fixture(params=[89, 90, 100, 120])
def card(request: pytest.FixtureRequest, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver.active, "arch", request.param)


def test_other_batches_make_no_other_kernel(log: Log) -> None:
    """A step with prompts would stand still for seconds until one is compiled."""
    q = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
    pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=torch.float8_e4m3fn)

    def launch_all() -> None:
        for width in (1, 16, 17):
            batch = replace(make_batch([(1, 9), (1, 9)], 16), max_kv_len=1 << 14)
            batch = replace(batch, block_tables=torch.zeros(2, width, dtype=torch.int32))
            for attend in (decode_attention, prefill_attention):
                attend(q, pool, 0, batch, **OPTIONS)
        for num_seqs in (1, 3, 16, 30):
            batch = make_batch([(1, 9)] * num_seqs, 16)
            # An address that is no multiple of 16.
            behind = torch.cat((batch.kv_lens[:1], batch.kv_lens))[1:]
            for kv_lens, window in ((batch.kv_lens, None), (behind, 64)):
                plan_contexts(replace(batch, kv_lens=kv_lens), pool, window)

    compile_ahead(launch_all, progress=False)
    # Prompts have two, one for contexts in parts.
    kernels = ["_decode_kernel", "_plan_kernel", "_prefill_kernel", "_prefill_kernel"]
    assert log.names("forked") == kernels


def test_other_numbers_of_tokens_make_no_other_kernel(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["_rope_and_store_kv_kernel", "_rotated_fp8_kernel"]
    for name in names:
        renew(monkeypatch, rope_module, name)
    pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=torch.float8_e4m3fn)
    cos_sin = torch.zeros(32, 128)

    def launch_all() -> None:
        for num_tokens in (1, 3, 16, 30):
            batch = make_batch([(num_tokens, num_tokens)], 16)
            q = torch.zeros(num_tokens, 8, 128, dtype=torch.bfloat16)
            k, v = torch.zeros(2, num_tokens, 2, 128, dtype=torch.bfloat16)
            rope_module.rope_and_store_kv(q, k, v, cos_sin, batch, pool, 0)
            rope_module.rotated_fp8(q, cos_sin, batch.positions)

    compile_ahead(launch_all, progress=False)
    assert log.names("forked") == names


def test_other_numbers_of_blocks_make_no_other_kernel(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_copy_blocks_kernel"
    renew(monkeypatch, block_copy, name)
    pool = torch.zeros(8, 64, dtype=torch.uint8)

    def launch_all() -> None:
        for count in (1, 3, 4, 8):
            # As the copier has them.
            ids = torch.arange(2 * count, dtype=torch.int32)
            block_copy.copy_blocks(pool, ids[:count], pool, ids[count:])

    compile_ahead(launch_all, progress=False)
    assert log.names("forked", "here") == [name]


@pytest.mark.usefixtures("card")
def test_decode_attention_compiles_for_cards_and_groups(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew(monkeypatch, decode_module, "_decode_kernel")

    def launch_all() -> None:
        # A group that fits in the fewest columns, and one that fills as many again; one sequence
        # and several, which have other tiles.
        for group, num_seqs in ((4, 1), (16, 1), (16, 40)):
            q = torch.zeros(num_seqs, 2 * group, 128, dtype=torch.bfloat16)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn):
                pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=dtype)
                batch = make_batch([(1, 9)] * num_seqs, 16)
                decode_attention(q, pool, 0, batch, **OPTIONS)

    compile_ahead(launch_all, progress=False)
    assert all(isinstance(each, CompiledKernel) for each in memory_of(decode_module._decode_kernel))
    assert log.names("forked", "here").count("_decode_kernel") == 6


@pytest.mark.usefixtures("card")
def test_prompts_over_contexts_in_parts_compile_for_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """And any step asks for both kinds, though a card may have too few programs for parts of it."""
    renew(monkeypatch, prefill_module, "_prefill_kernel")

    def launch_all() -> None:
        for head_dim in (128, 256):
            q = torch.zeros(3, 8, head_dim, dtype=torch.bfloat16)
            pool = torch.zeros(4, 1, 2, 2, 16, head_dim, dtype=torch.float8_e4m3fn)
            prefill_attention(q, pool, 0, make_batch([(3, 9)], 16), **OPTIONS)

    compile_ahead(launch_all, progress=False)
    compiled = memory_of(prefill_module._prefill_kernel)
    assert len(compiled) == 4
    assert all(isinstance(each, CompiledKernel) for each in compiled)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype"),
    [
        (32, torch.float32, torch.float8_e4m3fn),
        (128, torch.bfloat16, torch.float8_e4m3fn),
        (256, torch.bfloat16, torch.float8_e5m2),
    ],
)
def test_turning_compiles_for_cards_and_heads(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    """And what is too large for 8 bits is left to their instructions, which see to it."""
    for module in (rope_module, decode_module):
        monkeypatch.setattr(module, "bound_of", lambda *_: None)
    kernels = (
        (decode_module, "_decode_kernel"),
        (rope_module, "_rope_and_store_kv_kernel"),
        (rope_module, "_rotated_fp8_kernel"),
        (widened_module, "_widen_blocks_kernel"),
    )
    for module, name in kernels:
        renew(monkeypatch, module, name)

    def launch_all() -> None:
        q = torch.zeros(3, 8, head_dim, dtype=dtype)
        k, v = torch.zeros(2, 3, 2, head_dim, dtype=dtype)
        pool = torch.zeros(4, 1, 2, 2, 16, head_dim, dtype=kv_dtype)
        batch, cos_sin = make_batch([(1, 9)] * 3, 16), torch.zeros(9, head_dim)
        rope_module.rope_and_store_kv(q, k, v, cos_sin, batch, pool, 0)
        rope_module.rotated_fp8(q, cos_sin, batch.positions)
        new = NewTokens(k, v, cos_sin, KVScales())
        decode_attention(q, pool, 0, batch, new=new, **OPTIONS)
        if dtype.itemsize == 2:
            widened_module.widen_blocks(pool, 0, batch, dtype, turns_back=True)

    compile_ahead(launch_all, progress=False)
    for module, name in kernels:
        compiled = memory_of(getattr(module, name))
        assert all(isinstance(each, CompiledKernel) for each in compiled)
        assert len(compiled) == (1 if dtype.itemsize == 2 or module is not widened_module else 0)
        if module is not widened_module:
            rounded = re.findall(r"cvt\.rn\.(\S*e[45]m[23]x2)\.f", compiled[0].asm["ptx"])
            assert rounded
            assert all(each.startswith("satfinite.") for each in rounded)
