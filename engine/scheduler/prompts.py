"""Prompts that wait and prompts that are being computed, and how they share a step's tokens.

Policy, in this order:

1. **Admission is in rank order** (priority, then arrival), and only when the prompt gets tokens in
   this step: the later it looks into the prefix cache, the more it finds. While one waits for
   blocks, nobody behind it is admitted, so a stream of short prompts can't starve a long one.
2. **Short prompts pass a long one.** While the first prompt needs more than half of the step, the
   other half goes to prompts of at least its priority that need at most half as many tokens as
   it does. With a work-conserving split in halves, that is exactly when sharing shortens the mean
   wait: two prompts of s and h tokens end after 2s and s + h instead of h and s + h. The first
   prompt keeps its half, so it takes at most twice as long as alone, however many pass.
3. **A prompt waits for its prefix.** If most of what it needs is being computed right now by
   another prompt, it starts when that is cached instead of computing it a second time.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseEvent
from engine.scheduler.admission import Admission
from engine.scheduler.plan import ScheduledSequence
from engine.scheduler.queue import RankedQueue, running_rank, waiting_rank
from engine.sequence import Sequence
from protocol.block_hash import BlockHash

# Below this many tokens in common, a step's delay costs more than computing them twice.
MIN_TOKENS_WORTH_WAITING = 256
_WAITING = (Phase.WAITING, Phase.SWAPPED)
# How many waiting prompts a step looks at beyond those that it admits.
MAX_LOOKAHEAD = 64


class _StepTokens:
    """One step's token budget and who got how much of it, behind what is `in_flight`."""

    def __init__(self, budget: int, block_size: int, in_flight: Mapping[Sequence, int]) -> None:
        self.left = budget
        self._block_size = block_size
        self._in_flight = in_flight
        self._given: dict[Sequence, int] = {}

    @property
    def num_given(self) -> int:
        return sum(self._given.values())

    def num_wanted(self, sequence: Sequence) -> int:
        """Its tokens behind those in flight."""
        return sequence.num_uncomputed_tokens - self._in_flight.get(sequence, 0)

    def give(self, sequence: Sequence, limit: int) -> int:
        """Up to `limit` more tokens; returns how much of `limit` is used up.

        A chunk that doesn't end the prompt ends with a block if it can, because whole blocks
        travel and are cached. The few tokens that this leaves are nobody's: they would only
        admit the next prompt for a sliver of it, before it can find more in the cache.
        """
        given = self._given.get(sequence, 0)
        first = sequence.num_computed_tokens + self._in_flight.get(sequence, 0)
        start = first + given
        limit = min(limit, self.left)
        end = min(start + limit, sequence.num_tokens)
        is_cut = end < sequence.num_tokens
        if is_cut:
            aligned = end - end % self._block_size
            end = aligned if aligned > start else end
        if end > start:
            self._given[sequence] = end - first
            self.left = 0 if is_cut and limit == self.left else self.left - (end - start)
        return limit if is_cut else end - start

    def keep(self, num_tokens: int) -> None:
        """Takes back what is beyond `num_tokens`, unless that is all of the last chunk."""
        excess = self.num_given - num_tokens
        if excess <= 0:
            return
        sequence, given = next(reversed(self._given.items()))
        end = sequence.num_computed_tokens + self._in_flight.get(sequence, 0) + given - excess
        kept = given - excess - end % self._block_size
        if kept > 0:
            self._given[sequence] = kept

    def scheduled(self) -> list[ScheduledSequence]:
        return [
            ScheduledSequence(
                sequence,
                given,
                samples=given == self.num_wanted(sequence),
                num_in_flight=self._in_flight.get(sequence, 0),
            )
            for sequence, given in self._given.items()
        ]


