"""What bytes each token stands for, read off the decoder that `tokenizer.json` declares.

All supported models write text as a stream of UTF-8 bytes in one of three ways: byte-level BPE
(GPT-2's alphabet of 256 printable characters), SentencePiece (`▁` for a space, `<0xE9>` for a
byte without a token) or WordPiece (a space before each token but one that begins with `##`). With
bytes per token, decoding is concatenation and costs O(new tokens).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from protocol.errors import StartupError

# What WordPiece's "cleanup" amounts to for tokens, among which punctuation stands alone.
_NO_SPACE_BEFORE = [(f" {mark}", mark) for mark in ".?!,"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """How a token's text becomes bytes.

    `strips_first_space`: one space at the very start of a text isn't part of it (SentencePiece
    puts it there when it encodes, WordPiece when it decodes). `word_part`, if any, begins a token
    that goes on with a word.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strips_first_space: bool = False
    word_part: str | None = None


def decoder_rules(decoder: Mapping[str, Any] | None) -> DecoderRules:
    """The rules in `tokenizer.json`'s "decoder"; StartupError if there's one we don't know."""
    byte_level = byte_fallback = strips_first_space = False
    replacements: list[tuple[str, str]] = []
    word_part: str | None = None
    for part in _flatten(decoder):
        match part:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips_first_space = True
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                strips_first_space = True
            case {"type": "WordPiece", "prefix": str(prefix)}:
                word_part, strips_first_space = prefix, True
                if part.get("cleanup"):
                    replacements += _NO_SPACE_BEFORE
            case _:
                raise StartupError(f"tokenizer.json declares an unsupported decoder: {part}.")
    return DecoderRules(
        byte_level, byte_fallback, tuple(replacements), strips_first_space, word_part
    )


def _flatten(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    match decoder:
        case None:
            raise StartupError("tokenizer.json declares no decoder.")
        case {"type": "Sequence", "decoders": list(parts)}:
            for part in parts:
                yield from _flatten(part)
        case _:
            yield decoder


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping: printable Latin-1 characters stand for themselves, others are moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    alphabet = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(moved)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


class TokenPieces:
    """Token id → bytes, made when first asked for. Ids without a token stand for nothing."""

    def __init__(self, backend: Backend, rules: DecoderRules) -> None:
        self._backend = backend
        self._rules = rules
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._pieces: dict[int, bytes] = {}

    def piece(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make(token_id)
        return piece

    def join(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes that `token_ids` stand for, one after another."""
        piece = self.piece
        if skip_special_tokens:
            special = self.special_ids
            return b"".join([piece(i) for i in token_ids if i not in special])
        return b"".join([piece(i) for i in token_ids])

    def _make(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        rules = self._rules
        if rules.word_part is not None:
            begins_word = not token.startswith(rules.word_part)
            token = f" {token}" if begins_word else token.removeprefix(rules.word_part)
        for old, new in rules.replacements:
            token = token.replace(old, new)
        if rules.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if rules.byte_level and all(char in _BYTE_OF for char in token):
            return bytes([_BYTE_OF[char] for char in token])
        return token.encode()
