"""Refuses what Tandem can't do, instead of answering as if it hadn't been asked."""

from collections.abc import Mapping
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from services.router.openai.bodies import SamplingBody

# Fields with no effect here, each with the values besides null that ask for what happens anyway.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "ec_transfer_params": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "structural_tag": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}


def refuse_unsupported(body: SamplingBody) -> None:
    """Raises InvalidRequestError that names the first field that asks for something missing."""
    refuse_fields(body, UNSUPPORTED)


def refuse_fields(
    body: msgspec.Struct, harmless: Mapping[str, tuple[Any, ...]], *, prefix: str = ""
) -> None:
    """As `refuse_unsupported`, for these fields, which errors name behind `prefix`; null is
    harmless, too."""
    for name, values in harmless.items():
        value = getattr(body, name)
        if value is not None and not any(_same_json(value, other) for other in values):
            raise unsupported(prefix + name)


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
