"""Parts a model's thoughts from its answer, as the text comes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Thought:
    """What some text came to."""

    reasoning: str = ""
    content: str = ""


class ThinkParser:
    """Thoughts stand between `<think>` and `</think>`, at the start of the output.

    With `starts_inside` the template has written the opening mark already, or the model leaves it
    out: everything up to the closing mark is thought.
    """

    _OPENING, _CLOSING = OPENING, CLOSING

    def __init__(self, *, starts_inside: bool) -> None:
        self._starts_inside = starts_inside
        self._held = ""
        self._state = self._before

    @property
    def starts_inside(self) -> bool:
        return self._starts_inside

    def push(self, text: str) -> Thought:
        self._held += text
        return self._state()

    def finish(self) -> Thought:
        held, self._held = self._held, ""
        if self._state == self._inside or (self._state == self._before and self._starts_inside):
            return Thought(reasoning=held)
        return Thought(content=held)

    def _before(self) -> Thought:
        """Nothing but blanks has come."""
        stripped = self._held.lstrip()
        if self._OPENING.startswith(stripped):
            return Thought()
        if stripped.startswith(self._OPENING):
            self._held = stripped[len(self._OPENING) :]
        elif not self._starts_inside:
            self._state = self._behind
            return self._behind()
        self._state = self._inside
        return self._inside()

    def _inside(self) -> Thought:
        end = self._held.find(self._CLOSING)
        if end < 0:
            cut = len(self._held) - self._tail()
            reasoning, self._held = self._held[:cut], self._held[cut:]
            return Thought(reasoning=reasoning)
        reasoning, self._held = self._held[:end], self._held[end + len(self._CLOSING) :]
        self._state = self._behind
        return Thought(reasoning=reasoning, content=self._behind().content)

    def _behind(self) -> Thought:
        held, self._held = self._held, ""
        return Thought(content=held)

    def _tail(self) -> int:
        """Length of the end of what is held that may begin the closing mark."""
        sizes = range(min(len(self._held), len(self._CLOSING) - 1), 0, -1)
        return next((size for size in sizes if self._held.endswith(self._CLOSING[:size])), 0)


REASONING_FORMATS: Mapping[str, Callable[[], ThinkParser]] = {
    "deepseek_r1": lambda: ThinkParser(starts_inside=True),
    "qwen3": lambda: ThinkParser(starts_inside=False),
}
