"""The sampling that a model's makers recommend, from its generation_config.json."""

import json
from pathlib import Path
from typing import Any

from protocol.errors import InvalidRequestError, StartupError
from protocol.sampling import SamplingParams

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(model_dir: Path) -> dict[str, Any]:
    """Values for what a request leaves out; vLLM applies the same file in the same way.

    Raises StartupError if the file is broken or recommends what can't be.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        declared = json.loads(path.read_bytes())
        defaults = {name: declared[name] for name in _FIELDS if declared.get(name) is not None}
        SamplingParams(**defaults).validate()
    except (ValueError, TypeError, InvalidRequestError) as error:
        raise StartupError(f"{path} can't be used: {error}") from error
    return defaults
