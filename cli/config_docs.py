"""Writes docs/configuration.md from the settings' declarations: `python -m cli.config_docs`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from cli.declarations import WITH_SETTINGS
from cli.options import Option
from cli.resolve import CONFIG_VARIABLE, Group

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_INTRODUCTION = f"""\
# Settings

This page is generated from the settings' declarations (`make docs`).

Every setting is a flag, an environment variable and a key of the settings file at once:
`--max-num-seqs 64`, `TANDEM_MAX_NUM_SEQS=64`, `max-num-seqs: 64`. A flag wins over a variable, a
variable over the file. The file is YAML; `--config FILE` or `{CONFIG_VARIABLE}` names it. On-off
settings are `--enable-x` and `--no-enable-x`, or `true` and `false`. Lists are several words after
a flag, commas in a variable, a list in the file. Whole numbers may end in `k`, `m` or `g` (powers
of ten) or `K`, `M` or `G` (powers of two): `4k` is 4,000. A value that can't be right stops the
process with a sentence that says what it must be, and a flag of vLLM's that Tandem doesn't have
with one that says what to do instead. As there, flags may be written with underscores, and on-off
settings be given `true` or `false`.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    commands: dict[type, list[str]] = {}
    groups: dict[type, Group] = {}
    for command in WITH_SETTINGS:
        for group in command.groups:
            commands.setdefault(group.config_class, []).append(f"`tandem {command.name}`")
            seen = groups.get(group.config_class)
            # The command that omits least shows the group whole.
            if seen is None or len(group.omit) < len(seen.omit):
                groups[group.config_class] = group
    for config_class, group in groups.items():
        yield f"## {group.title}\n"
        yield f"Of {', '.join(commands[config_class])}.\n"
        yield "| flag | variable | default | meaning |\n| --- | --- | --- | --- |"
        yield "\n".join(_row(option) for option in group.options()) + "\n"


def _row(option: Option) -> str:
    meaning = option.info.help
    if option.info.choices:
        meaning += "; one of " + ", ".join(f"`{choice}`" for choice in option.info.choices)
    elif option.info.minimum is not None or option.info.maximum is not None:
        meaning += f" ({option.wanted})"
    flag = option.flag if option.info.short is None else f"-{option.info.short}, {option.flag}"
    cells = (f"`{flag}`", f"`{option.variable}`", _default(option), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(option: Option) -> str:
    if option.default is None or option.default == ():
        return ""
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    return f"`{option.default}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"Wrote {PAGE}\n")
