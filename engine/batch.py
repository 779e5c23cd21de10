"""The persistent batch: what the runner keeps of each running sequence between steps, and the
arrays that it makes of a step's plan."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.models.config import ModelConfig
from engine.scheduler.plan import ScheduledSequence
from engine.sequence import Sequence

_FIRST_CAPACITY = 16


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """A step's geometry on the host; the fields of `AttentionBatch` mean the same there.

    `token_ids` int64 [num_tokens]; `samples` int64 [num_samples] are the indexes of the sequences
    that sample, `sample_rows` their rows, and `sample_positions` the sampled tokens' indexes among
    their outputs. `sources` int64 [num_tokens], if any, says which tokens aren't known to the
    host: their places among the samples of the step before, -1 for all others. The first
    `num_decodes` sequences have one query each.
    """

    token_ids: NDArray[np.int64]
    sources: NDArray[np.int64] | None
    query_starts: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    max_query_len: int
    max_kv_len: int
    num_decodes: int
    samples: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    sample_positions: NDArray[np.int64]


class PersistentBatch:
    """A row for each sequence that has run and not been released: its block table and constants.

    Rows are given out lowest first and grow with need; what runs together stays together.
    """

    def __init__(self, model: ModelConfig, *, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self._max_blocks = -(-model.max_model_len // block_size)
        self._block_tables = np.zeros((0, self._max_blocks), dtype=np.int32)
        self._num_blocks: list[int] = []
        self._num_prompt_tokens = np.zeros(0, dtype=np.int64)
        self._rope_offsets = np.zeros(0, dtype=np.int64)
        self._free_rows: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._num_blocks) - len(self._free_rows)

    def add(self, sequence: Sequence) -> int:
        """A row for `sequence`; sets `sequence.row`."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        request = sequence.request
        self._num_blocks[row] = 0
        self._num_prompt_tokens[row] = request.num_prompt_tokens
        max_seq_len = min(request.max_num_tokens, self._model.max_model_len)
        self._rope_offsets[row] = self._model.rope_row_offset(max_seq_len)
        sequence.row = row
        return row

    def remove(self, sequence: Sequence) -> int | None:
        """Takes the row back; None if the sequence has none."""
        row = sequence.row
        if row is not None:
            sequence.row = None
            self._free_rows.append(row)
        return row

    def arrays(self, scheduled: list[ScheduledSequence]) -> StepArrays:
        """Every sequence has a row; `scheduled` isn't empty."""
        # The one loop over sequences of a step: attribute reads, no arithmetic on arrays.
        rows: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        sources: list[int] = []
        for item in scheduled:
            sequence, count = item.sequence, item.num_new_tokens
            row, start = sequence.row, item.start
            assert row is not None
            if len(sequence.block_ids) != self._num_blocks[row]:
                self._write_blocks(row, sequence.block_ids)
            rows.append(row)
            starts.append(start)
            counts.append(count)
            if item.source is not None:
                sources += [-1] * (len(token_ids) - len(sources))
                sources.append(item.source)
                token_ids.append(0)
            elif count == 1:
                token_ids.append(sequence.token_ids[start])
            else:
                token_ids.extend(sequence.token_ids[start : start + count])
        if sources:
            sources += [-1] * (len(token_ids) - len(sources))
        return self._arrays(
            scheduled,
            rows=np.array(rows),
            starts=np.array(starts),
            counts=np.array(counts),
            token_ids=np.array(token_ids),
            sources=np.array(sources) if sources else None,
        )

    def _arrays(
        self,
        scheduled: list[ScheduledSequence],
        *,
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        sources: NDArray[np.int64] | None,
    ) -> StepArrays:
        kv_lens = starts + counts
        max_kv_len = int(kv_lens.max())
        max_query_len = int(counts.max())
        query_ends = counts.cumsum()
        query_starts = np.zeros(len(rows) + 1, dtype=np.int32)
        query_starts[1:] = query_ends
        num_decodes = len(rows)
        if max_query_len == 1:
            token_rows, positions = rows, starts
        else:
            num_decodes = int((counts > 1).argmax())
            token_rows = rows.repeat(counts)
            positions = np.arange(len(token_ids)) + (starts - query_starts[:-1]).repeat(counts)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = self._block_tables[token_rows, blocks] * np.int64(self._block_size) + offsets
        samples = np.array([i for i, item in enumerate(scheduled) if item.samples], np.int64)
        sample_rows = rows[samples]
        return StepArrays(
            token_ids=token_ids,
            sources=sources,
            query_starts=query_starts,
            kv_lens=kv_lens.astype(np.int32),
            block_tables=self._block_tables[rows, : -(-max_kv_len // self._block_size)],
            slots=slots,
            positions=positions + self._rope_offsets[token_rows],
            max_query_len=max_query_len,
            max_kv_len=max_kv_len,
            num_decodes=num_decodes,
            samples=samples,
            sample_rows=sample_rows,
            sample_positions=kv_lens[samples] - self._num_prompt_tokens[sample_rows],
        )

    def _write_blocks(self, row: int, block_ids: list[int]) -> None:
        """Blocks are only ever appended while a sequence has its row."""
        known = self._num_blocks[row]
        assert known < len(block_ids)
        self._block_tables[row, known : len(block_ids)] = block_ids[known:]
        self._num_blocks[row] = len(block_ids)

    def _grow(self) -> None:
        used = len(self._num_blocks)
        added = max(used, _FIRST_CAPACITY)
        tables = np.zeros((used + added, self._max_blocks), dtype=np.int32)
        tables[:used] = self._block_tables
        self._block_tables = tables
        self._num_blocks += [0] * added
        self._num_prompt_tokens = np.resize(self._num_prompt_tokens, used + added)
        self._rope_offsets = np.resize(self._rope_offsets, used + added)
        self._free_rows = list(range(used + added - 1, used - 1, -1))
