"""Request bodies of the API's side that answers with vectors, or with what they have in common."""

from typing import Literal

import msgspec

from services.router.openai.bodies import Side

Texts = str | list[str | int | list[int]]


class PoolingBody(msgspec.Struct, kw_only=True):
    """What all of them have: how texts become tokens, and when it's their turn."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    user: str | None = None


class EmbeddingBody(PoolingBody, kw_only=True):
    """`input` is a text, several, token ids, or several lists of them; vLLM's `normalize` may
    leave the vectors' lengths as they are."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None


class ScoreBody(PoolingBody, kw_only=True):
    """One text against each of several, or pair by pair: under one of four pairs of names."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class RerankDocument(msgspec.Struct, kw_only=True):
    text: str


class RerankBody(PoolingBody, kw_only=True):
    """Jina's and Cohere's: which documents fit the query best. vLLM's `top_n` of 0 is all."""

    query: str
    documents: list[str | RerankDocument]
    top_n: int | None = None
    return_documents: bool | None = None
