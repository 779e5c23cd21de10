"""The endpoints around generation: models, tokenizer, health, load, metrics."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from fastapi import Request, Response

from protocol.errors import InvalidRequestError, ServiceUnavailableError
from services.router.http.body import BodyReader
from services.router.openai.answers import encode_json
from services.router.openai.bodies import DetokenizeBody, TokenizeBody
from services.router.openai.prompts import PromptEncoder
from services.router.openai.sampling import check_token_ids
from services.router.openai.tool_choice import check_tools, tool_definitions
from services.router.served_model import ServedModel


def _version() -> str:
    try:
        return version("tandem")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was never installed


VERSION = _version()


class ClusterStatus(Protocol):
    """What the router knows of its workers."""

    def describe(self) -> list[dict[str, Any]]:
        """One entry for each worker."""
        ...


class StatusApi:
    """Answers without generating."""

    def __init__(
        self,
        *,
        model: ServedModel,
        encoder: PromptEncoder,
        cluster: ClusterStatus,
        settings: Callable[[], dict[str, Any]],
        render_metrics: Callable[[], tuple[bytes, str]],
        unready_reason: Callable[[], str | None],
        max_body_bytes: int,
    ) -> None:
        """`settings` are shown to clients; `render_metrics` gives text and content type;
        `unready_reason` is why a request would not be served now, None if it would."""
        self._model = model
        self._encoder = encoder
        self._cluster = cluster
        self._settings = settings
        self._render_metrics = render_metrics
        self._unready_reason = unready_reason
        self._tokenize_bodies = BodyReader(TokenizeBody, max_bytes=max_body_bytes)
        self._detokenize_bodies = BodyReader(DetokenizeBody, max_bytes=max_body_bytes)

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self._model.names]})

    async def one_model(self, name: str) -> Response:
        return _json(self._card(self._model.check_name(name)))

    async def tokenize(self, request: Request) -> Response:
        body = await self._tokenize_bodies.read(request)
        self._model.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("Give either `prompt` or `messages`.", field="prompt")
        if body.messages is not None:
            tools = body.tools or None
            if tools is not None:
                check_tools(tools)
            definitions = None if tools is None else tool_definitions(tools)
            prompt = await self._encoder.chat_prompt(body.messages, body, tools=definitions)
        else:
            prompt = await self._encoder.text_prompt(
                body.prompt or "",
                field="prompt",
                add_special_tokens=body.add_special_tokens is not False,
            )
        answer: dict[str, Any] = {
            "count": len(prompt.token_ids),
            "max_model_len": self._model.limits.max_model_len,
            "tokens": prompt.token_ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            name = self._model.tokenizer.token_name
            answer["token_strs"] = [name(token_id) for token_id in prompt.token_ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = await self._detokenize_bodies.read(request)
        self._model.check_name(body.model)
        check_token_ids(body.tokens, self._model.limits.vocab_size, field="tokens")
        text = self._model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    async def health(self) -> Response:
        """Empty and 200 if a request would be served."""
        reason = self._unready_reason()
        if reason is not None:
            raise ServiceUnavailableError(reason)
        return Response()

    async def version(self) -> Response:
        return _json({"version": VERSION})

    async def load_config(self) -> Response:
        """How this server is set up, for whoever tunes or monitors it."""
        return _json(
            {
                "model": self._model.names[0],
                "max_model_len": self._model.limits.max_model_len,
                "settings": self._settings(),
                "workers": self._cluster.describe(),
            }
        )

    async def metrics(self) -> Response:
        text, content_type = self._render_metrics()
        return Response(text, media_type=content_type)

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "tandem",
            "root": self._model.names[0],
            "parent": None,
            "max_model_len": self._model.limits.max_model_len,
        }


def _json(content: dict[str, Any]) -> Response:
    return Response(encode_json(content), media_type="application/json")
