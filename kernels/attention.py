"""Causal attention over the paged KV pool, for prefill chunks and decode rows in one batch."""

from collections.abc import Iterable
from ctypes import byref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.kv_format import UNSCALED, KVScales, native_format, scales_of
from kernels.native.arguments import PagedAttentionArgs
from kernels.native.library import Operation, native_kernel

if TYPE_CHECKING:
    from kernels.gpu.decode_plan import DecodePlan

# A group of gathered decode contexts stays under this many elements, about 128 MiB in bfloat16.
_MAX_GATHERED_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's geometry, built once a step and used by all layers; tensors on the pool's device.

    Sequence i's new tokens are rows `query_starts[i] : query_starts[i + 1]`, at least one, and are
    the last of its `kv_lens[i]` tokens. Entries of `block_tables` past a sequence's blocks are
    never read for their meaning, but must be valid block ids (0 will do).
    """

    query_starts: Tensor  # int32 [num_seqs + 1]
    kv_lens: Tensor  # int32 [num_seqs], tokens including this step's
    block_tables: Tensor  # int32 [num_seqs, max_blocks]
    slots: Tensor  # int64 [num_tokens], block id * block_size + offset of each new token
    positions: Tensor  # int64 [num_tokens], rows of RoPE's table; a sequence's follow each other
    max_query_len: int
    max_kv_len: int
    num_seqs: int
    usual_kv_len: int | None = None
    """What work is ordered for, where `max_kv_len` is far beyond what is to be expected."""
    parts: "tuple[AttentionBatch, AttentionBatch] | None" = None
    """The same rows in two, if the first sequences have one query each and others more."""
    attends_in_parts: bool = False
    """Whether each part has a kernel of its own, whatever is faster: a part may be padded."""
    uses_flash_attention: bool = False
    """Whether FlashAttention 3 is to attend for prompts where it can, on a GPU."""
    decode_plans: "dict[int | None, DecodePlan]" = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """By sliding window, what `prepare` has made of sequences with one query each, for one pool."""

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    def divided(
        self, num_decodes: int, max_kv_lens: tuple[int, int], *, attends_in_parts: bool = False
    ) -> "AttentionBatch":
        """The same batch with its `parts`: the first `num_decodes` sequences have one query each.

        `max_kv_lens` are the two parts' own.
        """
        decodes = replace(
            self,
            query_starts=self.query_starts[: num_decodes + 1],
            kv_lens=self.kv_lens[:num_decodes],
            block_tables=self.block_tables[:num_decodes],
            slots=self.slots[:num_decodes],
            positions=self.positions[:num_decodes],
            max_query_len=1,
            max_kv_len=max_kv_lens[0],
            num_seqs=num_decodes,
        )
        prompts = replace(
            self,
            query_starts=self.query_starts[num_decodes:] - num_decodes,
            # Copies: kernels are compiled anew for addresses that aren't multiples of 16.
            kv_lens=self.kv_lens[num_decodes:].clone(),
            block_tables=self.block_tables[num_decodes:].clone(),
            slots=self.slots[num_decodes:].clone(),
            positions=self.positions[num_decodes:].clone(),
            max_kv_len=max_kv_lens[1],
            num_seqs=self.num_seqs - num_decodes,
        )
        return replace(self, parts=(decodes, prompts), attends_in_parts=attends_in_parts)

    def last_tokens(self, max_kv_len: int) -> "LastTokens":
        """Each sequence's last new token; `max_kv_len` is at least this batch's."""
        # A captured graph's padded sequences have none: any row will do.
        rows = (self.query_starts[1:] - 1).clamp(min=0)
        batch = AttentionBatch(
            query_starts=torch.arange(self.num_seqs + 1, dtype=torch.int32, device=rows.device),
            kv_lens=self.kv_lens,
            block_tables=self.block_tables,
            slots=self.slots.index_select(0, rows),
            positions=self.positions.index_select(0, rows),
            max_query_len=1,
            max_kv_len=max_kv_len,
            num_seqs=self.num_seqs,
        )
        return LastTokens(rows, batch)

    def __post_init__(self) -> None:
        # Checked here, once a step: native kernels see only addresses.
        int32 = (self.query_starts, self.kv_lens, self.block_tables)
        int64 = (self.slots, self.positions)
        if not (
            all(tensor.dtype is torch.int32 and tensor.stride(-1) == 1 for tensor in int32)
            and all(tensor.dtype is torch.int64 and tensor.stride(-1) == 1 for tensor in int64)
        ):
            raise ValueError("an AttentionBatch holds int32 geometry, and int64 slots, positions")


@dataclass(frozen=True, slots=True)
class LastTokens:
    """A batch's last token of each sequence, as a batch of its own."""

    rows: Tensor  # int32 [num_seqs], where they are in the whole batch
    batch: AttentionBatch


