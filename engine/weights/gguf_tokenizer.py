"""Builds tokenizer.json from the vocabulary and merges in a GGUF file's metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from protocol.errors import StartupError

_CONTROL, _USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(words: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How a byte-level BPE cuts text into words, by GGUF's name for it (`tokenizer.ggml.pre`).
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_WORDS_LLAMA3),
    "qwen2": lambda: _split(_WORDS_QWEN2),
}


def write_tokenizer(metadata: Mapping[str, Any], target: Path) -> None:
    """tokenizer.json and tokenizer_config.json; raises StartupError for an unknown kind."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    match metadata["tokenizer.ggml.model"]:
        case "gpt2":
            tokenizer = _byte_level_bpe(metadata, tokens)
        case "llama":
            tokenizer = _sentencepiece_bpe(metadata, tokens)
        case kind:
            raise StartupError(
                f"The GGUF file's tokenizer is of kind {kind!r}; importable are byte-level and "
                "SentencePiece BPE."
            )
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in typed if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED]
    )
    if _adds_bos(metadata):
        bos_id: int = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(target / "tokenizer.json"))
    config = _tokenizer_config(metadata, tokens)
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt starts with the BOS token; files that don't say mean their kind's habit."""
    habit = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return metadata.get("tokenizer.ggml.add_bos_token", habit)


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise StartupError(
            f"The GGUF file cuts words as {pre!r} does; known are {', '.join(_PRE_TOKENIZERS)}."
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges_by_score(vocabulary, metadata["tokenizer.ggml.scores"])
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    undo: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; BPE wants that as a list.

    Every way to cut a piece into two known ones is a merge, as good as the piece's score.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
    }
    for role, gguf_role in _ROLES.items():
        index = metadata.get(f"tokenizer.ggml.{gguf_role}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config
