"""A configuration file for a run that was made by settings over another's, so that every command can be tried on it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.data.files import write_atomically
from kdpipe.pipeline.runner import Request
from kdpipe.stages.base import Context
from kdpipe.stages.config import ModelConfig

_HEAD = "# Written by kdpipe, each time anew, from {name} and what was set over it; paths start from this folder.\n"


def write_configuration(request: Request) -> Path:
    """Writes `kdpipe.yaml` into the run folder of a request: the same run, whatever file and settings it came from.

    Raises:
        ConfigError: all mistakes of the configuration.
        OSError: it cannot be written.
    """
    import yaml

    ctx = request.context()
    values = _plain(ctx.config, ctx)
    values["data"]["manifest"] = _from(ctx, ctx.config.data.manifest)
    values["run"] |= {"folder": ".", "cache": os.path.relpath(ctx.cache_folder, ctx.run_folder)}
    text = _HEAD.format(name=ascii(request.config_file.name)) + yaml.safe_dump(values, sort_keys=False)
    target = ctx.run_folder / "kdpipe.yaml"
    if not target.exists() or target.read_text(encoding="utf-8", errors="replace") != text:
        write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"), ctx.run_folder / "tmp")
    return target


def _plain(value: Any, ctx: Context) -> Any:
    if isinstance(value, ModelConfig) and (ctx.base / value.path).is_dir():
        value = dataclasses.replace(value, path=_from(ctx, value.path))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name), ctx) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(inner, ctx) for name, inner in value.items()}
    return [_plain(inner, ctx) for inner in value] if isinstance(value, list | tuple) else value


def _from(ctx: Context, path: str) -> str:
    """A path of the configuration as it is called from the run folder."""
    file = ctx.base / path  # which may be a link: what it names starts from where the link lies
    return os.path.relpath(file.parent.resolve() / file.name, ctx.run_folder)
