"""The libraries that follow grammars, by name."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.interface import GrammarBackend, GrammarChecker
from engine.grammar.llguidance import LlguidanceBackend
from engine.grammar.outlines import OutlinesBackend
from engine.grammar.trial import TrialProcess, TrialSettings
from engine.grammar.xgrammar import XgrammarBackend
from protocol.errors import StartupError


@dataclass(frozen=True, slots=True)
class _Library:
    module: str
    backend: type[GrammarBackend]
    bounds_its_work: bool
    """Whether it may read strangers' grammars in a process that has other things to do."""
    num_kept: int
    """Compiled grammars that a process keeps; some take as much memory as a trial allows."""


_LIBRARIES = {
    "llguidance": _Library("llguidance", LlguidanceBackend, bounds_its_work=True, num_kept=256),
    "xgrammar": _Library("xgrammar", XgrammarBackend, bounds_its_work=False, num_kept=32),
    "outlines": _Library("outlines_core", OutlinesBackend, bounds_its_work=False, num_kept=32),
}
_ALIASES = {"auto": "llguidance", "guidance": "llguidance"}
BACKEND_NAMES = (*_ALIASES, *_LIBRARIES)


def backend_name(name: str) -> str:
    """The library's own name."""
    return _ALIASES.get(name, name)


def make_compiler(
    name: str, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> GrammarCompiler:
    """`name` is one of `BACKEND_NAMES`. Raises StartupError if its library isn't installed."""
    library = _library(name)
    backend = library.backend(tokenizer_file, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    return GrammarCompiler(backend, vocab_size=vocab_size, num_kept=library.num_kept)


def make_checker(
    name: str, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> GrammarChecker:
    """For grammars of strangers; otherwise as `make_compiler`."""
    if _library(name).bounds_its_work:
        return make_compiler(
            name, tokenizer_file, vocab_size=vocab_size, eos_token_ids=eos_token_ids
        )
    return TrialProcess(
        TrialSettings(
            backend=name,
            tokenizer_file=str(tokenizer_file),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
    )


def _library(name: str) -> _Library:
    library = _LIBRARIES[backend_name(name)]
    if importlib.util.find_spec(library.module) is None:
        raise StartupError(
            f"--guided-decoding-backend {name} needs the package of that name: "
            f"pip install 'tandem[{name}]'."
        )
    return library
