"""What a step's result does to a sequence: computed tokens, registered blocks, end."""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens

from engine.block_pool import BlockPool
from engine.scheduler.plan import ScheduledSequence, SequenceUpdate, StepPlan
from engine.sequence import Sequence
from protocol.block_hash import hash_block, hash_blocks


def hash_prompt(sequence: Sequence, block_size: int) -> None:
    """Names the full blocks of the tokens known so far."""
    if len(sequence.block_hashes) == sequence.num_tokens // block_size:
        return
    sequence.block_hashes = hash_blocks(
        sequence.token_ids, block_size, root=sequence.root, known=sequence.block_hashes
    )


def advance_computed(pool: BlockPool, sequence: Sequence, num_tokens: int) -> None:
    """`num_tokens` more tokens have their KV; blocks that are full by that can be hit."""
    sequence.num_computed_tokens += num_tokens
    if not pool.enable_prefix_caching:
        return
    num_full = sequence.num_computed_tokens // pool.block_size
    if num_full > sequence.num_registered_blocks:
        _register(pool, sequence, num_full)


def _register(pool: BlockPool, sequence: Sequence, num_full: int) -> None:
    hashes = sequence.block_hashes
    size = pool.block_size
    for i in range(len(hashes), num_full):
        parent = hashes[-1] if hashes else sequence.root
        hashes.append(hash_block(parent, sequence.token_ids[i * size : (i + 1) * size]))
    pool.register(
        sequence.block_ids,
        hashes[:num_full],
        root=sequence.root,
        first=sequence.num_registered_blocks,
    )
    sequence.num_registered_blocks = num_full


def pair_samples(
    plan: StepPlan, sampled: Tokens[Tokens[int]]
) -> Iterator[tuple[ScheduledSequence, Tokens[int] | None]]:
    """Each item with its sampled tokens, None for a chunk that doesn't reach the last token."""
    num_sampling = sum(item.samples for item in plan.scheduled)
    if num_sampling != len(sampled):
        raise ValueError(f"{num_sampling} sequences sample, but {len(sampled)} results came")
    results = iter(sampled)
    for item in plan.scheduled:
        yield item, next(results) if item.samples else None


class StopRules:
    """When a sequence ends: end-of-sequence and stop tokens, then lengths."""

    def __init__(self, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len

    def max_tokens(self, sequence: Sequence) -> int:
        """With so many tokens, those of the prompt counted, it ends for its length."""
        max_tokens = sequence.request.sampling.max_tokens
        if max_tokens is None:
            return self._max_model_len
        return min(self._max_model_len, sequence.request.num_prompt_tokens + max_tokens)

    def append(self, sequence: Sequence, token_ids: Tokens[int]) -> SequenceUpdate:
        """Appends sampled tokens until one ends the sequence; later ones are dropped.

        Tokens before `min_tokens` never stop it (the sampler masks those that would), while the
        length limits always hold.
        """
        sampling = sequence.request.sampling
        min_tokens = sequence.request.num_prompt_tokens + sampling.min_tokens
        max_tokens = self.max_tokens(sequence)
        known = sequence.token_ids
        for i, token_id in enumerate(token_ids, start=1):
            known.append(token_id)
            if len(known) >= min_tokens:
                if token_id in self._eos_token_ids and not sampling.ignore_eos:
                    return SequenceUpdate(sequence, list(token_ids[:i]), "stop")
                if token_id in sampling.stop_token_ids:
                    return SequenceUpdate(sequence, list(token_ids[:i]), "stop", token_id)
            if len(known) >= max_tokens:
                return SequenceUpdate(sequence, list(token_ids[:i]), "length")
        return SequenceUpdate(sequence, list(token_ids))
