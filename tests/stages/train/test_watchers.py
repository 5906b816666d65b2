"""What people watch: the same lines everywhere, without doubled steps, and training does not notice it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.data.errors import ConfigError, KdpipeError
from kdpipe.stages.train.metrics import MetricsFile, missing_watchers, read_metrics
from kdpipe.stages.train.stage import STAGE
from kdpipe.stages.train.watchers import bar_text, named, peak_memory, watch

from .conftest import story

LINE = {
    "step": 3,
    "loss": 2.5,
    "terms": {"top": 0.5, "sft": 2.0},
    "sources": {"layer/03": {"divergence": 0.25}},
    "learning_rate": 1e-5,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _interrupted(run: Any) -> None:
    """Trains, is killed in spirit after step 3 was logged (its checkpoint is of step 2), and trains on."""
    append = MetricsFile.append

    def dying(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 4:
            raise OSError("power lost")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KdpipeError, match="power lost"):
        patch.setattr(MetricsFile, "append", dying)
        run.train()
    run.train()
    assert "train: goes on after step 2" in run.said


def _expected(run: Any) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for line in run.metrics:
        for name, value in named(line).items():
            series.setdefault(name, []).append((line["step"], value))
    return series


def test_names_of_charts() -> None:
    assert named(LINE) == {
        "train/loss": 2.5,
        "train/terms/top": 0.5,
        "train/terms/sft": 2.0,
        "train/sources/layer/03/divergence": 0.25,
        "train/learning_rate": 1e-5,
    }
    assert named({"step": 3, "validation": {"loss": 1.0, "tasks": {"ser": {"loss": 2.0}}}, "seconds": 1}) == {
        "validation/loss": 1.0,
        "validation/tasks/ser/loss": 2.0,
    }


def test_the_bar_tells_all() -> None:
    text = bar_text(2.5, {"top": 0.5, "sft": 2.0}, 0.25, 1e-5, 1234.4, 0.021, 3 * 2**30)
    assert text == "loss 2.5000 (top 0.5, sft 2), grad 0.25, lr 1.00e-05, 1234 tok/s, data 2 %, 3.00 GiB"
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40


def test_lines_tell_the_memory(cached: Any) -> None:
    (line,) = cached("SFT only").elsewhere("memory").train(max_steps=1)
    assert 0.05 < line["peak_memory_gib"] < 1000


@pytest.mark.parametrize("kind", ["nothing", "a folder of that name"])
def test_what_is_missing_is_said_with_the_command(
    cached: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        if name != "wandb":
            return true(name, *rest)
        return None if kind == "nothing" else importlib.util.spec_from_loader("wandb", loader=None)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert missing_watchers(()) == []
    words = "train.log_to: wandb is not installed here. Run `pip install wandb`, or leave it out."
    assert missing_watchers(("wandb",)) == [words]
    run = cached("SFT only").elsewhere("missing")
    with pytest.raises(ConfigError, match="pip install wandb"):
        run.train(log_to=("wandb",))
    assert not run.ctx.folder("train").exists(), "nothing was loaded, nothing written"
    assert run.plans()["train"].todo and STAGE.name == "train"


def test_nothing_more_is_imported_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with watch((), tmp_path / "train", tmp_path / "tmp", 0, "a", {}) as watchers:
        watchers.append(LINE)
    assert read_metrics(tmp_path / "train" / "metrics.jsonl") == [LINE]


def test_tensorboard_shows_one_series_after_a_crash(cached: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"checkpoint_steps": 2, "validation_fraction": 0.4, "validate_steps": 2, "epochs": 4, "max_steps": 5}
    run = cached("top + SFT").elsewhere("tensorboard", log_to=("tensorboard",), **settings)
    _interrupted(run)
    shown = EventAccumulator(str(run.ctx.folder("train") / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = _expected(run)
    assert set(shown.Tags()["scalars"]) == set(expected) and "validation/best_loss" in expected
    for name in ("train/loss", "train/terms/top", "train/sources/top/agreement", "validation/loss"):
        events = [(event.step, event.value) for event in shown.Scalars(name)]
        assert [step for step, _ in events] == [step for step, _ in expected[name]]
        assert [value for _, value in events] == pytest.approx([value for _, value in expected[name]], rel=1e-6)

    plain = cached("top + SFT").elsewhere("unwatched", **settings)
    assert story(plain.train()) == story(run.metrics)
    assert (plain.student / "model.safetensors").read_bytes() == (run.student / "model.safetensors").read_bytes()
    run.train(learning_rate=1e-4)
    shown = EventAccumulator(str(run.ctx.folder("train") / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5], "another run begins anew"


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a `.wandb` file: a LevelDB log after 7 bytes, in blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def _offline(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Run id and history of every line in the offline files of a folder, in the order they were written."""
    from wandb.proto import wandb_internal_pb2

    lines = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        identifier = ""
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.HasField("run"):
                identifier = record.run.run_id
            if record.HasField("history"):
                items = record.history.item
                lines.append((identifier, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}))
    return lines


def test_wandb_offline_keeps_one_series_after_a_crash(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"checkpoint_steps": 2, "validation_fraction": 0.4, "validate_steps": 2, "epochs": 4, "max_steps": 5}
    run = cached("top + SFT").elsewhere("wandb", log_to=("wandb",), **settings)
    _interrupted(run)
    lines = _offline(run.ctx.folder("train"))
    assert len({identifier for identifier, _ in lines}) == 1
    for name in ("train/loss", "train/terms/top", "validation/loss"):
        series = [(items["step"], items[name]) for _, items in lines if name in items]
        assert series == _expected(run)[name]
    handler = signal.getsignal(signal.SIGINT)
    run.train(learning_rate=1e-4, max_steps=1)
    assert len({identifier for identifier, _ in _offline(run.ctx.folder("train"))}) == 2, "another run is another run"
    assert signal.getsignal(signal.SIGINT) is handler and os.environ["WANDB_MODE"] == "offline"
