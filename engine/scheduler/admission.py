"""Whether a sequence may come in, and its blocks when it does."""

from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.progress import hash_prompt
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

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens that the prefix cache would spare this waiting sequence now."""
        return self._pool.block_size * self._pool.num_prefix_blocks(self._matchable(sequence))

    def take_blocks(self, sequence: Sequence, num_spare_blocks: int) -> int | None:
        """Gives it its cached prefix and fresh blocks for all its other tokens.

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
        sequence.num_computed_tokens = len(cached) * pool.block_size
        sequence.num_registered_blocks = len(cached)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.stats.num_queried_tokens += sequence.num_tokens
            self.stats.num_hit_tokens += sequence.num_computed_tokens
        return len(cached)

    def return_blocks(self, sequence: Sequence) -> None:
        """The sequence holds nothing afterwards; its registered blocks stay as cache."""
        block_ids, sequence.block_ids = sequence.block_ids, []
        self._pool.free(block_ids)

    def preempt(self, sequence: Sequence) -> None:
        """Takes its blocks and makes it a sequence to compute anew, from what stays cached."""
        self.return_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        if self._pool.enable_prefix_caching:
            hash_prompt(sequence, self._pool.block_size)

    def _matchable(self, sequence: Sequence) -> list[bytes]:
        if sequence.request.reads_whole_prompt and not sequence.num_output_tokens:
            return []
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self._pool.block_size]
