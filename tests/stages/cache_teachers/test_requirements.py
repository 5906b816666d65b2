"""What is found wrong before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from kdpipe.data.errors import ConfigError, VocabularyError
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import (
    AcousticTeacherConfig,
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
    TrainConfig,
    WeightsConfig,
)


def context(student: Path, teacher: Path, hears: Path | None = None, **weights: float) -> Context:
    settings = {"acoustic": 0.0, "layer": 0.0, **weights}
    teachers = TeachersConfig(
        TextualTeacherConfig(ModelConfig(str(teacher))),
        AcousticTeacherConfig(ModelConfig(str(hears)) if hears else None),
        k=10_000,
        temperatures=(2, 0.5),
    )
    config = Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(ModelConfig(str(student))),
        teachers,
        layers=LayersConfig("map", map={9: 1}),
        train=TrainConfig(weights=WeightsConfig(**settings)),
    )
    return Context(config, student.parent)


def other_vocabulary(path: Path, target: Path) -> Path:
    """A copy whose tokenizer swaps two ordinary tokens."""
    shutil.copytree(path, target)
    data = json.loads((target / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    first, second = (next(token for token, index in vocab.items() if index == i) for i in (300, 310))
    vocab[first], vocab[second] = 310, 300
    (target / "tokenizer.json").write_text(json.dumps(data))
    return target


def test_disagreeing_tokenizers_are_found_when_the_stage_is_planned(family, tmp_path):
    ctx = context(family.qwen2_audio, other_vocabulary(family.teacher, tmp_path / "other"))
    with pytest.raises(VocabularyError, match=r"different tokenizers: id 300 is .* in the teacher"):
        STAGE.wanted(ctx, {})


def test_k_and_temperatures(family):
    needs = requirements(context(family.qwen2_audio, family.teacher))
    assert needs.k == needs.alignment.valid - len(needs.alignment.masked) > 400
    assert needs.temperatures == (0.5, 1.0, 2.0)


def test_one_alignment_for_all_teachers(family, tmp_path):
    text = requirements(context(family.qwen2_audio, family.teacher)).alignment
    both = requirements(context(family.qwen2_audio, family.teacher, acoustic_top=1.0)).alignment
    assert both == text
    for weights in ({"acoustic_top": 1.0}, {"sft": 1.0}):
        needs = requirements(context(family.qwen2_audio, family.teacher, top=0.0, **weights))
        assert needs.textual is None and needs.alignment == text, "runs with other weights must share one cache"


def test_models_that_do_not_fit(family):
    with pytest.raises(ConfigError, match=r"student\.model: .* is a text model and cannot hear"):
        requirements(context(family.teacher, family.teacher))
    with pytest.raises(ConfigError, match=r"teachers\.acoustic\.model: .* is a text model"):
        requirements(context(family.qwen2_audio, family.teacher, family.teacher, acoustic=1.0))
    with pytest.raises(ConfigError, match="Their hidden states cannot be compared"):
        requirements(context(family.qwen2_audio, family.teacher, family.qwen2_5_omni, acoustic=1.0))
    with pytest.raises(ConfigError, match="the student has no layer 9"):
        requirements(context(family.qwen2_audio, family.teacher, layer=1.0))
