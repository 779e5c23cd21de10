"""How long a text may be, and what is left of it where it's to be cut."""

from typing import Protocol

from protocol.errors import ContextLengthError, InvalidRequestError
from protocol.sampling import SamplingParams
from services.router.embeddings.bodies import Texts
from services.router.openai.bodies import Side
from services.router.openai.prompts import Prompt, PromptEncoder, truncated
from services.router.openai.sampling import bounded_max_tokens
from services.router.served_model import ServedModel

# Prefill samples a token whether anybody wants it or not.
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class TextLengths(Protocol):
    """One kind of model's rules. A text is cut on this `side`."""

    side: Side

    def shortened(self, texts: Texts, num_tokens: int | None) -> Texts:
        """`texts` without what is cut anyway, `num_tokens` meaning what it does to `fit`."""
        ...

    def fit(self, prompt: Prompt, num_tokens: int | None, *, field: str) -> Prompt:
        """`prompt`, or `num_tokens` of it (-1: as many as the model takes) where it has more.

        Raises InvalidRequestError for a number that makes no sense, and ContextLengthError under
        the name `field` for a text that's too long.
        """
        ...


class DecoderLengths:
    """A prompt keeps its end, as vLLM's does, and leaves room for a token."""

    side: Side = "left"

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def shortened(self, texts: Texts, num_tokens: int | None) -> Texts:  # noqa: ARG002
        return texts

    def fit(self, prompt: Prompt, num_tokens: int | None, *, field: str) -> Prompt:
        limits = self._model.limits
        cut = truncated(prompt, num_tokens, ONE_TOKEN, limits)
        bounded_max_tokens(ONE_TOKEN, len(cut.token_ids), limits, prompt_field=field)
        return cut


class EncoderLengths:
    """A text keeps its beginning, and the special token behind it: what the tokenizers of encoders
    do where they cut."""

    side: Side = "right"

    def __init__(self, model: ServedModel, encoder: PromptEncoder) -> None:
        self._model = model
        self._encoder = encoder
        self._last = model.tokenizer.encode("")[-1:]

    def shortened(self, texts: Texts, num_tokens: int | None) -> Texts:
        if num_tokens is None:
            return texts
        max_chars = self._encoder.max_chars
        if isinstance(texts, str):
            return texts[:max_chars]
        return [text[:max_chars] if isinstance(text, str) else text for text in texts]

    def fit(self, prompt: Prompt, num_tokens: int | None, *, field: str) -> Prompt:
        max_len = self._model.limits.max_model_len
        if num_tokens == -1:
            num_tokens = max_len
        if num_tokens is not None and not 1 <= num_tokens <= max_len:
            raise InvalidRequestError(
                f"`truncate_prompt_tokens` must be -1 or between 1 and {max_len}, "
                f"got {num_tokens}.",
                field="truncate_prompt_tokens",
            )
        token_ids = prompt.token_ids
        if num_tokens is not None and len(token_ids) > num_tokens:
            last = self._last if token_ids[-1:] == self._last else []
            return Prompt(None, [*token_ids[: num_tokens - len(last)], *last])
        if len(token_ids) > max_len:
            raise ContextLengthError(
                f"This model takes texts of up to {max_len} tokens; one in `{field}` has "
                f"{len(token_ids)}. `truncate_prompt_tokens` can cut it.",
                field=field,
            )
        return prompt
