"""Strict YAML: a tree of values that remember their lines, without YAML 1.1's surprises.

`1e-5` is a number, `no` is a string, duplicate keys are errors, and only plain data is built (no tags).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kdpipe.data.errors import ConfigError

_PLAIN = {
    "tag:yaml.org,2002:null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "tag:yaml.org,2002:bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"
    ),
}


_TAGS = frozenset((*_PLAIN, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))))
_MOST_NODES = 10_000
_DEEPEST = 40


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema for plain scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_tag, _pattern, None)


def _is_plain(tag: str, text: str) -> bool:
    """Whether a scalar is what its tag says by YAML 1.2; PyYAML builds `!!int 010` and `!!bool yes` by 1.1."""
    patterns = [_PLAIN[tag]] if tag in _PLAIN else []
    if tag.endswith(":float"):
        patterns.append(_PLAIN["tag:yaml.org,2002:int"])
    return not patterns or any(pattern.match(text) for pattern in patterns)


def _fault(text: str) -> str | None:
    """Why a text can be neither a file's name nor written as UTF-8, if so: `"\\0"` and `"\\ud800"` are YAML."""
    if "\0" in text:
        return "holds a NUL character; remove it"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "is not valid Unicode (half of a surrogate pair); write the character itself"
    return None


@dataclass(frozen=True)
class Node:
    """A value with its place.

    Attributes:
        value: a scalar, a list of nodes, or a mapping from string to node.
        line: line in the file, counted from 1; 0 for a value given by `--set`.
    """

    value: Any
    line: int


def plain(node: Node) -> Any:
    """The value without lines."""
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    if isinstance(node.value, Mapping):
        return {key: plain(item) for key, item in node.value.items()}
    return node.value


def parse(text: str, name: str, *, line: int | None = None) -> Node:
    """Parses one YAML document.

    Args:
        text: the document.
        name: file name for messages.
        line: the line to give every node, instead of its own.

    Raises:
        ConfigError: a syntax error, a duplicate or non-scalar key, an alias to itself, an unknown tag, a text that
            holds NUL or is not valid Unicode, nesting or aliases without end.
    """
    try:
        loader = _Loader(text)
        try:
            reader = _Reader(loader, name, line)
            root = loader.get_single_node()
            result = Node({}, 1) if root is None else reader.convert(root, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError([f"{where}: not valid YAML: {error.problem or error.context}"]) from None
    except RecursionError:
        raise ConfigError([f"{name}: not valid YAML: nested more than {_DEEPEST} deep"]) from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError([f"{name}: not valid YAML: {error}"]) from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return result


class _Reader:
    """Turns PyYAML's nodes into ours and collects what is wrong with them."""

    def __init__(self, loader: _Loader, name: str, line: int | None):
        self.loader, self.name, self.line = loader, name, line
        self.problems: list[str] = []
        self.count = 0

    def _at(self, node: yaml.Node) -> int:
        return self.line if self.line is not None else node.start_mark.line + 1

    def convert(self, node: yaml.Node, above: tuple[int, ...]) -> Node:
        place = self._at(node)
        self.count += 1
        if self.count > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES} values (aliases count each time they are used)")
        if len(above) > _DEEPEST:
            raise RecursionError
        if node.tag not in _TAGS:
            self.problems.append(
                f"{self.name}:{place}: not valid YAML: the tag {node.tag} is not allowed; plain data only"
            )
            return Node(None, place)
        if id(node) in above:
            self.problems.append(f"{self.name}:{place}: an alias refers to itself")
            return Node(None, place)
        if isinstance(node, yaml.ScalarNode) and not _is_plain(node.tag, node.value):
            self.problems.append(f"{self.name}:{place}: not valid YAML: {node.value[:40]!r} is not a {node.tag[18:]}")
            return Node(None, place)
        if isinstance(node, yaml.ScalarNode) and (fault := _fault(node.value)):
            self.problems.append(f"{self.name}:{place}: {node.value[:40]!a} {fault}")
            return Node(None, place)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, above), place)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, above) for item in node.value], place)
        return Node(self.loader.construct_object(node), place)

    def _mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            at = self._at(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.name}:{at}: a key must be a single word")
                continue
            key = key_node.value
            if fault := _fault(key):
                self.problems.append(f"{self.name}:{at}: the key {key[:40]!a} {fault}")
                continue
            if key in result:
                first = result[key].line
                self.problems.append(f"{self.name}:{at}: {key} is given twice (first on line {first}); remove one")
            result[key] = Node(self.convert(value_node, above).value, at)
        return result
