"""What makes a student stale, and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import soundfile

from kdpipe.data.errors import ConfigError, KdpipeError
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.config import AcousticTeacherConfig, LayersConfig, WeightsConfig
from kdpipe.stages.train.stage import STAGE, student_identity
from kdpipe.stages.train.terms import resolve_terms

ALL = "all + acoustic + SFT"


def _stale(run: Any) -> set[str]:
    return {want.id for want in run.plans()["train"].todo}


@pytest.fixture(scope="module")
def trained(cached: Any) -> Any:
    """A run of its own, trained, whose inputs may be changed."""
    run = cached(ALL, samples=4)
    run.train(max_steps=1)
    assert not _stale(run)
    return run


def _with(run: Any, section: str, **changes: Any) -> Any:
    return replace(run, config=replace(run.config, **{section: replace(getattr(run.config, section), **changes)}))


def test_rows_are_committed_last_under_one_identity(trained: Any) -> None:
    plan = trained.plans()["train"]
    rows = list(plan.ledger.rows())
    assert {row.id for row in rows} == {"s00", "s01", "s02", "s03"}
    assert {(row.source, row.part, row.content) for row in rows} == {("student", "student", student_identity(plan))}
    names = {"version", "objective", "optimization", "student", "prompt", "audio", "span", "question", "choices"}
    assert set(rows[0].fields) == names | {"targets", "textual", "acoustic"}


@pytest.mark.parametrize(
    ("section", "changes", "fields"),
    [
        ("train", {"learning_rate": 1e-4}, {"optimization"}),
        ("train", {"freeze": ("embeddings",)}, {"optimization"}),
        ("train", {"max_steps": 2}, {"optimization"}),
        ("train", {"divergence": "forward_kl"}, {"objective"}),
        ("train", {"beta": 0.3}, {"objective"}),
        ("train", {"weights": WeightsConfig(sft=0.6)}, {"objective"}),
        ("layers", {"distance": "mse"}, {"objective"}),
        ("teachers", {"k": 8}, {"objective"}),
        ("layers", {"mode": "map", "map": {4: 6}}, {"objective"}),
    ],
    ids=str,
)
def test_a_changed_setting_makes_every_sample_stale(
    trained: Any, section: str, changes: dict[str, Any], fields: set[str]
) -> None:
    plan = _with(trained, section, **changes).plans()["train"]
    assert {want.id for want in plan.todo} == {"s00", "s01", "s02", "s03"}
    for want in plan.todo:
        row = plan.ledger.get(want.id, "student")
        assert want.pending is None
        assert {name for name, value in want.fields.items() if row.fields[name] != value} == fields


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("train", {"micro_batch_tokens": 77}),
        ("train", {"checkpoint_steps": 1, "keep_checkpoints": 5, "log_steps": 9, "gradient_checkpointing": True}),
        ("train", {"scale_by_temperature_squared": False}),
        ("layers", {"mode": "map", "map": {1: 2, 2: 3, 3: 5, 4: 6}}),
        ("layers", {"every": 3}),
        ("teachers", {"batch_tokens": 9}),
    ],
    ids=str,
)
def test_what_cannot_change_the_student_makes_nothing_stale(
    trained: Any, section: str, changes: dict[str, Any]
) -> None:
    assert not _stale(_with(trained, section, **changes))


def test_a_weight_of_zero_makes_its_settings_irrelevant(trained: Any) -> None:
    def terms(weights: WeightsConfig, layers: LayersConfig = LayersConfig(), beta: float = 0.5, k: int = 64) -> Any:  # noqa: B008
        run = _with(_with(trained, "train", weights=weights, beta=beta), "teachers", k=k)
        run = replace(run, config=replace(run.config, layers=layers))
        return resolve_terms(run.config, requirements(run.ctx)).identity()

    sft = WeightsConfig(top=0, layer=0, acoustic=0)
    assert terms(sft) == terms(sft, LayersConfig(match="hidden", distance="mse"), beta=0.1, k=3)
    top = WeightsConfig(layer=0, acoustic=0)
    assert terms(top) == terms(top, LayersConfig(mode="skip", every=2, distance="mse"))
    assert terms(top) != terms(top, beta=0.1) and terms(top) != terms(top, k=3)
    heard = WeightsConfig(top=0, layer=0)
    assert terms(heard) == terms(heard, LayersConfig(mode="top"), beta=0.1, k=3)
    assert terms(heard) != terms(heard, LayersConfig(distance="mse"))
    with pytest.raises(ConfigError, match="nothing to learn"):
        terms(WeightsConfig(top=0, layer=0, acoustic=0, sft=0))


def test_changing_one_clip_stales_one_sample_and_the_student_is_made_anew_from_all(trained: Any) -> None:
    clip = trained.base / "clips" / "02.wav"
    samples, rate = soundfile.read(clip)
    soundfile.write(clip, samples * 0.5, rate)
    plan = trained.plans()["train"]
    assert [(want.id, want.pending) for want in plan.todo] == [("s02", "textualize")]
    with pytest.raises(KdpipeError, match=r"textualize is not done for 1 samples and 3 are ready. Run `kdpipe train`"):
        STAGE.run(trained.ctx, plan.todo)
    from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
    from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE

    trained.bring_up_to_date(TEXTUALIZE)
    assert [(want.id, want.pending) for want in trained.plans()["train"].todo] == [("s02", "cache-teachers")]
    trained.bring_up_to_date(CACHE_TEACHERS)
    plan = trained.plans()["train"]
    assert [(want.id, want.pending) for want in plan.todo] == [("s02", None)]
    before = plan.ledger.get("s02", "student").fields
    changed = {name for name, value in plan.todo[0].fields.items() if before[name] != value}
    assert changed == {"audio", "acoustic"}, "the trace came out as before, and so did the targets"
    trained.bring_up_to_date()
    assert not _stale(trained)
    contents = {row.content for row in trained.ctx.ledger("train").rows()}
    assert contents == {student_identity(trained.plans()["train"])}


def test_a_sample_that_upstream_rejects_is_no_longer_wanted(trained: Any) -> None:
    manifest = trained.base / "manifest.jsonl"
    text = manifest.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    (trained.base / "clips" / "empty.wav").write_bytes(b"")
    lines[1]["audio"] = "clips/empty.wav"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
    from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE

    run = _with(trained, "data", max_reject_fraction=1.0)
    run.bring_up_to_date(TEXTUALIZE, CACHE_TEACHERS)
    plan = run.plans()["train"]
    assert {want.id for want in plan.wanted} == {"s00", "s02", "s03"}
    assert plan.removed == [("s01", "student")] and not plan.todo
    run.bring_up_to_date()
    plan = run.plans()["train"]
    assert not plan.todo and not plan.removed
    manifest.write_text(text)


def test_a_crash_between_student_and_ledger_leaves_no_rows_of_the_old_student(
    cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdpipe.stages.train import run as module

    run = cached("SFT only", samples=4).elsewhere("crash", max_steps=1)
    run.train()
    assert not any("will be replaced" in line for line in run.said)
    true = module.move_into_place

    def crashing(built: Any, target: Any) -> None:
        true(built, target)
        raise OSError("power lost")

    monkeypatch.setattr(module, "move_into_place", crashing)
    with pytest.raises(OSError, match="power lost"):
        run.train(learning_rate=1e-4)
    (warned,) = [line for line in run.said if "will be replaced" in line]
    assert "--set run.folder=NAME --set run.cache=." in warned
    run.config = replace(run.config, train=replace(run.config.train, learning_rate=2e-3))
    assert run.student.exists() and _stale(run) == {"s00", "s01", "s02", "s03"}


def test_float16_is_refused_before_anything_is_loaded(cached: Any) -> None:
    run = cached("SFT only", samples=4)
    run = _with(run, "student", model=replace(run.config.student.model, dtype="float16"))
    with pytest.raises(KdpipeError, match=r"student\.model\.dtype: gradients underflow in float16"):
        STAGE.run(run.ctx, [])


def test_acoustic_layers_are_part_of_the_objective(trained: Any) -> None:
    teachers = replace(trained.config.teachers, acoustic=AcousticTeacherConfig(layers="skip"))
    run = replace(trained, config=replace(trained.config, teachers=teachers, layers=LayersConfig(every=2)))
    assert resolve_terms(run.config, requirements(run.ctx)).acoustic_layers == (2, 4)


def test_the_stage_is_light() -> None:
    code = (
        "import sys, kdpipe.stages.train.stage; "
        "print([name for name in ('torch', 'transformers', 'vllm', 'datasets', 'zarr') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
