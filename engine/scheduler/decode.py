"""What a decode worker (and the offline `LLM`) runs next.

Life of a sequence that comes by transfer:

1. `try_reserve` sets blocks aside for it and yields what its ticket says.
2. `admit`, when its KV is here and its first token appended: it joins the batch at the next
   step, before anything that holds no blocks.
3. One token a step; one more block when the last one is full.
4. `commit` finds its end and frees its blocks, which stay as prefix cache.

Life of one that is prefilled here: `add` lets it wait; it's admitted and computed in chunks with
what the running ones leave of a step (policy: prompts.py), then goes on with 3.

When no block is left for a running sequence, the one that ranks last among those that hold blocks
loses them and is computed anew later, or goes on with what host memory has kept of it (swap.py).
So whoever ranks first is never stopped and every sequence becomes first some day: preemption can't
go round in circles. Nobody is admitted in a step that preempts, nor if it would leave less than a
watermark of blocks to the running ones.

`schedule_ahead` says what runs behind a step whose tokens aren't known yet (ahead.py).
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseEvent
from engine.scheduler.admission import Admission, PrefixStats
from engine.scheduler.ahead import StepAhead
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import ScheduledSequence, SequenceUpdate, StepPlan
from engine.scheduler.progress import StopRules, advance_computed, pair_samples
from engine.scheduler.prompts import PromptQueue
from engine.scheduler.queue import RankedQueue, running_rank
from engine.scheduler.reservations import Reservation, Reservations
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey

# Blocks kept for growth of running sequences whenever someone is let in.
WATERMARK = 0.01
# Transfers may be under way for this share of `max_num_seqs` beyond the batch's free places, so
# that a place that gets free is taken at once instead of a transfer later.
RESERVE_AHEAD = 0.125


@dataclass(slots=True)
class DecodeStats:
    """Counts since the start."""

    num_preemptions: int = 0


class DecodeScheduler:
    """Continuous batching of running sequences and local prompts."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self._pool = pool
        self._budget = config.max_num_batched_tokens
        self._mixed_budget = config.max_num_mixed_tokens or self._budget
        # Each running sequence takes at least a token of every step.
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._num_ahead = max(1, int(self._max_num_seqs * RESERVE_AHEAD))
        self._watermark = max(1, int(pool.num_blocks * WATERMARK))
        self._admission = Admission(pool, config)
        self._stop_rules = StopRules(config.eos_token_ids, self._admission.max_model_len)
        self._prompts = PromptQueue(
            pool, self._admission, short_prompts_pass=config.short_prompts_pass
        )
        self._decoding = RankedQueue(running_rank)
        self._arrived = RankedQueue(running_rank)
        self._reservations = Reservations(pool, self._admission)
        self._sequences: dict[RequestKey, Sequence] = {}
        self._refused_rank: tuple[int, float] | None = None
        self._ahead = StepAhead(pool, self._stop_rules)
        self._may_admit = True  # whether the next `schedule` may let a waiting prompt in
        self.stats = DecodeStats()

    @property
    def num_waiting(self) -> int:
        return len(self._prompts.waiting) + len(self._arrived)

    @property
    def num_swapped(self) -> int:
        """Those of the waiting sequences whose KV is in host memory."""
        return len(self._admission.swap)

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prompts.active)

    @property
    def num_reserved(self) -> int:
        """Sequences whose KV is on its way."""
        return len(self._reservations)

    @property
    def num_stopping(self) -> int:
        """Cancelled reservations whose blocks are in quarantine."""
        return self._reservations.num_stopping

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to compute here."""
        return self._prompts.num_queued_tokens

    @property
    def max_model_len(self) -> int:
        """The configured limit, or less if the pool is smaller than one longest sequence."""
        return self._admission.max_model_len

    @property
    def prefix_stats(self) -> PrefixStats:
        return self._admission.stats

    def add(self, sequence: Sequence) -> None:
        """Prefill and decode it here. Raises InvalidRequestError if it's here or can't ever run."""
        self._check(sequence)
        sequence.advance(PhaseEvent.ADD)
        self._sequences[sequence.key] = sequence
        self._prompts.add(sequence)
        self._may_admit = True

    def try_reserve(self, sequence: Sequence) -> Reservation | None:
        """Room for the KV of all its present tokens; None if it has to wait: ask again each step.

        A refused sequence keeps its place: in the next step, local prompts that rank behind it
        don't join the running ones either; and it's refused while one before it waits for blocks.
        Raises InvalidRequestError if it's here already or can't ever run.
        """
        self._check(sequence)
        reservation = None
        blocked = self._prompts.waiting_for_blocks
        num_coming = self.num_running + len(self._arrived) + self.num_reserved
        if num_coming < self._max_num_seqs + self._num_ahead and (
            blocked is None or sequence.rank < blocked.rank
        ):
            reservation = self._reservations.try_reserve(sequence, self._num_spare_blocks())
        if reservation is not None:
            self._sequences[sequence.key] = sequence
        elif self._refused_rank is None or sequence.rank < self._refused_rank:
            self._refused_rank = sequence.rank
        return reservation

    def admit(self, sequence: Sequence) -> None:
        """A reserved sequence whose KV is here and whose first token is appended to `token_ids`.

        It holds blocks, so it's never refused, and waits for a free place in the batch at most.
        Raises PhaseError if it isn't reserved (cancelled, or admitted before), ValueError if no
        token follows those that were reserved.
        """
        self._reservations.receive(sequence)
        self._arrived.insert(sequence)

    def cancel_reservation(self, reservation: Reservation) -> None:
        """Its blocks stay in quarantine until `confirm_stopped`. Raises PhaseError if it has
        arrived or was cancelled already."""
        self._reservations.cancel(reservation.sequence)
        del self._sequences[reservation.sequence.key]
        self._may_admit = True

    def confirm_stopped(self, reservation: Reservation) -> None:
        """Nothing writes to a cancelled reservation's blocks any more: they are free."""
        self._reservations.stop(reservation)
        self._may_admit = True

    def abort(self, key: RequestKey) -> Sequence | None:
        """Ends it wherever it stands and takes its blocks; None if it isn't here (any more).

        One whose KV is still coming is cancelled: its phase is `stopping` then, and
        `confirm_stopped` is due as after `cancel_reservation`.
        """
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return None
        if sequence.phase is Phase.RESERVED:
            self._reservations.cancel(sequence)
            self._may_admit = True
            return sequence
        self._take_out(sequence)
        sequence.advance(PhaseEvent.ABORT)
        self._end(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        """The next step: running sequences, then prompt chunks. Empty if nothing can run now.

        All steps before it are committed.
        """
        preempted: list[Sequence] = []
        # An idle engine gains nothing by keeping a place for a transfer without room.
        admit_before = self._refused_rank if self.num_running else None
        self._join_arrived()
        scheduled = self._schedule_decoding(preempted)
        num_free_places = self._max_num_seqs - self.num_running
        num_prompt_tokens = self._budget - len(scheduled)
        if scheduled:
            num_prompt_tokens = min(num_prompt_tokens, self._mixed_budget)
        scheduled += self._prompts.plan(
            num_prompt_tokens,
            max_admissions=0 if preempted or self._arrived else num_free_places,
            num_spare_blocks=self._num_spare_blocks,
            admit_before=admit_before,
        )
        self._refused_rank = None
        # Only a want of blocks lasts until some come back; all else may be otherwise next time.
        is_blocked = self._prompts.waiting_for_blocks is not None
        self._may_admit = not is_blocked or bool(preempted) or admit_before is not None
        return StepPlan(scheduled, preempted, self._admission.swap.drain())

    def schedule_ahead(self, running: StepPlan) -> StepPlan | None:
        """The step behind `running`, which is committed next although this one may be running by
        then. None if nothing can be said of it before: a prompt is to be computed, or blocks run
        out."""
        self._ahead.clear()
        has_place = self.num_running < self._max_num_seqs
        if self._prompts.active or (self._prompts.waiting and has_place and self._may_admit):
            return None
        self._join_arrived()
        return self._ahead.plan(self._decoding, running)

    def commit(self, plan: StepPlan, sampled: Tokens[Tokens[int]]) -> list[SequenceUpdate]:
        """Takes a step's result: for each item that samples, in order, its new tokens.

        Returns an update for each of them; a sequence whose update has a `finish_reason` is gone,
        its blocks are free or cache, or will be when the step ahead is committed. Sequences that
        ended since `schedule` are passed over.
        """
        self._ahead.commit(plan)
        updates: list[SequenceUpdate] = []
        num_finished = 0
        for item, token_ids in pair_samples(plan, sampled):
            sequence = item.sequence
            if sequence.phase is Phase.PREFILLING:
                if token_ids is not None:
                    self._prompts.remove(sequence)
                    sequence.advance(PhaseEvent.CATCH_UP)
                    self._decoding.insert(sequence)
            elif sequence.phase is not Phase.DECODING:
                if sequence.phase is Phase.FINISHED:
                    self._end(sequence)
                continue
            advance_computed(self._pool, sequence, item.num_new_tokens)
            if token_ids is not None:
                update = self._stop_rules.append(sequence, token_ids)
                updates.append(update)
                if update.finish_reason is not None:
                    num_finished += 1
                    sequence.advance(PhaseEvent.FINISH)
                    del self._sequences[sequence.key]
                    self._end(sequence)
        if num_finished:
            self._decoding.keep(_is_decoding)
        return updates

    def _check(self, sequence: Sequence) -> None:
        if sequence.key in self._sequences:
            raise InvalidRequestError(f"Request {sequence.key} is here already.", field=None)
        self._admission.check(sequence)

    def _num_spare_blocks(self) -> int:
        """What an admission has to leave; nothing if nobody is there to grow."""
        is_alone = not (self.num_running or self._arrived or self.num_reserved)
        return 0 if is_alone else self._watermark

    def _join_arrived(self) -> None:
        while self._arrived and self.num_running < self._max_num_seqs:
            sequence = self._arrived[0]
            self._arrived.remove(sequence)
            sequence.advance(PhaseEvent.JOIN)
            self._decoding.insert(sequence)

    def _schedule_decoding(self, preempted: list[Sequence]) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        block_size = self._pool.block_size
        # Preemption takes from the end of the ranks, so it never hits what is scheduled already.
        for sequence in tuple(self._decoding):
            if preempted and sequence.phase is not Phase.DECODING:
                continue
            has_room = len(sequence.block_ids) * block_size >= len(sequence.token_ids)
            if has_room or self._grow(sequence, preempted):
                scheduled.append(ScheduledSequence(sequence, 1, samples=True))
        return scheduled

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """One more block, taken from whoever ranks last if need be.

        False if that is the sequence itself: it's preempted then, or, where it's the only one
        that holds blocks, pauses until blocks under transfer, pinned or in quarantine come back.
        """
        while (block_ids := self._pool.allocate(1)) is None:
            victim = self._last_holder()
            if victim is sequence and self._num_holders() == 1:
                return False
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.block_ids += block_ids
        return True

    def _num_holders(self) -> int:
        return len(self._decoding) + len(self._prompts.active) + len(self._arrived)

    def _last_holder(self) -> Sequence:
        queues = (self._decoding, self._prompts.active, self._arrived)
        return max((queue[-1] for queue in queues if queue), key=running_rank)

    def _preempt(self, victim: Sequence) -> None:
        self._take_out(victim)
        is_kept = self._admission.preempt(victim)
        victim.advance(PhaseEvent.SWAP if is_kept else PhaseEvent.PREEMPT)
        self._prompts.add(victim)
        self.stats.num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        """It's finished: its blocks are free as soon as no step writes to them."""
        if sequence not in self._ahead:
            self._admission.return_blocks(sequence)
            self._may_admit = True

    def _take_out(self, sequence: Sequence) -> None:
        """Removes it from the queue where its phase says it is."""
        match sequence.phase:
            case Phase.DECODING:
                self._decoding.remove(sequence)
            case Phase.ARRIVED:
                self._arrived.remove(sequence)
            case _:
                self._prompts.remove(sequence)


def _is_decoding(sequence: Sequence) -> bool:
    return sequence.phase is Phase.DECODING