class PromptQueue:
    """Waiting and half-computed prompts of one worker (see the policy above)."""

    def __init__(self, pool: BlockPool, admission: Admission, *, short_prompts_pass: bool) -> None:
        self.waiting = RankedQueue(waiting_rank)
        self.active = RankedQueue(running_rank)
        self._pool = pool
        self._admission = admission
        self._short_prompts_pass = short_prompts_pass
        self._waiting_for_blocks: Sequence | None = None

    @property
    def waiting_for_blocks(self) -> Sequence | None:
        """The waiting sequence that the last admission found no blocks for."""
        return self._waiting_for_blocks

    @property
    def num_queued_tokens(self) -> int:
        """Tokens still to compute, prefix cache hits of waiting prompts not yet taken off."""
        return sum(
            sequence.num_uncomputed_tokens
            for queue in (self.waiting, self.active)
            for sequence in queue
        )

    def add(self, sequence: Sequence) -> None:
        """A new or a preempted sequence (`waiting` or `swapped`) waits for admission."""
        assert sequence.phase in _WAITING
        self.waiting.insert(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that waits or is `prefilling`; its blocks are the caller's."""
        if sequence.phase in _WAITING:
            self.waiting.remove(sequence)
        else:
            self.active.remove(sequence)
        if self._waiting_for_blocks is sequence:
            self._waiting_for_blocks = None

    def plan(
        self,
        budget: int,
        *,
        max_admissions: int,
        num_spare_blocks: Callable[[], int],
        admit_before: tuple[int, float] | None = None,
        in_flight: Mapping[Sequence, int] | None = None,
        worthwhile: Callable[[int], int] | None = None,
    ) -> list[ScheduledSequence]:
        """Chunks for one step of `budget` tokens, admitting up to `max_admissions` sequences.

        An admission has to leave `num_spare_blocks()` available. Sequences that rank behind
        `admit_before` are not admitted. `in_flight` tokens of sequences are being computed by the
        step before. Of the tokens found, `worthwhile` says how many the step had better have.
        """
        gate = _Gate(max_admissions, num_spare_blocks, admit_before)
        step = _StepTokens(budget, self._pool.block_size, in_flight or {})
        if self._short_prompts_pass:
            self._serve_short_prompts(step, gate)
        for sequence in self.active:
            if step.left == 0:
                break
            step.give(sequence, step.left)
        self._admit_in_order(step, gate)
        if worthwhile is not None:
            step.keep(worthwhile(step.num_given))
        return step.scheduled()

    def _serve_short_prompts(self, step: _StepTokens, gate: "_Gate") -> None:
        first = next((each for each in self.active if step.num_wanted(each)), None)
        if first is None or step.num_wanted(first) <= step.left // 2:
            return
        share = step.left - step.left // 2
        for sequence in list(self._passing(first, step)):
            if share == 0:
                return
            if sequence.phase in _WAITING:
                if self._is_worth_waiting(sequence):
                    continue
                if not self._admit(sequence, gate):
                    return
            share -= step.give(sequence, share)

    def _passing(self, first: Sequence, step: _StepTokens) -> Iterator[Sequence]:
        """Prompts that may pass `first`, in rank order."""

        def may_pass(sequence: Sequence, num_wanted: int) -> bool:
            is_urgent = sequence.request.priority <= first.request.priority
            return is_urgent and 2 * num_wanted <= step.num_wanted(first)

        for sequence in self.active:
            if sequence is not first and may_pass(sequence, step.num_wanted(sequence)):
                yield sequence
        blocked = self._waiting_for_blocks
        candidates = [blocked] if blocked else islice(self.waiting, MAX_LOOKAHEAD)
        for sequence in candidates:
            if sequence.request.priority > first.request.priority:
                return
            if may_pass(sequence, self._admission.num_needed_tokens(sequence)):
                yield sequence

    def _admit_in_order(self, step: _StepTokens, gate: "_Gate") -> None:
        num_skipped = 0
        while step.left and gate.is_open and num_skipped < min(len(self.waiting), MAX_LOOKAHEAD):
            sequence = self.waiting[num_skipped]
            if self._is_worth_waiting(sequence):
                num_skipped += 1
            elif self._admit(sequence, gate):
                step.give(sequence, step.left)
            else:
                return

    def _admit(self, sequence: Sequence, gate: "_Gate") -> bool:
        """Moves it from waiting to active with all its blocks, if it may and can come in now."""
        if not gate.is_open or not gate.allows(sequence):
            return False
        if self._admission.take_blocks(sequence, gate.num_spare_blocks()) is None:
            self._waiting_for_blocks = sequence
            return False
        self._waiting_for_blocks = None
        gate.num_left -= 1
        self.waiting.remove(sequence)
        self.active.insert(sequence)
        sequence.advance(PhaseEvent.START)
        return True

    def _is_worth_waiting(self, sequence: Sequence) -> bool:
        """Whether an active prompt is computing most of what this one lacks."""
        if not self.active or sequence.num_tokens <= MIN_TOKENS_WORTH_WAITING:
            return False
        if sequence.request.reads_whole_prompt or sequence.phase is Phase.SWAPPED:
            return False  # nothing that is cached spares it anything
        block_size = self._pool.block_size
        hashes = sequence.block_hashes
        num_cached = self._pool.num_prefix_blocks(hashes)
        num_coming = max(
            (
                _num_common_blocks(hashes, other.block_hashes, num_cached)
                for other in self.active
                if other.num_computed_tokens // block_size <= num_cached
            ),
            default=0,
        )
        needed = sequence.num_tokens - num_cached * block_size
        coming = num_coming * block_size
        return coming >= MIN_TOKENS_WORTH_WAITING and 2 * coming >= needed


class _Gate:
    """How many sequences one step may still admit, and which."""

    def __init__(
        self,
        max_admissions: int,
        num_spare_blocks: Callable[[], int],
        admit_before: tuple[int, float] | None,
    ) -> None:
        self.num_left = max_admissions
        self.num_spare_blocks = num_spare_blocks
        self._admit_before = admit_before

    @property
    def is_open(self) -> bool:
        return self.num_left > 0

    def allows(self, sequence: Sequence) -> bool:
        return self._admit_before is None or sequence.rank <= self._admit_before


def _num_common_blocks(ours: list[BlockHash], theirs: list[BlockHash], start: int) -> int:
    """How many blocks from number `start` on both have in common; a hash stands for its prefix,
    so the length of the common part is found by bisection."""
    low, high = start, min(len(ours), len(theirs))
    if low >= high or ours[low] != theirs[low]:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if ours[middle] == theirs[middle]:
            low = middle
        else:
            high = middle
    return low + 1 - start
