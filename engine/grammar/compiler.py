"""Compiled grammars of one model, whichever library follows them."""

import ctypes
import functools

import msgspec

from engine.grammar.interface import GrammarBackend, GrammarMatcher, MatcherFactory
from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams

_WORD_BITS = 32
_NUM_CACHED_GRAMMARS = 256


class GrammarCompiler:
    """Makes matchers for one model's tokens; threads may share it."""

    def __init__(self, backend: GrammarBackend, *, vocab_size: int) -> None:
        self._backend = backend
        self.mask_bytes = 4 * -(-vocab_size // _WORD_BITS)
        self._compiled = functools.lru_cache(_NUM_CACHED_GRAMMARS)(self._compile)

    def matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A new matcher at the output's start. What is no grammar has an `error`, and is over.

        Raises ValueError for what can't even be read as one.
        """
        return self._compiled(params.key)()

    def check(self, params: StructuredOutputsParams, field: str) -> None:
        """Compiles, and looks at what an output may start with: what is hopeless shows there.

        Raises InvalidRequestError under the name `field`.
        """
        try:
            matcher = self.matcher(params)
            mask = ctypes.create_string_buffer(self.mask_bytes)
            matcher.write_allowed(ctypes.addressof(mask), self.mask_bytes)
            error = matcher.error
        except ValueError as refused:
            error = one_line(refused)
        if error:
            raise InvalidRequestError(f"`{field}` can't be followed: {error}", field=field)

    def _compile(self, key: bytes) -> MatcherFactory:
        return self._backend.compile(msgspec.json.decode(key, type=StructuredOutputsParams))


def one_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
