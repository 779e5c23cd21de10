"""Settings of one model replica, frozen after start."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, cast

from engine.grammar import BACKEND_NAMES
from protocol.errors import StartupError
from protocol.settings import setting, setting_info

# vLLM's settings that have one answer here. Code that comes with a model is never run.
_ONE_ANSWER: Mapping[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "trust_remote_code": (False, True),
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded and run. vLLM's names; None means "resolved at start"."""

    model: str | None = setting(
        None,
        help="local HF directory, hub id, or nothing for the built-in SmolLM2-135M-Instruct",
    )
    dtype: str = setting(
        "auto",
        choices=("auto", "bfloat16", "float16", "half", "float32", "float"),
        help="type of weights and activations; 'half' is 'float16', 'float' is 'float32'",
    )
    kv_cache_dtype: str = setting(
        "auto",
        choices=("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
        help="type of keys and values: that of the model, or one of 8 bits, which takes half the "
        "memory of 16 ('fp8' is 'fp8_e4m3'); 'auto' is fp8 if the checkpoint was calibrated for it",
    )
    attention_backend: str = setting(
        "auto",
        choices=("auto", "native", "flash-attn", "TRITON_ATTN", "FLASH_ATTN"),
        help="what attends for prompts of some length: our own kernels (native, and auto), or on a "
        "Hopper GPU FlashAttention 3, an extra to install, which computes in 8 bits where keys and "
        "values have 8 (fp8); vLLM's TRITON_ATTN is native here, its FLASH_ATTN is flash-attn",
    )
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    load_format: str = setting(
        "auto",
        choices=("auto", "safetensors", "dummy"),
        help="'dummy' makes random weights, for benchmarks",
    )
    quantization: str | None = setting(
        None,
        short="q",
        choices=("fp8", "compressed-tensors"),
        help="'fp8' quantizes an unquantized checkpoint's linear layers while loading; "
        "default: as the checkpoint is",
    )
    quantization_ignore: tuple[str, ...] = setting(
        (),
        metavar="LAYER",
        help="layers that --quantization fp8 leaves as they are, by names as in the checkpoint, or "
        "behind 're:' by regular expressions: 're:model.layers.(0|31).mlp'",
    )
    max_model_len: int | None = setting(
        None, minimum=1, help="longest sequence in tokens; default: the model's own limit"
    )
    block_size: int = setting(16, minimum=1, maximum=256, help="tokens in a KV block")
    kv_cache_memory_bytes: int | None = setting(
        None, minimum=1, help="memory for KV blocks; default: a share of what is free"
    )
    num_gpu_blocks_override: int | None = setting(
        None, minimum=1, help="number of KV blocks, whatever the memory"
    )
    gpu_memory_utilization: float = setting(
        0.9, minimum=0.01, maximum=1.0, help="share of a GPU's memory that this worker may use"
    )
    max_num_seqs: int = setting(256, minimum=1, help="sequences in one step at most")
    max_num_batched_tokens: int = setting(
        2048, minimum=1, help="tokens in one step at most; longer prompts run in chunks"
    )
    max_num_mixed_tokens: int | None = setting(
        None,
        minimum=1,
        help="prompt tokens in a step that also decodes; default: 512 on a CPU, where a step of "
        "2,048 stops running streams for a second, else what --max-num-batched-tokens leaves",
    )
    enforce_eager: bool = setting(
        False, help="on a GPU, launch steps kernel by kernel instead of as CUDA graphs"
    )
    async_scheduling: bool | None = setting(
        None,
        help="launch a step while the one before runs; default: on a GPU, where they "
        "would wait for each other",
    )
    jump_ahead: bool = setting(
        True,
        help="append the tokens that a grammar leaves no choice about all at once, without "
        "sampling them, where that saves time",
    )
    enable_prefix_caching: bool = setting(True, help="reuse KV blocks of equal prefixes")
    seed: int = setting(0, help="root of the random numbers of requests without a seed")
    preemption_mode: str = setting(
        "recompute",
        choices=("recompute", "swap"),
        help="what becomes of a sequence that others need the KV blocks of: computed anew, from "
        "what is still cached, or moved to host memory and back",
    )
    swap_space: float = setting(
        4.0,
        minimum=0.0,
        help="GiB of host memory for that, of each worker that decodes; what finds no room in it "
        "is computed anew",
    )
    guided_decoding_backend: str = setting(
        "auto",
        choices=BACKEND_NAMES,
        help="library that holds outputs to grammars, one for routers and workers; xgrammar and "
        "outlines are extras to install; auto and guidance: llguidance",
    )
    num_threads: int | None = setting(
        None, minimum=1, help="CPU threads of this worker; default: all cores of the process"
    )

    @property
    def uses_flash_attention(self) -> bool:
        return self.attention_backend in ("flash-attn", "FLASH_ATTN")


def engine_config(given: Mapping[str, Any]) -> EngineConfig:
    """From what a caller gave by name. Raises StartupError for a name that there isn't, one of
    vLLM's with a value that can't be had, or a value out of bounds."""
    known = {field.name: field for field in fields(EngineConfig)}
    for name, value in given.items():
        if name in _ONE_ANSWER and value not in _ONE_ANSWER[name]:
            raise StartupError(f"{name} can't be {value!r}: a model runs whole, on one device.")
        if name not in known and name not in _ONE_ANSWER:
            raise StartupError(f"There is no setting {name}, only {', '.join(sorted(known))}.")
        if name in known:
            _check(known[name], value)
    return EngineConfig(**{name: value for name, value in given.items() if name in known})


def _check(field: Field[Any], value: object) -> None:
    info, default = setting_info(field), cast("object", field.default)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise StartupError(f"{field.name} is {value!r}, but must be a list.")
        return
    is_fine = default is None if value is None else info.allows(value)
    if info.allowed and not is_fine:
        raise StartupError(f"{field.name} is {value!r}, but must be {info.allowed}.")
