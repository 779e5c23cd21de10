"""One model replica, as services and `LLM` drive it: all calls on one thread, the engine thread."""

import logging
import threading

import torch
from torch import Tensor

from engine.attention_backend import check_flash_attention
from engine.block_pool import BlockPool
from engine.compiling import watch_kernels
from engine.config import EngineConfig
from engine.decode_graphs import graph_sizes
from engine.device import resolve_device
from engine.device_blocks import DeviceBlocks
from engine.grammar import GrammarCompiler, backend_name, make_compiler
from engine.kv_memory import allocate_kv_pool, cpu_free_bytes, num_kv_blocks
from engine.model_info import ModelInfo
from engine.models.causal_lm import CausalLM
from engine.models.config import ModelConfig, read_model_config
from engine.models.encoder_config import is_encoder
from engine.models.registry import load_model
from engine.product_check import check_products_under_mps
from engine.profiling import measure_gpu_memory, warm_up
from engine.prompt_graphs import MAX_CHUNKS, SINGLES, graph_shapes
from engine.runner import ModelRunner
from engine.running_step import RunningStep
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import StepPlan
from engine.scheduler.tiles import StepTiles
from engine.sequence import Sequence
from engine.swap import HostBlocks, num_swap_blocks
from engine.weights.dtype import resolve_dtype, resolve_kv_dtype
from engine.weights.model_dir import model_name, resolve_model
from protocol.block_hash import BlockHash
from protocol.errors import StartupError
from protocol.layout import KVLayout
from protocol.request import Request

logger = logging.getLogger(__name__)

_CPU_MIXED_TOKENS = 512
# Tokens of the library's tiles in products of 8 bits, and two of those of 16.
_GPU_TILE = 256


