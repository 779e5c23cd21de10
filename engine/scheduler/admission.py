"""Whether a sequence may come in, and its blocks when it does."""

from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.progress import hash_prompt
from engine.scheduler.swap import SwapSpace
from engine.sequence import Sequence
from protocol.errors import ContextLengthError, InvalidRequestError


@dataclass(slots=True)
class PrefixStats:
    """Tokens looked up in the prefix cache at admission and found there, since the start."""

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


class Admission:
    """Checks sequences and gives them all blocks of their present tokens at once.

    All at once, so that a prompt never stops halfway for want of a block.
    """

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self._pool = pool
        self._config = config
        self.stats = PrefixStats()
        self.swap = SwapSpace(config.num_swap_blocks)
        # A sequence that had the whole pool to itself could go on up to here; so it ends by
        # "length" there, and no sequence can come into a state in which it never fits again.
        self.max_model_len = min(config.max_model_len, pool.num_blocks * pool.block_size)

    def check(self, sequence: Sequence) -> None:
        """Raises InvalidRequestError for a sequence that could never run here."""
        if sequence.num_tokens < 1:
            raise InvalidRequestError("The prompt must not be empty.", field="prompt")
        if sequence.num_tokens >= self.max_model_len:
            holder = (
                "the model's context"
                if self.max_model_len == self._config.max_model_len
                else "this worker's KV cache"
            )
            raise ContextLengthError(
                f"The prompt has {sequence.num_tokens} tokens, but {holder} holds "
                f"{self.max_model_len}, the output included.",
                field="prompt",
            )
        max_tokens = sequence.request.sampling.max_tokens
        if max_tokens is not None and sequence.num_output_tokens >= max_tokens:
            raise InvalidRequestError(
                f"The request brings {sequence.num_output_tokens} output tokens, but asks for "
                f"{max_tokens} at most.",
                field="max_tokens",
            )
        if self._pool.enable_prefix_caching:
            hash_prompt(sequence, self._pool.block_size)

    def num_needed_tokens(self, sequence: Sequence) -> int:
        """What this waiting sequence would have to compute now, whatever is cached or swapped."""
        num_cached = self._pool.block_size * self._pool.num_prefix_blocks(self._matchable(sequence))
        return sequence.num_tokens - max(num_cached, sequence.num_computed_tokens)

    def take_blocks(self, sequence: Sequence, num_spare_blocks: int) -> int | None:
        """Gives it its cached prefix and fresh blocks for all its other tokens, to which comes back
        what was swapped.

        Returns the number of cached blocks; None, with nothing taken, unless `num_spare_blocks`
        stay available. At least the last token is left uncached: it has to be run (or its block
        has to be received), because the next token comes from it.
        """
        pool = self._pool
        num_blocks = pool.num_blocks_for(sequence.num_tokens)
        cached = pool.match_prefix(self._matchable(sequence))
        num_fresh = num_blocks - len(cached)
        fresh = None
        if num_fresh + num_spare_blocks <= pool.num_available_blocks:
            fresh = pool.allocate(num_fresh)
        if fresh is None:
            pool.free(cached)
            return None
        sequence.block_ids = cached + fresh
        sequence.num_computed_tokens = max(
            len(cached) * pool.block_size, sequence.num_computed_tokens
        )
        sequence.num_registered_blocks = len(cached)
        if sequence in self.swap:
            self.swap.take(sequence, len(cached))
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.stats.num_queried_tokens += sequence.num_tokens
            self.stats.num_hit_tokens += sequence.num_computed_tokens
        return len(cached)

    def return_blocks(self, sequence: Sequence) -> None:
        """The sequence holds nothing afterwards; its registered blocks stay as cache."""
        if sequence in self.swap:
            self.swap.drop(sequence)
        block_ids, sequence.block_ids = sequence.block_ids, []
        self._pool.free(block_ids)

    def preempt(self, sequence: Sequence) -> bool:
        """Takes its blocks. True if their content is kept in host memory; else the sequence is to
        be computed anew, from what stays cached."""
        is_kept = self._can_go_on(sequence) and self.swap.put(
            sequence, self._pool.num_blocks_for(sequence.num_computed_tokens)
        )
        block_ids, sequence.block_ids = sequence.block_ids, []
        self._pool.free(block_ids)
        if not is_kept:
            sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        if self._pool.enable_prefix_caching:
            hash_prompt(sequence, self._pool.block_size)
        return is_kept

    def _can_go_on(self, sequence: Sequence) -> bool:
        """Whether KV is all that it needs: what was read of a prompt is lost with its row."""
        has_read = sequence.request.reads_whole_prompt and not sequence.num_output_tokens
        return sequence.num_computed_tokens > 0 and not has_read

    def _matchable(self, sequence: Sequence) -> list[bytes]:
        if sequence.request.reads_whole_prompt and not sequence.num_output_tokens:
            return []
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self._pool.block_size]