def prepare(batch: AttentionBatch, kv_pool: Tensor, sliding_windows: Iterable[int | None]) -> None:
    """Makes what kernels want to know of `batch`, once for all of a step's layers, which have those
    windows.

    To be called before the step's first kernel. The batch is of that step alone, and for pools like
    this one. A step that is captured makes its own while it is: replays find other contexts.
    """
    if kv_pool.is_cuda:
        from kernels.gpu import attention as gpu

        gpu.prepare(batch, kv_pool, sliding_windows)


def paged_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    """Attend from each query to its sequence's tokens up to itself; the new KV is in the pool.

    `q` is [num_tokens, num_heads, head_dim] with a contiguous last dimension; the result has its
    shape, contiguous. `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size,
    head_dim], of q's type or one of 8 bits, whose values are multiplied with `kv_scales`; `q` is as
    `kernels.rope.rope_and_store_kv` leaves it, turned if the pool's keys are.
    `sliding_window` counts the tokens seen, the query's own included. `softcap` bounds scores as
    `softcap * tanh(score / softcap)`.
    """
    num_heads, head_dim = q.shape[1:]
    if kv_pool.shape[5] != head_dim or num_heads % kv_pool.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} doesn't fit the pool {tuple(kv_pool.shape)}")
    assert 0 <= layer < kv_pool.shape[1]
    scales = scales_of(kv_pool, kv_scales)
    if q.is_cuda:
        _check_layout(q, kv_pool)
        from kernels.gpu import attention as gpu

        return gpu.paged_attention(
            q,
            kv_pool,
            layer,
            batch,
            scale=scale * scales.k,
            v_scale=scales.v,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    kernel = native_kernel(Operation.PAGED_ATTENTION, q)
    kv_format = native_format(kv_pool, q.dtype)
    if kernel is None or kv_format is None:
        return paged_attention_reference(
            q,
            kv_pool,
            layer,
            batch,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            kv_scales=kv_scales,
        )
    _check_layout(q, kv_pool)
    block_stride, layer_stride, *_ = kv_pool.stride()
    out = torch.empty(q.shape, dtype=q.dtype)
    args = PagedAttentionArgs(
        q=q.data_ptr(),
        out=out.data_ptr(),
        pool=kv_pool.data_ptr() + layer * layer_stride * kv_pool.element_size(),
        query_starts=batch.query_starts.data_ptr(),
        kv_lens=batch.kv_lens.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
        num_seqs=batch.num_seqs,
        max_blocks=batch.block_tables.stride(0),
        num_heads=num_heads,
        num_kv_heads=kv_pool.shape[3],
        head_dim=head_dim,
        block_size=kv_pool.shape[4],
        q_stride=q.stride(0),
        block_stride=block_stride,
        window=sliding_window or batch.max_kv_len,
        max_kv_len=batch.max_kv_len,
        kv_format=kv_format,
        num_threads=torch.get_num_threads(),
        scale=scale * scales.k,
        softcap=softcap or 0.0,
        v_scale=scales.v,
    )
    if not kernel(byref(args)):
        raise MemoryError("no memory for attention's workspace")
    return out


def _check_layout(q: Tensor, kv_pool: Tensor) -> None:
    if q.stride()[1:] != (q.shape[2], 1) or not kv_pool.is_contiguous():
        raise ValueError("attention needs adjacent heads and a contiguous pool")


def paged_attention_reference(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    """`paged_attention` in torch: gathers the blocks, decode rows of many sequences at a time."""
    scales = scales_of(kv_pool, kv_scales)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts, kv_lens = batch.query_starts.tolist(), batch.kv_lens.tolist()
    layer_pool = kv_pool.select(1, layer)
    window = sliding_window or batch.max_kv_len
    for first, last in _groups(starts, kv_lens, layer_pool[0].numel() // layer_pool.shape[3]):
        rows = slice(starts[first], starts[last])
        num_queries = starts[first + 1] - starts[first]
        queries = q[rows].unflatten(0, (last - first, num_queries))
        out[rows] = _attend(
            queries,
            layer_pool,
            batch.block_tables[first:last],
            batch.kv_lens[first:last],
            max_kv_len=max(kv_lens[first:last]),
            scale=scale * scales.k,
            window=window,
            softcap=softcap,
        ).flatten(0, 1)
    return out if scales.v == 1.0 else out.mul_(scales.v)


def _groups(
    starts: list[int], kv_lens: list[int], elements_per_token: int
) -> list[tuple[int, int]]:
    """Runs `[first, last)` of sequences attended at once: neighbours in decode, else one."""
    groups: list[tuple[int, int]] = []
    first = longest = 0
    for i, kv_len in enumerate(kv_lens):
        longest = max(longest, kv_len)
        is_decode = starts[i + 1] - starts[first] == i + 1 - first
        gathered = longest * (i + 1 - first) * elements_per_token
        if i > first and not (is_decode and gathered <= _MAX_GATHERED_ELEMENTS):
            groups.append((first, i))
            first, longest = i, kv_len
    groups.append((first, len(kv_lens)))
    return groups


def _attend(
    queries: Tensor,
    layer_pool: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    *,
    max_kv_len: int,
    scale: float,
    window: int,
    softcap: float | None,
) -> Tensor:
    """Attention of `queries` [num_seqs, num_queries, num_heads, head_dim], as many each."""
    num_seqs, num_queries, num_heads, head_dim = queries.shape
    num_kv_heads, block_size = layer_pool.shape[2:4]
    num_blocks = -(-max_kv_len // block_size)
    # [num_seqs, blocks, 2, kv_heads, block_size, head_dim] to k and v by head, tokens in a row
    gathered = layer_pool[block_tables[:, :num_blocks]].permute(2, 0, 3, 1, 4, 5).to(queries.dtype)
    k, v = gathered.flatten(3, 4)[..., :max_kv_len, :]
    kv_positions = torch.arange(max_kv_len, device=queries.device)
    padding = kv_positions >= kv_lens[:, None]
    if num_seqs > 1:
        # What lies past a sequence's end is whatever the block's last owner left, NaN included.
        k = k.masked_fill(padding[:, None, :, None], 0)
        v = v.masked_fill(padding[:, None, :, None], 0)
    query_positions = (
        kv_lens[:, None] - num_queries + torch.arange(num_queries, device=queries.device)
    )
    distance = query_positions[:, :, None] - kv_positions
    visible = (distance >= 0) & (distance < window)  # [num_seqs, num_queries, kv]
    # The heads of a group share their K and V: they become further query rows.
    group = num_heads // num_kv_heads
    rows = queries.unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = visible[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            rows, k, v, attn_mask=mask, scale=scale
        )
    else:
        scores = softcap * torch.tanh((rows @ k.mT).float() * (scale / softcap))
        probabilities = scores.masked_fill_(~mask, float("-inf")).softmax(-1)
        out = probabilities.to(v.dtype) @ v
    return (
        out.unflatten(2, (group, num_queries))
        .permute(0, 3, 1, 2, 4)
        .reshape(num_seqs, num_queries, num_heads, head_dim)
    )
