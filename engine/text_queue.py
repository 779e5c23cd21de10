"""Texts that wait for an encoder, and which of them run next.

An encoder has no memory between steps: a text runs whole, once, beside as many others as a step
takes. Lower priority numbers go first, then whoever came earlier.
"""

import heapq
import itertools
from dataclasses import dataclass, field

from protocol.ids import RequestKey
from protocol.request import Request

# Aborted texts that are no burden.
_FEW = 64


@dataclass(frozen=True, slots=True, order=True)
class WaitingText:
    """Compared by rank alone; `arrival_s` is of a monotonic clock."""

    priority: int
    number: int
    request: Request = field(compare=False)
    arrival_s: float = field(compare=False)


class TextQueue:
    """Hands out batches of at most `max_num_seqs` texts and `max_num_batched_tokens` tokens."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._numbers = itertools.count()
        self._heap: list[WaitingText] = []
        self._waiting: dict[RequestKey, WaitingText] = {}
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Of all texts that wait."""
        return self._num_tokens

    def add(self, request: Request, *, arrival_s: float) -> None:
        """A request that waits already isn't added again."""
        if request.key in self._waiting:
            return
        text = WaitingText(request.priority, next(self._numbers), request, arrival_s)
        heapq.heappush(self._heap, text)
        self._waiting[request.key] = text
        self._num_tokens += len(request.token_ids)

    def abort(self, key: RequestKey) -> None:
        """Unknown keys are ignored."""
        if self._leave(key) and len(self._heap) > 2 * len(self._waiting) + _FEW:
            # Behind others that keep coming, what was aborted might never be met.
            self._heap = list(self._waiting.values())
            heapq.heapify(self._heap)

    def take(self) -> list[WaitingText]:
        """The next step's texts; one at least if any waits, however long it is."""
        batch: list[WaitingText] = []
        num_left = self._max_num_batched_tokens
        while self._heap and len(batch) < self._max_num_seqs:
            first = self._heap[0]
            if self._waiting.get(first.request.key) is not first:
                heapq.heappop(self._heap)  # aborted
                continue
            num_left -= len(first.request.token_ids)
            if batch and num_left < 0:
                break
            heapq.heappop(self._heap)
            self._leave(first.request.key)
            batch.append(first)
        return batch

    def _leave(self, key: RequestKey) -> bool:
        """False for an unknown key."""
        text = self._waiting.pop(key, None)
        if text is None:
            return False
        self._num_tokens -= len(text.request.token_ids)
        return True
