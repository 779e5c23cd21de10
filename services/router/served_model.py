"""The one model that a router serves: its names, its tokenizer, its limits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from engine.grammar import GrammarChecker, make_checker
from engine.models.config import ModelConfig, read_model_config
from engine.models.encoder_config import EncoderConfig, is_encoder, read_encoder_config
from engine.tokenizer import Tokenizer
from engine.weights.generation_defaults import read_generation_defaults
from engine.weights.pooling_config import read_encoder_pooling_type, read_pooling_type
from protocol.errors import ModelNotFoundError, StartupError
from protocol.pooling import PoolingType
from services.router.openai.sampling import SamplingLimits


class ServedModel:
    """Read from a model directory; what workers say about the model's limits wins over it."""

    def __init__(
        self,
        names: tuple[str, ...],
        tokenizer: Tokenizer,
        config: ModelConfig | EncoderConfig,
        limits: SamplingLimits,
        grammars: GrammarChecker,
        pooling_type: PoolingType,
    ) -> None:
        assert names, "a model has a name"
        self.names = names
        self.tokenizer = tokenizer
        self.config = config
        self.limits = limits
        self.grammars = grammars
        self.pooling_type: PoolingType = pooling_type
        self.created = int(time.time())

    @classmethod
    def from_dir(
        cls,
        path: Path,
        *,
        names: tuple[str, ...],
        chat_template: Path | None = None,
        guided_decoding_backend: str = "auto",
    ) -> "ServedModel":
        """Raises StartupError if the directory lacks or garbles something."""
        if is_encoder(path):
            config, pooling_type = read_encoder_config(path), read_encoder_pooling_type(path)
            # It generates nothing, and needs no process to try grammars in.
            eos_token_ids, guided_decoding_backend = (), "auto"
        else:
            config, pooling_type = read_model_config(path), read_pooling_type(path)
            eos_token_ids = config.eos_token_ids
        tokenizer = Tokenizer.from_dir(path, chat_template=chat_template)
        limits = SamplingLimits(
            max_model_len=config.max_model_len,
            # A tokenizer can know more ids than the model has embeddings for, or fewer.
            vocab_size=config.vocab_size,
            defaults=read_generation_defaults(path),
        )
        grammars = make_checker(
            guided_decoding_backend,
            path / "tokenizer.json",
            vocab_size=config.vocab_size,
            eos_token_ids=eos_token_ids,
        )
        return cls(names, tokenizer, config, limits, grammars, pooling_type)

    @property
    def only_embeds(self) -> bool:
        """Whether it's an encoder, which generates nothing."""
        return isinstance(self.config, EncoderConfig)

    def pooling_for(self, setting: PoolingType | Literal["auto"]) -> PoolingType:
        """What `--pooling-type` comes to. Raises StartupError for one that makes no sense."""
        if setting == "cls" and not self.only_embeds:
            raise StartupError(
                "--pooling-type cls is for encoders: a decoder's first token has seen nothing else."
            )
        return self.pooling_type if setting == "auto" else setting

    def adopt_worker(self, *, fingerprint: str, max_model_len: int) -> None:
        """The workers were started with these, whatever our copy of the directory says."""
        self.config = replace(self.config, fingerprint=fingerprint)
        self.limits = replace(self.limits, max_model_len=max_model_len)

    def check_name(self, name: str | None) -> str:
        """The name to answer with. Raises ModelNotFoundError for another model's."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ModelNotFoundError(name)
        return name
