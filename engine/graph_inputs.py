"""Where captured CUDA graphs read a step's arrays: at fixed addresses, padded."""

import numpy as np
import torch
from torch import Tensor

from engine.batch import StepArrays
from kernels.attention import AttentionBatch

_NO_SLOT = -1
# Rows that tokens have, and those behind them that sequences have, as half as wide numbers.
_TOKENS, _SLOTS, _POSITIONS, _PLACES, _KV_LENS, _STARTS = range(6)
_FIRST_ON_DEVICE = 1


class GraphInputs:
    """A step's sequences with one token each, padded, and then those with several, padded.

    A padded row of one token attends to nothing, a padded sequence of several tokens has none, and
    padded tokens store nothing; nobody reads what comes of them.

    Rows of int64 [7, width] on the device are the tokens sampled last (there alone), token ids,
    slots, positions, where to find each token in the first two rows, counted through, and, as int32
    in the first half of a row, context lengths and first tokens. Block tables are int32
    [max_seqs, max_blocks].
    """

    def __init__(
        self, *, max_seqs: int, max_tokens: int, max_blocks: int, device: torch.device
    ) -> None:
        width = max(max_tokens, max_seqs + 1)
        tables = (max_seqs, max_blocks)
        self._pinned_rows = torch.zeros((6, width), dtype=torch.int64, pin_memory=True)
        self._pinned_tables = torch.zeros(tables, dtype=torch.int32, pin_memory=True)
        rows = self._pinned_rows.numpy()
        self._host = rows[: _PLACES + 1]
        self._host_kv_lens, self._host_starts = rows[_KV_LENS:].view(np.int32)
        self._host_tables = self._pinned_tables.numpy()
        self._known_places = width + np.arange(width)
        self._host[_SLOTS] = _NO_SLOT
        self._host[_PLACES] = self._known_places
        self._rows = torch.zeros((7, width), dtype=torch.int64, device=device)
        self._rows[_FIRST_ON_DEVICE:].copy_(self._pinned_rows)
        self._tables = self._pinned_tables.to(device)
        self._copied: torch.cuda.Event | None = None

    def token_ids(self, num_tokens: int) -> Tensor:
        """Gathers them: a part of the graph."""
        places = self._rows[_FIRST_ON_DEVICE + _PLACES, :num_tokens]
        return self._rows.view(-1).index_select(0, places)

    def batch(
        self,
        *,
        num_seqs: int,
        num_tokens: int,
        max_query_len: int,
        max_kv_len: int,
        usual_kv_len: int | None = None,
    ) -> AttentionBatch:
        rows = self._rows[_FIRST_ON_DEVICE:]
        return AttentionBatch(
            query_starts=rows[_STARTS].view(torch.int32)[: num_seqs + 1],
            kv_lens=rows[_KV_LENS].view(torch.int32)[:num_seqs],
            block_tables=self._tables[:num_seqs],
            slots=rows[_SLOTS, :num_tokens],
            positions=rows[_POSITIONS, :num_tokens],
            max_query_len=max_query_len,
            max_kv_len=max_kv_len,
            num_seqs=num_seqs,
            usual_kv_len=usual_kv_len,
        )

    def write(
        self,
        arrays: StepArrays,
        sampled: Tensor,
        *,
        num_singles: int,
        num_seqs: int,
        num_tokens: int,
    ) -> None:
        """Puts a step in place, on the current stream: its `num_decodes` first sequences padded to
        `num_singles`, all of them to `num_seqs`, and the tokens to `num_tokens`.

        `sampled` are the tokens of the step before, which `arrays.sources` speaks of.
        """
        if self._copied is not None:
            # Pinned memory may still be being read; by the step before, so it has begun by now.
            self._copied.synchronize()
        self._write_tokens(arrays, num_singles, num_tokens)
        num_used = self._write_sequences(arrays, num_singles, num_seqs)
        if arrays.sources is not None:
            self._rows[0, : len(sampled)].copy_(sampled)
        self._rows[_FIRST_ON_DEVICE:].copy_(self._pinned_rows, non_blocking=True)
        self._tables[:num_used].copy_(self._pinned_tables[:num_used], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def _write_tokens(self, arrays: StepArrays, num_singles: int, num_tokens: int) -> None:
        first = arrays.num_decodes
        end = num_singles + len(arrays.token_ids) - first
        for row, values, padding in (
            (_TOKENS, arrays.token_ids, 0),
            (_SLOTS, arrays.slots, _NO_SLOT),
            (_POSITIONS, arrays.positions, 0),
        ):
            host = self._host[row]
            host[:first] = values[:first]
            host[first:num_singles] = padding
            host[num_singles:end] = values[first:]
            host[end:num_tokens] = padding
        places = self._host[_PLACES]
        places[:num_tokens] = self._known_places[:num_tokens]
        if arrays.sources is not None:
            # Who has a source has one token.
            known, sources = self._known_places[:first], arrays.sources[:first]
            places[:first] = np.where(sources < 0, known, sources)

    def _write_sequences(self, arrays: StepArrays, num_singles: int, num_seqs: int) -> int:
        """Returns how many rows of block tables are to be copied."""
        first = arrays.num_decodes
        num_others = len(arrays.kv_lens) - first
        end = num_singles + num_others
        kv_lens, starts, tables = self._host_kv_lens, self._host_starts, self._host_tables
        kv_lens[:first] = arrays.kv_lens[:first]
        kv_lens[first:num_singles] = 0
        kv_lens[num_singles:end] = arrays.kv_lens[first:]
        kv_lens[end:num_seqs] = 0
        starts[:num_singles] = np.arange(num_singles)
        starts[num_singles : end + 1] = arrays.query_starts[first:] + (num_singles - first)
        starts[end + 1 : num_seqs + 1] = starts[end]
        width = arrays.block_tables.shape[1]
        tables[:first, :width] = arrays.block_tables[:first]
        tables[num_singles:end, :width] = arrays.block_tables[first:]
        return end
