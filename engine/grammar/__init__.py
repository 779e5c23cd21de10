"""Structured outputs: which tokens may come next."""

from engine.grammar.backends import BACKEND_NAMES as BACKEND_NAMES
from engine.grammar.backends import make_compiler as make_compiler
from engine.grammar.compiler import GrammarCompiler as GrammarCompiler
from engine.grammar.interface import GrammarMatcher as GrammarMatcher
