"""Prints `docs/configuration.md`, made from the dataclasses: `python -m kdpipe.pipeline.reference`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from kdpipe.stages import config as schema
from kdpipe.stages.config import Config

_HEAD = """# Configuration

One YAML file, read strictly: an unknown key is an error with its line and a suggestion, `1e-5` is a number, `no` is
a string, a duplicate key is an error. `--set section.key=value` overrides a value. Paths start from the file's folder.

A field marked **identity** is part of the keys of the samples it touches: changing it makes their outputs stale.
A field marked *execution* says how fast, how much at once or where; changing it makes nothing stale.

This page is written by `python -m kdpipe.pipeline.reference`.
"""


def _docs(section: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, inherited ones included."""
    texts = {}
    for base in section.__bases__:
        if dataclasses.is_dataclass(base):
            texts |= _docs(base)
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            texts[statement.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return texts


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "`{}`" if field.default_factory is not dataclasses.MISSING else "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def _rows(section: type, prefix: str) -> Iterator[str]:
    hints, docs = typing.get_type_hints(section), _docs(section)
    for field in dataclasses.fields(section):
        kinds = [kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if inspect.isclass(kind)]
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        name = f"{prefix}{field.name}"
        if inner is schema.ModelConfig:
            yield f"| `{name}` | model | {_default(field)} | **identity** | {docs.get(field.name, '')} |"
        elif inner is not None and field.default is None:
            yield f"| `{name}` | section or null | `null` | **identity** | {docs.get(field.name, '')} |"
            yield from _rows(inner, f"{name}.")
        elif inner is not None and typing.get_origin(hints[field.name]) is Mapping:
            yield f"| `{name}` | mapping | {_default(field)} | **identity** | {docs.get(field.name, '')} |"
            yield from _rows(inner, f"{name}.*.")
        elif inner is not None:
            yield from _rows(inner, f"{name}.")
        else:
            kind = "*execution*" if field.metadata.get("execution") else "**identity**"
            yield f"| `{name}` | {_type(hints[field.name])} | {_default(field)} | {kind} | {docs.get(field.name, '')} |"


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(kind))
    text = kind.__name__ if inspect.isclass(kind) and not typing.get_args(kind) else str(kind)
    for old, new in (
        ("collections.abc.", ""),
        ("typing.", ""),
        (", ...", ""),
        ("tuple", "list"),
        (" | None", " or null"),
    ):
        text = text.replace(old, new)
    return text


def reference() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    hints = typing.get_type_hints(Config)
    table = ["| key | type | default | kind | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(Config):
        section = hints[field.name]
        lines += [f"## {field.name}", "", inspect.getdoc(section) or "", "", *table]
        lines += [*_rows(section, f"{field.name}."), ""]
    lines += [
        "## A model",
        "",
        "Wherever the type is *model*, write its path alone, or a section with these keys.",
        "",
        *table,
        *_rows(schema.ModelConfig, ""),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
