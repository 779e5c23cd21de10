"""Compiled grammars of one model, whichever library follows them."""

import ctypes
import functools
from concurrent.futures import Future, ThreadPoolExecutor, wait

import msgspec

from engine.grammar.interface import GrammarBackend, GrammarMatcher, MatcherFactory
from protocol.structured_outputs import StructuredOutputsParams

_WORD_BITS = 32


class GrammarCompiler:
    """Makes matchers for one model's tokens; threads may share it."""

    def __init__(self, backend: GrammarBackend, *, vocab_size: int, num_kept: int) -> None:
        """Keeps the `num_kept` grammars that were used last."""
        self._backend = backend
        self.mask_bytes = 4 * -(-vocab_size // _WORD_BITS)
        self._compiled = functools.lru_cache(num_kept)(self._compile)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._under_way: dict[bytes, Future[MatcherFactory]] = {}

    def prepare(self, params: StructuredOutputsParams) -> None:
        """Begins to compile in the background what `matcher` will be asked for."""
        key = params.key
        if key not in self._under_way:
            self._under_way[key] = compiling = self._thread.submit(self._compiled, key)
            compiling.add_done_callback(lambda _: self._under_way.pop(key, None))

    def matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A new matcher at the output's start. What is no grammar has an `error`, and is over.

        Raises ValueError for what can't even be read as one.
        """
        key = params.key
        compiling = self._under_way.get(key)
        if compiling is not None:
            wait([compiling])
        return self._compiled(key)()

    def error_of(self, params: StructuredOutputsParams) -> str:
        """Why this can't be followed, in one line; empty if it can.

        Compiles, and looks at what an output may start with: what is hopeless shows there.
        """
        try:
            matcher = self.matcher(params)
        except ValueError as refused:
            return str(refused).strip().split("\n", 1)[0] or "it's no grammar"
        mask = ctypes.create_string_buffer(self.mask_bytes)
        matcher.write_allowed(ctypes.addressof(mask), self.mask_bytes)
        if not matcher.error and not any(mask.raw):
            return "no output can obey it"
        return matcher.error

    def close(self) -> None:
        """For `GrammarChecker`: there is nothing to end."""

    def _compile(self, key: bytes) -> MatcherFactory:
        return self._backend.compile(msgspec.json.decode(key, type=StructuredOutputsParams))
