"""Fields of the configuration: which of them are in the keys, and within which bounds their numbers lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda"]


def execution(default: Any = dataclasses.MISSING) -> Any:
    """A field that says how, not what: never part of a key."""
    return dataclasses.field(default=default, metadata={"execution": True})


def bounded(default: Any, low: float | None = None, high: float | None = None, *, how: bool = False) -> Any:
    """A number with inclusive bounds that `kdpipe check` enforces; `how=True` marks an execution field."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "execution": how})


def identity_of(section: Any) -> dict[str, Any]:
    """The identity fields of a section, nested sections included, as plain values."""
    values = {}
    for field in dataclasses.fields(section):
        if not field.metadata.get("execution"):
            values[field.name] = _plain(getattr(section, field.name))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return identity_of(value) if dataclasses.is_dataclass(value) else value
