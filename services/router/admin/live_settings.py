"""The settings that may change while a router runs, each swapped whole, and who then hears of it.

Others decide what was allocated, bound or read at the start; they need a restart.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from protocol.errors import InvalidRequestError
from protocol.settings import setting_info
from services.router.config import RouterConfig
from services.router.dispatch.admission import AdmissionPolicy

LIVE_SETTINGS = (
    "local_prefill",
    "max_attempts",
    "max_queued_requests",
    "queue_timeout_s",
    "request_timeout_s",
    "disable_log_requests",
    "log_level",
)
_HIDDEN = frozenset({"redis_url", "fd"})


def _body() -> type[msgspec.Struct]:
    """One optional field for each, with the bounds that flags have."""
    hints = get_type_hints(RouterConfig)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(RouterConfig):
        if field.name not in LIVE_SETTINGS:
            continue
        info, kind = setting_info(field), hints[field.name]
        if info.choices:
            kind = Literal[info.choices]
        elif info.minimum is not None or info.maximum is not None:
            kind = Annotated[kind, msgspec.Meta(ge=info.minimum, le=info.maximum)]
        fields.append((field.name, kind | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(
        "LiveSettingsBody", fields, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
    )


LiveSettingsBody = _body()


class LiveSettings:
    """What this router was started with, but for `changes`; `adopt` gets each new whole."""

    def __init__(self, config: RouterConfig, adopt: Callable[[RouterConfig], None]) -> None:
        self._started_with = config
        self._config = config
        self._adopt = adopt
        self.changes: dict[str, Any] = {}

    def take(self, changes: dict[str, Any]) -> None:
        """All of them, in place of those before. Raises InvalidRequestError, and takes none then,
        if one isn't such a setting or has no such value."""
        try:
            body = msgspec.convert(changes, LiveSettingsBody)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(str(error), field=None) from error
        changes = msgspec.to_builtins(body)
        if changes != self.changes:
            self.changes = changes
            self._config = dataclasses.replace(self._started_with, **changes)
            self._adopt(self._config)

    def public(self) -> dict[str, Any]:
        """All settings but secrets."""
        return {
            field.name: getattr(self._config, field.name)
            for field in dataclasses.fields(self._config)
            if not setting_info(field).secret and field.name not in _HIDDEN
        }


def refusal_of(error: InvalidRequestError) -> InvalidRequestError:
    """Of a body with a field that it doesn't have: is it a setting at all?"""
    if error.code != "unknown_parameter":
        return error
    fixed = {field.name for field in dataclasses.fields(RouterConfig)}
    if error.field in fixed:
        text = f"`{error.field}` can't be changed while the server runs."
        return InvalidRequestError(text, field=error.field, code="fixed_setting")
    text = f"There is no setting `{error.field}`; {', '.join(LIVE_SETTINGS)} can be changed."
    return InvalidRequestError(text, field=error.field, code="unknown_setting")


def admission_policy(config: RouterConfig) -> AdmissionPolicy:
    return AdmissionPolicy(
        max_waiting=config.max_queued_requests,
        max_wait_s=min(config.queue_timeout_s, config.request_timeout_s),
    )
