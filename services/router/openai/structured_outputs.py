"""From a body's `response_format`, `structured_outputs` or `guided_*` to what workers follow."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from engine.grammar import GrammarChecker, backend_name, check_grammar
from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams
from services.router.openai.bodies import (
    ResponseFormat,
    SamplingBody,
    StructuredOutputsBody,
)
from services.router.openai.unsupported import refuse_fields

# Compiling takes a few milliseconds; what takes so long is meant to.
COMPILE_TIMEOUT_S = 5.0
_NUM_REMEMBERED = 1024
# Options that would change outputs, with the values that ask for what happens anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


class StructuredOutputs:
    """Reads and compiles what an output has to look like, off the event loop."""

    def __init__(self, checker: GrammarChecker, executor: Executor, *, backend: str) -> None:
        """`backend` is the name that the server was started with."""
        self._backend = backend_name(backend)
        self._checker = checker
        self._executor = executor
        self._known: dict[bytes, None] = {}  # in the order of their last use

    async def read(
        self, body: SamplingBody, *, for_tools: StructuredOutputsParams | None = None
    ) -> tuple[str, StructuredOutputsParams] | None:
        """The field that asks for something, and what; None if the output is free.

        `for_tools` is what a forced tool call asks for. Raises InvalidRequestError that names the
        client's field.
        """
        self._check_backend(body.guided_decoding_backend, "guided_decoding_backend")
        if body.structured_outputs is not None:
            self._check_backend(body.structured_outputs.backend, "structured_outputs.backend")
        found = _requested(body, for_tools)
        if found is None:
            return None
        field, params = found
        params.validate(field)
        key = params.key
        if key in self._known:
            del self._known[key]
        else:
            await self._check(params, field)
        self._known[key] = None
        if len(self._known) > _NUM_REMEMBERED:
            del self._known[next(iter(self._known))]
        return found

    def _check_backend(self, wanted: str | None, field: str) -> None:
        """A server has one, for all requests, as vLLM does; options behind a colon are dropped."""
        if wanted is None or wanted == "auto":
            return
        if backend_name(wanted.split(":", 1)[0]) != self._backend:
            raise InvalidRequestError(
                f"`{field}` can't differ from this server's, {self._backend} "
                "(--guided-decoding-backend).",
                field=field,
            )

    async def _check(self, params: StructuredOutputsParams, field: str) -> None:
        compiling = asyncio.get_running_loop().run_in_executor(
            self._executor, check_grammar, self._checker, params, field
        )
        try:
            await asyncio.wait_for(compiling, COMPILE_TIMEOUT_S)
        except TimeoutError as error:
            raise InvalidRequestError(
                f"`{field}` took longer to compile than the {COMPILE_TIMEOUT_S:.0f} s allowed.",
                field=field,
            ) from error


def _requested(
    body: SamplingBody, for_tools: StructuredOutputsParams | None
) -> tuple[str, StructuredOutputsParams] | None:
    """The field that asks for something, and what."""
    wanted = [] if for_tools is None else [("tools", for_tools)]
    for field, read in _READERS.items():
        value = getattr(body, field)
        params = None if value is None else read(value)
        if params is not None:
            wanted.append((field, params))
    if len(wanted) > 1:
        raise InvalidRequestError(
            f"`{wanted[0][0]}` and `{wanted[1][0]}` can't both be given.", field=wanted[1][0]
        )
    return wanted[0] if wanted else None


def _response_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.json_schema is None:
        raise InvalidRequestError(
            "`response_format` of type json_schema needs a `json_schema`.",
            field="response_format.json_schema",
        )
    return StructuredOutputsParams(json=wanted.json_schema.schema)


def _vllm(wanted: StructuredOutputsBody) -> StructuredOutputsParams:
    refuse_fields(wanted, _UNSUPPORTED, prefix="structured_outputs.")
    return StructuredOutputsParams(
        json=wanted.json,
        json_object=wanted.json_object is True,
        regex=wanted.regex,
        choice=tuple(wanted.choice or ()),
        grammar=wanted.grammar,
    )


# Each is called with what its field holds, which isn't null.
_READERS: dict[str, Callable[[Any], StructuredOutputsParams | None]] = {
    "response_format": _response_format,
    "structured_outputs": _vllm,
    "guided_json": lambda schema: StructuredOutputsParams(json=schema),
    "guided_regex": lambda regex: StructuredOutputsParams(regex=regex),
    "guided_choice": lambda texts: StructuredOutputsParams(choice=tuple(texts)),
    "guided_grammar": lambda grammar: StructuredOutputsParams(grammar=grammar),
}
