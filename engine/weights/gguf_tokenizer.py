"""Builds tokenizer.json from the vocabulary and merges in a GGUF file's metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from protocol.errors import StartupError

_CONTROL, _USER_DEFINED = 3, 4
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
    kind = metadata["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise StartupError(
            f"The GGUF file's tokenizer is of kind {kind!r}; only byte-level BPE can be imported."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = _byte_level_bpe(metadata, tokens)
    for index, token_type in enumerate(metadata["tokenizer.ggml.token_type"]):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(tokens[index], special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(tokens[index], normalized=False)])
    tokenizer.save(str(target / "tokenizer.json"))
    config = _tokenizer_config(metadata, tokens)
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise StartupError(
            f"The GGUF file cuts words as {pre!r} does; known are {', '.join(_PRE_TOKENIZERS)}."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
    }
    for role, gguf_role in _ROLES.items():
        index = metadata.get(f"tokenizer.ggml.{gguf_role}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config
