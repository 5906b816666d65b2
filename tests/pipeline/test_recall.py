"""What the last look found is used as long as nothing it read has moved, and not a moment longer."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdpipe.data import hashing
from kdpipe.data.ledger_files import Reject
from kdpipe.pipeline import recall as module
from kdpipe.pipeline import standing
from kdpipe.pipeline.recall import Recalled, look, recall
from kdpipe.stages.base import Context
from kdpipe.stages.config import Config

from .test_staleness import done  # noqa: F401

NOTE = Path("tmp") / "look.npz"


@pytest.fixture
def run(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Path]:  # noqa: F811
    """A copy of a run that is done, to be changed; files that were just written do not count as doubtful."""
    monkeypatch.setattr(hashing, "RACY_NS", 0)
    monkeypatch.setattr(module, "RACY_NS", 0)
    monkeypatch.setattr(standing, "assembled", lambda ctx: True)
    config, base, _ = done
    shutil.copytree(base, tmp_path / "run", symlinks=True)
    return config, tmp_path / "run"


def keep(run: tuple[Config, Path], *stages: str) -> Recalled:
    look(Context(*run)).keep(stages)
    found = recall(Context(*run))
    assert found is not None
    return found


def test_nothing_moved_and_nothing_is_read(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Context(*run).run_folder
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    assert recall(Context(*run)) is None
    statuses = look(Context(*run)).keep()
    monkeypatch.setattr(hashing, "digest_file", None)
    monkeypatch.setattr(module, "make_plans", None)
    assert recall(Context(*run)) == Recalled(statuses, frozenset())
    assert {status.state for status in statuses} == {"fresh"}


def other_byte(path: Path) -> None:
    """Another content of the same size and modification time."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


MOVES: dict[str, Callable[[Context], object]] = {
    "a clip": lambda ctx: other_byte(ctx.base / "a.wav"),
    "a clip of the evaluation split": lambda ctx: (ctx.base / "c.wav").write_bytes(b"RIFF"),
    "a clip is gone": lambda ctx: (ctx.base / "b.wav").unlink(),
    "the manifest": lambda ctx: other_byte(ctx.base / "manifest.jsonl"),
    "a configuration file of a model": lambda ctx: other_byte(ctx.base / "models/textual/config.json"),
    "one more file of a model": lambda ctx: (ctx.base / "models/student/more.json").write_text("{}"),
    "a model is gone": lambda ctx: shutil.rmtree(ctx.base / "models/tracer"),
    "a part is gone": lambda ctx: shutil.rmtree(ctx.ledger("cache-teachers").parts / "textual.zarr"),
    "a rejection": lambda ctx: ctx.ledger("textualize").commit(rejects=[Reject("given", "trace", "k", "too_long", "")]),
    "a row is dropped": lambda ctx: ctx.ledger("train").commit(drop=[("given", "student")]),
    "scores": lambda ctx: (ctx.folder("evaluate") / "scores.json").write_text("{}"),
    "no HEAD": lambda ctx: (ctx.folder("evaluate") / "HEAD").unlink(),
}


@pytest.mark.parametrize("what", MOVES)
def test_whatever_moves_is_seen(run: Any, what: str) -> None:
    keep(run)
    MOVES[what](Context(*run))
    assert recall(Context(*run)) is None


def test_another_configuration_is_another_run(run: Any) -> None:
    config, base = run
    keep(run)
    other = replace(config, teachers=replace(config.teachers, k=90))
    assert recall(Context(other, base)) is None and recall(Context(config, base)) is not None
    statuses = look(Context(other, base)).keep()
    found = recall(Context(other, base))
    assert found is not None and found.statuses == statuses and statuses[1].state == "stale"
    assert "k 64 -> 90" in statuses[1].reasons[0] and recall(Context(config, base)) is None


def test_a_missing_clip_that_appears(run: Any) -> None:
    _, base = run
    (base / "a.wav").rename(base / "aside.wav")
    stale = keep(run).statuses
    assert stale[0].state == "stale"
    (base / "aside.wav").rename(base / "a.wav")
    assert recall(Context(*run)) is None


def test_a_part_that_is_lost_is_not_noted_down(run: Any) -> None:
    ctx = Context(*run)
    keep(run)
    (ctx.run_folder / NOTE).unlink()
    part = ctx.ledger("cache-teachers").parts / "targets.zarr"
    part.rename(part.with_name("aside"))
    assert look(Context(*run)).keep()[1].state == "stale" and recall(Context(*run)) is None
    part.with_name("aside").rename(part)
    assert {status.state for status in keep(run).statuses} == {"fresh"}


def test_what_was_written_a_moment_ago_is_doubtful(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, base = run
    for path in ("a.wav", "manifest.jsonl"):
        shutil.copy(base / path, base / "new")
        os.replace(base / "new", base / path)
        look(Context(*run)).keep()
        assert recall(Context(*run)) is None
    future = time.time() + 1000
    os.utime(base / "manifest.jsonl", (future, future))
    time.sleep(hashing.RACY_NS / 1e9)
    look(Context(*run)).keep()
    assert recall(Context(*run)) is None, "the clock went back: nobody knows when the next change comes"
    os.utime(base / "manifest.jsonl", (1e9, 1e9))
    time.sleep(hashing.RACY_NS / 1e9 + 0.1)
    keep(run)


def test_result_files_are_part_of_done(run: Any) -> None:
    ctx = Context(*run)
    (ctx.run_folder / "kdpipe.lock").write_text("a")
    assert keep(run, "train", "textualize").done == {"train", "textualize"}
    (ctx.run_folder / "kdpipe.lock").unlink()
    found = recall(ctx)
    assert found is not None and found.done == frozenset()


def test_a_damaged_note_is_none(run: Any) -> None:
    keep(run)
    note = Context(*run).run_folder / NOTE
    whole = note.read_bytes()
    for content in (b"", b"PK", whole[:-30], whole[:100], b"\x93NUMPY" + whole[6:], json.dumps({}).encode()):
        note.write_bytes(content)
        assert recall(Context(*run)) is None
    for place in range(0, len(whole), 41):
        note.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = recall(Context(*run))
        assert found is None or {status.state for status in found.statuses} == {"fresh"}
    note.unlink()
    note.mkdir()
    assert recall(Context(*run)) is None
    assert {status.state for status in look(Context(*run)).keep()} == {"fresh"}
