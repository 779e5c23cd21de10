"""What an output has to look like; vLLM's names."""

from typing import Any

import msgspec

from protocol.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 256 << 10
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of these is set.

    `json` is a JSON Schema, as JSON text or decoded; `json_object` asks for any JSON object;
    `regex` must match the whole output; `choice` lists the possible outputs; `grammar` is in EBNF
    as llama.cpp writes it (`root ::= …`) or in Lark's notation (`start: …`).
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    @property
    def key(self) -> bytes:
        """Equal for what is written alike."""
        return msgspec.json.encode(self)

    def validate(self, field: str) -> None:
        """Raises InvalidRequestError, under the client's name `field` for it, if not one is set or
        it's too long. Whether it's a grammar is for the engine's compiler to say."""
        given = [name for name in _KINDS if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            raise InvalidRequestError(
                f"`{field}` must say exactly one of {', '.join(_KINDS)}, "
                f"got {' and '.join(given) or 'none'}.",
                field=field,
            )
        if any(not text for text in self.choice):
            raise InvalidRequestError(f"A choice in `{field}` must not be empty.", field=field)
        try:
            size = len(self.key)
        except RecursionError as error:
            raise InvalidRequestError(f"`{field}` is nested too deeply.", field=field) from error
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                f"`{field}` may have at most {MAX_GRAMMAR_BYTES} bytes, got {size}.", field=field
            )
