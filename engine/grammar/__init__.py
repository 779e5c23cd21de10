"""Structured outputs: which tokens may come next."""

from engine.grammar.backends import BACKEND_NAMES as BACKEND_NAMES
from engine.grammar.backends import backend_name as backend_name
from engine.grammar.backends import make_checker as make_checker
from engine.grammar.backends import make_compiler as make_compiler
from engine.grammar.compiler import GrammarCompiler as GrammarCompiler
from engine.grammar.interface import GrammarChecker as GrammarChecker
from engine.grammar.interface import GrammarMatcher as GrammarMatcher
from engine.grammar.interface import check_grammar as check_grammar
