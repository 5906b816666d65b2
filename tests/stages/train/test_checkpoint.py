"""Checkpoints: complete or absent, and of the right run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kdpipe.data.errors import KdpipeError, StoreError
from kdpipe.stages.config import TrainConfig
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.optimizer import Optimizer
from kdpipe.stages.train.world import World

ALONE = World.alone("cpu")


def _optimizer(seed: int = 0) -> Optimizer:
    torch.manual_seed(seed)
    layer = nn.Linear(4, 3)
    optimizer = Optimizer(dict(layer.named_parameters()), {}, TrainConfig(learning_rate=0.1), 10)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step(0)
    return optimizer


def _save(folder: Path, step: int, best: int | None = None) -> None:
    with _writer(folder) as checkpoints:
        checkpoints.save(_optimizer(), step, {"digest": "s", "batch": step}, best)


def _writer(folder: Path, identity: str = "a", keep: int = 2) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(folder / "checkpoints", folder / "tmp", identity=identity, keep=keep, world=ALONE)


def _find(folder: Path, say: Callable[[str], None] = print) -> checkpoint.Checkpoint | None:
    return checkpoint.find(folder / "checkpoints", folder / "tmp", "a", "s", say)


def _last(folder: Path) -> checkpoint.Checkpoint:
    found = _find(folder)
    assert found is not None
    return found


def _steps(folder: Path) -> list[int]:
    return [checkpoint.read(folder / "checkpoints" / name).step for name in _names(folder)]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_everything_comes_back_as_it_was_when_the_checkpoint_was_asked_for(tmp_path: Path) -> None:
    optimizer = _optimizer()
    before = {name: value.clone() for name, value in optimizer.tensors().items()}
    with _writer(tmp_path) as checkpoints:
        checkpoints.save(optimizer, 3, {"digest": "s"})
        with torch.no_grad():
            for value in optimizer.tensors().values():
                value.fill_(99.0)
    found = _last(tmp_path)
    assert (found.step, found.stream) == (3, {"digest": "s"}) and list(found.files)
    other = _optimizer(seed=1)
    checkpoint.load(found, other, ALONE)
    after = other.tensors()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    files = list((tmp_path / "checkpoints" / "step-000001").iterdir())
    assert sorted(path.suffix for path in files) == [".json", ".safetensors"]


def test_the_last_ones_and_the_best_are_kept_and_come_by_step(tmp_path: Path) -> None:
    for step in (1, 9, 10):
        _save(tmp_path, step)
    assert _names(tmp_path) == ["step-000009", "step-000010"]
    for step in (11, 12, 13):
        _save(tmp_path, step, best=10)
    assert _steps(tmp_path) == [10, 12, 13] and _last(tmp_path).step == 13
    _save(tmp_path, 14, best=14)
    assert _names(tmp_path) == ["step-000013", "step-000014"]


def test_those_of_another_run_are_removed_aloud(tmp_path: Path) -> None:
    said: list[str] = []
    for step, identity, stream in ((1, "b", "s"), (2, "a", "t"), (3, "a", "s")):
        with _writer(tmp_path, identity, keep=3) as checkpoints:
            checkpoints.save(_optimizer(), step, {"digest": stream})
    state = tmp_path / "checkpoints" / "step-000003" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 1}))
    assert not _find(tmp_path, said.append)
    assert said == [
        "train: step-000001 is of another configuration or other data: removed",
        "train: step-000002 is of another order of the data: removed",
        "train: step-000003 is of another release: removed",
    ]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(KdpipeError, match=r"a checkpoint could not be written .*No space left.*make room"):
        _save(tmp_path, 2)
    assert _steps(tmp_path) == [1]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(
        KdpipeError, match=r"could not be written to .*checkpoints \(rank 0: \[Errno 28\] No space left on device\)"
    ):
        _save(tmp_path, 2)
    assert _steps(tmp_path) == [1]
    monkeypatch.undo()
    _save(tmp_path, 2)
    assert _steps(tmp_path) == [1, 2]


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    saved = _last(tmp_path)
    (file,) = (saved.folder / name for name in saved.files)
    whole = file.read_bytes()
    for damaged in (whole[:-8], b"x" * len(whole)):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"step-000001: the checkpoint cannot be read .*Remove this folder"):
            checkpoint.load(saved, _optimizer(), ALONE)
    file.unlink()
    with pytest.raises(StoreError, match=r"step-000001: the checkpoint cannot be read .*Remove this folder"):
        checkpoint.load(saved, _optimizer(), ALONE)
    (saved.folder / "state.json").write_text("{")
    with pytest.raises(StoreError, match="step-000001"):
        _find(tmp_path)


def test_weights_are_restored_into_a_whole_model(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    expected = _optimizer().weights
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    checkpoint.restore(layer, _last(tmp_path))
    assert torch.equal(layer.weight, expected["weight"].to(torch.bfloat16))
    with pytest.raises(StoreError, match="cannot be read"):
        checkpoint.restore(nn.Linear(5, 3), _last(tmp_path))


@pytest.mark.parametrize("change", [{"files": {"a": None}}, {"step": float("inf")}, {"stream": 5}, {"files": []}])
def test_a_state_of_other_types_is_damage(tmp_path, change):
    place = tmp_path / "step-000001"
    place.mkdir()
    state = {"format": 2, "identity": "i", "step": 1, "stream": {"digest": "s"}, "files": {}}
    (place / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(StoreError, match="the checkpoint cannot be read"):
        checkpoint.read(place)
