"""A model directory's tokenizer and chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.pieces import TokenPieces, decoder_rules
from engine.tokenizer.turns import TurnEncoder
from protocol.errors import InvalidRequestError, StartupError


class Tokenizer:
    """Encodes and decodes text; safe to use from several threads.

    `num_ids` is one more than the largest token id. Made by `from_dir`.
    """

    def __init__(
        self,
        backend: Backend,
        chat_template: ChatTemplate | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        rules = decoder_rules(json.loads(backend.to_str())["decoder"])
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self._turns = TurnEncoder(backend)
        self.pieces = TokenPieces(backend, rules)
        self.strips_first_space = rules.strips_first_space
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.num_ids = max(vocabulary.values(), default=-1) + 1
        # A text of n characters has at least n / max_token_chars tokens.
        self.max_token_chars = max(map(len, vocabulary), default=1)

    @classmethod
    def from_dir(cls, path: Path, *, chat_template: Path | None = None) -> Self:
        """Reads `tokenizer.json` and, if there, the chat template of a HF model directory.

        `chat_template` is a Jinja file that replaces the model's own.
        Raises StartupError if a file is missing or unreadable.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"The model directory {path} has no tokenizer.json.")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:
            raise StartupError(f"{file} can't be read: {error}.") from error
        source = _template_source(path, chat_template)
        special_tokens = _special_tokens(path)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(backend, template, special_tokens=special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around a text."""
        if not add_special_tokens:
            return self._turns.encode(text)
        # As in turns: no offsets are computed, and other Python threads run meanwhile.
        return self._backend.encode_batch_fast([text])[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, as a text that stands alone; broken UTF-8 becomes U+FFFD."""
        data = self.pieces.join(token_ids, skip_special_tokens=skip_special_tokens)
        if self.strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text; part of a character, possibly."""
        return self.pieces.piece(token_id)

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, None if the id has no token."""
        return self._backend.id_to_token(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: ChatTemplate | None = None,
        **options: Any,  # noqa: ANN401
    ) -> str:
        """The prompt's text, by `template` or the model's own; options as of
        `ChatTemplate.render`.

        Raises InvalidRequestError if there is no chat template or it refuses.
        """
        template = template or self.chat_template
        if template is None:
            raise InvalidRequestError(
                "This model has no chat template; use completions instead.", field="messages"
            )
        return template.render(messages, **options)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        **options: Any,  # noqa: ANN401
    ) -> list[int]:
        """The prompt's token ids; the template writes the special tokens, so none are added."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


def _template_source(path: Path, override: Path | None) -> str | None:
    for file in (override, path / "chat_template.jinja"):
        if file is not None and file.is_file():
            return file.read_text()
    if override is not None:
        raise StartupError(f"There is no chat template {override}.")
    source = _read_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        return named.get("default")
    return source


def _special_tokens(path: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` … by name, from both files that may declare them."""
    declared = _read_json(path / "special_tokens_map.json")
    declared |= _read_json(path / "tokenizer_config.json")
    tokens: dict[str, str] = {}
    for name, value in declared.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StartupError(f"{path} isn't valid JSON: {error}.") from error
