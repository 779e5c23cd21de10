"""What bounds a scheduler's steps and its sequences."""

from dataclasses import dataclass

from engine.scheduler.tiles import StepTiles


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """`max_model_len` bounds prompt and output together, in tokens. `max_num_mixed_tokens` bounds
    the prompt tokens of a step that also decodes, None for no bound of their own; `tiles` says how
    many of them are worth it, None for all.
    `short_prompts_pass` lets short prompts share a step with a long one before them (policy:
    prompts.py). `num_swap_blocks` of host memory keep the KV of preempted sequences (swap.py)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_mixed_tokens: int | None = None
    tiles: StepTiles | None = None
    eos_token_ids: frozenset[int] = frozenset()
    short_prompts_pass: bool = True
    num_swap_blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value: int = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
