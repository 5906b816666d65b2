"""The map from student to teacher layers."""

import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.stages.cache_teachers.layers import acoustic_layers, layer_map
from kdpipe.stages.config import (
    AcousticTeacherConfig,
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
)


def test_the_papers_map():
    assert layer_map(LayersConfig("skip", 7), 28, 36) == {7: 9, 14: 18, 21: 27, 28: 36}
    assert layer_map(LayersConfig("top"), 28, 36) == {28: 36}
    every = layer_map(LayersConfig("all"), 28, 36)
    assert list(every) == list(range(1, 29)) and every[28] == 36 and every[1] == 1
    assert list(every.values()) == sorted(every.values())


def test_halves_go_up_where_pythons_round_goes_to_even():
    assert round(4.5) == 4
    assert layer_map(LayersConfig("all"), 4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert layer_map(LayersConfig("all"), 4, 2) == {1: 1, 2: 1, 3: 2, 4: 2}


def test_no_student_layer_is_without_a_teacher():
    assert layer_map(LayersConfig("all"), 12, 2)[1] == 1


def test_an_explicit_map_is_checked_as_a_whole():
    assert layer_map(LayersConfig("map", map={4: 6, 1: 3}), 4, 6) == {1: 3, 4: 6}
    with pytest.raises(ConfigError) as error:
        layer_map(LayersConfig("map", map={0: 1, 5: 7, 2: 2}), 4, 6)
    assert error.value.problems == [
        "layers.map: the student has no layer 0; its layers are 1 to 4.",
        "layers.map: the student has no layer 5; its layers are 1 to 4.",
        "layers.map: the teacher has no layer 7; its layers are 1 to 6.",
    ]
    with pytest.raises(ConfigError, match="is empty"):
        layer_map(LayersConfig("map"), 4, 6)


def test_skipping_everything_is_an_error():
    with pytest.raises(ConfigError, match=r"layers\.every: 7 chooses no layer of a student with 4"):
        layer_map(LayersConfig("skip", 7), 4, 6)
    assert layer_map(LayersConfig("all", 7), 4, 6)


@pytest.mark.parametrize(("which", "expected"), [("all", (1, 2, 3, 4)), ("skip", (2, 4))])
def test_acoustic_layers(which, expected):
    model = ModelConfig("x")
    teachers = TeachersConfig(TextualTeacherConfig(model), AcousticTeacherConfig(layers=which))
    config = Config(DataConfig("m"), StudentConfig(model), teachers, layers=LayersConfig("all", every=2))
    assert acoustic_layers(config, 4) == expected
    far = Config(DataConfig("m"), StudentConfig(model), teachers, layers=LayersConfig("all", every=9))
    if which == "skip":
        with pytest.raises(ConfigError, match="chooses no layer"):
            acoustic_layers(far, 4)
