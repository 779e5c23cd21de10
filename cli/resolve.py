"""Where a command's settings come from: flags, then environment, then file, then defaults."""

import argparse
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml

from cli.options import VARIABLE_PREFIX, Option, OptionValue, options_of
from cli.vllm_flags import vllm_advice
from protocol.errors import StartupError

Config = TypeVar("Config")

CONFIG_VARIABLE = VARIABLE_PREFIX + "CONFIG"
# Similarity from 0 to 1, as difflib measures it.
_NEAR_MISS = 0.92


@dataclass(frozen=True, slots=True)
class Group:
    """A configuration class that a command takes, less the fields that the command sets itself."""

    config_class: type[Any]
    title: str
    omit: frozenset[str] = frozenset()

    def options(self) -> list[Option]:
        return options_of(self.config_class, omit=self.omit)


@dataclass(frozen=True, slots=True)
class Command:
    """What a subcommand is called and takes. `positional` names an option given without flag."""

    name: str
    summary: str
    groups: tuple[Group, ...]
    positional: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All values that a command was given; `explicit` are those that differ from "not said"."""

    command: Command
    values: Mapping[str, OptionValue]
    explicit: frozenset[str] = field(default_factory=frozenset[str])

    def config(self, config_class: type[Config], **fixed: OptionValue) -> Config:
        """An instance of `config_class`; `fixed` gives the fields that the command omits."""
        group = next(g for g in self.command.groups if g.config_class is config_class)
        chosen = {option.name: self.values[option.name] for option in group.options()}
        return cast("Config", group.config_class(**(chosen | fixed)))


def resolve(
    command: Command, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> Settings:
    """Reads flags, `TANDEM_*` variables and the `--config` file; StartupError if one is bad."""
    environ = os.environ if environ is None else environ
    options = {option.name: option for group in command.groups for option in group.options()}
    flags = _flag_values(command, options, argv)
    path = flags.pop("config", None) or environ.get(CONFIG_VARIABLE)
    values: dict[str, OptionValue] = {name: option.default for name, option in options.items()}
    given = _file_values(options, Path(str(path))) if path else {}
    given |= _variable_values(options, environ)
    given |= flags
    return Settings(command, values | given, frozenset(given))


def _flag_values(
    command: Command, options: Mapping[str, Option], argv: Sequence[str]
) -> dict[str, OptionValue]:
    parser = make_parser(command)
    namespace, unknown = parser.parse_known_args(list(_vllm_spelled(argv, options)))
    if unknown:
        raise StartupError(_unknown_argument(unknown[0], command, options))
    values: dict[str, OptionValue] = {}
    for name, raw in vars(namespace).items():
        option = options.get(name)
        if option is None:
            values[name] = raw
        elif isinstance(raw, str):
            values[name] = option.parse(raw, source=option.flag)
        else:
            values[name] = option.check(raw, source=option.flag)
    return values


def _vllm_spelled(argv: Sequence[str], options: Mapping[str, Option]) -> Iterator[str]:
    """Flags with underscores and switches with a value, which vLLM takes, too, as they are here."""
    switches = {option.flag: option for option in options.values() if option.kind is bool}
    words = list(argv)
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
        switch = switches.get(flag)
        if switch is None:
            yield flag + equals + text
            continue
        if not equals and words and words[0].lower() in ("true", "false"):
            equals, text = "=", words.pop(0)
        yield from switch.arguments(switch.parse(text, source=flag) if equals else True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def make_parser(command: Command) -> argparse.ArgumentParser:
    """A parser that keeps values as text, and leaves out what isn't on the command line."""
    parser = _Parser(
        prog=f"tandem {command.name}",
        description=command.summary,
        epilog="Every flag can also be an environment variable (--max-num-seqs is "
        "TANDEM_MAX_NUM_SEQS) or a key of the --config file (max-num-seqs). "
        "Flags win over variables, variables over the file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    declared: set[str] = set()
    for group in command.groups:
        section = parser.add_argument_group(group.title)
        for option in group.options():
            if option.name in declared:
                continue
            declared.add(option.name)
            if option.name == command.positional:
                parser.add_argument(option.name, nargs="?", metavar=option.name.upper())
            _add_flag(section, option)
    return parser


def _add_flag(section: argparse._ArgumentGroup, option: Option) -> None:
    text = _help_text(option)
    # The long one gives the value its name, so it's found as the others are.
    flags = (option.flag,) if option.info.short is None else (f"-{option.info.short}", option.flag)
    if option.kind is bool:
        section.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
    elif option.kind is tuple:
        section.add_argument(*flags, nargs="+", metavar=option.info.metavar, help=text)
    else:
        metavar = option.info.metavar
        if metavar is None and option.info.choices:
            metavar = "{" + ",".join(option.info.choices) + "}"
        section.add_argument(*flags, metavar=metavar, help=text)


def _help_text(option: Option) -> str:
    text = option.info.help
    if option.default is not None and option.default != () and option.kind is not bool:
        text = f"{text} (default: {option.default})"
    elif option.kind is bool:
        text = f"{text} (default: {'on' if option.default else 'off'})"
    return text.replace("%", "%%")


def _unknown_argument(argument: str, command: Command, options: Mapping[str, Option]) -> str:
    word = argument.split("=", 1)[0]
    if not word.startswith("-"):
        return f"tandem {command.name} doesn't take the argument {word!r}."
    name = word.lstrip("-").replace("_", "-")
    advice = vllm_advice(name)
    if advice is not None:
        return f"{word} is a vLLM flag that tandem {command.name} doesn't have: {advice}."
    close = difflib.get_close_matches(name, [option.key for option in options.values()], n=1)
    hint = f"did you mean --{close[0]}?" if close else f"see tandem {command.name} --help."
    return f"tandem {command.name} has no flag {word}; {hint}"


def _file_values(options: Mapping[str, Option], path: Path) -> dict[str, OptionValue]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"Can't read the settings file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise StartupError(f"The settings file {path} is not valid YAML: {first}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"The settings file {path} must hold keys and values.")
    by_key = {option.key: option for option in options.values()}
    values: dict[str, OptionValue] = {}
    for key, value in cast("dict[object, object]", content).items():
        spelled = str(key).replace("_", "-")
        option = by_key.get(spelled)
        if option is None:
            if advice := vllm_advice(spelled):
                raise StartupError(
                    f"The settings file {path} has vLLM's key {key}, which isn't here: {advice}."
                )
            close = difflib.get_close_matches(str(key), by_key, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise StartupError(f"The settings file {path} has an unknown key {key}{hint}")
        values[option.name] = option.check(value, source=f"{option.key} in {path}")
    return values


def _variable_values(
    options: Mapping[str, Option], environ: Mapping[str, str]
) -> dict[str, OptionValue]:
    by_variable = {option.variable: option for option in options.values()}
    for name in environ:
        # Other names may have other readers, but a near miss is a mistake that would go unnoticed.
        if name.startswith(VARIABLE_PREFIX) and name not in by_variable:
            close = difflib.get_close_matches(name, by_variable, n=1, cutoff=_NEAR_MISS)
            if close:
                raise StartupError(f"{name} is no setting; did you mean {close[0]}?")
    return {
        option.name: option.parse(environ[option.variable], source=option.variable)
        for option in options.values()
        if option.variable in environ
    }
