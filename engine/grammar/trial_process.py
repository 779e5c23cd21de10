"""The other side of trial.py: `python -m engine.grammar.trial_process SETTINGS`.

Reads grammars from its standard input, one after another, and answers each with its error.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import msgspec

from engine.grammar.backends import make_compiler
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.trial import TrialSettings, read_message, write_message
from protocol.structured_outputs import StructuredOutputsParams

# What every kind of grammar needs is read before the first fork.
_FIRST = (StructuredOutputsParams(regex="a"), StructuredOutputsParams(json={"type": "null"}))


def main(settings: TrialSettings) -> None:
    questions, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what libraries print isn't an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our parent ends us
    compiler = make_compiler(
        settings.backend,
        Path(settings.tokenizer_file),
        vocab_size=settings.vocab_size,
        eos_token_ids=settings.eos_token_ids,
    )
    for params in _FIRST:
        compiler.error_of(params)
    while True:
        try:
            key = read_message(questions)
        except EOFError:
            return
        write_message(answers, _try(compiler, key, settings).encode())


def _try(compiler: GrammarCompiler, key: bytes, settings: TrialSettings) -> str:
    """The error, as the fork found it or as it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _limit(settings)
        params = msgspec.json.decode(key, type=StructuredOutputsParams)
        write_message(writing, compiler.error_of(params).encode())
        os._exit(0)
    os.close(writing)
    try:
        return read_message(reading).decode()
    except EOFError:
        pass
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes more than the {settings.cpu_limit_s:g} s allowed to compile"
    megabytes = settings.memory_limit_bytes >> 20
    return f"it takes more than the {megabytes} MiB of memory allowed to compile"


def _limit(settings: TrialSettings) -> None:
    """Processor time, so that a busy machine refuses no other grammars than an idle one."""
    signal.setitimer(signal.ITIMER_PROF, settings.cpu_limit_s)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + settings.memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=TrialSettings))
