"""The rows of a step whose output follows a grammar."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarCompiler, GrammarMatcher
from engine.sequence import Sequence
from kernels.sampling import rule_out

logger = logging.getLogger(__name__)


class GrammarRows:
    """A matcher for each constrained row, as far as its sequence's tokens have come."""

    def __init__(self, compiler: GrammarCompiler | None, *, eos_token_ids: tuple[int, ...]) -> None:
        """Without a compiler (a model without a tokenizer) nothing is constrained."""
        self._compiler = compiler
        self._eos_token_ids = list(eos_token_ids)
        self._matchers: dict[int, GrammarMatcher] = {}

    def add(self, row: int, sequence: Sequence) -> None:
        """Nothing happens if `sequence` is free to say what it likes."""
        params = sequence.request.sampling.structured_outputs
        if params is None or self._compiler is None:
            return
        matcher = self._compiler.matcher(params)
        for token_id in sequence.token_ids[sequence.request.num_prompt_tokens :]:
            matcher.accept(token_id)
        self._matchers[row] = matcher

    def remove(self, row: int) -> None:
        self._matchers.pop(row, None)

    def constrained(self, rows: NDArray[np.int64]) -> list[tuple[int, GrammarMatcher]]:
        """The places in `rows` that have a grammar, with their matchers."""
        if not self._matchers:
            return []
        found = ((place, self._matchers.get(row)) for place, row in enumerate(rows.tolist()))
        return [(place, matcher) for place, matcher in found if matcher is not None]

    def rule_out(self, scores: Tensor, constrained: list[tuple[int, GrammarMatcher]]) -> None:
        """Sets the scores [num_rows, padded_vocab_size] of what no grammar allows to -inf."""
        assert self._compiler is not None, "else nothing is constrained"
        mask_bytes = self._compiler.mask_bytes
        masks = torch.empty((len(constrained), mask_bytes // 4), dtype=torch.int32)
        address = masks.data_ptr()
        for i, (_, matcher) in enumerate(constrained):
            matcher.write_allowed(address + i * mask_bytes, mask_bytes)
        places = torch.tensor([place for place, _ in constrained], device=scores.device)
        rule_out(scores, places=places, allowed=masks)
        for place, matcher in constrained:
            if matcher.is_over:
                # Even if `min_tokens` wanted more: there is nothing more to say.
                scores[place] = -torch.inf
                scores[place, self._eos_token_ids] = 0.0

    @staticmethod
    def accept(constrained: list[tuple[int, GrammarMatcher]], token_ids: list[int]) -> None:
        """Each constrained row has got its token of `token_ids`, one for each row of the step."""
        for place, matcher in constrained:
            if not matcher.accept(token_ids[place]):
                logger.warning("an output is cut short, its grammar failed: %s", matcher.error)
