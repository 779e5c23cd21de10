"""The libraries that follow grammars, by name."""

from pathlib import Path

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.interface import GrammarBackend
from engine.grammar.llguidance import LlguidanceBackend

_BACKENDS: dict[str, type[GrammarBackend]] = {"llguidance": LlguidanceBackend}
_ALIASES = {"auto": "llguidance", "guidance": "llguidance"}
BACKEND_NAMES = (*_ALIASES, *_BACKENDS)


def make_compiler(
    name: str, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> GrammarCompiler:
    """`name` is one of `BACKEND_NAMES`."""
    backend = _BACKENDS[_ALIASES.get(name, name)](
        tokenizer_file, vocab_size=vocab_size, eos_token_ids=eos_token_ids
    )
    return GrammarCompiler(backend, vocab_size=vocab_size)
