"""What `LLM` takes as prompts; vLLM's names."""

from collections.abc import Sequence
from typing import TypeAlias, TypedDict, cast

from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError


class TextPrompt(TypedDict):
    """A prompt that is text, as a dict."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt that is tokens already."""

    prompt_token_ids: list[int]


Prompt: TypeAlias = str | list[int] | TextPrompt | TokensPrompt


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str | dict):
        return [cast("Prompt", prompts)]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("list[int]", list(prompts))]
    return cast("list[Prompt]", list(prompts))


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer, *, vocab_size: int
) -> tuple[str | None, list[int]]:
    """Text, if there is one, and tokens. Raises InvalidRequestError for ids the model lacks."""
    if isinstance(prompt, str):
        text, token_ids = prompt, tokenizer.encode(prompt)
    elif isinstance(prompt, list):
        text, token_ids = None, list(prompt)
    elif "prompt_token_ids" in prompt:
        text, token_ids = None, list(prompt["prompt_token_ids"])
    elif "prompt" in prompt:
        text, token_ids = prompt["prompt"], tokenizer.encode(prompt["prompt"])
    else:
        raise InvalidRequestError(
            "A prompt that is a dict needs `prompt` or `prompt_token_ids`.", field="prompt"
        )
    # Some tokenizers have marks that their model was never given embeddings for.
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequestError(
            f"Token ids must be between 0 and {vocab_size - 1}.", field="prompt"
        )
    return text, token_ids
