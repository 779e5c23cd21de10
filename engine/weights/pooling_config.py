"""How a model's makers mean its hidden states to become one vector; imports no torch."""

from pathlib import Path

from engine.models.config import read_json
from protocol.pooling import PoolingType

_POOLING_CONFIG = "1_Pooling/config.json"


def read_pooling_type(model_dir: Path) -> PoolingType:
    """From sentence-transformers' `1_Pooling/config.json`; without one a decoder's last token,
    which alone has seen the whole text. Raises StartupError for an unreadable file."""
    path = model_dir / _POOLING_CONFIG
    if not path.is_file():
        return "last"
    return "mean" if read_json(path).get("pooling_mode_mean_tokens") is True else "last"
