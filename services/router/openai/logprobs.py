"""Log probabilities in the two forms that OpenAI's API has."""

from collections.abc import Sequence
from typing import Any

from engine.tokenizer import Tokenizer
from protocol.request import TokenLogprobs

# JSON has no infinity; vLLM writes this for a token that can't be.
_LEAST_LOGPROB = -9999.0


class TokenNames:
    """How tokens are written in an answer: as text, or as `token_id:7` where asked for."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def described(self, token_id: int, logprob: float) -> dict[str, Any]:
        """With the token's own bytes, which may be part of a character only."""
        return {
            "token": self.name(token_id),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """The chat form: one entry a token, with its alternatives inside."""
    content: list[dict[str, Any]] = []
    for token_id, chosen in zip(token_ids, logprobs, strict=True):
        top = [
            names.described(top_id, value)
            for top_id, value in zip(chosen.top_token_ids, chosen.top_logprobs, strict=True)
        ]
        content.append(names.described(token_id, chosen.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def named_prompt_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token the likeliest in its place and itself, by token id.

    Nothing tells how likely the first one was.
    """
    entries: list[dict[str, Any] | None] = [None]
    for token_id, known in zip(token_ids[1:], logprobs, strict=True):
        entry = {
            str(top_id): _prompt_entry(names, top_id, value, rank)
            for rank, (top_id, value) in enumerate(
                zip(known.top_token_ids, known.top_logprobs, strict=True), start=1
            )
        }
        entry[str(token_id)] = _prompt_entry(names, token_id, known.logprob, known.rank)
        entries.append(entry)
    return entries


def _prompt_entry(names: TokenNames, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {
        "logprob": max(logprob, _LEAST_LOGPROB),
        "rank": rank,
        "decoded_token": names.name(token_id),
    }


def completion_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    first_offset: int,
) -> tuple[dict[str, Any], int]:
    """The older form: parallel lists; the chosen token is among its alternatives. Of a token
    without logprobs both are null.

    Offsets count characters of the tokens' texts from `first_offset` on; the second result is
    the offset of the token that comes next.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    offset = first_offset
    for token_id, chosen in zip(token_ids, logprobs, strict=True):
        name = names.name(token_id)
        tokens.append(name)
        offsets.append(offset)
        offset += len(name)
        if chosen is None:
            values.append(None)
            tops.append(None)
            continue
        logprob = max(chosen.logprob, _LEAST_LOGPROB)
        top = {
            names.name(top_id): max(value, _LEAST_LOGPROB)
            for top_id, value in zip(chosen.top_token_ids, chosen.top_logprobs, strict=True)
        }
        top.setdefault(name, logprob)
        values.append(logprob)
        tops.append(top)
    entry = {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": tokens,
        "top_logprobs": tops,
    }
    return entry, offset
