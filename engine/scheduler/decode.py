"""What a decode worker (and the offline `LLM`) runs next.

Life of a sequence that comes by transfer:

1. `try_reserve` sets blocks aside for it and yields what its ticket says.
2. `admit`, when its KV is here and its first token appended: it joins the batch at the next
   step, before anything that holds no blocks.
3. One token a step, more if several are known (engine/jump_ahead.py), and blocks for them
   (running.py).
4. `commit` finds its end and frees its blocks, which stay as prefix cache.

Life of one that is prefilled here: `add` lets it wait; it's admitted and computed in chunks with
what the running ones leave of a step (policy: prompts.py), then goes on with 3.

When no block is left for a running sequence, the one that ranks last among those that hold blocks
loses them and is computed anew later, or goes on with what host memory has kept of it (swap.py).
So whoever ranks first is never stopped and every sequence becomes first some day: preemption can't
go round in circles. Nobody is admitted in a step that preempts, nor if it would leave too few
blocks for what those who hold some will soon grow by.

`schedule_ahead` says what runs behind a step whose tokens aren't known yet (ahead.py).
"""

import functools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseEvent
from engine.scheduler.admission import Admission, PrefixStats
from engine.scheduler.ahead import StepAhead, in_flight_tokens
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import ScheduledSequence, SequenceUpdate, StepPlan
from engine.scheduler.progress import StopRules, advance_computed, pair_samples
from engine.scheduler.prompts import PromptQueue
from engine.scheduler.reservations import Reservation, Reservations
from engine.scheduler.running import DecodeStats, RunningBatch
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey

# What whoever comes in has to leave: blocks for so many more tokens of each sequence that holds
# some, unless it ends before, but at least and at most these shares of the pool. A sequence that is
# preempted computes its whole context anew.
GROWTH_TOKENS = 256
WATERMARKS = (0.01, 0.0625)
# Transfers may be under way for this share of `max_num_seqs` beyond the batch's free places, so
# that a place that gets free is taken at once instead of a transfer later.
RESERVE_AHEAD = 0.125


