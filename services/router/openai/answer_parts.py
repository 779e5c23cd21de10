"""Divides one chat output into its parts as it grows: thoughts, words, and each tool call.

/v1/responses answers them as items and /v1/messages as content blocks; both tell a stream's reader
where each one begins, grows and ends.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from services.router.dispatch.choice import Delta
from services.router.openai.chat_reader import Reading, ReadingRules

PartKind: TypeAlias = Literal["thoughts", "words", "call"]


@dataclass(slots=True)
class Part:
    """`text` are thoughts, words, or a call's arguments in JSON; `name` is the called tool's."""

    index: int
    kind: PartKind
    name: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    texts: list[str] = field(default_factory=list[str])
    is_whole: bool = False

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Opened:
    part: Part


@dataclass(frozen=True, slots=True)
class Grew:
    part: Part
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """`part.is_whole` unless the output was cut off within it."""

    part: Part


PartEvent: TypeAlias = Opened | Grew | Closed


class PartReader:
    """Fed with an output's deltas in order; an output without any text is one part of no words.

    Blanks between thoughts and calls are no words: they're passed on once words follow.
    """

    def __init__(self, reading: ReadingRules) -> None:
        self._reader = None if reading.is_plain else reading.reader()
        self._blanks = ""
        self.parts: list[Part] = []

    @property
    def has_calls(self) -> bool:
        return any(part.kind == "call" for part in self.parts)

    def read(self, delta: Delta) -> list[PartEvent]:
        is_last = delta.finish_reason is not None
        if self._reader is None:
            reading = Reading(content=delta.text)
        else:
            reading = self._reader.read(delta.text, is_last=is_last)
        events = list(self._events(reading))
        if is_last:
            if not self.parts:
                events += self._grow("words", self._blanks)
            events += self._close(is_whole=delta.finish_reason == "stop")
        return events

    def _events(self, reading: Reading) -> Iterator[PartEvent]:
        if reading.reasoning:
            yield from self._grow("thoughts", reading.reasoning)
        start = 0
        for piece in reading.calls:
            yield from self._words(reading.content[start : piece.num_chars_before])
            start = piece.num_chars_before
            if piece.name is not None:
                yield from self._open("call", piece.name)
            yield from self._grow("call", piece.arguments)
        yield from self._words(reading.content[start:])

    def _words(self, text: str) -> Iterator[PartEvent]:
        text, self._blanks = self._blanks + text, ""
        if text.strip() or (text and self._is_in("words")):
            yield from self._grow("words", text)
        else:
            self._blanks = text

    def _is_in(self, kind: PartKind) -> bool:
        return bool(self.parts) and self.parts[-1].kind == kind

    def _grow(self, kind: PartKind, text: str) -> Iterator[PartEvent]:
        if not self._is_in(kind):
            yield from self._open(kind)
        part = self.parts[-1]
        if text:
            part.texts.append(text)
            yield Grew(part, text)

    def _open(self, kind: PartKind, name: str = "") -> Iterator[PartEvent]:
        yield from self._close(is_whole=True)
        part = Part(len(self.parts), kind, name)
        self.parts.append(part)
        yield Opened(part)

    def _close(self, *, is_whole: bool) -> Iterator[PartEvent]:
        if self.parts:
            self.parts[-1].is_whole = is_whole
            yield Closed(self.parts[-1])
