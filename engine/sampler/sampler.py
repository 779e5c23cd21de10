"""From a step's logits to its tokens, vectorised over rows.

Order, as in vLLM: logprobs are taken from the logits as they come; then bias, minimum length,
penalties, constraints (grammar, allowed tokens, bad words), the end of long thoughts; greedy rows
take the largest; the others divide by their temperature, filter, and choose by a random number
that is a function of (seed, output position).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarCompiler
from engine.sampler.constraints import Constraints
from engine.sampler.groups import RowGroups, StopEntries, group_rows
from engine.sampler.logprobs import PendingLogprobs
from engine.sampler.penalties import PenaltyCounts
from engine.sampler.pending import HeldRows, PendingRows
from engine.sampler.randomness import uniforms
from engine.sampler.rows import NO_PENALTY_SLOT, SamplingTable
from engine.sampler.sampled import OutputFailure
from engine.sampler.thoughts import ThoughtLimits
from engine.sequence import Sequence
from engine.upload import to_device
from kernels.choice import CHUNK, choose_tokens
from protocol.sampling import SamplingParams


class Sampler:
    """Holds the sampling state of all running sequences by row number.

    A token that `choose` chooses counts as the row's next output from then on: the caller
    appends it to the sequence, or removes the row.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        root_seed: int,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._table = SamplingTable(
            vocab_size=vocab_size, eos_token_ids=eos_token_ids, root_seed=root_seed
        )
        self._penalty_counts = PenaltyCounts(vocab_size=vocab_size, device=device)
        self._constraints = Constraints(
            grammars, vocab_size=vocab_size, eos_token_ids=eos_token_ids
        )
        self._thoughts = ThoughtLimits(vocab_size=vocab_size)
        self._groups: RowGroups | None = None
        self._grouped: tuple[int, bytes] | None = None
        # Chunked search wants whole chunks; the surplus logits are -inf.
        self._padded_vocab_size = -(-vocab_size // CHUNK) * CHUNK
        self._scores = torch.empty((0, self._padded_vocab_size), device=device)

    def add(self, row: int, sequence: Sequence) -> None:
        """Row `row` stands for `sequence`, at whatever output position it is, until `remove`."""
        slot = NO_PENALTY_SLOT
        if _uses_penalties(sequence.request.sampling):
            num_prompt_tokens = sequence.request.num_prompt_tokens
            slot = self._penalty_counts.add(
                sequence.token_ids[:num_prompt_tokens], sequence.token_ids[num_prompt_tokens:]
            )
        self._table.add(row, sequence, slot)
        self._constraints.add(row, sequence)
        self._thoughts.add(row, sequence)

    def remove(self, row: int) -> None:
        self._constraints.remove(row)
        self._thoughts.remove(row)
        slot = self._table.remove(row)
        if slot is not None:
            self._penalty_counts.remove(slot)

    def choose(
        self, logits: Tensor, rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> PendingRows:
        """Tokens for `rows` from `logits` [num_rows, vocab_size], whatever its dtype.

        `positions[i]` is the index among row i's output tokens of the one to sample. Rows that
        aren't free (`PendingRows.is_free`) may not come again before their tokens are read and
        appended. A row that was removed since the logits were made gets a token of no meaning.
        """
        groups = self._groups_of(rows)
        constrained = self._constraints.of(rows)
        limited = self._thoughts.of(rows)
        if logits.is_cuda and groups.are_plain and not (constrained or limited):
            return PendingRows(self._choose(logits, groups, positions))
        scores = self._load(logits)
        wanted = groups.logprobs
        unadjusted = None if wanted is None else scores[wanted.index, : self._vocab_size]
        self._adjust(scores, groups, positions)
        failures: dict[int, OutputFailure] = {}
        if constrained:
            failures = self._constraints.rule_out(scores, constrained)
        self._thoughts.force(scores, limited)
        chosen = self._choose(scores, groups, positions)
        if groups.penalized is not None:
            self._penalty_counts.count(groups.penalized, chosen)
        held = HeldRows(constrained, limited, failures)
        if wanted is None or unadjusted is None:
            return PendingRows(chosen, held=held)
        logprobs = PendingLogprobs(unadjusted, chosen[wanted.index], wanted.num_top)
        return PendingRows(chosen, held=held, logprobs=logprobs, logprob_places=wanted.places)

    def forced_tokens(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """What must follow the tokens that were just read for `sequences`: for those of them that
        have rows, and where anything must."""
        return self._constraints.forced_tokens(sequences)

    def append(self, row: int, token_ids: list[int]) -> None:
        """Forced tokens count as the row's next outputs, behind the one that was read."""
        self._constraints.append(row, token_ids)
        slot = self._table.penalty_slot(row)
        if slot is not None:
            self._penalty_counts.count_more(slot, token_ids)

    def _groups_of(self, rows: NDArray[np.int64]) -> RowGroups:
        """Decode steps in a row have the same rows; only a change makes new groups."""
        key = (self._table.version, rows.tobytes())
        if self._groups is None or key != self._grouped:
            self._groups = group_rows(self._table, rows, self._device)
            self._grouped = key
        return self._groups

    def _load(self, logits: Tensor) -> Tensor:
        """A float32 copy, padded to whole chunks: [num_rows, padded_vocab_size].

        The buffer stays: fresh memory of this size costs a CPU more than all the arithmetic.
        """
        num_rows = logits.shape[0]
        if num_rows > self._scores.shape[0]:
            self._scores = torch.empty((num_rows, self._padded_vocab_size), device=self._device)
        scores = self._scores[:num_rows]
        scores[:, self._vocab_size :].fill_(-torch.inf)
        scores[:, : self._vocab_size].copy_(logits)
        return scores

    def _adjust(self, scores: Tensor, groups: RowGroups, positions: NDArray[np.int64]) -> None:
        if groups.biased is not None:
            biased = groups.biased
            scores[biased.places, biased.token_ids] += biased.values
        if groups.stops is not None:
            self._rule_out_stops(scores, groups.stops, positions)
        if groups.penalized is not None:
            self._penalty_counts.apply(groups.penalized, scores)

    def _rule_out_stops(
        self, scores: Tensor, stops: StopEntries, positions: NDArray[np.int64]
    ) -> None:
        too_early = positions[stops.places] < stops.min_tokens
        if too_early.any():
            places = to_device(stops.places[too_early], self._device)
            token_ids = to_device(stops.token_ids[too_early], self._device)
            scores[places, token_ids] = -torch.inf

    def _choose(self, scores: Tensor, groups: RowGroups, positions: NDArray[np.int64]) -> Tensor:
        """May overwrite `scores`."""
        random = groups.random
        if random is None:
            return choose_tokens(scores)
        return choose_tokens(
            scores,
            temperature=random.temperature,
            uniforms=to_device(uniforms(random.keys, positions), self._device),
            filters=random.filters,
        )


def _uses_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
