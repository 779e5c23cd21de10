"""One model replica: scheduler, KV blocks, model, sampler; `LLM` runs it in your own process.

`LLM` and what it needs load on first use, so importing `engine.scheduler` doesn't import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.beam_search import BeamSearchParams
    from engine.llm import LLM
    from engine.outputs import (
        BeamSearchOutput,
        CompletionOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestOutput,
    )
    from engine.prompts import TextPrompt, TokensPrompt
    from engine.sampling_params import SamplingParams
    from protocol.pooling import PoolingParams
    from protocol.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

_MODULES = {
    "LLM": "engine.llm",
    "BeamSearchOutput": "engine.outputs",
    "BeamSearchParams": "engine.beam_search",
    "CompletionOutput": "engine.outputs",
    "EmbeddingRequestOutput": "engine.outputs",
    "Logprob": "engine.outputs",
    "PoolingParams": "protocol.pooling",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "StructuredOutputsParams": "protocol.structured_outputs",
    "TextPrompt": "engine.prompts",
    "TokensPrompt": "engine.prompts",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the module holds)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
