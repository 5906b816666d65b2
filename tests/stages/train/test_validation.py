"""The held-out loss: right, by task, never trained on, and training does not notice it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config_train import ScheduleConfig, TaskWeightsConfig
from kdpipe.stages.train import loop
from kdpipe.stages.train.held_out import NO_TASK, held_out
from kdpipe.stages.train.metrics import MetricsFile
from kdpipe.stages.train.stage import student_identity
from kdpipe.stages.train.validation import _undisturbed

from .conftest import ready, story

ALL = "all + acoustic + SFT"
FRACTION = 0.4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _split(run: Any) -> tuple[set[str], set[str]]:
    """Ids that are trained on, and ids that are held out."""
    trained = {want.id for want in run.plans()["train"].wanted}
    return trained, {sample.id for sample in run.ctx.samples("train")} - trained


def test_the_share_is_kept_and_grows_around_what_was_held_out() -> None:
    names = [f"{number:032x}" for number in range(4000)]
    tenth, fifth = ({name for name in names if held_out(name, share)} for share in (0.1, 0.2))
    assert 320 < len(tenth) < 480 and 700 < len(fifth) < 900 and tenth < fifth
    assert not any(held_out(name, 0.0) for name in names)


def test_held_out_samples_are_measured_by_hand_and_never_trained_on(
    tasked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "validation_fraction": FRACTION,
        "task_weights": {"ser": TaskWeightsConfig(acoustic=0.4, sft=2.0)},
        "weight_schedule": {"sft": ScheduleConfig()},
        "learning_rate": 0.0,
    }
    run = tasked(ALL)
    run.config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, **settings))
    trained, held = _split(run)
    assert len(held) >= 2 and len(trained) >= 3
    tasks = {sample.id: sample.task for sample in run.ctx.samples("train")}

    given = ready(run, monkeypatch)
    objective, reader, weights = given["objective"], given["reader"], given["weights"]
    state = next(iter(given["stream"]))[0]
    sums: dict[str, dict[str, float]] = {}
    tokens: dict[str, tuple[int, int]] = {}
    for sample in sorted(held):
        batch = reader.load((state, [sample]))
        tokens[sample] = (batch.audio_tokens, batch.response_tokens)
        with torch.no_grad():
            sums[sample] = {name: float(v) for name, v in objective(batch.micros[0], {}).terms.items()}
    over = [sum(counts) for counts in zip(*tokens.values(), strict=True)]
    terms = {
        name: sum(one[name] for one in sums.values()) / over[name != "acoustic"] for name in ("top", "sft", "acoustic")
    }
    loss = sum(
        weights.of(sample)[name] * value / over[name != "acoustic"]
        for sample, one in sums.items()
        for name, value in one.items()
    )

    seen: set[str] = set()
    true = loop.train_step

    def spy(objective, weights, optimizer, batch, number, world):
        seen.update(sample for micro in batch.micros for sample in micro.batch.ids)
        return true(objective, weights, optimizer, batch, number, world)

    monkeypatch.setattr(loop, "train_step", spy)
    metrics = run.train(validate_steps=2, max_steps=3)
    assert seen <= trained
    lines = [line for line in metrics if "validation" in line]
    assert [line["step"] for line in lines] == [2, 3]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    for line in lines:
        found = line["validation"]
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        for name, value in terms.items():
            assert found["terms"][name] == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert {"top", "layer/01", "acoustic/04"} <= set(found["sources"])
        assert found["sources"]["top"]["divergence"] == found["terms"]["top"]
        assert found["samples"] == len(held) and found["response_tokens"] == over[1]
        assert set(found["tasks"]) == {tasks[sample] or NO_TASK for sample in held}
        assert sum(one["samples"] for one in found["tasks"].values()) == len(held)
        assert (found["best_step"], found["best_loss"]) == (2, found["loss"])
    card = (run.student / "README.md").read_text()
    assert f"Held-out loss on {len(held)} samples: {loss:.4f} after step 3; the lowest was" in card
    assert "| loss |" in card


def test_training_does_not_notice_it(cached: Any) -> None:
    often, once = (
        cached(ALL).elsewhere(f"every-{every}", validation_fraction=FRACTION, validate_steps=every)
        for every in (1, 1000)
    )
    first, second = often.train(), once.train()
    steps = [line for line in first if "validation" not in line]
    assert len(steps) >= 3 and len([line for line in second if "validation" in line]) == 1
    assert story(steps) == story(second[:-1])
    assert story(first)[-1] == story(second)[-1] | {"validation": story(first)[-1]["validation"]}
    assert (often.student / "model.safetensors").read_bytes() == (once.student / "model.safetensors").read_bytes()


def test_an_interrupted_run_measures_the_same_and_remembers_the_best(cached: Any) -> None:
    settings = {"validation_fraction": FRACTION, "validate_steps": 1, "checkpoint_steps": 100, "epochs": 3}
    whole, broken = (cached(ALL).elsewhere(f"held-{name}", **settings) for name in ("whole", "cut"))
    whole.train()
    append = MetricsFile.append

    def stopping(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 2 and "validation" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsFile, "append", stopping)
        broken.train()
    broken.train()
    assert "train: goes on after step 2" in broken.said
    assert story(broken.metrics) == story(whole.metrics)
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()
    found = [(line["validation"]["loss"], line["step"]) for line in broken.metrics if "validation" in line]
    last = broken.metrics[-1]["validation"]
    assert (last["best_loss"], last["best_step"]) == min(found) and last["loss"] < found[0][0]


def test_micro_batches_do_not_count(cached: Any) -> None:
    losses = []
    for budget in (100, 100_000):
        run = cached(ALL).elsewhere(f"held-{budget}", validation_fraction=FRACTION, micro_batch_tokens=budget)
        losses.append(run.train(max_steps=1, learning_rate=0.0, global_batch_tokens=100_000)[-1]["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_modes_and_random_states_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[1].eval()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with _undisturbed(model, torch.device("cpu")):
        torch.rand(5)
        assert not model[0].training and not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert model.training and model[0].training and not model[1].training and torch.is_grad_enabled()


def test_keys_and_clips_that_questions_share(cached: Any, tmp_path: Path) -> None:
    shared = cached("SFT only", samples=8)
    shutil.copytree(shared.base, tmp_path / "run")
    run = type(shared)(shared.config, tmp_path / "run")
    run.train(max_steps=1)
    identity = student_identity(run.plans()["train"])
    run.config = dataclasses.replace(
        run.config, train=dataclasses.replace(run.config.train, validation_fraction=FRACTION, max_steps=1)
    )
    plans = run.plans()
    trained, held = _split(run)
    assert held and not plans["cache-teachers"].todo and not plans["textualize"].todo
    assert not plans["train"].todo and {sample for sample, _ in plans["train"].removed} == held
    assert student_identity(plans["train"]) != identity
    run.bring_up_to_date()
    plan = run.plans()["train"]
    assert not plan.todo and not plan.removed and {row.id for row in plan.ledger.rows()} == trained
    assert run.metrics[-1]["validation"]["samples"] == len(held)

    manifest = run.base / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    one_held, one_trained = (next(line for line in lines if line["id"] in ids) for ids in (held, trained))
    lines += [one_held | {"id": "again-held"}, one_trained | {"id": "again-trained"}]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.bring_up_to_date()
    now_trained, now_held = _split(run)
    assert now_held - held == {"again-held"} and now_trained - trained == {"again-trained"}


def test_the_best_student_is_exported_where_that_is_asked_for(cached: Any) -> None:
    """At so high a rate the loss falls, and then rises again."""
    settings = {"validation_fraction": FRACTION, "validate_steps": 1, "epochs": 4, "learning_rate": 3e-2}
    settings |= {"keep_checkpoints": 1, "checkpoint_steps": 1}
    last, best = (cached(ALL).elsewhere(f"export-{name}", export=name, **settings) for name in ("last", "best"))
    metrics = last.train()
    step = metrics[-1]["validation"]["best_step"]
    assert 1 < step < metrics[-1]["step"]
    assert story(best.train()) == story(metrics)
    folders = sorted(path.name for path in (best.ctx.folder("train") / "checkpoints").iterdir())
    assert folders == [f"step-{number:06d}" for number in (step, metrics[-1]["step"])], "both are kept"
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (best, last))
    kept = load_file(next((best.ctx.folder("train") / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")))
    names = [name for name in kept if name.startswith("weights/")]
    assert names
    for name in names:
        own = name.removeprefix("weights/")
        assert torch.equal(ours[f"thinker.{own}"], kept[name])
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"the weights are those after step {step}" in (best.student / "README.md").read_text()
    best.config = dataclasses.replace(best.config, train=dataclasses.replace(best.config.train, export="last"))
    assert best.plans()["train"].todo, "another student is asked for"


def test_a_damaged_best_checkpoint_is_noticed_before_training_goes_on(cached: Any) -> None:
    """Its remedy works: the steps after it are taken again."""
    settings = {"validation_fraction": FRACTION, "validate_steps": 1, "epochs": 5, "learning_rate": 3e-2}
    settings |= {"checkpoint_steps": 1, "keep_checkpoints": 20, "export": "best"}
    whole, broken = (cached(ALL).elsewhere(f"best-{name}", **settings) for name in ("whole", "broken"))
    whole.train()
    step = whole.metrics[-1]["validation"]["best_step"]
    assert 1 < step < whole.metrics[-1]["step"] - 1, "there are others on both sides"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr("kdpipe.stages.train.run.write_student", _no_room)
        broken.train()
    checkpoints = broken.ctx.folder("train") / "checkpoints"
    later = sorted(path for path in checkpoints.iterdir() if path.name > f"step-{step:06d}")
    file = next((checkpoints / f"step-{step:06d}").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    names = re.escape(", ".join(path.name for path in later))
    for _ in range(2):
        with pytest.raises(
            KdpipeError, match=rf"step-{step:06d}: .* Remove this folder and the later ones \({names}\)"
        ):
            broken.train()
    for path in (file.parent, *later):
        shutil.rmtree(path)
    assert story(broken.train()) == story(whole.metrics)
    assert f"train: goes on after step {step - 1}" in broken.said
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def _no_room(*args: Any) -> None:
    raise OSError(28, "no room")
