"""Damaged and hostile configurations and `--set` texts: a configuration comes out, or `ConfigError` with the place."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from kdpipe.data.errors import ConfigError
from kdpipe.data.hashing import digest
from kdpipe.pipeline.config import load_config
from kdpipe.pipeline.demo import _config
from kdpipe.pipeline.starter import RECIPES, starter_text
from kdpipe.pipeline.strict_yaml import parse, plain
from kdpipe.stages.base import Context
from kdpipe.stages.config import identity_of

from .fuzzing import ODD_TEXTS, apply, edits, fuzz, odd_values, refusing

SEEDS = [*map(starter_text, RECIPES), _config(distil=True), _config(distil=False)]
FULL = """
data: {manifest: m.jsonl, allow_outside: true}
run: {folder: ., cache: ..}
student: {model: {path: s, revision: main, trust_remote_code: false, dtype: float32}, system: s, prompt: "{question}"}
teachers:
  textual: {model: t, chat_template_kwargs: {enable_thinking: false, deep: {a: [1, null]}}}
  temperatures: [1.0, 2]
  mass: 0.99
textualize: {trace: {sections: [A, B], model: x}}
layers: {mode: map, map: {1: 2, 3: 4}}
train:
  weights: {top: 1, sft: 0.5}
  task_weights: {ser: {sft: 2.0}}
  weight_schedule: {sft: {kind: cosine}}
  betas: [0.9, 0.95]
  log_to: [tensorboard]
  lora: {rank: 4, targets: [decoder]}
  temperature: 2.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "kdpipe.yaml"


def load(file: Path, data: bytes, *overrides: str) -> None:
    """Reads a configuration, and does what every command does with one: finds its folders, digests what counts."""
    file.write_bytes(data)
    began = time.process_time()
    with refusing("" if overrides else file.name, ConfigError):
        config = load_config(file, overrides)
        assert dataclasses.is_dataclass(config)
        digest(identity_of(config))
        ctx = Context(config, file.parent)
        assert ctx.run_folder.is_absolute() and ctx.cache_folder.is_absolute()
        (file.parent / config.data.manifest).exists()
        json.dumps(identity_of(config)).encode()
    assert time.process_time() - began < 5  # seconds


@fuzz(0.07, seed=st.sampled_from([*SEEDS, FULL]), changes=edits())
def test_bytes(file: Path, seed: str, changes: Any) -> None:
    load(file, apply(seed.encode(), changes))


def test_the_seeds_are_configurations(file: Path) -> None:
    for seed in [*SEEDS, FULL]:
        file.write_text(seed)
        load_config(file)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*at, key))


TREES = [plain(parse(seed, "seed")) for seed in [*SEEDS, FULL]]
PLACES = sorted({place for tree in TREES for place in _places(tree)}, key=str)
KEYS = sorted({".".join(map(str, place)) for place in PLACES} | {"train.nothing", "a.b.c.d", "data", "", ".", "data."})


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """Configurations of which some values are odd, some keys are unknown, and some are gone."""
    found = json.loads(json.dumps(draw(st.sampled_from(TREES))))
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=4)):
        at = found
        for key in place[:-1]:
            at = at.setdefault(key, {}) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                break
        else:
            kind = draw(st.sampled_from(("put", "put", "put", "drop", "add")))
            if kind == "put":
                at[place[-1]] = draw(odd_values)
            elif kind == "drop":
                at.pop(place[-1], None)
            else:
                at[draw(st.sampled_from(ODD_TEXTS))] = draw(odd_values)
    return found


def _escaped(value: Any) -> str:
    """JSON, which is YAML, but for what JSON writes of numbers that are none."""
    return json.dumps(value).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


@fuzz(0.08, tree=trees())
def test_values_of_other_kinds(file: Path, tree: Any) -> None:
    load(file, _escaped(tree).encode())


_ENDLESS = (
    "a: &a [{leaf}]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)),
    "a: &a\n  b: *a\n  c: {leaf}\n",
    "data: &d {{manifest: {leaf}}}\nstudent: *d\nteachers: *d\n",
    "base: &b {{manifest: m}}\ndata:\n  <<: *b\n  manifest: {leaf}\n",
    "data: {leaf}\ndata: {leaf}\n",
    "? [a, b]\n: {leaf}\n",
    "? {{a: b}}\n: {leaf}\n",
    "data: !!python/object/apply:os.system [{leaf}]\n",
    "data: !!binary {leaf}\n",
    "%YAML 9.9\n%TAG ! tag:x,2000:\n---\ndata: !x {leaf}\n",
    "--- {leaf}\n--- {leaf}\n",
    "data: *nowhere\nx: {leaf}\n",
    "data: |9\n {leaf}\n",
    "\tdata: {leaf}\n",
    "data: {leaf}\n...\n%\n",
    "layers: {{map: {{99999999999999999999999999999: {leaf}}}}}\n",
    "layers: {{map: {{" + "9" * 1000 + ": {leaf}}}}}\n",
)


@fuzz(
    0.02,
    form=st.sampled_from(_ENDLESS),
    leaf=st.sampled_from(("1", '"\\0"', '"\\ud800"', "~", "!!int x", "[" * 400, "{a: " * 400, "9" * 5000, "&x", "")),
    depth=st.integers(0, 3000),
    opening=st.sampled_from(("[", "{a: ", "- ", "? ", "a:\n ")),
)
def test_yaml_that_is_too_clever(file: Path, form: str, leaf: str, depth: int, opening: str) -> None:
    load(file, form.format(leaf=leaf).encode())
    load(file, (FULL + f"more: {opening * depth}").encode())


@fuzz(
    0.05,
    key=st.one_of(st.sampled_from(KEYS), st.text(max_size=8), st.just("a." * 5000 + "a")),
    value=st.one_of(
        odd_values.map(_escaped), st.text(max_size=12), st.sampled_from(("&a [*a]", "!!python/x y", "[", "{", "'"))
    ),
    equals=st.sampled_from(("=", "=", "=", "", "==")),
)
def test_set_texts(file: Path, key: str, value: str, equals: str) -> None:
    load(file, FULL.encode(), f"{key}{equals}{value}")


@fuzz(0.02, tree=odd_values, seed=st.sampled_from(SEEDS))
def test_any_yaml(file: Path, tree: Any, seed: str) -> None:
    load(file, yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
    load(file, _escaped(tree).encode() + seed.encode())
