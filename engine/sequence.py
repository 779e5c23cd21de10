"""A sequence's state on one worker, shared by scheduler and runner."""

from dataclasses import dataclass, field

from engine.phase import Phase, PhaseEvent, advance
from protocol.block_hash import BlockHash
from protocol.ids import RequestKey
from protocol.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and blocks. A step lets `num_computed_tokens` catch up with
    `num_tokens`, and whoever has caught up samples; `phase` says only who holds the blocks why.

    `block_ids` cover at least the computed tokens, unless the sequence is swapped; `block_hashes`
    name the full blocks among `token_ids` known so far. `row` is the sequence's place in the
    runner's persistent batch while it's running. `first_scheduled_s` is for the service's timings;
    who drives the scheduler sets it.
    """

    request: Request
    root: BlockHash
    arrival_s: float
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_ids: list[int] = field(default_factory=list[int])
    block_hashes: list[BlockHash] = field(default_factory=list[BlockHash])
    num_registered_blocks: int = 0
    num_preemptions: int = 0
    row: int | None = None
    first_scheduled_s: float | None = None
    phase: Phase = Phase.NEW

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.token_ids)

    @property
    def key(self) -> RequestKey:
        return self.request.key

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, float]:
        """Who comes first: lower priority number, then earlier arrival."""
        return (self.request.priority, self.arrival_s)

    def advance(self, event: PhaseEvent) -> None:
        """Raises PhaseError if `event` can't happen now."""
        self.phase = advance(self.phase, event)
