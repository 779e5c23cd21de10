"""Names a model by its content, so that workers and routers agree on it without comparing files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Written by tools into config.json without any bearing on what the model computes.
_VOLATILE_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
)
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


def fingerprint_model(model_dir: Path, config: Mapping[str, Any]) -> str:
    """32 hex digits over the parsed config.json and the weight files.

    Of each weight file its name, size and a few evenly spaced samples count: fine-tunes of one
    model have equal sizes, and reading everything would take seconds at every start. Paths and
    times don't count, so the same model has one fingerprint on all machines.
    """
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    digest = hashlib.blake2b(digest_size=16, person=b"tandem-model")
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(sample_file(path))
    return digest.hexdigest()


def fingerprint_variant(fingerprint: str, variant: str) -> str:
    """The fingerprint of a model that is made of another at start, as `variant` says."""
    content = f"{fingerprint}\0{variant}".encode()
    return hashlib.blake2b(content, digest_size=16, person=b"tandem-model").hexdigest()


def sample_file(path: Path) -> bytes:
    """16 bytes that name a large file by its size and a few evenly spaced samples."""
    size = path.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as file:
        for i in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
