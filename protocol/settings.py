"""One declaration of a setting, from which flag, `TANDEM_*` variable and YAML key are made.

Configuration classes are frozen dataclasses whose fields are made by `setting(…)`; the `cli`
package turns them into arguments. Field `max_num_seqs` is flag `--max-num-seqs`, variable
`TANDEM_MAX_NUM_SEQS` and key `max-num-seqs`.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class SettingInfo:
    """What the command line and the documentation say about a setting."""

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    secret: bool = False
    short: str | None = None
    only_default: str = ""

    def allows(self, value: object) -> bool:
        """Whether a value, which isn't None, is one of the choices and within the bounds."""
        if self.choices:
            return value in self.choices
        if self.minimum is None and self.maximum is None:
            return not (isinstance(value, float) and math.isnan(value))
        return (
            isinstance(value, (int, float))
            and not math.isnan(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def allowed(self) -> str:
        """Which values, in words: "one of ..." or "from 1 to 256" or "1 or more"; or nothing."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{self.minimum:g} or more"
        return "" if self.maximum is None else f"{self.maximum:g} or less"


def setting(
    default: Any,  # noqa: ANN401  (a dataclass default of the field's own type)
    *,
    help: str,  # noqa: A002  (argparse's word for it)
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    secret: bool = False,
    short: str | None = None,
    only_default: str = "",
) -> Any:  # noqa: ANN401
    """A dataclass field that carries its help text and its bounds.

    A secret's value never appears in an argument list or a message. `short` is the letter of a
    short flag. `only_default` says why no other value is accepted, and what to do instead.
    """
    info = SettingInfo(help, choices, minimum, maximum, metavar, secret, short, only_default)
    return dataclasses.field(default=default, metadata={"setting": info})


def setting_info(field: dataclasses.Field[Any]) -> SettingInfo:
    """The `SettingInfo` of a field made by `setting`."""
    return field.metadata["setting"]
