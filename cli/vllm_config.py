"""vLLM's flags that have one answer here: accepted where they ask for it, else refused with advice.

So a vLLM command line runs as it is, or says what to change. They are checked and then forgotten;
flags that do something are declared where they do it.
"""

from dataclasses import dataclass

from protocol.settings import setting

_ONE_GPU = (
    "a worker runs the whole model on one GPU; serve more requests with --prefill-workers and "
    "--decode-workers"
)
_NO_LORA = "adapters aren't served; merge the adapter into the model's weights"
_NO_SPECULATION = "speculative decoding isn't there; leave it out"


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """vLLM's names and defaults."""

    tensor_parallel_size: int = setting(1, short="tp", help="1", only_default=_ONE_GPU)
    pipeline_parallel_size: int = setting(1, short="pp", help="1", only_default=_ONE_GPU)
    distributed_executor_backend: str | None = setting(
        None, choices=("mp", "uni"), help="how workers are run: always as processes of this machine"
    )
    enable_chunked_prefill: bool = setting(
        True,
        help="always on",
        only_default="long prompts always run in chunks; --max-num-batched-tokens says how large",
    )
    num_scheduler_steps: int = setting(
        1,
        help="1",
        only_default="the next step is prepared while one runs anyway (--async-scheduling)",
    )
    speculative_model: str | None = setting(None, help="none", only_default=_NO_SPECULATION)
    num_speculative_tokens: int | None = setting(None, help="none", only_default=_NO_SPECULATION)
    enable_lora: bool = setting(False, help="off", only_default=_NO_LORA)
    max_loras: int = setting(1, help="of no effect without adapters", only_default=_NO_LORA)
    max_lora_rank: int = setting(16, help="of no effect without adapters", only_default=_NO_LORA)
    rope_scaling: str | None = setting(
        None,
        help="none",
        only_default="write `rope_scaling` into the config.json of the model's directory",
    )
    limit_mm_per_prompt: str | None = setting(
        None, help="none", only_default="models take text only"
    )
