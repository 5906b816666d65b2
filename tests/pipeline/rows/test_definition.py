"""The rows as changes to a configuration."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.pipeline.config import load_config
from kdpipe.pipeline.derived import write_configuration
from kdpipe.pipeline.rows.definition import NO_TASK_WEIGHTS, ROWS, choose, refuse_missing_weights, settings, widest
from kdpipe.pipeline.runner import Request
from kdpipe.pipeline.starter import RECIPES

CONFIG = """\
data: {manifest: m.jsonl}
student: {model: {path: student, dtype: float32}}
teachers: {textual: {model: teacher}}
layers: {mode: map, map: {1: 2}}
train:
  weights: {top: 1.5, layer: 0.05, acoustic: 0.1, sft: 0.5}
  task_weights: {ser: {acoustic_top: 2, sft: 0}}
  weight_schedule: {acoustic: {start: 1, end: 0}, sft: {start: 0.5, end: 1}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "kdpipe.yaml").write_text(CONFIG)
    return tmp_path / "kdpipe.yaml"


def test_the_rows_are_those_of_the_paper_and_one_more():
    assert list(ROWS) == ["base", "sft", "top", "skip", "all", "acoustic", "ours"]
    for name, (weights, mode) in RECIPES.items():
        assert set(ROWS[name].terms) - {"acoustic_top"} == {term for term, weight in weights.items() if float(weight)}
        assert ROWS[name].mode == mode


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.trains])
def test_a_row_turns_terms_off_and_leaves_weights_as_they_are(file, tmp_path, name):
    config, row = load_config(file), ROWS[name]
    changed = load_config(file, ["evaluate.model=other", *settings(config, row, 3, tmp_path / "r o'w 😀", tmp_path)])
    for term in ("top", "layer", "acoustic", "sft"):
        assert getattr(changed.train.weights, term) == (getattr(config.train.weights, term) if term in row.terms else 0)
    assert changed.train.task_weights == (config.train.task_weights if name == "ours" else {})
    assert set(changed.train.weight_schedule) == {"acoustic", "sft"} & set(row.terms)
    assert (changed.train.seed, changed.layers.mode) == (3, row.mode)
    assert (changed.run.folder, changed.run.cache) == (str(tmp_path / "r o'w 😀"), str(tmp_path))
    assert not changed.evaluate.base and changed.evaluate.model is None


def test_base_scores_the_untouched_model(file, tmp_path):
    config = load_config(file)
    changed = load_config(file, settings(config, ROWS["base"], 0, tmp_path, tmp_path))
    assert changed.evaluate.model == config.student.model


def test_one_pass_of_the_teachers_serves_all_rows(file):
    config = load_config(file)
    everything = load_config(file, widest(config, ROWS.values()))
    assert everything.layers.mode == "all" and everything.train.weights.acoustic == 0.1
    assert everything.train.task_weights == config.train.task_weights
    some = load_config(file, widest(config, choose(["base", "top", "skip"])))
    assert some.layers.mode == "skip" and some.train.weights.acoustic == 0 and some.train.task_weights == {}


def test_rows_that_cannot_be_had_are_refused_together(file):
    config = load_config(file, ["train.weights.layer=0", "train.task_weights={}"])
    with pytest.raises(ConfigError) as refused:
        refuse_missing_weights(config, ROWS.values())
    assert [problem.split(";")[0] for problem in refused.value.problems] == [
        "row skip: train.weights.layer is 0",
        "row all: train.weights.layer is 0",
        "row acoustic: train.weights.layer is 0",
        "row ours: " + NO_TASK_WEIGHTS.split(";")[0],
    ]
    refuse_missing_weights(config, choose(["base", "sft", "top"]))


def test_rows_are_chosen_by_name_in_the_order_of_the_table():
    assert [row.name for row in choose(["top", "base"])] == ["base", "top"]
    for names in (["base", "best"], []):
        with pytest.raises(ConfigError, match="is no row; there are base, sft"):
            choose(names)


def test_a_row_has_a_configuration_of_its_own_that_says_the_same(file, tmp_path):
    for name in ("student", "data"):
        (tmp_path / name).mkdir()
    file.write_text(file.read_text().replace("m.jsonl", "data/m.jsonl"))
    place = tmp_path / "rows" / "ours" / "seed-2"
    place.mkdir(parents=True)
    request = Request(file, settings(load_config(file), ROWS["ours"], 2, place, tmp_path))
    written = write_configuration(request)
    assert written == place / "kdpipe.yaml"
    mine, theirs = Request(written).context(), request.context()
    assert (mine.run_folder, mine.cache_folder) == (theirs.run_folder, theirs.cache_folder)
    for path in ("data.manifest", "student.model.path"):
        section, _, key = path.rpartition(".")
        one, other = (ctx.base / getattr(attrgetter(section)(ctx.config), key) for ctx in (mine, theirs))
        assert one.resolve() == other.resolve()
    assert mine.config.teachers == theirs.config.teachers, "a hub name stays as it is"
    assert (mine.config.train, mine.config.layers) == (theirs.config.train, theirs.config.layers)
