"""Calls in a list that a grammar sees to, and where each of them ends."""

from services.router.openai.tool_parsers import Parsed, read_json_call

_BETWEEN = " \t\r\n[,"


class ListedCallsParser:
    """A `ToolParser` for an output that a grammar has made a list of calls. Each is passed on when
    it's whole; one that the output breaks off in is passed on as text."""

    def __init__(self) -> None:
        self._held = ""
        self._brackets = Brackets()
        self._num_calls = 0
        self._is_text = False

    def push(self, text: str) -> Parsed:
        if self._is_text:
            return Parsed(content=text)
        self._held += text
        parsed = Parsed()
        while (end := self._brackets.end_in(text)) is not None:
            text = text[end:]
            place = len(self._held) - len(text)
            calls = read_json_call(self._held[:place].lstrip(_BETWEEN))
            if calls is None:
                self._is_text = True
                parsed.content, self._held = self._held, ""
                break
            parsed.calls += [call.piece(self._num_calls) for call in calls]
            self._num_calls += 1
            self._held = text
            self._brackets = Brackets()
        return parsed

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        is_end = self._num_calls and held.strip() in ("", "]")
        return Parsed() if is_end else Parsed(content=held)


class Brackets:
    """Looks for the first bracket's partner, in JSON or Python: what is quoted doesn't count."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._is_escaped = False
        self._is_over = False

    def end_in(self, text: str) -> int | None:
        """The place behind it, found once; `text` is what follows that of the calls before."""
        if self._is_over:
            return None
        for i, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                self._is_escaped = char == "\\"
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            elif char in "{(":
                self._depth += 1
            elif char in "})":
                self._depth -= 1
                if self._depth == 0:
                    self._is_over = True
                    return i + 1
        return None
