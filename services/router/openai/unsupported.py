"""Refuses what Tandem can't do, instead of answering as if it hadn't been asked."""

from collections.abc import Mapping
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from services.router.openai.bodies import SamplingBody

# Fields with no effect here, each with the values besides null that ask for what happens anyway.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "structural_tag": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def refuse_unsupported(body: SamplingBody) -> None:
    """Raises InvalidRequestError that names the first field that asks for something missing."""
    refuse_fields(body, UNSUPPORTED)


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
