"""Reads one chat output's text: thoughts, words and tool calls, whichever are looked for."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from services.router.dispatch.choice import Watch
from services.router.openai.reasoning_parsers import ThinkParser
from services.router.openai.tool_parsers import ToolCallPiece, ToolParser


@dataclass(slots=True)
class Reading:
    """What some text came to."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCallPiece] = field(default_factory=list[ToolCallPiece])


class ChatReader:
    """Thoughts come first, and may be left out; what follows them may be calls."""

    def __init__(
        self,
        thoughts: ThinkParser | None,
        calls: ToolParser | None,
        *,
        shows_thoughts: bool = True,
    ) -> None:
        self._thoughts = thoughts
        self._shows_thoughts = shows_thoughts
        self._calls = calls
        self.has_calls = False

    def read(self, text: str, *, is_last: bool) -> Reading:
        """The next text; with `is_last`, also all that was held back."""
        reading = Reading()
        if self._thoughts is not None:
            thoughts = [self._thoughts.push(text)]
            if is_last:
                thoughts.append(self._thoughts.finish())
            if self._shows_thoughts:
                reading.reasoning = "".join(thought.reasoning for thought in thoughts)
            text = "".join(thought.content for thought in thoughts)
        if self._calls is None:
            reading.content = text
            return reading
        parsed = self._calls.push(text)
        if is_last:
            parsed.add(self._calls.finish())
        reading.content, reading.calls = parsed.content, parsed.calls
        self.has_calls = self.has_calls or bool(parsed.calls)
        return reading


class ReadingRules(msgspec.Struct, frozen=True):
    """What is looked for in the outputs of one request. `says_tool_calls`: calls are the reason
    that an output gives for its end. `ends_with_call`: the first one ends it."""

    make_thoughts: Callable[[], ThinkParser] | None = None
    make_calls: Callable[[], ToolParser] | None = None
    shows_thoughts: bool = True
    says_tool_calls: bool = True
    ends_with_call: bool = False

    @property
    def is_plain(self) -> bool:
        """The text is the answer, as it comes."""
        return self.make_thoughts is None and self.make_calls is None

    def watch(self) -> Watch | None:
        """For one output; None if it's wanted to its end."""
        if not self.ends_with_call:
            return None
        reader = self.reader()
        return lambda text: bool(reader.read(text, is_last=False).calls)

    def reader(self) -> ChatReader:
        """For one output."""
        return ChatReader(
            None if self.make_thoughts is None else self.make_thoughts(),
            None if self.make_calls is None else self.make_calls(),
            shows_thoughts=self.shows_thoughts,
        )
