"""For clients that take one tool call at most: an output's first call is its end."""

from collections.abc import Callable
from dataclasses import replace

from services.router.openai.listed_calls import Brackets
from services.router.openai.tool_parsers import Parsed, ToolCallPiece, ToolParser


class FirstCallParser:
    """A `ToolParser` that passes the first call on as soon as it's whole, and nothing behind it."""

    def __init__(self, make: Callable[[], ToolParser], closings: tuple[str, ...]) -> None:
        """`make` is for what has all calls; `closings` are its format's."""
        self._make = make
        self._closings = closings
        self._parser = make()
        self._held = ""
        self._brackets = Brackets()
        self._is_over = False

    def push(self, text: str) -> Parsed:
        if self._is_over:
            return Parsed()
        parsed = self._parser.push(text)
        if not self._closings:
            return self._up_to_first(parsed)
        self._held += text
        if parsed.content:
            self._held = text = self._held[len(parsed.content) :]
            self._brackets = Brackets()
        end = self._brackets.end_in(text)
        if end is not None:
            call = self._call_in(self._held[: len(self._held) - len(text) + end])
            if call is not None:
                parsed.calls = [replace(call, num_chars_before=len(parsed.content))]
        return self._up_to_first(parsed)

    def finish(self) -> Parsed:
        return Parsed() if self._is_over else self._up_to_first(self._parser.finish())

    def _call_in(self, text: str) -> ToolCallPiece | None:
        """The call that `text` is, if nothing but a closing follows."""
        for closing in self._closings:
            parser = self._make()
            calls = parser.push(text + closing).calls + parser.finish().calls
            if calls:
                return calls[0]
        return None

    def _up_to_first(self, parsed: Parsed) -> Parsed:
        if not parsed.calls:
            return parsed
        self._is_over = True
        call = parsed.calls[0]
        return Parsed(parsed.content[: call.num_chars_before], [call])
