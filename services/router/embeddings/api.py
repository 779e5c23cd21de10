"""/v1/embeddings, /v1/score and /v1/rerank: prompts are computed, nothing is generated.

Scores are cosines of two texts' vectors, so they mean something for a model that was trained for
embeddings, and little for another.
"""

import base64
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, TypeAlias, cast

from fastapi import Request, Response

from protocol.errors import InvalidRequestError
from protocol.pooling import PoolingParams, PoolingType
from services.router.dispatch.choice import Delta
from services.router.dispatch.generation import Generation, GenerationSpec, Output
from services.router.embeddings.bodies import (
    EmbeddingBody,
    PoolingBody,
    RerankBody,
    RerankDocument,
    ScoreBody,
    Texts,
)
from services.router.embeddings.lengths import (
    ONE_TOKEN,
    DecoderLengths,
    EncoderLengths,
    TextLengths,
)
from services.router.http.body import BodyReader
from services.router.openai.answers import AnswerHead, encode_json
from services.router.openai.api import OpenAIApi
from services.router.openai.chat_fields import required
from services.router.openai.prompts import MAX_PROMPTS, Prompt, PromptEncoder
from services.router.openai.sampling import check_priority
from services.router.openai.unsupported import unsupported
from services.router.served_model import ServedModel

# In quotes: Python 3.11 has no array[float] at run time.
Vectors: TypeAlias = "list[array[float]]"
MakeAnswer = Callable[[Vectors, dict[str, int]], dict[str, Any]]