class DecodeScheduler:
    """Continuous batching of running sequences and local prompts."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self._pool = pool
        self._budget = config.max_num_batched_tokens
        self._tiles = config.tiles
        self._mixed_budget = config.max_num_mixed_tokens or self._budget
        # Each running sequence takes at least a token of every step.
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._num_ahead = max(1, int(self._max_num_seqs * RESERVE_AHEAD))
        self._watermarks = [max(1, int(pool.num_blocks * share)) for share in WATERMARKS]
        self._admission = Admission(pool, config)
        self._stop_rules = StopRules(config.eos_token_ids, self._admission.max_model_len)
        self._prompts = PromptQueue(
            pool, self._admission, short_prompts_pass=config.short_prompts_pass
        )
        self._batch = RunningBatch(
            pool,
            self._admission,
            self._prompts,
            self._stop_rules,
            max_num_seqs=self._max_num_seqs,
        )
        self._reservations = Reservations(pool, self._admission)
        self._sequences: dict[RequestKey, Sequence] = {}
        self._refused_rank: tuple[int, float] | None = None
        # Blocks that those who hold some will soon grow by, and how many of them were coming in
        # then: counted once a step, or when somebody has left.
        self._growth: tuple[int, int] | None = None
        self._ahead = StepAhead()

    @property
    def stats(self) -> DecodeStats:
        return self._batch.stats

    @property
    def num_waiting(self) -> int:
        return len(self._prompts.waiting) + len(self._batch.arrived)

    @property
    def num_swapped(self) -> int:
        """Those of the waiting sequences whose KV is in host memory."""
        return len(self._admission.swap)

    @property
    def num_running(self) -> int:
        return self._batch.num_running

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

    def try_reserve(self, sequence: Sequence) -> Reservation | None:
        """Room for the KV of all its present tokens; None if it has to wait: ask again each step.

        A refused sequence keeps its place: until the next commit, local prompts that rank behind
        it don't join the running ones either; and it's refused while one before it waits for
        blocks.
        Raises InvalidRequestError if it's here already or can't ever run.
        """
        self._check(sequence)
        reservation = None
        blocked = self._prompts.waiting_for_blocks
        num_coming = self.num_running + len(self._batch.arrived) + self.num_reserved
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
        self._batch.arrived.insert(sequence)

    def cancel_reservation(self, reservation: Reservation) -> None:
        """Its blocks stay in quarantine until `confirm_stopped`. Raises PhaseError if it has
        arrived or was cancelled already."""
        self._growth = None
        self._reservations.cancel(reservation.sequence)
        del self._sequences[reservation.sequence.key]

    def confirm_stopped(self, reservation: Reservation) -> None:
        """Nothing writes to a cancelled reservation's blocks any more: they are free."""
        self._reservations.stop(reservation)

    def abort(self, key: RequestKey) -> Sequence | None:
        """Ends it wherever it stands and takes its blocks; None if it isn't here (any more).

        One whose KV is still coming is cancelled: its phase is `stopping` then, and
        `confirm_stopped` is due as after `cancel_reservation`.
        """
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return None
        self._growth = None
        if sequence.phase is Phase.RESERVED:
            self._reservations.cancel(sequence)
            return sequence
        self._batch.take_out(sequence)
        sequence.advance(PhaseEvent.ABORT)
        self._end(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        """The next step: running sequences, then prompt chunks. Empty if nothing can run now.

        All steps before it are committed.
        """
        preempted: list[Sequence] = []
        self._growth = None
        self._batch.join_arrived()
        scheduled = self._batch.plan(self._budget, preempted)
        scheduled += self._plan_prompts(scheduled, may_admit=not preempted)
        if not scheduled:
            self._refused_rank = None
        return StepPlan(scheduled, preempted, self._admission.swap.drain())

    def schedule_ahead(self, running: StepPlan) -> StepPlan | None:
        """The step behind `running`, which is committed next although this one may be running by
        then. None if there is none, or if blocks run out: it preempts nobody."""
        self._ahead.clear()
        self._growth = None
        self._batch.join_arrived()
        scheduled = self._batch.plan_ahead(self._budget, running)
        if scheduled is None:
            return None
        scheduled += self._plan_prompts(scheduled, in_flight=in_flight_tokens(running))
        return self._ahead.put(StepPlan(scheduled, copies=self._admission.swap.drain()))

    def computes_prompts_behind(self, running: StepPlan) -> bool:
        """Whether the step behind `running` has prompts to go on with."""
        ending = {item.sequence for item in running.scheduled if item.samples}
        return any(sequence not in ending for sequence in self._prompts.active)

    def commit(self, plan: StepPlan, sampled: Tokens[Tokens[int]]) -> list[SequenceUpdate]:
        """Takes a step's result: for each item that samples, in order, its new tokens.

        Returns an update for each of them; a sequence whose update has a `finish_reason` is gone,
        its blocks are free or cache, or will be when the step ahead is committed. Sequences that
        ended since `schedule` are passed over.
        """
        self._ahead.commit(plan)
        self._growth = None
        self._refused_rank = None
        updates: list[SequenceUpdate] = []
        num_finished = 0
        for item, token_ids in pair_samples(plan, sampled):
            sequence = item.sequence
            if sequence.phase is Phase.PREFILLING:
                if token_ids is not None:
                    self._prompts.remove(sequence)
                    sequence.advance(PhaseEvent.CATCH_UP)
                    self._batch.decoding.insert(sequence)
            elif sequence.phase is not Phase.DECODING:
                if sequence.phase is Phase.FINISHED:
                    self._end(sequence)
                continue
            advance_computed(self._pool, sequence, item.num_new_tokens)
            if token_ids is not None:
                update = self._stop_rules.append(sequence, token_ids)
                updates.append(update)
                if len(update.new_token_ids) > 1:
                    self._ahead.token_known(sequence)
                if update.finish_reason is not None:
                    num_finished += 1
                    sequence.advance(PhaseEvent.FINISH)
                    del self._sequences[sequence.key]
                    self._end(sequence)
        if num_finished:
            self._batch.decoding.keep(_is_decoding)
        return updates

    def _plan_prompts(
        self,
        decoding: list[ScheduledSequence],
        *,
        may_admit: bool = True,
        in_flight: Mapping[Sequence, int] | None = None,
    ) -> list[ScheduledSequence]:
        """Chunks beside `decoding`, behind those `in_flight`."""
        # An idle engine gains nothing by keeping a place for a transfer without room.
        admit_before = self._refused_rank if self.num_running else None
        num_free_places = self._max_num_seqs - self.num_running
        return self._prompts.plan(
            self._num_prompt_tokens(decoding),
            max_admissions=num_free_places if may_admit and not self._batch.arrived else 0,
            num_spare_blocks=self._num_spare_blocks,
            admit_before=admit_before,
            in_flight=in_flight,
            worthwhile=self._worthwhile(decoding),
        )

    def _worthwhile(self, decoding: list[ScheduledSequence]) -> Callable[[int], int] | None:
        """Of the prompt tokens beside `decoding`, how many to take; None for all."""
        if self._tiles is None or not decoding:
            return None
        return functools.partial(self._tiles.worthwhile, len(decoding))

    def _num_prompt_tokens(self, decoding: list[ScheduledSequence]) -> int:
        """What `decoding` leaves to prompts. Known tokens beyond one a sequence take a step's time
        as prompts do, so they count as such."""
        if not decoding:
            return self._budget
        num_decoding_tokens = sum([item.num_new_tokens for item in decoding])
        num_known_tokens = num_decoding_tokens - len(decoding)
        mixed = max(0, self._mixed_budget - num_known_tokens)
        return min(self._budget - num_decoding_tokens, mixed)

    def _check(self, sequence: Sequence) -> None:
        if sequence.key in self._sequences:
            raise InvalidRequestError(f"Request {sequence.key} is here already.", field=None)
        self._admission.check(sequence)

    def _num_spare_blocks(self) -> int:
        """What an admission has to leave; nothing if nobody is there to grow."""
        batch, prompts = self._batch, self._prompts
        if not (self.num_running or batch.arrived or self.num_reserved):
            return 0
        if self._growth is None:
            holders = (*batch.decoding, *batch.arrived, *prompts.active, *self._reservations)
            num_blocks = sum(self._num_growth_blocks(each) for each in holders)
            self._growth = num_blocks, len(prompts.active) + self.num_reserved
        # Who has come in since is taken to need all that anybody may.
        num_blocks, num_counted = self._growth
        num_new = max(0, len(prompts.active) + self.num_reserved - num_counted)
        num_blocks += num_new * self._pool.num_blocks_for(GROWTH_TOKENS)
        least, most = self._watermarks
        return max(least, min(most, num_blocks))

    def _num_growth_blocks(self, sequence: Sequence) -> int:
        soon = sequence.num_tokens + GROWTH_TOKENS
        num_tokens = min(soon, self._stop_rules.max_tokens(sequence))
        return self._pool.num_blocks_for(num_tokens) - len(sequence.block_ids)

    def _end(self, sequence: Sequence) -> None:
        """It's finished: its blocks are free as soon as no step writes to them."""
        if sequence not in self._ahead:
            self._admission.return_blocks(sequence)


def _is_decoding(sequence: Sequence) -> bool:
    return sequence.phase is Phase.DECODING
