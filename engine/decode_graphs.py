"""Decode steps captured as CUDA graphs, one for each of a ladder of batch sizes.

A decode step of a few sequences is some hundred kernels of microseconds each: launched one by one
they wait for Python, replayed as a graph they follow each other. A graph reads its inputs where it
was captured, so a step copies its arrays there, in one piece; a batch between two sizes is padded
with rows that have no tokens, attend to nothing and store nothing.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine.batch import StepArrays
from engine.models.causal_lm import CausalLM
from kernels.attention import AttentionBatch

# Up to here the ladder has every power of two, from here on every eighth size.
_FINE_UP_TO = 8
_NO_SLOT = -1


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 16, 24, … up to `max_num_seqs`, ascending."""
    fine = [size for size in (1, 2, 4) if size < max_num_seqs]
    coarse = range(_FINE_UP_TO, max_num_seqs, _FINE_UP_TO)
    return [*fine, *coarse, max_num_seqs]


class DecodeGraphs:
    """Captured forward passes over one model and pool; `hidden` replays the one that fits."""

    def __init__(
        self, model: CausalLM, kv_pool: Tensor, sizes: list[int], *, progress: bool
    ) -> None:
        """Captures all sizes. Nothing else may run on the device meanwhile.

        `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        self._sizes = sizes
        self._max_kv_len = model.config.max_model_len
        max_blocks = -(-self._max_kv_len // kv_pool.shape[4])
        self._inputs = _Inputs(sizes[-1], max_blocks, kv_pool.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, Tensor] = {}
        memory = torch.cuda.graph_pool_handle()
        # The largest first: the others find their memory in what it leaves.
        shown = tqdm(reversed(sizes), "CUDA graphs", len(sizes), disable=not progress, leave=False)
        for size in shown:
            self._capture(model, kv_pool, size, memory)

    def hidden(self, arrays: StepArrays, sampled: Tensor) -> Tensor | None:
        """[num_seqs, hidden_size], valid until the next call; None if the step isn't captured:
        several tokens of a sequence, more sequences than the largest size, or one that doesn't
        sample. `sampled` are the tokens of the step before, which `arrays.sources` speaks of."""
        num_seqs = len(arrays.kv_lens)
        is_decode = len(arrays.token_ids) == num_seqs == len(arrays.sample_tokens)
        if not is_decode or num_seqs > self._sizes[-1]:
            return None
        size = self._sizes[int(np.searchsorted(self._sizes, num_seqs))]
        self._inputs.write(arrays, size, sampled)
        self._graphs[size].replay()
        return self._hidden[size][:num_seqs]

    @torch.inference_mode()
    def _capture(
        self,
        model: CausalLM,
        kv_pool: Tensor,
        size: int,
        memory: Any,  # noqa: ANN401  (torch has no public type for it)
    ) -> None:
        batch = self._inputs.batch(size, self._max_kv_len)
        # Outside of the graph first: kernels are compiled and libraries make their workspaces.
        model.logits(model.forward(self._inputs.token_ids(size), batch, kv_pool))
        torch.cuda.synchronize(kv_pool.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self._hidden[size] = model.forward(self._inputs.token_ids(size), batch, kv_pool)
        self._graphs[size] = graph


class _Inputs:
    """The arrays of a step at fixed addresses: pinned on the host, and on the device.

    Rows of int64 [6, max_size] are the tokens sampled last (on the device alone), token ids, slots,
    positions, where to find each token in the first two rows, counted through, and, in the first
    half of the last one, int32 context lengths; block tables are int32 [max_size, max_blocks].
    """

    def __init__(self, max_size: int, max_blocks: int, device: torch.device) -> None:
        tables = (max_size, max_blocks)
        self._pinned_rows = torch.zeros((5, max_size), dtype=torch.int64, pin_memory=True)
        self._pinned_tables = torch.zeros(tables, dtype=torch.int32, pin_memory=True)
        rows = self._pinned_rows.numpy()
        self._host_tokens, self._host_slots, self._host_positions, self._host_places = rows[:4]
        self._host_kv_lens = rows[4].view(np.int32)
        self._host_tables = self._pinned_tables.numpy()
        self._known_places = max_size + np.arange(max_size)
        self._host_slots[:] = _NO_SLOT
        self._host_places[:] = self._known_places
        self._rows = torch.zeros((6, max_size), dtype=torch.int64, device=device)
        self._rows[1:].copy_(self._pinned_rows)
        self._tables = self._pinned_tables.to(device)
        self._query_starts = torch.arange(max_size + 1, dtype=torch.int32, device=device)
        self._copied: torch.cuda.Event | None = None

    def token_ids(self, size: int) -> Tensor:
        """Gathers them: a part of the graph."""
        return self._rows.view(-1).index_select(0, self._rows[4, :size])

    def batch(self, size: int, max_kv_len: int) -> AttentionBatch:
        return AttentionBatch(
            query_starts=self._query_starts[: size + 1],
            kv_lens=self._rows[5].view(torch.int32)[:size],
            block_tables=self._tables[:size],
            slots=self._rows[2, :size],
            positions=self._rows[3, :size],
            max_query_len=1,
            max_kv_len=max_kv_len,
            num_seqs=size,
        )

    def write(self, arrays: StepArrays, size: int, sampled: Tensor) -> None:
        """Puts a step of at most `size` sequences in place, on the current stream."""
        if self._copied is not None:
            # Pinned memory may still be being read; by the step before, so it has begun by now.
            self._copied.synchronize()
        num_seqs = len(arrays.kv_lens)
        for row, values, padding in (
            (self._host_tokens, arrays.token_ids, 0),
            (self._host_slots, arrays.slots, _NO_SLOT),
            (self._host_positions, arrays.positions, 0),
            (self._host_places, self._places(arrays, num_seqs), 0),
            (self._host_kv_lens, arrays.kv_lens, 0),
        ):
            row[:num_seqs] = values
            row[num_seqs:size] = padding
        self._host_tables[:num_seqs, : arrays.block_tables.shape[1]] = arrays.block_tables
        if arrays.sources is not None:
            self._rows[0, : len(sampled)].copy_(sampled)
        self._rows[1:].copy_(self._pinned_rows, non_blocking=True)
        self._tables[:num_seqs].copy_(self._pinned_tables[:num_seqs], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def _places(self, arrays: StepArrays, num_seqs: int) -> NDArray[np.int64]:
        known = self._known_places[:num_seqs]
        if arrays.sources is None:
            return known
        return np.where(arrays.sources < 0, known, arrays.sources)
