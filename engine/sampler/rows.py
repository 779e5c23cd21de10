"""Sampling parameters of all running sequences, one table row each, kept between steps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.sampler.randomness import row_key
from engine.sequence import Sequence

# A table of these stays on the host; a step's rows are gathered from it only when they change.
_ROW_DTYPE = np.dtype(
    [
        ("key", np.uint64),
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("penalty_slot", np.int64),
        ("min_tokens", np.int64),
        ("has_bias", np.bool_),
        ("num_logprobs", np.int64),
    ],
    align=True,
)
NO_PENALTY_SLOT = NO_LOGPROBS = -1
_FIRST_CAPACITY = 16


@dataclass(frozen=True, slots=True, eq=False)
class TokenAdjustments:
    """The sparse part of a row: tokens with a bias, and those that may not end it too early."""

    bias_token_ids: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    stop_token_ids: NDArray[np.int64]


class SamplingTable:
    """`version` changes with every `add` and `remove`: what was made of older rows is stale."""

    def __init__(self, *, vocab_size: int, eos_token_ids: tuple[int, ...], root_seed: int) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._root_seed = root_seed
        self._rows = np.zeros(_FIRST_CAPACITY, dtype=_ROW_DTYPE)
        self._adjustments: dict[int, TokenAdjustments] = {}
        self.version = 0

    def add(self, row: int, sequence: Sequence, penalty_slot: int = NO_PENALTY_SLOT) -> None:
        """Row `row` is `sequence` from now on."""
        if row >= len(self._rows):
            grown = np.zeros(max(2 * len(self._rows), row + 1), dtype=_ROW_DTYPE)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        sampling = sequence.request.sampling
        top_k = sampling.top_k if 0 < sampling.top_k < self._vocab_size else 0
        # One candidate left is the likeliest, whatever the temperature.
        is_greedy = sampling.is_greedy or top_k == 1
        self._rows[row] = (
            row_key(
                sampling.seed,
                request_id=sequence.request.key.request_id,
                root_seed=self._root_seed,
            ),
            0.0 if is_greedy else sampling.temperature,
            top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            penalty_slot,
            sampling.min_tokens,
            bool(sampling.logit_bias),
            NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs,
        )
        if sampling.logit_bias or sampling.min_tokens:
            self._adjustments[row] = self._adjustments_of(sequence)
        self.version += 1

    def remove(self, row: int) -> int | None:
        """Forgets the row; its penalty slot, if it had one. It may still be in a step that is
        sampled later: it's greedy there, whatever it was."""
        self._adjustments.pop(row, None)
        self.version += 1
        slot = self.penalty_slot(row)
        self._rows[row] = np.zeros((), dtype=_ROW_DTYPE)
        self._rows["penalty_slot"][row] = NO_PENALTY_SLOT
        self._rows["num_logprobs"][row] = NO_LOGPROBS
        return slot

    def penalty_slot(self, row: int) -> int | None:
        slot = int(self._rows["penalty_slot"][row])
        return None if slot == NO_PENALTY_SLOT else slot

    def gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The rows' records, a copy; fields as in `_ROW_DTYPE`."""
        return self._rows[rows]

    def adjustments(self, row: int) -> TokenAdjustments:
        return self._adjustments[row]

    def _adjustments_of(self, sequence: Sequence) -> TokenAdjustments:
        """Ids outside the vocabulary name no logit and are left out."""
        sampling = sequence.request.sampling
        bias = {k: v for k, v in (sampling.logit_bias or {}).items() if k < self._vocab_size}
        eos = () if sampling.ignore_eos else self._eos_token_ids
        stops = {i for i in (*eos, *sampling.stop_token_ids) if 0 <= i < self._vocab_size}
        return TokenAdjustments(
            bias_token_ids=np.array(list(bias), dtype=np.int64),
            bias_values=np.array(list(bias.values()), dtype=np.float32),
            stop_token_ids=np.array(sorted(stops), dtype=np.int64),
        )
