"""Refuses what Tandem can't do, instead of answering as if it hadn't been asked."""

from collections.abc import Mapping
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from services.router.openai.bodies import Unsupported

# Values besides null with which a field asks for what happens anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
}


_REFUSED = {name: HARMLESS.get(name, ()) for name in Unsupported.__struct_fields__}


def refuse_unsupported(body: Unsupported) -> None:
    """Raises InvalidRequestError that names the first field that asks for something missing."""
    refuse_fields(body, _REFUSED)


def refuse_fields(body: msgspec.Struct, harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """As `refuse_unsupported`, for these fields; null is harmless, too."""
    for name, values in harmless.items():
        value = getattr(body, name)
        if value is not None and not any(_same_json(value, other) for other in values):
            raise unsupported(name)


def unsupported(field: str, what: str | None = None) -> InvalidRequestError:
    """`what` names what is missing, if that isn't the field itself."""
    return InvalidRequestError(
        f"{what or f'`{field}`'} is not supported by this server.",
        field=field,
        code="unsupported_parameter",
    )


def _same_json(value: Any, other: Any) -> bool:  # noqa: ANN401
    """JSON's false isn't 0, and its 1.0 is 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
