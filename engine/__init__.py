"""One model replica: scheduler, KV blocks, model, sampler; `LLM` runs it in your own process.

`LLM` and what it needs load on first use, so importing `engine.scheduler` doesn't import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.outputs import CompletionOutput, Logprob, RequestOutput, TokensPrompt
    from protocol.sampling import SamplingParams
    from protocol.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokensPrompt",
]

_MODULES = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.outputs",
    "Logprob": "engine.outputs",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "protocol.sampling",
    "StructuredOutputsParams": "protocol.structured_outputs",
    "TokensPrompt": "engine.outputs",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the module holds)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
