"""One declaration of a setting, from which flag, `TANDEM_*` variable and YAML key are made.

Configuration classes are frozen dataclasses whose fields are made by `setting(…)`; the `cli`
package turns them into arguments. Field `max_num_seqs` is flag `--max-num-seqs`, variable
`TANDEM_MAX_NUM_SEQS` and key `max-num-seqs`.
"""

import dataclasses
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
