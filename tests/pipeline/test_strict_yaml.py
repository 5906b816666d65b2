"""Numbers as YAML 1.2 reads them, tags, and what a value must be to be bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.pipeline.config import load_config
from kdpipe.pipeline.strict_yaml import parse, plain

CONFIG = "data: {manifest: m.jsonl}\nstudent: {model: student}\nteachers: {textual: {model: teacher}}\n"


def value_of(text: str) -> Any:
    return plain(parse(f"key: {text}\n", "file"))["key"]


def problems(tmp_path: Path, line: str) -> str:
    (tmp_path / "kdpipe.yaml").write_text(CONFIG + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "kdpipe.yaml")
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-0", 0), ("+7", 7), ("-12", -12), ("1_000_000", 1_000_000), ("9007199254740993", 9007199254740993)],
)
def test_whole_numbers(text, value):
    assert value_of(text) == value and type(value_of(text)) is int


@pytest.mark.parametrize("text", ["010", "007", "-08", "00", "0_1", "0o17", "0x1F", "0b11", "1:30", "190:20:30"])
def test_what_yaml_1_1_reads_as_an_octal_or_in_base_sixty_is_text(text):
    """PyYAML makes 8 of 010 and 90 of 1:30; a revision or an id would be another one."""
    assert value_of(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.", 1.0), ("0.", 0.0), ("-.5", -0.5), ("08.5", 8.5), ("1e3", 1000.0), ("1_0.5E-1", 1.05), (".5e1", 5.0)],
)
def test_floats(text, value):
    assert value_of(text) == value and type(value_of(text)) is float


@pytest.mark.parametrize(
    "text", ["1e", "1E", "e5", "1e5e", ".", "-.", "+.e1", "1.2.3", "-.INF", "nUll", "TruE", "=", "<<"]
)
def test_what_only_resembles_a_number_or_a_constant_is_text(text):
    assert value_of(text) == text


def test_leading_zeros_reach_the_configuration_as_they_were_written(tmp_path):
    path = tmp_path / "kdpipe.yaml"
    path.write_text(CONFIG.replace("model: student", "model: {path: student, revision: 0123456}"))
    assert load_config(path).student.model.revision == "0123456"
    assert "train.epochs: expected a whole number, got '03'" in problems(tmp_path, "train: {epochs: 03}")


@pytest.mark.parametrize("tag", ["!mine", "!!timestamp", "!!binary", "!!set", "!!omap", "!!python/name:os.system"])
def test_tags_of_other_than_plain_data_name_their_line(tag):
    with pytest.raises(ConfigError, match=r"^file:2: not valid YAML: the tag \S+ is not allowed; plain data only"):
        parse(f"a: 1\nb: {tag} 2020-01-01\n", "file")


@pytest.mark.parametrize(
    "text",
    [
        "!!int ''",
        "!!int abc",
        "!!int",
        "!!bool maybe",
        "!!float abc",
        "!!float " + ":".join(["9"] * 200),
        "!!int " + "9" * 5000,
        "9" * 5000,
        "[" * 5000,
    ],
)
def test_values_that_cannot_be_built_are_mistakes_of_the_file(text):
    """Whatever PyYAML raises over them: ValueError, IndexError, KeyError, OverflowError, RecursionError."""
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse(f"key: {text}\n", "file")


def test_aliases_do_not_multiply_without_bound():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="aliases count each time they are used"):
        parse("\n".join(lines), "file")


def test_numbers_out_of_all_bounds_are_named_with_their_line(tmp_path):
    huge = "1" + "0" * 400
    assert "kdpipe.yaml:4: train.learning_rate: must be a finite number" in problems(
        tmp_path, f"train: {{learning_rate: {huge}}}"
    )
    for key in ("textualize", "train", "evaluate"):
        for seed in (-1, 2**63):
            found = problems(tmp_path, f"{key}: {{seed: {seed}}}")
            assert f"kdpipe.yaml:4: {key}.seed: " in found and "is out of range; it must be from 0" in found
    assert "train.max_steps: 0 is out of range" in problems(tmp_path, "train: {max_steps: 0}")


@pytest.mark.parametrize("key", ["²", "٣", "-1", "1.0", "1_0"])
def test_keys_of_the_layer_map_are_plain_digits(tmp_path, key):
    """`str.isdigit` takes the first two, and `int` fails at the first."""
    found = problems(tmp_path, f"layers: {{mode: map, map: {{{key}: 2}}}}")
    assert f"kdpipe.yaml:4: layers.map.{key}: expected a whole number as key" in found


@pytest.mark.parametrize(
    "text", ["!!int 010", "!!int 0x1F", "!!int 1:30", "!!float 1:30", "!!bool yes", "!!int abc", "!!null x"]
)
def test_a_tag_does_not_bring_yaml_1_1_back(text: str):
    with pytest.raises(ConfigError, match=r"^file:2: not valid YAML"):
        parse(f"a: 1\nkey: {text}\n", "file")


def test_tags_that_fit_are_kept():
    text = "[!!int 7, !!float 1, !!str 007, !!bool true, !!null ~, !!int '7']"
    assert plain(parse(f"key: {text}\n", "file"))["key"] == [7, 1.0, "007", True, None, 7]


def test_bounds_are_written_out(tmp_path: Path):
    config = "data: {manifest: m.jsonl}\nstudent: {model: student}\nteachers: {textual: {model: teacher}}\n"
    (tmp_path / "k.yaml").write_text(config + f"train: {{seed: {2**63}}}\n")
    with pytest.raises(ConfigError, match=f"{2**63} is out of range; it must be from 0 to {2**63 - 1}"):
        load_config(tmp_path / "k.yaml")


@pytest.mark.parametrize("text", ['"a\\0b"', '"\\ud800"', '{"\\0": 1}'])
def test_texts_that_no_file_can_have_are_refused_with_their_line(text):
    with pytest.raises(ConfigError, match=r"^file:2: .* (holds a NUL character|is not valid Unicode)"):
        parse(f"a: 1\nb: {text}\n", "file")


def test_endless_nesting_is_said(tmp_path):
    for depth in (45, 5000):
        with pytest.raises(ConfigError, match="nested more than 40 deep"):
            parse("a: " + "[" * depth + "]" * depth, "file")


def test_whole_numbers_that_fit_nowhere_are_named(tmp_path):
    assert "train.epochs: 9223372036854775808 is out of range; it must be below 2^63" in problems(
        tmp_path, f"train: {{epochs: {2**63}}}"
    )
    assert "expected a whole number as key" in problems(tmp_path, f"layers: {{map: {{{'9' * 30}: 1}}}}")


def test_a_set_text_with_thousands_of_names_is_refused(tmp_path):
    (tmp_path / "kdpipe.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"write section\.key=value"):
        load_config(tmp_path / "kdpipe.yaml", ["a." * 5000 + "a=1"])
