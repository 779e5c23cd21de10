"""An option: one declared setting as flag, environment variable and file key."""

import dataclasses
import types
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

from protocol.errors import StartupError
from protocol.settings import SettingInfo, setting_info

OptionValue: TypeAlias = bool | int | float | str | tuple[str, ...] | None

VARIABLE_PREFIX = "TANDEM_"

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of words without commas",
}
# vLLM's: small letters are powers of ten, large ones of two.
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_TRUE_TEXTS = ("1", "true", "yes", "on")
_FALSE_TEXTS = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Option:
    """What a field of a configuration class accepts, and its names outside."""

    name: str
    kind: type
    nullable: bool
    default: OptionValue
    info: SettingInfo

    @property
    def key(self) -> str:
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.name.upper()

    def parse(self, text: str, *, source: str) -> OptionValue:
        """The value that `text` stands for; StartupError names `source` and what it must be."""
        value: OptionValue = text
        if self.kind is bool:
            lowered = text.strip().lower()
            if lowered not in _TRUE_TEXTS + _FALSE_TEXTS:
                raise self._refusal(text, source)
            value = lowered in _TRUE_TEXTS
        elif self.kind is tuple:
            value = tuple(part.strip() for part in text.split(",") if part.strip())
        elif self.kind in (int, float):
            try:
                value = _whole_number(text) if self.kind is int else float(text)
            except (ArithmeticError, ValueError):
                raise self._refusal(text, source) from None
        return self.check(value, source=source)

    def check(self, value: object, *, source: str) -> OptionValue:
        """`value` in the field's own type, or StartupError if it has another or is out of range."""
        if value is None and self.nullable:
            return None
        if isinstance(value, list):
            value = tuple(value)
        if self.kind is int and isinstance(value, str) and value[-1:] in _SUFFIXES:
            # In a file; a number there is one already.
            return self.parse(value, source=source)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise self._refusal(value, source)
        if isinstance(value, tuple) and not all(
            # A variable holds such a list with commas between.
            isinstance(part, str) and part and "," not in part
            for part in value
        ):
            raise self._refusal(value, source)
        if not self.info.allows(value):
            raise self._refusal(value, source)
        if self.info.only_default and value != self.default:
            raise StartupError(f"{source} can't be {value!r}: {self.info.only_default}.")
        return cast("OptionValue", value)

    def arguments(self, value: OptionValue) -> list[str]:
        """The words on a command line that give this option `value`, which differs from None."""
        match value:
            case None:
                return []
            case bool():
                return [self.flag if value else f"--no-{self.key}"]
            case tuple():
                return [self.flag, *value]
            case _:
                # One word, so that a value that begins with a dash isn't taken for a flag.
                return [f"{self.flag}={value}"]

    def variable_value(self, value: OptionValue) -> str:
        """What the environment variable holds for `value`."""
        return ",".join(value) if isinstance(value, tuple) else str(value)

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        allowed = self.info.allowed
        if self.info.choices:
            return allowed
        wanted = _TYPE_NAMES[self.kind]
        if not allowed:
            return wanted
        return f"{wanted} {allowed}" if allowed.startswith("from") else f"{wanted}, {allowed}"

    def _refusal(self, value: object, source: str) -> StartupError:
        got = "something else" if self.info.secret else repr(value)
        return StartupError(f"{source} must be {self.wanted}, not {got}.")


def _whole_number(text: str) -> int:
    """Also `4k` (4,000) and `4K` (4,096), with a fraction if it comes to a whole number.

    Raises ValueError.
    """
    scale = _SUFFIXES.get(text[-1:])
    if scale is None:
        return int(text)
    number = Decimal(text[:-1]) * scale
    if number != int(number):
        raise ValueError(text)
    return int(number)


def options_of(config_class: type, *, omit: Iterable[str] = ()) -> list[Option]:
    """The options that a configuration class declares, less the fields in `omit`."""
    hints = get_type_hints(config_class)
    omitted = frozenset(omit)
    return [
        _option(field, hints[field.name])
        for field in dataclasses.fields(config_class)
        if field.name not in omitted
    ]


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:  # noqa: ANN401  (a type hint)
    nullable = False
    if isinstance(hint, types.UnionType):
        members = [member for member in get_args(hint) if member is not types.NoneType]
        nullable = len(members) < len(get_args(hint))
        assert len(members) == 1, f"setting {field.name} has more than one type"
        hint = members[0]
    info = setting_info(field)
    if get_origin(hint) is Literal:
        info = dataclasses.replace(info, choices=get_args(hint))
        hint = str
    kind = get_origin(hint) or hint
    assert kind in _TYPE_NAMES, f"setting {field.name} has type {hint}"
    default = cast("OptionValue", field.default)
    return Option(field.name, kind, nullable, default, info)
