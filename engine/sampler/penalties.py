"""Repetition, presence and frequency penalties over token counts kept per row."""

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.upload import to_device
from kernels.sampling import penalize

_FIRST_CAPACITY = 4


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyRows:
    """Rows of a step that use penalties. `places` int64 [n] are their places in the step, `slots`
    int64 [n] name their counts; the penalties are float32 [n]."""

    places: Tensor
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class PenaltyCounts:
    """How often each token occurs in the output, and whether in the prompt, of the sequences
    that use penalties: vocabulary-sized, so allocated for those alone."""

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._free_slots: list[int] = []

    def add(self, prompt_ids: TokenIds[int], output_ids: TokenIds[int]) -> int:
        """Counts a sequence's tokens so far; the slot to name it by until `remove`."""
        if not self._free_slots:
            self._grow()
        slot = self._free_slots.pop()
        self._in_prompt[slot].zero_().index_fill_(0, self._indexes(prompt_ids), value=True)
        self._output_counts[slot].zero_()
        self.count_more(slot, output_ids)
        return slot

    def remove(self, slot: int) -> None:
        self._free_slots.append(slot)

    def count(self, rows: PenaltyRows, token_ids: Tensor) -> None:
        """Adds a step's sampled `token_ids` (int64, one a row of the step) to the counts."""
        self._output_counts[rows.slots, token_ids[rows.places]] += 1

    def count_more(self, slot: int, token_ids: TokenIds[int]) -> None:
        """Adds tokens that nobody sampled to one sequence's counts."""
        indexes = self._indexes(token_ids)
        ones = torch.ones_like(indexes, dtype=torch.int32)
        self._output_counts[slot].index_add_(0, indexes, ones)

    def apply(self, rows: PenaltyRows, scores: Tensor) -> None:
        """Changes `scores` [num_rows, >= vocab_size] in place."""
        penalize(
            scores,
            places=rows.places,
            slots=rows.slots,
            output_counts=self._output_counts,
            in_prompt=self._in_prompt,
            repetition=rows.repetition,
            presence=rows.presence,
            frequency=rows.frequency,
        )

    def _indexes(self, token_ids: TokenIds[int]) -> Tensor:
        return to_device(np.array(token_ids, dtype=np.int64), self._in_prompt.device)

    def _grow(self) -> None:
        """Doubles the slots, so that a burst of such requests doesn't copy the counts each time."""
        used = self._output_counts.shape[0]
        added = max(used, _FIRST_CAPACITY)
        self._output_counts = torch.cat(
            [self._output_counts, self._output_counts.new_zeros((added, self._vocab_size))]
        )
        self._in_prompt = torch.cat(
            [self._in_prompt, self._in_prompt.new_zeros((added, self._vocab_size))]
        )
        self._free_slots.extend(range(used, used + added))
