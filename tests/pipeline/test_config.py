"""The configuration: strict YAML, every mistake at once, overrides, and what is identity."""

import dataclasses
from pathlib import Path

import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.pipeline.config import load_config
from kdpipe.pipeline.reference import reference
from kdpipe.pipeline.starter import RECIPES, starter_text, write_starter
from kdpipe.pipeline.strict_yaml import parse, plain
from kdpipe.stages.config import Config, identity_of

MINIMAL = """\
data:
  manifest: m.jsonl
student:
  model: student
teachers:
  textual:
    model: teacher
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kdpipe.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E3", -2000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("12:30:45", "12:30:45"),
        ("2026-11-22", "2026-11-22"),
        ("007", "007"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text, value):
    result = plain(parse(f"key: {text}\n", "file"))["key"]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "file:3: a is given twice (first on line 1)"),
        ("a: [1, 2\n", "file:2: not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: &x\n  b: *x\n", "an alias refers to itself"),
        ("? [1, 2]\n: 3\n", "a key must be a single word"),
    ],
)
def test_bad_yaml_names_line_and_cause(text, words):
    with pytest.raises(ConfigError) as caught:
        plain(parse(text, "file"))
    assert words in str(caught.value)


def test_minimal_configuration_gets_the_documented_defaults(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config.student.model.path == "student"
    assert config.describer == config.tracer == config.acoustic == config.student.model
    assert dataclasses.asdict(config.train.weights) == {
        "top": 1.0, "layer": 0.05, "acoustic": 0.05, "acoustic_top": 0.0, "sft": 0.5,
    }  # fmt: skip
    assert (config.train.learning_rate, config.train.epochs) == (1e-5, 3)
    assert (config.evaluate.temperature, config.evaluate.top_k, config.evaluate.top_p) == (0.6, 5, 0.5)


def test_all_mistakes_are_reported_at_once_with_line_and_remedy(tmp_path):
    text = MINIMAL + (
        "train:\n  learning_rat: 1e-4\n  epochs: many\n  divergence: kl\n  beta: 1.5\n  betas: 0.9\n"
        "evaluate: [1]\nspeling: 1\n"
    )
    found = problems(tmp_path, text)
    assert found == [
        "kdpipe.yaml:9: train.learning_rat is not a known key; did you mean learning_rate?",
        "kdpipe.yaml:10: train.epochs: expected a whole number, got 'many'",
        "kdpipe.yaml:11: train.divergence: 'kl' is none of forward_kl, reverse_kl, jsd, tvd, skew_kl, skew_reverse_kl, "
        "sampled_ce",
        "kdpipe.yaml:12: train.beta: 1.5 is out of range; it must be from 0 to 1",
        "kdpipe.yaml:13: train.betas: expected a list, got 0.9; write [0.9]",
        "kdpipe.yaml:14: evaluate: expected a section with keys, got a list",
        "kdpipe.yaml:15: speling is not a known key",
    ]


def test_missing_sections_are_named(tmp_path):
    assert problems(tmp_path, "data: {}\n") == [
        "kdpipe.yaml:1: data.manifest is missing",
        "kdpipe.yaml:1: student is missing",
        "kdpipe.yaml:1: teachers is missing",
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("train: {temperature: 2}", "train.temperature 2 is not cached; add it to teachers.temperatures"),
        ("train: {weights: {top: 0, layer: 0, acoustic: 0, sft: 0}}", "all are zero"),
        ("train: {head_form: triton, device: cpu}", "triton needs a CUDA device and train.device is cpu"),
        ("train: {divergence: sampled_ce}", "teachers.draws is 0; set teachers.draws"),
        ("  device_map: auto\n  tensor_parallel_size: 2", "shares each of them; say one of the two"),
        ("  device_map: auto\n  device: cpu", "teachers.device is cpu; leave one of them out"),
        ("layers: {mode: map}", "give at least one"),
        ("layers: {map: {1: 2}}", "set layers.mode: map"),
        ("layers: {mode: map, map: {one: 2}}", "expected a whole number as key"),
        ("textualize: {describe: {prompt: '{qestion}'}}", "{qestion} is not a field"),
        ("textualize: {trace: {sections: [PLAN, PLAN]}}", "textualize.trace.sections"),
        ("train: {learning_rate: .nan}", "must be a finite number"),
        ("train: {global_batch_tokens: 10}", "larger than train.global_batch_tokens"),
        ("run: {folder: no, cache: 3}", "run.cache: expected text"),
    ],
)
def test_relations_between_fields(tmp_path, lines, words):
    assert words in "\n".join(problems(tmp_path, MINIMAL + lines + "\n"))


def test_all_that_vllm_cannot_give_of_the_textual_teacher_is_said_at_once(tmp_path):
    served = MINIMAL + "    engine: vllm\n"
    asked = "  temperatures: [1, 2]\n  tail_blocks: 8\n  draws: 5\n"
    found = problems(tmp_path, served + asked)
    assert [text.split(":")[1].strip() for text in found] == [
        "teachers.temperatures", "teachers.tail_blocks", "teachers.draws", "train.weights.layer",
    ]  # fmt: skip
    assert all("teachers.textual.engine is vllm" in text and "engine: transformers" in text for text in found)
    assert "set train.weights.layer: 0" in found[-1]
    config = load_config(
        write(tmp_path, served + "  temperatures: [1]\n  serve: {max_num_seqs: 8}\ntrain: {weights: {layer: 0}}\n")
    )
    assert config.teachers.serve.max_num_seqs == 8
    assert identity_of(config.teachers)["serve"] == {}
    assert load_config(write(tmp_path, MINIMAL + asked)).teachers.textual.engine == "transformers"


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, ["train.learning_rate=2e-4", "train.weights.sft=0.25", "layers.map={1: 2}", "layers.mode=map"]
    )
    assert (config.train.learning_rate, config.train.weights.sft, config.layers.map) == (2e-4, 0.25, {1: 2})
    assert problems(tmp_path, MINIMAL, "train.epoch=2", "nonsense") == [
        "--set nonsense: write section.key=value",
        "--set: train.epoch is not a known key; did you mean epochs?",
    ]


def test_model_as_text_or_section(tmp_path):
    text = MINIMAL.replace("model: student", "model: {path: student, revision: abc, dtype: float32}")
    model = load_config(write(tmp_path, text)).student.model
    assert (model.path, model.revision, model.dtype, model.trust_remote_code) == ("student", "abc", "float32", False)


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="kdpipe init"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_valid_configuration(tmp_path, recipe):
    path = tmp_path / "new" / "kdpipe.yaml"
    write_starter(path, recipe, force=False)
    config = load_config(path)
    weights, mode = RECIPES[recipe]
    assert config.layers.mode == mode
    assert {name: getattr(config.train.weights, name) for name in weights} == {n: float(v) for n, v in weights.items()}
    with pytest.raises(ConfigError, match="--force"):
        write_starter(path, recipe, force=False)


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="choose one of"):
        starter_text("best")


def test_starter_shows_the_defaults(tmp_path):
    """Where the starter states a value that is not a choice for its models, it is the default."""
    path = tmp_path / "kdpipe.yaml"
    path.write_text(starter_text("acoustic"))
    shown, bare = load_config(path), load_config(write(tmp_path, MINIMAL))
    assert shown.train == bare.train
    assert shown.evaluate == bare.evaluate
    assert shown.layers == bare.layers


def test_execution_fields_are_not_identity(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    identity = identity_of(config)
    assert identity["run"] == {}
    assert "micro_batch_tokens" not in identity["train"] and "global_batch_tokens" in identity["train"]
    assert "batch_tokens" not in identity["teachers"] and "k" in identity["teachers"]
    assert "gpu_memory_utilization" not in identity["textualize"]["engine"]


def test_configuration_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run `python -m kdpipe.pipeline.reference > docs/configuration.md`"


def test_every_field_is_documented():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []
    assert dataclasses.is_dataclass(Config)


def test_weights_by_task_and_schedules(tmp_path):
    text = MINIMAL + (
        "train:\n  task_weights: {ser: {acoustic: 0.2, top: 0.5}, aqa: }\n"
        "  weight_schedule: {acoustic: {start: 1, end: 0, until: 0.5}}\n"
    )
    train = load_config(write(tmp_path, text)).train
    assert dataclasses.asdict(train.weights_of("ser")) == {
        **dataclasses.asdict(train.weights),
        "acoustic": 0.2,
        "top": 0.5,
    }
    assert train.weights_of("aqa") == train.weights_of("other") == train.weights_of(None) == train.weights
    schedule = train.weight_schedule["acoustic"]
    assert (schedule.kind, schedule.start, schedule.end, schedule.after, schedule.until) == ("linear", 1, 0, 0, 0.5)
    assert identity_of(train)["task_weights"]["ser"]["top"] == 0.5


def test_mistakes_in_weights_by_task_and_schedules(tmp_path):
    text = MINIMAL + (
        "train:\n  task_weights: {ser: {acustic: 0.2, top: -1}}\n  weight_schedule: {acustic: {end: 0}, sft: {kind: x}}"
    )
    found = problems(tmp_path, text)
    assert len(found) == 4 and "train.task_weights.ser.acustic is not a known key" in found[0]
    assert "train.task_weights.ser.top: -1 is out of range" in found[1]
    assert "train.weight_schedule.acustic: 'acustic' is none of top, layer" in found[2]
    assert "did you mean acoustic?" in found[2] and "'x' is none of linear, cosine" in found[3]
    text = MINIMAL + "train: {weight_schedule: {acoustic_top: {}, sft: {after: 0.5, until: 0.25}}}"
    found = problems(tmp_path, text)
    assert "train.weight_schedule.acoustic_top: the weight of acoustic_top is zero" in found[0]
    assert "train.weight_schedule.sft: after, 0.5, is more than until, 0.25" in found[1]
