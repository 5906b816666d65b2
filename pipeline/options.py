"""What the commands of several modules share. Only click is imported at the top: `--help` must answer at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kdpipe.pipeline.runner import Request


class Commands(click.Group):
    """Lists commands in the order they are defined in."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `-c`, `--set` and `--strict-env`; the command takes `config_file` and `overrides`."""

    @functools.wraps(command)
    def configured(*, overrides: tuple[str, ...], strict_env: bool, **rest: Any) -> None:
        command(overrides=(*overrides, "run.strict_env=true") if strict_env else overrides, **rest)

    with_flag = click.option(
        "--strict-env", is_flag=True, help="Make anew what other versions of the libraries made (run.strict_env)."
    )(configured)
    with_settings = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one setting, e.g. --set train.epochs=1.",
    )(with_flag)
    return click.option(
        "-c",
        "--config",
        "config_file",
        default="kdpipe.yaml",
        show_default=True,
        type=click.Path(path_type=Path),
        help="The configuration file; paths in it start from its folder.",
    )(with_settings)


def request_of(config_file: Path, overrides: tuple[str, ...]) -> Request:
    """What the command line asked for; imported late, so that `--help` answers at once."""
    from kdpipe.pipeline.runner import Request

    return Request(config_file, overrides)
