"""A decode scheduler over a small pool, and short words for what tests do with it."""

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import SequenceUpdate, StepPlan
from engine.scheduler.prefill import PrefillScheduler
from engine.scheduler.reservations import Reservation
from engine.scheduler.tiles import StepTiles
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

ROOT = root_hash("model")
BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 100,
    *,
    max_num_seqs: int = 8,
    budget: int = 64,
    mixed_budget: int | None = None,
    enable_prefix_caching: bool = False,
    num_swap_blocks: int = 0,
    tiles: StepTiles | None = None,
) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching)
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_num_mixed_tokens=mixed_budget,
        tiles=tiles,
        max_model_len=1000,
        num_swap_blocks=num_swap_blocks,
    )
    return DecodeScheduler(pool, config), pool


def make_sequence(
    name: str,
    token_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    max_tokens: int = 100,
    stop_token_ids: tuple[int, ...] = (),
    arrival_s: float = 0.0,
    priority: int = 0,
) -> Sequence:
    request = Request(
        key=RequestKey(name, 0),
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens or len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
        priority=priority,
    )
    return Sequence(request, ROOT, arrival_s)


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.key.request_id for sequence in sequences]


def scheduled(plan: StepPlan) -> dict[str, int]:
    return {item.sequence.key.request_id: item.num_new_tokens for item in plan.scheduled}


def commit(
    scheduler: DecodeScheduler | PrefillScheduler, plan: StepPlan, token_id: int = 9
) -> list[SequenceUpdate]:
    return scheduler.commit(plan, [[token_id] for item in plan.scheduled if item.samples])


def step(scheduler: DecodeScheduler) -> dict[str, int]:
    plan = scheduler.schedule()
    commit(scheduler, plan)
    return scheduled(plan)


def transfer(scheduler: DecodeScheduler, sequence: Sequence, first_token_id: int = 9) -> None:
    assert scheduler.try_reserve(sequence) is not None
    sequence.token_ids.append(first_token_id)
    scheduler.admit(sequence)


def reserve(scheduler: DecodeScheduler, sequence: Sequence) -> Reservation:
    reservation = scheduler.try_reserve(sequence)
    assert reservation is not None
    return reservation
