"""Small encoders with random weights, and transformers' answers for them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Large enough that wrong positions or masks show.
    "initializer_range": 0.3,
}
WORDS = ["the", "cat", "sat", "mat", "dog", "un", "##believ", "##able", ".", ","]


def write_encoder(path: Path, kind: str, **options: Any) -> transformers.PreTrainedModel:
    """A Hugging Face directory with WordPiece's tokenizer; `kind` is transformers' class."""
    torch.manual_seed(5)
    family = kind.removesuffix("ForMaskedLM").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(path)
    write_word_pieces(path)
    return model


def write_word_pieces(path: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(special)
    # As published tokenizers have it, left over from their training.
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(path / "tokenizer.json"))


def write_pooling(path: Path, **modes: bool) -> None:
    """sentence-transformers' files."""
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        )
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling/config.json").write_text(json.dumps(modes))


def reference_states(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[num_tokens, hidden_size] of one text alone."""
    body = getattr(model, model.base_model_prefix, model)
    with torch.inference_mode():
        return body(torch.tensor([token_ids])).last_hidden_state[0]