class Engine:
    """Model, KV pool and the books over its blocks. Made by `load`.

    `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
    """

    model: ModelInfo
    kv_pool: Tensor
    pool: BlockPool
    device_blocks: DeviceBlocks | None
    """For transfers; None on a CPU."""
    grammars: GrammarCompiler | None
    """For structured outputs; None for a model without a tokenizer."""

    def __init__(
        self,
        config: EngineConfig,
        name: str,
        model: CausalLM,
        *,
        grammars: GrammarCompiler | None = None,
        progress: bool = False,
    ) -> None:
        """Sizes and allocates the pool, warms the model up, and captures CUDA graphs."""
        self._config = config
        self._model_config = model.config
        kv_dtype = _kv_dtype(config, model.config, model.dtype)
        layout = _layout(model, config.block_size, kv_dtype)
        max_model_len = model.config.max_model_len
        if model.device.type == "cuda":
            check_products_under_mps(model.config, model.dtype, model.device)
            memory = measure_gpu_memory(model, layout, config, progress=progress)
            logger.info("GPU memory: %s", memory)
            free_bytes, origin = memory.kv_bytes(), f"what is left ({memory})"
        else:
            free_bytes = cpu_free_bytes(config, layout, max_model_len=max_model_len)
            origin = "the memory left for it"
        num_blocks = num_kv_blocks(config, layout, free_bytes=free_bytes, origin=origin)
        self.kv_pool = allocate_kv_pool(layout, num_blocks, device=model.device)
        self.device_blocks = DeviceBlocks(self.kv_pool) if self.kv_pool.is_cuda else None
        self.pool = BlockPool(
            num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.model = ModelInfo(
            name=name,
            architecture=model.config.architecture,
            fingerprint=model.config.fingerprint,
            layout=layout,
            max_model_len=min(max_model_len, num_blocks * config.block_size),
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            eos_token_ids=model.config.eos_token_ids,
        )
        self._runner = ModelRunner(
            model,
            self.kv_pool,
            root_seed=config.seed,
            uses_flash_attention=config.uses_flash_attention,
            grammars=grammars,
        )
        self.grammars = grammars
        self._host_blocks: HostBlocks | None = None
        self._thread: int | None = None
        self._num_threads = torch.get_num_threads()
        warm_up(self._runner, self.kv_pool, max_model_len=max_model_len)
        if self.kv_pool.is_cuda and not config.enforce_eager:
            self._runner.capture_graphs(
                graph_sizes(config.max_num_seqs),
                graph_shapes(config.max_num_seqs, config.max_num_batched_tokens),
                progress=progress,
            )
        if self.kv_pool.is_cuda:
            watch_kernels()

    @classmethod
    def load(cls, config: EngineConfig, *, progress: bool) -> "Engine":
        """Finds and loads the model. Raises StartupError that says what is wrong or too small."""
        device = resolve_device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model_dir = resolve_model(config.model, progress=progress)
        if is_encoder(model_dir):
            raise StartupError(
                f"{model_dir} holds an encoder, which only embeds: `tandem serve` gives it encode "
                "workers, and `tandem encode` is one."
            )
        model_config = (
            read_model_config(model_dir)
            .quantized(config.quantization, config.quantization_ignore)
            .limited_to(config.max_model_len)
        )
        dtype = resolve_dtype(config.dtype, device, checkpoint_dtype=model_config.dtype)
        if config.uses_flash_attention:
            # Before weights are loaded, which takes its time.
            check_flash_attention(
                device=device,
                dtype=dtype,
                kv_dtype=_kv_dtype(config, model_config, dtype),
                head_dim=model_config.head_dim,
                layer_windows=model_config.layer_windows,
            )
        model = load_model(
            model_config,
            model_dir,
            dtype=dtype,
            device=device,
            load_format=config.load_format,
            progress=progress,
        )
        grammars = make_compiler(
            config.guided_decoding_backend,
            model_dir / "tokenizer.json",
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
        )
        logger.info("structured outputs by %s", backend_name(config.guided_decoding_backend))
        name = model_name(config.model)
        return cls(config, name, model, grammars=grammars, progress=progress)

    def allocate_swap_space(self) -> None:
        """To be called once before a scheduler is made that preempts sequences.

        Raises StartupError if there isn't as much host memory as the settings ask for.
        """
        num_blocks = num_swap_blocks(self._config, self.model.layout)
        if num_blocks and self._host_blocks is None:
            self._host_blocks = HostBlocks(self.kv_pool, self.model.layout, num_blocks)

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """What a scheduler over this engine's pool is made with."""
        return SchedulerConfig(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_num_mixed_tokens=self._config.max_num_mixed_tokens
            or (None if self.kv_pool.is_cuda else _CPU_MIXED_TOKENS),
            tiles=StepTiles(_GPU_TILE, SINGLES) if self.kv_pool.is_cuda else None,
            max_model_len=self.model.max_model_len,
            eos_token_ids=frozenset(self.model.eos_token_ids),
            num_swap_blocks=0 if self._host_blocks is None else self._host_blocks.num_blocks,
        )

    @property
    def num_rows(self) -> int:
        """Sequences that have run and not been released; 0 when idle, or something leaks."""
        return self._runner.num_rows

    def root_hash(self, cache_salt: str | None, *, max_seq_len: int = 0) -> BlockHash:
        """The parent of a sequence's first block.

        `max_seq_len` is the length that the sequence can reach; it matters for models alone whose
        rope frequencies depend on it.
        """
        return self._model_config.root_hash(
            max_seq_len, cache_salt=cache_salt, kv_dtype=self.model.layout.dtype
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether steps may be launched before the one before is finished (see pipeline.py)."""
        wanted = self._config.async_scheduling
        return self.kv_pool.is_cuda if wanted is None else wanted

    def prepare(self, request: Request) -> None:
        """Begins with what `request` will need and takes time; to be called when it arrives."""
        if request.sampling.structured_outputs is not None and self.grammars is not None:
            self.grammars.prepare(request.sampling.structured_outputs)

    def launch(self, plan: StepPlan) -> RunningStep:
        """Queues a step on the device, up to the choice of tokens: `RunningStep.sample` is next.
        Advances nothing; sequences in `plan.preempted` are released."""
        if self._thread != threading.get_ident():
            # OpenMP counts threads per calling thread; a new one starts with the default.
            self._thread = threading.get_ident()
            torch.set_num_threads(self._num_threads)
        if self._host_blocks is not None:
            self._host_blocks.run(plan.copies)
        return self._runner.launch(plan)

    @property
    def jumps_ahead(self) -> bool:
        """Whether tokens that a grammar forces may be appended without sampling them."""
        return self._config.jump_ahead

    @property
    def max_captured_chunks(self) -> int:
        """How many sequences may have several tokens in a step that is a captured CUDA graph."""
        return MAX_CHUNKS if self.uses_graphs else 0

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps, and those with few prompt tokens, are captured CUDA graphs."""
        return self._runner.uses_graphs

    def forced_tokens(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """What must follow the tokens that a step has just yielded for `sequences`, by their
        grammars: non-empty lists."""
        return self._runner.forced_tokens(sequences)

    def append(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Forced tokens are the sequence's next outputs: commit them behind the sampled one."""
        self._runner.append(sequence, token_ids)

    def release(self, sequence: Sequence) -> None:
        """Call it when a sequence finished or was aborted, and when prefill is through with it;
        nothing happens if it never ran or was released."""
        self._runner.release(sequence)


def _kv_dtype(
    config: EngineConfig, model_config: ModelConfig, model_dtype: torch.dtype
) -> torch.dtype:
    quantization = model_config.quantization
    return resolve_kv_dtype(
        config.kv_cache_dtype,
        model_dtype=model_dtype,
        has_fp8_kv=quantization is not None and quantization.has_fp8_kv,
    )


def _layout(model: CausalLM, block_size: int, kv_dtype: torch.dtype) -> KVLayout:
    config: ModelConfig = model.config
    return KVLayout(
        model_fingerprint=config.fingerprint,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=str(kv_dtype).removeprefix("torch."),
    )
