"""Checkpoints: complete or absent, and of the right run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kdpipe.data.errors import StoreError
from kdpipe.stages.config import TrainConfig
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.optimizer import Optimizer


def _optimizer(seed: int = 0) -> Optimizer:
    torch.manual_seed(seed)
    layer = nn.Linear(4, 3)
    optimizer = Optimizer(dict(layer.named_parameters()), {}, TrainConfig(learning_rate=0.1), 10)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step(0)
    return optimizer


def _save(tmp_path: Path, step: int, identity: str = "a", stream: str = "s") -> checkpoint.Checkpoint:
    return checkpoint.save(
        tmp_path / "checkpoints",
        tmp_path / "tmp",
        _optimizer(),
        identity=identity,
        step=step,
        stream={"digest": stream, "batch": step},
        keep=2,
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    optimizer = _optimizer()
    torch.manual_seed(7)
    saved = checkpoint.save(
        tmp_path / "c", tmp_path / "tmp", optimizer, identity="a", step=3, stream={"digest": "s"}, keep=1
    )
    found = checkpoint.find(tmp_path / "c", "a", "s", print)
    assert found == saved
    other = _optimizer(seed=1)
    checkpoint.load(found, other)
    for name, weight in optimizer.weights.items():
        assert torch.equal(weight, other.weights[name])
    assert all(torch.equal(value, other.state()[name]) for name, value in optimizer.state().items())


def test_the_last_ones_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (1, 9, 10):
        _save(tmp_path, step)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000009", "step-000010"]
    found = checkpoint.find(tmp_path / "checkpoints", "a", "s", print)
    assert found is not None and found.step == 10


def test_those_of_another_run_are_removed_aloud(tmp_path: Path) -> None:
    said: list[str] = []
    _save(tmp_path, 1, identity="b")
    _save(tmp_path, 2, stream="t")
    assert checkpoint.find(tmp_path / "checkpoints", "a", "s", said.append) is None
    assert said == [
        "train: step-000001 is of another configuration or other data: removed",
        "train: step-000002 is of another order of the data: removed",
    ]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_nothing_unfinished_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    assert not list((tmp_path / "tmp").iterdir())
    found = checkpoint.find(tmp_path / "checkpoints", "a", "s", print)
    assert found is not None and found.step == 1


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    (saved.folder / "optimizer.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(StoreError, match=r"step-000001: the checkpoint cannot be read .*Remove this folder"):
        checkpoint.load(saved, _optimizer())
    (saved.folder / "state.json").write_text("{")
    with pytest.raises(StoreError, match="step-000001"):
        checkpoint.find(tmp_path / "checkpoints", "a", "s", print)
