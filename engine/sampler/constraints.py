"""The rows of a step that may not choose freely: grammars, allowed tokens, bad words."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarCompiler, GrammarMatcher
from engine.sampler.sampled import OutputFailure
from engine.sequence import Sequence
from engine.upload import to_device
from kernels.sampling import rule_out

_FIELD = "structured_outputs"

Mask = NDArray[np.uint32]
"""Bit i % 32 of word i // 32 is whether token i may come."""


@dataclass(slots=True, eq=False)
class Constraint:
    """What one sequence is held to, as far as its tokens have come."""

    sequence: Sequence
    matcher: GrammarMatcher | None
    allowed: Mask | None
    bad_words: tuple[tuple[int, ...], ...]
    failure: OutputFailure | None = None

    def write(self, mask: Mask) -> None:
        """Overwrites `mask`."""
        if self.matcher is None:
            mask.fill(0xFFFFFFFF)
        else:
            self.matcher.write_allowed(mask.ctypes.data, mask.nbytes)
        if self.allowed is not None:
            mask &= self.allowed
        if self.bad_words:
            _clear(mask, (word[-1] for word in self.bad_words if self._is_due(word)))

    @property
    def is_too_short(self) -> bool:
        """Whether `min_tokens` may have ruled tokens out."""
        return self.sequence.num_output_tokens < self.sequence.request.sampling.min_tokens

    def check(self, *, is_stuck: bool) -> bool:
        """Whether anything but the end may follow; `is_stuck` if no token may come.

        Sets `failure` if the grammar isn't through, but can't be followed any further.
        """
        if self.matcher is None:
            return self.failure is None and not is_stuck
        if self.failure is None:
            self.failure = _failure(self.matcher, is_stuck=is_stuck)
        return not (is_stuck or self.failure is not None or self.matcher.is_over)

    def forced_tokens(self) -> list[int]:
        """Those that must follow the token just accepted, which isn't appended yet.

        None where others have a say, too (allowed tokens, bad words, a least length that rules
        ends out), or where someone wants to know what else might have come (logprobs).
        """
        sampling = self.sequence.request.sampling
        is_too_short = self.sequence.num_output_tokens + 1 < sampling.min_tokens
        is_bound_otherwise = self.allowed is not None or self.bad_words or is_too_short
        if self.matcher is None or is_bound_otherwise or sampling.logprobs is not None:
            return []
        return [] if self.failure is not None else self.matcher.forced_tokens()

    def _is_due(self, word: tuple[int, ...]) -> bool:
        """Whether the word's last token would complete it now."""
        token_ids = self.sequence.token_ids
        start = len(token_ids) - len(word) + 1
        is_output = start >= self.sequence.request.num_prompt_tokens
        return is_output and tuple(token_ids[start:]) == word[:-1]


class Constraints:
    """A constraint for each row that has one."""

    def __init__(
        self, compiler: GrammarCompiler | None, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        """Without a compiler (a model without a tokenizer) grammars are not followed."""
        self._compiler = compiler
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._eos_token_ids = list(eos_token_ids)
        self._rows: dict[int, Constraint] = {}

    def add(self, row: int, sequence: Sequence) -> None:
        """Nothing happens if `sequence` is free to say what it likes."""
        sampling = sequence.request.sampling
        allowed: Mask | None = None
        matcher, failure = self._matcher(sequence)
        if sampling.allowed_token_ids:
            allowed = np.zeros(self._num_words, dtype=np.uint32)
            _set(allowed, (i for i in sampling.allowed_token_ids if i < self._vocab_size))
            if not sampling.ignore_eos:
                _set(allowed, self._eos_token_ids)
        bad_words = tuple(w for w in sampling.bad_words_token_ids if max(w) < self._vocab_size)
        if matcher is not None or failure is not None or allowed is not None or bad_words:
            self._rows[row] = Constraint(sequence, matcher, allowed, bad_words, failure)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def of(self, rows: NDArray[np.int64]) -> list[tuple[int, Constraint]]:
        """The places in `rows` that have a constraint, each with it."""
        if not self._rows:
            return []
        found = ((place, self._rows.get(row)) for place, row in enumerate(rows.tolist()))
        return [(place, constraint) for place, constraint in found if constraint is not None]

    def forced_tokens(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        """For those of `sequences` that have rows and just accepted a token that isn't appended
        yet: the tokens that must follow it, if any must."""
        if not self._rows:
            return {}
        held = ((each, self._rows.get(each.row)) for each in sequences if each.row is not None)
        forced = {each: held_to.forced_tokens() for each, held_to in held if held_to is not None}
        return {each: tokens for each, tokens in forced.items() if tokens}

    def append(self, row: int, token_ids: list[int]) -> None:
        """The row gets forced tokens."""
        matcher = self._rows[row].matcher
        assert matcher is not None, "nothing else forces"
        for token_id in token_ids:
            matcher.accept(token_id)

    def rule_out(
        self, scores: Tensor, constrained: list[tuple[int, Constraint]]
    ) -> dict[int, OutputFailure]:
        """Sets the scores [num_rows, padded_vocab_size] of what may not come to -inf.

        Returns the failures of outputs that can't go on, by place.
        """
        masks = np.empty((len(constrained), self._num_words), dtype=np.uint32)
        for mask, (_, constraint) in zip(masks, constrained, strict=True):
            constraint.write(mask)
        places = to_device(np.array([place for place, _ in constrained]), scores.device)
        rule_out(scores, places=places, allowed=torch.from_numpy(masks.view(np.int32)))
        for mask, (place, constraint) in zip(masks, constrained, strict=True):
            is_stuck = not mask.any()
            if constraint.is_too_short and not is_stuck:
                is_stuck = bool(scores[place].isneginf().all())
            if not constraint.check(is_stuck=is_stuck):
                # Even if `min_tokens` wanted more: there is nothing more to say.
                scores[place] = -torch.inf
                scores[place, self._eos_token_ids] = 0.0
        return {place: held.failure for place, held in constrained if held.failure is not None}

    @staticmethod
    def accept(constrained: list[tuple[int, Constraint]], token_ids: list[int]) -> None:
        """Each constrained row has got its token of `token_ids`, one for each row of the step."""
        for place, constraint in constrained:
            if constraint.matcher is not None:
                # An error shows when one more token is wanted; perhaps this was the last.
                constraint.matcher.accept(token_ids[place])

    def _matcher(self, sequence: Sequence) -> tuple[GrammarMatcher | None, OutputFailure | None]:
        """The router lets nothing through that doesn't compile there. Should this process think
        otherwise, one output fails, and nobody else's."""
        params = sequence.request.sampling.structured_outputs
        if params is None or self._compiler is None:
            return None, None
        try:
            matcher = self._compiler.matcher(params)
            error = matcher.error
        except ValueError as refused:
            error = str(refused)
        else:
            if not error:
                for token_id in sequence.token_ids[sequence.request.num_prompt_tokens :]:
                    matcher.accept(token_id)
                return matcher, None
        return None, OutputFailure(f"the grammar doesn't compile here: {error}")


def _failure(matcher: GrammarMatcher, *, is_stuck: bool) -> OutputFailure | None:
    error = matcher.error
    if error:
        field = None if matcher.has_refused else _FIELD
        return OutputFailure(f"`{_FIELD}` can't be followed any further: {error}", field)
    if is_stuck and not matcher.may_end:
        return OutputFailure(
            f"`{_FIELD}` can't be followed any further: of the tokens that may come next, "
            "the request's other constraints allow none.",
            _FIELD,
        )
    return None


def _set(mask: Mask, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)


def _clear(mask: Mask, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
