"""What a model that only embeds says to whoever wants text of it."""

from fastapi import Request, Response

from protocol.errors import InvalidRequestError


async def refuse_generation(request: Request) -> Response:
    """Raises InvalidRequestError."""
    raise InvalidRequestError(
        f"This server's model only embeds texts, so there is no {request.url.path}; it answers "
        "/v1/embeddings, /v1/score and /v1/rerank.",
        field="model",
        code="unsupported_by_model",
    )
