"""Refuses what Tandem can't do, instead of answering as if it hadn't been asked."""

from typing import Any

from protocol.errors import InvalidRequestError
from services.router.openai_bodies import Unsupported

# Values besides null with which a field asks for what happens anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
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
        if value is None or any(_same_json(value, other) for other in HARMLESS.get(name, ())):
            continue
        raise InvalidRequestError(
            f"`{name}` is not supported by this server.", field=name, code="unsupported_parameter"
        )


def _same_json(value: Any, other: Any) -> bool:  # noqa: ANN401
    """JSON's `true` isn't 1, and its 1.0 is."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
