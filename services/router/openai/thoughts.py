"""From a body's `thinking_token_budget` to the limit that workers hold thoughts to."""

from collections.abc import Callable

import msgspec

from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError
from protocol.sampling import ThoughtLimit
from services.router.openai.reasoning_parsers import CLOSING, OPENING, ThinkParser
from services.router.openai.unsupported import unsupported

_FIELD = "thinking_token_budget"
_MAX_BUDGET = 2**31 - 1


class ThoughtPolicy:
    """How long outputs may think, where this server can say so."""

    def __init__(
        self, tokenizer: Tokenizer, make_thoughts: Callable[[], ThinkParser] | None
    ) -> None:
        """Needs a parser, and marks that are tokens: those of a text are cut in many ways."""
        self._marks: ThoughtLimit | None = None
        if make_thoughts is None:
            return
        opening = tokenizer.encode(OPENING, add_special_tokens=False)
        closing = tokenizer.encode(CLOSING, add_special_tokens=False)
        if len(opening) == len(closing) == 1:
            self._marks = ThoughtLimit(
                max_tokens=0,
                opening_token_id=opening[0],
                closing_token_id=closing[0],
                starts_inside=make_thoughts().starts_inside,
            )

    @property
    def can_limit(self) -> bool:
        return self._marks is not None

    def read(self, budget: int | None) -> ThoughtLimit | None:
        """None if there's no limit. Raises InvalidRequestError."""
        if budget is None:
            return None
        if not 0 <= budget <= _MAX_BUDGET:
            raise InvalidRequestError(
                f"`{_FIELD}` must be between 0 and {_MAX_BUDGET}, got {budget}.", field=_FIELD
            )
        if self._marks is None:
            raise unsupported(_FIELD)
        return msgspec.structs.replace(self._marks, max_tokens=budget)
