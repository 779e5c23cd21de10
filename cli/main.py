"""The `tandem` command: picks a subcommand and turns a StartupError into one sentence.

Each subcommand's module is imported only when it runs, so `tandem --help` needs no torch.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import cast

from protocol.errors import StartupError

STARTUP_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


@dataclass(frozen=True, slots=True)
class Subcommand:
    """`module.function(argv)` runs it and returns the exit status."""

    module: str
    function: str
    summary: str

    def run(self, argv: Sequence[str]) -> int:
        function = getattr(importlib.import_module(self.module), self.function)
        return cast("Callable[[Sequence[str]], int]", function)(argv)


SUBCOMMANDS = {
    "serve": Subcommand("cli.serve", "run", "serve a model on this machine"),
    "router": Subcommand("cli.services", "run_router", "run one router"),
    "prefill": Subcommand("cli.services", "run_prefill", "run one prefill worker"),
    "decode": Subcommand("cli.services", "run_decode", "run one decode worker"),
    "encode": Subcommand("cli.services", "run_encode", "run one encode worker"),
    "fetch": Subcommand("cli.fetch", "run", "find, import or download a model"),
    "ps": Subcommand("cli.ps", "run", "list the processes of local stacks"),
    "run-batch": Subcommand("cli.run_batch", "run", "answer a file of requests"),
    "bench": Subcommand("cli.bench", "run", "load an OpenAI-compatible server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; the exit status is 2 if something kept it from starting."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except StartupError as error:
        # One write, so that the lines of several processes on one terminal don't mix.
        sys.stderr.write(f"tandem: {error}\n")
        return STARTUP_ERROR_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        # The reader of our output (say `head`) has gone.
        sys.stderr.close()
        return 1


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    if name in ("-V", "--version", "version"):
        sys.stdout.write(f"tandem {_version()}\n")
        return 0
    subcommand = SUBCOMMANDS.get(name)
    if subcommand is None:
        raise StartupError(f"There is no command {name!r}; see tandem --help.")
    return subcommand.run(words[1:])


def _usage() -> str:
    lines = [f"  {name:<11}{sub.summary}" for name, sub in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: tandem COMMAND …",
            "",
            "Serves language models with prefill and decode in separate worker pools.",
            "",
            *lines,
            "",
            "tandem COMMAND --help lists a command's flags; tandem --version says which release.",
            "",
        ]
    )


def _version() -> str:
    try:
        return version("tandem")
    except PackageNotFoundError:
        return "(not installed)"
