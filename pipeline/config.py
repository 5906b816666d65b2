"""From YAML to the frozen configuration, every mistake at once.

A mistake names the file, the line, the key and the remedy. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import ConfigError
from kdpipe.pipeline.strict_yaml import Node, parse, plain
from kdpipe.stages import config as schema
from kdpipe.stages.config import Config
from kdpipe.stages.models.prompt import unknown_fields
from kdpipe.stages.train.terms import NO_DRAWS, NO_FLOAT16

_PROMPT_FIELDS = {
    "student.prompt": ("question", "choices"),
    "textualize.describe.prompt": ("question", "choices"),
    "textualize.trace.prompt": ("description", "question", "choices"),
    "teachers.textual.prompt": ("description", "question", "choices"),
}
_DEEPEST = 20
"""Names joined by dots in a `--set`; the deepest section has four."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and validates a configuration file.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts of `--set`, values in YAML.

    Raises:
        ConfigError: all problems found, each with its line (or its `--set`), key and remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file. `kdpipe init` writes a starter; -c names another."]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a folder. Name the file in it, e.g. {path}/kdpipe.yaml."]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as UTF-8 text ({error})."]) from None
    name = path.name
    root = parse(text, name)
    if not isinstance(root.value, Mapping):
        raise ConfigError([f"{name}:1: the configuration must be a mapping of sections, like `data:`"])
    problems: list[str] = []
    for override in overrides:
        root = _override(root, override, problems)
    config = _bind(Config, root, "", name, problems)
    if isinstance(config, Config) and not problems:
        problems += [f"{name}: {text}" for text in _relations(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _override(root: Node, override: str, problems: list[str]) -> Node:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > _DEEPEST:
        problems.append(f"--set {override[:100]}: write section.key=value")
        return root
    try:
        value = parse(text, f"--set {key}", line=0) if text.strip() else Node(None, 0)
    except ConfigError as error:
        problems += error.problems
        return root

    def put(node: Node, rest: list[str]) -> Node:
        below = dict(node.value) if isinstance(node.value, Mapping) else {}
        below[rest[0]] = value if len(rest) == 1 else put(below.get(rest[0], Node({}, 0)), rest[1:])
        return Node(below, node.line)

    return put(root, parts)


def _where(name: str, node: Node) -> str:
    return f"{name}:{node.line}" if node.line else "--set"


def _bind(kind: Any, node: Node, key: str, name: str, problems: list[str]) -> Any:
    """Builds a value of type `kind`; on a mistake records it and returns None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if node.value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _bind(inner, node, key, name, problems)
    if dataclasses.is_dataclass(kind):
        return _bind_section(typing.cast(type, kind), node, key, name, problems)
    at = f"{_where(name, node)}: {key}"
    if origin is Literal:
        if node.value in arguments and isinstance(node.value, str):
            return node.value
        problems.append(
            f"{at}: {_show(node)} is none of {', '.join(map(str, arguments))}{_hint(node.value, arguments)}"
        )
        return None
    if origin is tuple:
        if isinstance(node.value, list):
            return tuple(_bind(arguments[0], item, f"{key}[{i}]", name, problems) for i, item in enumerate(node.value))
        problems.append(f"{at}: expected a list, got {_show(node)}; write [{_show(node)}]")
        return None
    if origin is Mapping or kind is Mapping:
        return _bind_mapping(arguments, node, key, name, problems)
    value = node.value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{at}: must be a finite number")
        return None
    if type(value) is kind:
        return value
    words = {str: "text (quote it)", int: "a whole number", float: "a number", bool: "true or false"}
    problems.append(f"{at}: expected {words[kind]}, got {_show(node)}")
    return None


def _bind_mapping(arguments: tuple[Any, ...], node: Node, key: str, name: str, problems: list[str]) -> Any:
    at = f"{_where(name, node)}: {key}"
    if not isinstance(node.value, Mapping):
        problems.append(f"{at}: expected a mapping, got {_show(node)}")
        return None
    if arguments[1] is Any:
        return {k: plain(v) for k, v in node.value.items()}
    result = {}
    for text, item in node.value.items():
        place = f"{_where(name, item)}: {key}.{text}"
        if arguments[0] is int and not (text.isascii() and text.isdecimal() and len(text) < 19):
            problems.append(f"{place}: expected a whole number as key")
            continue
        known = typing.get_args(arguments[0])
        if known and text not in known:
            problems.append(f"{place}: {text!r} is none of {', '.join(known)}{_hint(text, known)}")
            continue
        result[int(text) if arguments[0] is int else text] = _bind(arguments[1], item, f"{key}.{text}", name, problems)
    return result


def _bind_section(kind: type, node: Node, key: str, name: str, problems: list[str]) -> Any:
    at = _where(name, node)
    if kind is schema.ModelConfig and isinstance(node.value, str):
        node = Node({"path": node}, node.line)
    if node.value is None:
        node = Node({}, node.line)
    if not isinstance(node.value, Mapping):
        problems.append(f"{at}: {key}: expected a section with keys, got {_show(node)}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    before = len(problems)
    values = {}
    for word, item in node.value.items():
        full = f"{key}.{word}" if key else word
        if word not in fields:
            problems.append(f"{_where(name, item)}: {full} is not a known key{_hint(word, fields)}")
            continue
        value = _bind(hints[word], item, full, name, problems)
        problems += _out_of_bounds(fields[word], value, f"{_where(name, item)}: {full}")
        values[word] = value
    for word, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and word not in node.value:
            problems.append(f"{at}: {f'{key}.{word}' if key else word} is missing")
    return kind(**values) if len(problems) == before else None


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _out_of_bounds(field: dataclasses.Field[Any], value: Any, at: str) -> list[str]:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return []
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {_number(low)}" if high is None else f"from {_number(low)} to {_number(high)}"
        return [f"{at}: {_number(value)} is out of range; it must be {bounds}"]
    if isinstance(value, int) and value >= 1 << 63:
        return [f"{at}: {_number(value)} is out of range; it must be below 2^63"]
    return []


def _show(node: Node) -> str:
    if isinstance(node.value, Mapping):
        return "a mapping"
    return "a list" if isinstance(node.value, list) else repr(node.value) if node.value is not None else "nothing"


def _hint(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _relations(config: Config) -> list[str]:
    """Mistakes that need more than one field to see."""
    problems = []
    for key, allowed in _PROMPT_FIELDS.items():
        section: Any = config
        for part in key.split("."):
            section = getattr(section, part)
        for unknown in unknown_fields(section, allowed):
            problems.append(f"{key}: {{{unknown}}} is not a field; known are {', '.join(allowed)}")
    teachers, train = config.teachers, config.train
    temperatures = {1.0, *teachers.temperatures}
    if any(not 0.01 <= t <= 100 for t in teachers.temperatures):
        problems.append("teachers.temperatures: each must be from 0.01 to 100")
    if train.temperature not in temperatures:
        problems.append(
            f"train.temperature {train.temperature:g} is not cached; add it to teachers.temperatures "
            f"({', '.join(f'{t:g}' for t in sorted(temperatures))})"
        )
    if teachers.mass is None and teachers.min_k != 1:
        problems.append("teachers.min_k: is given but teachers.mass is not; set teachers.mass, or leave min_k out")
    if teachers.min_k > teachers.k:
        problems.append(f"teachers.min_k: {teachers.min_k} is more than teachers.k, {teachers.k}; lower it")
    if teachers.mass is not None and teachers.mass < 1 and teachers.draws:
        problems.append("teachers.draws: are from the tail that one k leaves; leave teachers.mass out, or the draws")
    if train.divergence == "sampled_ce" and not teachers.draws:
        problems.append(NO_DRAWS)
    problems += _beyond_vllm(config)
    if teachers.device_map is not None and teachers.tensor_parallel_size > 1:
        problems.append(
            f"teachers.device_map: {teachers.device_map} spreads whole layers and teachers.tensor_parallel_size: "
            f"{teachers.tensor_parallel_size} shares each of them; say one of the two"
        )
    if teachers.device_map is not None and teachers.device == "cpu":
        problems.append(
            "teachers.device_map: spreads layers over GPUs and teachers.device is cpu; leave one of them out"
        )
    if train.head_form == "triton" and train.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        problems.append("train.head_form: triton needs a CUDA device and train.device is cpu; say auto, or chunked")
    if config.student.model.dtype == "float16":
        problems.append(NO_FLOAT16)
    if train.lora is not None and train.freeze:
        problems.append(
            "train.freeze: with train.lora all weights stay as they are; leave train.freeze out, and choose with "
            "train.lora.targets what is adapted"
        )
    if train.lora is not None and not train.lora.targets:
        problems.append("train.lora.targets: is empty, so nothing would be trained; say [decoder], or leave it out")
    if train.export == "best" and not train.validation_fraction:
        problems.append("train.export: best is by the held-out loss; set train.validation_fraction, or say last")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        problems.append("train.betas: give two numbers, each at least 0 and below 1")
    if not any(dataclasses.astuple(train.largest_weights)):
        problems.append("train.weights: all are zero, so nothing would be learnt; set at least one")
    for term, schedule in train.weight_schedule.items():
        if schedule.after > schedule.until:
            problems.append(
                f"train.weight_schedule.{term}: after, {schedule.after:g}, is more than until, {schedule.until:g}"
            )
        if not getattr(train.largest_weights, term):
            problems.append(f"train.weight_schedule.{term}: the weight of {term} is zero; set it, or leave this out")
    if config.layers.mode == "map" and not config.layers.map:
        problems.append("layers.map: mode is map, so give at least one `student layer: teacher layer`")
    if config.layers.mode != "map" and config.layers.map:
        problems.append(f"layers.map: is given but layers.mode is {config.layers.mode}; set layers.mode: map")
    if train.micro_batch_tokens > train.global_batch_tokens:
        problems.append("train.micro_batch_tokens: larger than train.global_batch_tokens; lower it")
    try:
        TraceSchema(config.textualize.trace.sections)
    except ValueError as error:
        problems.append(f"textualize.trace.sections: {error}")
    return problems


def _beyond_vllm(config: Config) -> list[str]:
    """What is asked of a textual teacher that vLLM runs, and cannot be had from it."""
    teachers = config.teachers
    if teachers.textual.engine != "vllm":
        return []
    given = "teachers.textual.engine is vllm, which gives"
    otherwise = "or teachers.textual.engine: transformers"
    problems = []
    if set(teachers.temperatures) - {1.0}:
        problems.append(f"teachers.temperatures: {given} distributions at temperature 1 alone; say [1.0], {otherwise}")
    if teachers.tail_blocks > 1:
        problems.append(f"teachers.tail_blocks: {given} one tail alone; say 1, {otherwise}")
    if teachers.draws > 0:
        problems.append(f"teachers.draws: {given} the likeliest entries and no draws; say 0, {otherwise}")
    if config.train.largest_weights.layer > 0:
        where = "weights" if config.train.weights.layer > 0 else "task_weights"
        problems.append(
            f"train.{where}.layer: {given} the last layer alone, no layers below it; set train.{where}.layer: 0, "
            f"{otherwise}"
        )
    return problems
