"""Text to tokens and back: `Tokenizer`, chat templates, incremental detokenizing, stop strings."""

from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.detokenizer import IncrementalDetokenizer
from engine.tokenizer.stop import StopMatcher
from engine.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopMatcher", "Tokenizer"]
