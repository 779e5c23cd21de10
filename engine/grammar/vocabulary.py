"""A model's tokens as grammars see them: bytes that they write."""

from pathlib import Path

from tokenizers import Tokenizer as Backend

from engine.tokenizer.tokenizer import Tokenizer


def read_vocabulary(tokenizer_file: Path, *, vocab_size: int) -> list[bytes]:
    """What each token writes: nothing, if it's special or there is none with that id."""
    pieces = Tokenizer(Backend.from_file(str(tokenizer_file))).pieces
    special = pieces.special_ids
    return [b"" if i in special else pieces.piece(i) for i in range(vocab_size)]


def without_control_characters(vocabulary: list[bytes]) -> list[bytes]:
    """Tokens with a control character in them write nothing here: none may be in JSON's strings,
    and JSON on one line has them nowhere else."""
    return [b"" if any(byte < 0x20 for byte in text) else text for text in vocabulary]
