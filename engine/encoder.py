"""A model that only embeds, as services and `LLM` drive it: all calls on one thread.

There is no KV pool and no scheduler over blocks: a step takes whole texts (text_queue.py) and gives
a vector for each.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine.config import EngineConfig
from engine.device import resolve_device
from engine.model_info import ModelInfo
from engine.models.bert import BertModel
from engine.models.encoder_config import EncoderConfig, read_encoder_config
from engine.models.registry import load_encoder
from engine.text_batch import longest_first, make_text_batch
from engine.text_queue import TextQueue
from engine.weights.dtype import resolve_dtype
from engine.weights.model_dir import model_name, resolve_model
from protocol.errors import ContextLengthError, InvalidRequestError, StartupError
from protocol.ids import RequestKey
from protocol.layout import KVLayout
from protocol.pooling import PoolingParams, PoolingType
from protocol.request import Request
from protocol.sampling import SamplingParams

_WARM_UP_TOKENS = 64


class EncoderEngine:
    """Made by `load`."""

    model: ModelInfo

    def __init__(self, config: EngineConfig, name: str, model: BertModel) -> None:
        self._config = config
        self._model = model
        self._thread: int | None = None
        self._num_threads = torch.get_num_threads()
        self.model = ModelInfo(
            name=name,
            architecture=model.config.architecture,
            fingerprint=model.config.fingerprint,
            layout=_no_kv(model.config, config.block_size, model.dtype),
            max_model_len=model.config.max_model_len,
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            eos_token_ids=(),
        )
        self._vectors([[0] * min(_WARM_UP_TOKENS, model.config.max_model_len)], {"mean"})

    @classmethod
    def load(cls, config: EngineConfig, *, progress: bool) -> "EncoderEngine":
        """Finds and loads the model. Raises StartupError that says what is wrong."""
        device = resolve_device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.quantization is not None:
            raise StartupError(f"--quantization {config.quantization} isn't for encoders.")
        if config.quantization_ignore:
            raise StartupError("--quantization-ignore isn't for encoders.")
        model_dir = resolve_model(config.model, progress=progress)
        model_config = read_encoder_config(model_dir).limited_to(config.max_model_len)
        model = load_encoder(
            model_config,
            model_dir,
            dtype=resolve_dtype(config.dtype, device, checkpoint_dtype=model_config.dtype),
            device=device,
            load_format=config.load_format,
            progress=progress,
        )
        return cls(config, model_name(config.model), model)

    def make_queue(self) -> TextQueue:
        """An empty one with this engine's bounds."""
        return TextQueue(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
        )

    def check(self, request: Request) -> None:
        """Raises InvalidRequestError if the text is empty or longer than the model takes."""
        num_tokens, limit = len(request.token_ids), self.model.max_model_len
        if not num_tokens:
            raise InvalidRequestError("A text must have at least one token.", field="prompt")
        if num_tokens > limit:
            raise ContextLengthError(
                f"This model takes texts of up to {limit} tokens; one has {num_tokens}.",
                field="prompt",
            )

    def embed_all(
        self, texts: Sequence[list[int]], pooling: PoolingParams, *, progress: bool
    ) -> list[bytes]:
        """Vectors of any number of texts' token ids, in as many steps as they take.

        Raises InvalidRequestError before anything runs if one can't be served.
        """
        queue = self.make_queue()
        requests = [_offline_request(i, text, pooling) for i, text in enumerate(texts)]
        for request in requests:
            self.check(request)
            queue.add(request, arrival_s=0.0)
        vectors: list[bytes] = []
        with tqdm(total=len(requests), desc="Embedding", disable=not progress) as bar:
            # Of equal priority, they come back in the order in which they were added.
            while batch := queue.take():
                vectors += self.embed([text.request for text in batch])
                bar.update(len(batch))
        return vectors

    def embed(self, requests: Sequence[Request]) -> list[bytes]:
        """One step: each request's vector, float32 in little-endian order."""
        if self._thread != threading.get_ident():
            # OpenMP counts threads per calling thread; a new one starts with the default.
            self._thread = threading.get_ident()
            torch.set_num_threads(self._num_threads)
        texts = [request.token_ids for request in requests]
        wanted = [request.pooling or PoolingParams(type="mean") for request in requests]
        vectors = self._vectors(texts, {pooling.type for pooling in wanted})
        return [
            _finished(vectors[pooling.type][i], pooling).astype("<f4").tobytes()
            for i, pooling in enumerate(wanted)
        ]

    @torch.inference_mode()
    def _vectors(
        self, texts: Sequence[Sequence[int]], kinds: set[PoolingType]
    ) -> dict[PoolingType, NDArray[np.float32]]:
        """For each kind of pooling, [num_texts, hidden_size] in the order of `texts`."""
        order = longest_first(texts)
        batch = make_text_batch([texts[i] for i in order], self._model.device)
        hidden = self._model.forward(batch)
        places = np.argsort(order)
        return {kind: _pooled(hidden, batch.lengths, kind).cpu().numpy()[places] for kind in kinds}


def _offline_request(number: int, token_ids: list[int], pooling: PoolingParams) -> Request:
    return Request(
        key=RequestKey(str(number), 1),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=1),
        pooling=pooling,
    )


def _pooled(hidden: Tensor, lengths: Tensor, kind: PoolingType) -> Tensor:
    """float32 [num_texts, hidden_size] of the states of texts that lie one behind the other."""
    ends = lengths.cumsum(0)
    match kind:
        case "mean":
            return torch.segment_reduce(hidden.float(), "mean", lengths=lengths)
        case "cls":
            return hidden.index_select(0, ends - lengths).float()
        case "last":
            return hidden.index_select(0, ends - 1).float()


def _finished(vector: NDArray[np.float32], pooling: PoolingParams) -> NDArray[np.float32]:
    vector = vector[: pooling.dimensions]
    # As torch's `normalize`: nothing is divided by zero.
    return vector / max(float(np.linalg.norm(vector)), 1e-12) if pooling.normalize else vector


def _no_kv(config: EncoderConfig, block_size: int, dtype: torch.dtype) -> KVLayout:
    """Blocks of no bytes: nothing is kept of a text."""
    return KVLayout(
        model_fingerprint=config.fingerprint,
        num_layers=0,
        num_kv_heads=0,
        head_dim=0,
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
    )
