"""Parts: what is committed when, in which order, and what reading them finds."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from kdpipe.data.errors import KdpipeError, Rejected, StoreError
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.config import Config, DataConfig, ModelConfig, StudentConfig, TeachersConfig, TextualTeacherConfig
from kdpipe.stages.textualize.parts import Parts, read_records


@pytest.fixture
def ctx(tmp_path):
    rows = [{"id": f"s{n}", "audio": f"{n}.wav", "question": "What?"} for n in range(5)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(5):
        (tmp_path / f"{n}.wav").write_bytes(b"RIFF")
    model = ModelConfig("none")
    return Context(
        Config(DataConfig("manifest.jsonl"), StudentConfig(model), TeachersConfig(TextualTeacherConfig(model))),
        tmp_path,
    )


def wants(*keys: str) -> list[Wanted]:
    return [Wanted(f"s{n}", "trace", {"question": key}) for n, key in enumerate(keys)]


def make(ctx: Context, todo: list[Wanted], size: int) -> Parts:
    return Parts(ctx, "textualize", todo, size=size, to_table=lambda records: pa.Table.from_pylist(list(records)))


def finish(parts: Parts, want: Wanted) -> None:
    parts.done(want, {"id": want.id, "key": want.key, "text": want.id.upper()}, tokens=3, content=f"c-{want.id}")


def test_a_part_is_committed_when_its_last_sample_is_done_in_the_order_of_todo(ctx):
    todo = wants("a", "b", "c", "d", "e")
    parts = make(ctx, todo, 2)
    finish(parts, todo[3])
    finish(parts, todo[1])
    assert not list(ctx.ledger("textualize").rows())
    finish(parts, todo[0])
    assert {row.id: row.row for row in ctx.ledger("textualize").rows()} == {"s0": 0, "s1": 1}
    parts.reject(todo[2], Rejected("audio_silent", "silent"))
    finish(parts, todo[4])
    ledger = ctx.ledger("textualize")
    assert {row.id: (row.row, row.tokens, row.content) for row in ledger.rows()} == {
        "s0": (0, 3, "c-s0"),
        "s1": (1, 3, "c-s1"),
        "s3": (0, 3, "c-s3"),
        "s4": (0, 3, "c-s4"),
    }
    reject = ledger.rejected("s2", "trace")
    assert reject is not None
    assert (reject.reason, reject.key) == ("audio_silent", todo[2].key)
    assert {row.id: record["text"] for row, record in read_records(ledger)} == {
        "s0": "S0",
        "s1": "S1",
        "s3": "S3",
        "s4": "S4",
    }
    assert not list(ctx.tmp("textualize").glob("*.parquet"))


def test_a_rejection_that_was_dear_to_find_is_committed_at_once(ctx):
    todo = wants("a", "b", "c")
    parts = make(ctx, todo, 3)
    finish(parts, todo[0])
    parts.reject(todo[1], Rejected("engine_died", "twice"))
    ledger = ctx.ledger("textualize")
    assert [(reject.id, reject.reason) for reject in ledger.rejects()] == [("s1", "engine_died")]
    assert not list(ledger.rows())
    finish(parts, todo[2])
    ledger = ctx.ledger("textualize")
    assert {row.id for row in ledger.rows()} == {"s0", "s2"} and len(list(ledger.rejects())) == 1


def test_the_same_work_gives_the_same_names_and_another_sample_another(ctx):
    names = []
    for _ in range(2):
        todo = wants("same", "same")
        parts = make(ctx, todo, 1)
        for want in reversed(todo):
            finish(parts, want)
        names.append({row.id: row.part for row in ctx.ledger("textualize").rows()})
    assert names[0] == names[1]
    assert names[0]["s0"] != names[0]["s1"]


def test_a_part_of_rejections_alone_leaves_no_file(ctx):
    todo = wants("a")
    make(ctx, todo, 4).reject(todo[0], Rejected("audio_missing", "gone"))
    assert not (ctx.folder("textualize") / "parts").exists()
    assert ctx.ledger("textualize").rejected("s0", "trace") is not None


def test_a_clip_that_changed_meanwhile_stops_the_commit(ctx):
    todo = wants("a")
    clip = ctx.base / "0.wav"
    ctx.prints.file(clip)
    parts = make(ctx, todo, 1)
    clip.write_bytes(b"RIFF and more")
    with pytest.raises(KdpipeError, match=r"0\.wav"):
        finish(parts, todo[0])
    assert not list(ctx.ledger("textualize").rows())


def test_a_rejection_of_a_clip_that_changed_meanwhile_is_not_recorded(ctx):
    """It would stand against the new bytes' sample though nobody heard them; the good ones wait with it."""
    todo = wants("a", "b")
    clip = ctx.base / "1.wav"
    ctx.prints.file(clip)
    parts = make(ctx, todo, 2)
    finish(parts, todo[0])
    clip.write_bytes(b"RIFF and more")
    with pytest.raises(KdpipeError, match=r"1\.wav: changed while the stage was running"):
        parts.reject(todo[1], Rejected("audio_truncated", "cut"))
    ledger = ctx.ledger("textualize")
    assert not list(ledger.rows()) and not list(ledger.rejects())


def test_a_damaged_part_is_named(ctx):
    todo = wants("a")
    finish(make(ctx, todo, 1), todo[0])
    ledger = ctx.ledger("textualize")
    (part,) = ledger.parts.iterdir()
    good = part.read_bytes()
    part.write_bytes(good[: len(good) // 2])
    with pytest.raises(StoreError, match=part.name):
        list(read_records(ledger))
    other = wants("b")
    finish(make(ctx, other, 1), other[0])
    (now,) = [path for path in ledger.parts.iterdir() if path != part]
    now.write_bytes(good)
    with pytest.raises(StoreError, match="is not sample 's0'"):
        list(read_records(ctx.ledger("textualize")))
