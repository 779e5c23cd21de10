"""Finds stop strings in text that arrives in pieces of any size."""

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text at the stop string that ends first in it (the longest, if several end there).

    `push` hands out all text that can't be part of a stop string any more: it holds back the
    longest end that is also the beginning of one, nothing else. The result doesn't depend on
    how the text is cut into pieces. `include` keeps the stop string itself in the text.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        self._patterns = [_Pattern(text) for text in stop]
        self._held = ""

    def push(self, text: str) -> str:
        """The next part of the text; after a match, always the empty string."""
        if self.matched is not None:
            return ""
        if not self._patterns:
            return text
        ended = [(end, pattern) for pattern in self._patterns if (end := pattern.advance(text))]
        held, self._held = self._held + text, ""
        if ended:
            # Later pieces than the first end may hold other matches; they are behind the cut.
            end, pattern = min(ended, key=lambda item: (item[0], -len(item[1].text)))
            self.matched = pattern.text
            stop_end = len(held) - len(text) + end
            return held[:stop_end] if self._include else held[: stop_end - len(pattern.text)]
        num_held = max(pattern.num_matched for pattern in self._patterns)
        if num_held:
            self._held = held[-num_held:]
            return held[:-num_held]
        return held

    def finish(self) -> str:
        """The text held back, which is no stop string now that the end has come."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """Knuth-Morris-Pratt over one stop string: time linear in text and string, whatever either."""

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        assert text, "a stop string has at least one character"
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def advance(self, chunk: str) -> int | None:
        """The end of the string's first occurrence in `chunk`, counted from the chunk's start."""
        text, borders, matched = self.text, self._borders, self.num_matched
        i = 0
        while i < len(chunk):
            if matched == 0:
                # Nearly all text takes this path, at the speed of str.find.
                i = chunk.find(text[0], i)
                if i < 0:
                    break
            while matched and chunk[i] != text[matched]:
                matched = borders[matched - 1]
            if chunk[i] == text[matched]:
                matched += 1
            i += 1
            if matched == len(text):
                return i
        self.num_matched = matched
        return None


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
