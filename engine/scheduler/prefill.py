"""Which prompt chunks a prefill worker computes next.

Life of a sequence here:

1. `add` checks it and lets it wait.
2. `schedule` admits it with all blocks of its prompt and gives it chunks (policy: prompts.py).
3. `commit` of the chunk that reaches the last token appends the first sampled token and returns
   the sequence in an update. From there it's *retained*: it runs no more, but a transfer may
   still read its blocks.
4. `release` ends it; its blocks stay as prefix cache. Or `abort` ends it, at any point before.

Who reads blocks past the sequence's end (an aborted sequence's writes in flight) pins them.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Tokens

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseEvent
from engine.scheduler.admission import Admission, PrefixStats
from engine.scheduler.ahead import StepAhead, in_flight_tokens
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import ScheduledSequence, SequenceUpdate, StepPlan
from engine.scheduler.progress import StopRules, advance_computed, pair_samples
from engine.scheduler.prompts import PromptQueue
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey


class PrefillScheduler:
    """Continuous batching of prompt chunks."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self._pool = pool
        self._config = config
        self._admission = Admission(pool, config)
        self._stop_rules = StopRules(config.eos_token_ids, self._admission.max_model_len)
        self._prompts = PromptQueue(
            pool, self._admission, short_prompts_pass=config.short_prompts_pass
        )
        self._ahead = StepAhead()
        self._sequences: dict[RequestKey, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._prompts.waiting)

    @property
    def num_running(self) -> int:
        return len(self._prompts.active)

    @property
    def num_retained(self) -> int:
        """Sequences that have sampled and wait for `release`."""
        return len(self._sequences) - self.num_waiting - self.num_running

    @property
    def queued_tokens(self) -> int:
        """Tokens still to compute."""
        return self._prompts.num_queued_tokens

    @property
    def max_model_len(self) -> int:
        """The configured limit, or less if the pool is smaller than one longest sequence."""
        return self._admission.max_model_len

    @property
    def prefix_stats(self) -> PrefixStats:
        return self._admission.stats

    def add(self, sequence: Sequence) -> None:
        """Raises InvalidRequestError if it's here already or could never run."""
        if sequence.key in self._sequences:
            raise InvalidRequestError(f"Request {sequence.key} is here already.", field=None)
        self._admission.check(sequence)
        sequence.advance(PhaseEvent.ADD)
        self._sequences[sequence.key] = sequence
        self._prompts.add(sequence)

    def abort(self, key: RequestKey) -> Sequence | None:
        """Ends it wherever it stands and takes its blocks; None if it isn't here (any more)."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return None
        if sequence.phase is not Phase.RETAINED:
            self._prompts.remove(sequence)
        self._end(sequence, PhaseEvent.ABORT)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """A retained sequence's blocks are read no more. Nothing happens if it was aborted."""
        if self._sequences.get(sequence.key) is sequence:
            self._end(sequence, PhaseEvent.RELEASE)

    def schedule(self) -> StepPlan:
        """The next step; empty if there's nothing to compute or no block to compute it in.

        All steps before it are committed.
        """
        return StepPlan(self._plan_prompts({}))

    def schedule_ahead(self, running: StepPlan) -> StepPlan | None:
        """The step behind `running`, which is committed next although this one may be running by
        then; None if there is none."""
        self._ahead.clear()
        return self._ahead.put(StepPlan(self._plan_prompts(in_flight_tokens(running))))

    def commit(self, plan: StepPlan, sampled: Tokens[Tokens[int]]) -> list[SequenceUpdate]:
        """Takes a step's result: for each item that samples, in order, its new tokens.

        Returns an update for each of them, its sequence retained now, whether `finish_reason`
        says that the request ended or it's None and decode goes on. Sequences that were aborted
        since `schedule` are passed over.
        """
        self._ahead.commit(plan)
        updates: list[SequenceUpdate] = []
        for item, token_ids in pair_samples(plan, sampled):
            sequence = item.sequence
            if sequence.phase is not Phase.PREFILLING:
                if sequence.phase is Phase.FINISHED:
                    self._return_blocks(sequence)
                continue
            advance_computed(self._pool, sequence, item.num_new_tokens)
            if token_ids is not None:
                self._prompts.remove(sequence)
                sequence.advance(PhaseEvent.RETAIN)
                updates.append(self._stop_rules.append(sequence, token_ids))
        return updates

    def _plan_prompts(self, in_flight: Mapping[Sequence, int]) -> list[ScheduledSequence]:
        return self._prompts.plan(
            self._config.max_num_batched_tokens,
            max_admissions=self._config.max_num_seqs - len(self._prompts.active),
            num_spare_blocks=lambda: 0,
            in_flight=in_flight,
        )

    def _end(self, sequence: Sequence, event: PhaseEvent) -> None:
        sequence.advance(event)
        del self._sequences[sequence.key]
        self._return_blocks(sequence)

    def _return_blocks(self, sequence: Sequence) -> None:
        """It's finished: its blocks are free as soon as no step writes to them."""
        if sequence not in self._ahead:
            self._admission.return_blocks(sequence)
