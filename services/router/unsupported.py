"""Refuses what Tandem can't do, instead of answering as if it hadn't been asked."""

from typing import Any

from protocol.errors import InvalidRequestError
from services.router.openai_bodies import Unsupported

# Values besides null with which a field asks for what happens anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
}


def refuse_unsupported(body: Unsupported) -> None:
    """Raises InvalidRequestError that names the first field that asks for something missing."""
    for name in Unsupported.__struct_fields__:
        value = getattr(body, name)
        if value is None or value in _HARMLESS.get(name, ()):
            continue
        raise InvalidRequestError(
            f"`{name}` is not supported by this server.", field=name, code="unsupported_parameter"
        )