class EmbeddingsApi:
    """Validates bodies, has prompts pooled, answers. Errors are TandemErrors."""

    def __init__(
        self,
        openai: OpenAIApi,
        *,
        model: ServedModel,
        encoder: PromptEncoder,
        pooling_type: PoolingType,
        max_body_bytes: int,
    ) -> None:
        """`openai` sends what is to be computed on its way."""
        self._openai = openai
        self._model = model
        self._encoder = encoder
        self._pooling_type: PoolingType = pooling_type
        self._lengths: TextLengths = (
            EncoderLengths(model, encoder) if model.only_embeds else DecoderLengths(model)
        )
        self._embedding_bodies = BodyReader(EmbeddingBody, max_bytes=max_body_bytes)
        self._score_bodies = BodyReader(ScoreBody, max_bytes=max_body_bytes)
        self._rerank_bodies = BodyReader(RerankBody, max_bytes=max_body_bytes)

    async def embeddings(self, request: Request) -> Response:
        body = await self._embedding_bodies.read(request)
        head = self._head(body, "embd")
        params = PoolingParams(
            type=self._pooling_type,
            normalize=body.normalize is not False,
            dimensions=body.dimensions,
        )
        params.validate(self._model.config.hidden_size, is_encoder=self._model.only_embeds)

        def answer(vectors: Vectors, usage: dict[str, int]) -> dict[str, Any]:
            written = [_written(vector, body.encoding_format) for vector in vectors]
            return {
                "id": head.id,
                "object": "list",
                "created": head.created,
                "model": head.model,
                "data": [
                    {"object": "embedding", "index": i, "embedding": embedding}
                    for i, embedding in enumerate(written)
                ],
                "usage": usage,
            }

        texts = [_Texts("input", body.input)]
        return await self._pooled(request, body, head, texts, params, answer)

    async def score(self, request: Request) -> Response:
        body = await self._score_bodies.read(request)
        head = self._head(body, "score")
        ours_name, theirs_name = _score_fields(body)
        first, second = _listed(body, ours_name), _listed(body, theirs_name)
        if len(first) not in (1, len(second)):
            raise InvalidRequestError(
                f"`{ours_name}` must be one text, or as many as `{theirs_name}` has "
                f"({len(second)}), got {len(first)}.",
                field=ours_name,
            )

        def answer(vectors: Vectors, usage: dict[str, int]) -> dict[str, Any]:
            ours, theirs = vectors[: len(first)], vectors[len(first) :]
            if len(ours) == 1:
                ours *= len(theirs)
            return {
                "id": head.id,
                "object": "list",
                "created": head.created,
                "model": head.model,
                "data": [
                    {"index": i, "object": "score", "score": _cosine(*pair)}
                    for i, pair in enumerate(zip(ours, theirs, strict=True))
                ],
                "usage": usage,
            }

        texts = [_Texts(ours_name, [*first]), _Texts(theirs_name, [*second])]
        return await self._pooled(request, body, head, texts, self._plain(), answer)

    async def rerank(self, request: Request) -> Response:
        body = await self._rerank_bodies.read(request)
        head = self._head(body, "rerank")
        documents = [
            document.text if isinstance(document, RerankDocument) else document
            for document in body.documents
        ]
        if body.top_n is not None and body.top_n < 0:
            raise InvalidRequestError(
                f"`top_n` must be at least 0, got {body.top_n}.", field="top_n"
            )

        def answer(vectors: Vectors, usage: dict[str, int]) -> dict[str, Any]:
            query, *others = vectors
            scores = [(_cosine(query, other), i) for i, other in enumerate(others)]
            scores.sort(key=lambda pair: (-pair[0], pair[1]))
            results: list[dict[str, Any]] = []
            for score, i in scores[: body.top_n or None]:
                result: dict[str, Any] = {"index": i, "relevance_score": score}
                if body.return_documents is not False:
                    result["document"] = {"text": documents[i]}
                results.append(result)
            return {"id": head.id, "model": head.model, "usage": usage, "results": results}

        texts = [_Texts("query", [body.query]), _Texts("documents", [*documents])]
        return await self._pooled(request, body, head, texts, self._plain(), answer)

    async def _pooled(
        self,
        request: Request,
        body: PoolingBody,
        head: AnswerHead,
        texts: "Sequence[_Texts]",
        params: PoolingParams,
        make_answer: MakeAnswer,
    ) -> Response:
        """`make_answer` gets all texts' vectors, in order."""
        check_priority(body.priority)
        side = self._lengths.side
        if body.truncation_side not in (None, side):
            raise unsupported(
                "truncation_side", f"A `truncation_side` other than {side!r}, for this model,"
            )
        add_special_tokens = body.add_special_tokens is not False
        prompts: list[Prompt] = []
        for group in texts:
            encoded = await self._encoder.prompts(
                self._lengths.shortened(group.texts, body.truncate_prompt_tokens),
                field=group.field,
                add_special_tokens=add_special_tokens,
            )
            prompts += [
                self._lengths.fit(prompt, body.truncate_prompt_tokens, field=group.field)
                for prompt in encoded
            ]
        if len(prompts) > MAX_PROMPTS:
            raise InvalidRequestError(
                f"A request may have at most {MAX_PROMPTS} texts, got {len(prompts)}.",
                field=texts[-1].field,
            )
        spec = GenerationSpec(
            prompts,
            [1] * len(prompts),
            ONE_TOKEN,
            priority=body.priority or 0,
            pooling=params,
            is_prompt_only=True,
        )
        return await self._openai.answer(request, spec, head, _VectorAnswers(make_answer))

    def _plain(self) -> PoolingParams:
        return PoolingParams(type=self._pooling_type)

    def _head(self, body: PoolingBody, prefix: str) -> AnswerHead:
        """Raises ModelNotFoundError."""
        model = self._model.check_name(body.model)
        return AnswerHead(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Those of one field of a body."""

    field: str
    texts: Texts


class _VectorAnswers:
    """An `AnswerFormat` that is never a stream."""

    def __init__(self, make_answer: MakeAnswer) -> None:
        self._make_answer = make_answer

    async def whole(self, generation: Generation) -> bytes:
        vectors: Vectors = []
        for output in generation.outputs:
            assert output.pooled is not None, "the worker was asked for it"
            vectors.append(array("f", output.pooled))
        num_tokens = generation.num_prompt_tokens
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return encode_json(self._make_answer(vectors, usage))

    def chunk(self, output: Output, delta: Delta) -> bytes:  # noqa: ARG002
        raise AssertionError("vectors aren't streamed")

    async def end(self, generation: Generation) -> bytes:  # noqa: ARG002
        raise AssertionError("vectors aren't streamed")


# What vLLM calls one side and the other, the oldest first.
_SCORE_FIELDS = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)


def _score_fields(body: ScoreBody) -> tuple[str, str]:
    """The names that a body has both of; else, for the error, those that it has one of."""
    given = [sum(getattr(body, name) is not None for name in pair) for pair in _SCORE_FIELDS]
    return _SCORE_FIELDS[given.index(max(given))]


def _listed(body: ScoreBody, field: str) -> list[str]:
    texts = cast("str | list[str]", required(getattr(body, field), field))
    if texts == []:
        raise InvalidRequestError(f"`{field}` must not be an empty list.", field=field)
    return [texts] if isinstance(texts, str) else texts


def _written(vector: "array[float]", encoding_format: str | None) -> str | list[float]:
    if encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    return vector.tolist()


def _cosine(first: "array[float]", second: "array[float]") -> float:
    """Both have length 1."""
    return sum(map(mul, first, second))
