"""How a model's makers mean its hidden states to become one vector; imports no torch."""

import json
from pathlib import Path
from typing import Any

from engine.models.config import read_json
from protocol.errors import StartupError
from protocol.pooling import PoolingType

_POOLING_DIR = "1_Pooling"
_TYPES: dict[str, PoolingType] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
# Of sentence-transformers' modules; whether vectors are normalized is each request's choice.
_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")


def read_pooling_type(model_dir: Path) -> PoolingType:
    """From sentence-transformers' `1_Pooling/config.json`; without one a decoder's last token,
    which alone has seen the whole text. Raises StartupError for an unreadable file."""
    path = model_dir / _POOLING_DIR / "config.json"
    if not path.is_file():
        return "last"
    return "mean" if read_json(path).get("pooling_mode_mean_tokens") is True else "last"


def read_encoder_pooling_type(model_dir: Path) -> PoolingType:
    """From sentence-transformers' `modules.json` and what it names; without it the mean.

    Raises StartupError for what would make other vectors than these files say.
    """
    modules = _modules(model_dir / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    for kind in kinds:
        if kind not in _SERVED_MODULES:
            raise StartupError(
                f"{model_dir / 'modules.json'} names a module {kind!r}; "
                f"served are {', '.join(_SERVED_MODULES)}."
            )
    pooling = [module for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    name = str(pooling[0].get("path", _POOLING_DIR)) if pooling else _POOLING_DIR
    path = model_dir / name / "config.json"
    if not path.is_file():
        return "mean"
    chosen = [
        key
        for key, value in read_json(path).items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if len(chosen) != 1 or chosen[0] not in _TYPES:
        raise StartupError(
            f"{path} asks for {' and '.join(chosen) or 'no pooling'}; "
            f"served is one of {', '.join(_TYPES)}."
        )
    return _TYPES[chosen[0]]


def _modules(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_bytes())
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise StartupError(f"{path} must hold a list of JSON objects.")
    return modules
