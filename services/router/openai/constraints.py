"""Token-level limits on an output: the tokens that may come, and the words that may not."""

from typing import Any

from engine.tokenizer import Tokenizer
from engine.tokenizer.bad_words import bad_word_token_ids
from protocol.errors import InvalidRequestError
from services.router.openai.bodies import SamplingBody
from services.router.openai.sampling import SamplingLimits, check_token_ids


def token_constraints(
    body: SamplingBody, limits: SamplingLimits, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Fields of `SamplingParams`, those that the body asks for.

    Raises InvalidRequestError that names the client's field.
    """
    fields: dict[str, Any] = {}
    if body.allowed_token_ids is not None:
        if not body.allowed_token_ids:
            raise InvalidRequestError(
                "`allowed_token_ids` must hold at least one token id.", field="allowed_token_ids"
            )
        check_token_ids(body.allowed_token_ids, limits.vocab_size, field="allowed_token_ids")
        fields["allowed_token_ids"] = tuple(sorted(set(body.allowed_token_ids)))
    if body.bad_words:
        fields["bad_words_token_ids"] = bad_word_token_ids(body.bad_words, tokenizer)
    return fields
