"""What a library that follows grammars has to do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams


class GrammarMatcher(Protocol):
    """How far one output has come in its grammar."""

    @property
    def is_over(self) -> bool:
        """Nothing may follow but the end, as far as is known without a mask."""
        ...

    @property
    def may_end(self) -> bool:
        """The output obeys as it is."""
        ...

    @property
    def error(self) -> str:
        """Why the grammar can't be followed any further, in one line; empty if it can."""
        ...

    @property
    def has_refused(self) -> bool:
        """Whether a token that the grammar doesn't allow was the error."""
        ...

    def accept(self, token_id: int) -> bool:
        """Goes on by a token; False if the grammar doesn't allow it here, and is over then."""
        ...

    def write_allowed(self, address: int, num_bytes: int) -> None:
        """Writes the tokens that may come next to memory: token i is bit i % 8 of byte i // 8.

        `num_bytes` is the compiler's `mask_bytes`; the address is a multiple of 4.
        """
        ...

    def forced_tokens(self) -> list[int]:
        """Tokens that must follow now, in order: each mask on the way holds the next one alone.

        There may be more of them than a library finds; none ends the output.
        """
        ...


MatcherFactory: TypeAlias = Callable[[], GrammarMatcher]
"""Makes a new matcher of one grammar, at the output's start."""


class GrammarChecker(Protocol):
    """Says of grammars whether they can be followed; threads may share it."""

    def error_of(self, params: StructuredOutputsParams) -> str:
        """Why this can't be followed, in one line; empty if it can."""
        ...

    def close(self) -> None: ...


def check_grammar(checker: GrammarChecker, params: StructuredOutputsParams, field: str) -> None:
    """Raises InvalidRequestError, under the name `field`, for what can't be followed."""
    error = checker.error_of(params)
    if error:
        raise InvalidRequestError(f"`{field}` can't be followed: {error}", field=field)


class GrammarBackend(ABC):
    """Reads grammars for one model's tokens; threads may share it."""

    def __init__(
        self, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        """The vocabulary is read on first use. An output ends by one of `eos_token_ids`."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    @abstractmethod
    def compile(self, params: StructuredOutputsParams) -> MatcherFactory:
        """Raises ValueError for what it can't follow; some of that may show in the matcher's
        `error` instead."""
