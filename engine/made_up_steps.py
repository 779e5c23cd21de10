"""Steps over made-up sequences, which an engine runs before anybody asks for anything."""

from collections.abc import Iterable, Iterator

from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

_SHORT, _LONG_ON_GPU = 64, 512


def warm_up_steps(*, block_size: int, max_tokens: int, is_gpu: bool) -> Iterator[StepPlan]:
    """A prompt and a decode step, greedy, random and filtered, of up to `max_tokens` together.

    Each is to be launched, and its sequence released, before the next is taken.
    """
    # On a GPU, kernels of their own attend for long prompts.
    longest = _LONG_ON_GPU if is_gpu else _SHORT
    for wanted, sampling in (
        (longest, SamplingParams(temperature=0.0)),
        (_SHORT, SamplingParams()),
        (_SHORT, SamplingParams(top_p=0.9)),
    ):
        num_tokens = min(wanted, max_tokens - 1)
        block_ids = list(range(-(-(num_tokens + 1) // block_size)))
        sequence = _made_up(num_tokens, block_ids, sampling)
        yield StepPlan([ScheduledSequence(sequence, num_tokens, samples=True)])
        sequence.num_computed_tokens = num_tokens
        sequence.token_ids.append(0)
        yield StepPlan([ScheduledSequence(sequence, 1, samples=True)])


def prompt_steps(lengths: Iterable[int], *, block_size: int, max_tokens: int) -> Iterator[StepPlan]:
    """A prompt of each length that isn't too long, alone."""
    for num_tokens in lengths:
        if num_tokens < max_tokens:
            block_ids = list(range(-(-num_tokens // block_size)))
            sequence = _made_up(num_tokens, block_ids, SamplingParams(temperature=0.0))
            yield StepPlan([ScheduledSequence(sequence, num_tokens, samples=True)])


def largest_step(
    *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> tuple[StepPlan, int]:
    """`max_num_batched_tokens` new tokens and `max_num_seqs` samples, all in the same blocks; and
    how many blocks those are."""
    num_seqs = min(max_num_seqs, max_num_batched_tokens)
    longest = min(max_num_batched_tokens - num_seqs + 1, max_model_len - 1)
    num_blocks = -(-longest // block_size)
    block_ids = list(range(num_blocks))
    sampling = SamplingParams(top_p=0.9, logprobs=1)
    items = [
        ScheduledSequence(_made_up(count, block_ids, sampling), count, samples=True)
        for count in [longest] + [1] * (num_seqs - 1)
    ]
    return StepPlan(items), num_blocks


def _made_up(num_tokens: int, block_ids: list[int], sampling: SamplingParams) -> Sequence:
    request = Request(
        key=RequestKey("warm-up", 0),
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=sampling,
    )
    return Sequence(request=request, root=b"", arrival_s=0.0, block_ids=block_ids)
