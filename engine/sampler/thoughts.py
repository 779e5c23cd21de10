"""How long outputs may think: behind so many tokens of thoughts comes the one that ends them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sequence import Sequence
from protocol.sampling import ThoughtLimit


class Thoughts:
    """How far one output's thoughts have come; fed with its tokens in order."""

    def __init__(self, limit: ThoughtLimit) -> None:
        self._limit = limit
        self._num_left = limit.max_tokens
        self._is_inside = limit.starts_inside
        self._is_first = True
        self.is_over = False

    @property
    def due_token_id(self) -> int | None:
        """The token that has to come next; None if any may."""
        is_due = self._is_inside and not self.is_over and self._num_left <= 0
        return self._limit.closing_token_id if is_due else None

    def accept(self, token_id: int) -> None:
        is_first, self._is_first = self._is_first, False
        if is_first and token_id == self._limit.opening_token_id:
            # Some models write it although their thoughts have begun.
            self._is_inside = True
        elif not self._is_inside or token_id == self._limit.closing_token_id:
            self.is_over = True
        else:
            self._num_left -= 1


class ThoughtLimits:
    """The thoughts of each row that has a limit for them."""

    def __init__(self, *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: dict[int, Thoughts] = {}

    def add(self, row: int, sequence: Sequence) -> None:
        """Nothing happens if `sequence` may think as long as it likes, or a grammar lets it not."""
        sampling = sequence.request.sampling
        limit = sampling.thoughts
        if limit is None or sampling.structured_outputs is not None:
            return
        if not 0 <= limit.closing_token_id < self._vocab_size:
            return
        thoughts = Thoughts(limit)
        for token_id in sequence.token_ids[sequence.request.num_prompt_tokens :]:
            thoughts.accept(token_id)
        self._rows[row] = thoughts

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def of(self, rows: NDArray[np.int64]) -> list[tuple[int, Thoughts]]:
        """The places in `rows` that think, or may begin to, each with its thoughts."""
        if not self._rows:
            return []
        found = ((place, self._rows.get(row)) for place, row in enumerate(rows.tolist()))
        return [(place, held) for place, held in found if held is not None and not held.is_over]

    @staticmethod
    def force(scores: Tensor, limited: list[tuple[int, Thoughts]]) -> None:
        """Leaves the rows of `scores` where thoughts have to end nothing else to choose."""
        for place, thoughts in limited:
            token_id = thoughts.due_token_id
            if token_id is not None:
                scores[place] = -torch.inf
                scores[place, token_id] = 0.0

    @staticmethod
    def accept(limited: list[tuple[int, Thoughts]], token_ids: list[int]) -> None:
        """Each limited row has got its token of `token_ids`, one for each row of the step."""
        for place, thoughts in limited:
            thoughts.accept(token_ids[place])
