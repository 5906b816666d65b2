"""A clip that is edited while the student trains: what comes after the edit is not recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.checkpoint import Checkpoints
from kdpipe.stages.train.metrics import MetricsFile

CHANGED = r"clips/00\.wav: changed while the stage was running"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(cached: Any, tmp_path: Path) -> Any:
    """A run up to the teacher store whose clips are its own."""
    shared = cached("SFT only", samples=4)
    shutil.copytree(shared.base, tmp_path / "run")
    return type(shared)(shared.config, tmp_path / "run")


def edit(run: Any) -> None:
    clip = run.base / "clips" / "00.wav"
    content = bytearray(clip.read_bytes())
    content[-1] ^= 1
    clip.write_bytes(content)


def checkpoints(run: Any) -> list[str]:
    return sorted(path.name for path in (run.ctx.folder("train") / "checkpoints").iterdir())


def test_no_checkpoint_follows_an_edit(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append = MetricsFile.append

    def edit_after_the_second_step(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 2:
            edit(run)

    monkeypatch.setattr(MetricsFile, "append", edit_after_the_second_step)
    with pytest.raises(KdpipeError, match=CHANGED):
        run.train(checkpoint_steps=1, keep_checkpoints=9, epochs=4, max_steps=4)
    assert checkpoints(run) == ["step-000001"]
    assert not run.student.exists() and not list(run.ctx.ledger("train").rows())
    assert run.plans()["train"].todo, "the edited sample waits for the stages before"


def test_no_student_follows_an_edit_after_the_last_checkpoint(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def edit_after_saving(self: Checkpoints, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        edit(run)

    monkeypatch.setattr(Checkpoints, "save", edit_after_saving)
    with pytest.raises(KdpipeError, match=CHANGED):
        run.train(max_steps=1)
    assert checkpoints(run) == ["step-000001"]
    assert not run.student.exists() and not list(run.ctx.ledger("train").rows())
