"""The ledger: commits, and what is on disk after a crash, a full disk, or damage."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kdpipe.data import files
from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject, old_manifests
from kdpipe.data.ledger_rows import Row

REJECT = Reject("bad", "trace", "kb", "audio_silent", "bad.wav is silent")


class Killed(BaseException):
    """Stands for the end of the process: nothing after it may clean up."""


def row(number: int, part: str, key: str = "k", **changes: Any) -> Row:
    fields = {"audio": f"a{number}", "prompt": "p"}
    values = {
        "tokens": 10 + number,
        "length": 100 + number,
        "content": f"c{number}",
        "cover": {"k": 64, "lens": [1, 2]},
    }
    return Row(f"s{number}", "trace", f"{key}{number}", fields, part, number, **{**values, **changes})


def build(tmp: Path, name: str, *, folder: bool = True) -> Path:
    """A finished part in `tmp`."""
    path = tmp / f"built-{name}"
    path.mkdir(parents=True) if folder else path.parent.mkdir(parents=True, exist_ok=True)
    (path / "zarr.json" if folder else path).write_text(name)
    return path


def commit(ledger: Ledger, name: str, numbers: range, **options: Any) -> list[Row]:
    rows = [row(number, name) for number in numbers]
    ledger.commit(rows, built={name: build(ledger.tmp, name)}, **options)
    return rows


def state(ledger: Ledger) -> tuple[dict[tuple[str, str], Row], dict[tuple[str, str], Reject]]:
    return {(r.id, r.source): r for r in ledger.rows()}, {(r.id, r.source): r for r in ledger.rejects()}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "run" / "textualize", tmp_path / "run" / "tmp"


def test_an_empty_folder_is_an_empty_ledger(place):
    ledger = Ledger(*place)
    assert (ledger.digest, *state(ledger)) == (None, {}, {})
    assert ledger.lost_parts() == set() and ledger.unreferenced_parts() == []
    assert not place[0].exists(), "looking leaves no trace"


def test_what_was_committed_is_read_back(place):
    ledger = Ledger(*place)
    rows = commit(ledger, "p1.zarr", range(3), rejects=[REJECT])
    again = Ledger(*place)
    assert again.digest == ledger.digest
    assert state(again) == state(ledger) == ({(r.id, r.source): r for r in rows}, {("bad", "trace"): REJECT})
    assert again.get("s1", "trace") == rows[1] and again.get("s1", "student") is None
    assert again.rejected("bad", "trace") == REJECT and again.rejected("s1", "trace") is None
    assert (again.parts / "p1.zarr" / "zarr.json").read_text() == "p1.zarr"
    assert list(place[1].iterdir()) == []


def test_a_row_replaces_the_old_one_and_a_rejection_replaces_a_row(place):
    ledger = Ledger(*place)
    commit(ledger, "p1.zarr", range(2))
    newer = row(0, "p2.zarr", key="n")
    ledger.commit(
        [newer], built={"p2.zarr": build(place[1], "p2.zarr")}, rejects=[Reject("s1", "trace", "n", "x", "y")]
    )
    rows, rejects = state(Ledger(*place))
    assert rows == {("s0", "trace"): newer}
    assert list(rejects) == [("s1", "trace")]
    ledger.commit([row(1, "p1.zarr")])
    rows, rejects = state(Ledger(*place))
    assert set(rows) == {("s0", "trace"), ("s1", "trace")} and not rejects


def test_drop_forgets_rows_and_rejections(place):
    ledger = Ledger(*place)
    commit(ledger, "p1.zarr", range(2), rejects=[REJECT])
    ledger.commit(drop=[("s0", "trace"), ("bad", "trace"), ("never", "trace")])
    rows, rejects = state(Ledger(*place))
    assert list(rows) == [("s1", "trace")] and not rejects


def test_the_digest_says_what_the_rows_are_in_whatever_order_they_came(place, tmp_path: Path):
    first = Ledger(*place)
    commit(first, "p1.zarr", range(3))
    second = Ledger(tmp_path / "b", tmp_path / "tmp")
    rows = [row(number, "p1.zarr") for number in range(3)]
    for one in reversed(rows):
        second.commit([one])
    assert first.digest == second.digest
    name = f"manifests/{first.digest}.parquet"
    assert (place[0] / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (place[0] / "HEAD").read_text().split()[0] == first.digest


@pytest.mark.parametrize(
    "changes", [{"tokens": 1}, {"length": 1}, {"content": "x"}, {"cover": {"k": 1}}, {"part": "p"}, {"key": "x"}]
)
def test_every_change_of_a_row_is_written(place, changes: dict[str, Any]):
    ledger = Ledger(*place)
    before = commit(ledger, "p1.zarr", range(1))[0]
    old = ledger.digest
    changed = Row(**{**{name: getattr(before, name) for name in Row.__slots__}, **changes})
    ledger.commit([changed])
    assert ledger.digest != old
    assert Ledger(*place).get("s0", "trace") == changed


def test_committing_nothing_new_writes_nothing(place):
    ledger = Ledger(*place)
    rows = commit(ledger, "p1.zarr", range(2), rejects=[REJECT])
    before = {path: path.stat().st_mtime_ns for path in place[0].rglob("*")}
    ledger.commit(rows, rejects=[REJECT])
    assert {path: path.stat().st_mtime_ns for path in place[0].rglob("*")} == before


def test_only_the_current_manifest_is_kept(place):
    ledger = Ledger(*place)
    for number in range(5):
        commit(ledger, f"p{number}.zarr", range(number, number + 1))
        assert [path.stem for path in (place[0] / "manifests").iterdir()] == [ledger.digest]
    ledger.commit(drop=[("s4", "trace")])
    assert Ledger(*place).digest == ledger.digest


def test_a_manifest_that_a_kill_left_behind_goes_with_the_next_commit(place):
    ledger = Ledger(*place)
    commit(ledger, "p0.zarr", range(1))
    left = place[0] / "manifests" / f"{'0' * 32}.parquet"
    left.write_bytes(b"whatever")
    assert old_manifests(place[0], ledger.digest) == [left]
    commit(ledger, "p1.zarr", range(1, 2))
    assert not left.exists() and len(list(left.parent.iterdir())) == 1


def test_a_stage_folder_may_move(place, tmp_path: Path):
    commit(Ledger(*place), "p1.zarr", range(2), rejects=[REJECT])
    expected = state(Ledger(*place))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    moved = Ledger(tmp_path / "elsewhere" / "textualize", tmp_path / "elsewhere" / "tmp")
    assert state(moved) == expected and moved.lost_parts() == set()
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")
    copy = Ledger(tmp_path / "copy" / "textualize", tmp_path / "copy" / "tmp")
    commit(copy, "p2.zarr", range(2, 4))
    assert len(state(copy)[0]) == 4 and state(Ledger(moved.folder, moved.tmp)) == expected
    table = pq.read_table(next((copy.folder / "manifests").glob("*.parquet")))
    assert str(tmp_path) not in str(table.to_pydict()), "no path is written down"


def test_lost_and_unreferenced_parts_are_told(place):
    ledger = Ledger(*place)
    commit(ledger, "p1.zarr", range(2))
    commit(ledger, "p2.zarr", range(2, 4))
    (place[0] / "student").mkdir()
    ledger.commit([Row("s0", "student", "k", {}, "student")])
    shutil.rmtree(ledger.parts / "p1.zarr")
    (ledger.parts / "stray.zarr").mkdir()
    again = Ledger(*place)
    assert again.lost_parts() == {"p1.zarr"}
    assert again.unreferenced_parts() == [ledger.parts / "stray.zarr"]


# A commit makes these calls; one after another is made to fail, or to be the process's last.
CALLS = ("fsync", "replace", "rename")


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Callable[[], int]:
    """Makes the call number `at` of those in `CALLS` raise; gives a function that counts the calls so far."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise error
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(files.os, name, wrap(getattr(files.os, name)))
    return lambda: count


def second_commit(ledger: Ledger) -> None:
    """Replaces a row, adds one, rejects one, forgives one, in a new part."""
    rows = [row(0, "p2.zarr", key="n"), Row("bad", "trace", "n", {}, "p2.zarr", 1)]
    ledger.commit(rows, rejects=[Reject("s1", "trace", "n", "x", "y")], built={"p2.zarr": build(ledger.tmp, "p2.zarr")})


@pytest.fixture
def committed(place) -> tuple[Any, Any]:
    """A stage with one commit; the states before and after `second_commit`."""
    commit(Ledger(*place), "p1.zarr", range(3), rejects=[REJECT])
    before = state(Ledger(*place))
    trial = place[0].with_name("trial")
    shutil.copytree(place[0], trial)
    ledger = Ledger(trial, trial.with_name("trial-tmp"))
    second_commit(ledger)
    after = state(Ledger(ledger.folder, ledger.tmp))
    shutil.rmtree(trial)
    return before, after


def outcomes(place, monkeypatch, error: BaseException, *, clean: bool) -> list[Any]:
    """States that a fresh reader finds after `second_commit` broke off at each of its calls."""
    found = []
    original = place[0].with_name("original")
    shutil.copytree(place[0], original)
    for at in range(1, 100):
        for folder in place:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, place[0])
        ledger = Ledger(*place)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, at, error)
            if not clean:
                patch.setattr(files, "remove", lambda path: None)
            try:
                second_commit(ledger)
            except type(error):
                pass
            else:
                assert calls() < at
                return found
        found.append((state(ledger), Ledger(*place)))
    raise AssertionError("the commit never ends")


def test_a_kill_at_any_step_leaves_the_old_state_or_the_new_one(place, committed, monkeypatch):
    before, after = committed
    found = outcomes(place, monkeypatch, Killed(), clean=False)
    assert len(found) > 10
    rows = [state(ledger)[0] for _, ledger in found]
    switch = next((i for i, r in enumerate(rows) if r == after[0]), len(rows))
    assert all(r == before[0] for r in rows[:switch]) and all(r == after[0] for r in rows[switch:])
    for _, ledger in found:
        assert not ledger.lost_parts()
        rows_now, rejects_now = state(ledger)
        # a rejection may arrive before the rows do, never one that nobody made
        assert set(rejects_now.values()) <= set(before[1].values()) | set(after[1].values())
        assert {*rows_now, *rejects_now} <= {*before[0], *before[1], *after[0], *after[1]}


def test_after_a_kill_at_any_step_the_same_commit_succeeds(place, committed, monkeypatch):
    original = place[0].with_name("original")
    shutil.copytree(place[0], original)
    at, done = 0, False
    while not done:
        at += 1
        for folder in place:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, place[0])
        with monkeypatch.context() as patch:
            interrupt(patch, at, Killed())
            patch.setattr(files, "remove", lambda path: None)
            try:
                second_commit(Ledger(*place))
                done = True
            except Killed:
                pass
        shutil.rmtree(place[1])
        second_commit(Ledger(*place))
        assert state(Ledger(*place)) == committed[1]
        assert (place[0] / "parts" / "p2.zarr" / "zarr.json").read_text() == "p2.zarr"
        assert Ledger(*place).unreferenced_parts() == []
    assert at > 10


def test_a_full_disk_at_any_step_keeps_what_was_there(place, committed, monkeypatch):
    before, after = committed
    found = outcomes(place, monkeypatch, OSError(errno.ENOSPC, "No space left on device"), clean=True)
    assert len(found) > 10
    for in_memory, ledger in found:
        assert in_memory == before, "the object still says what it said"
        assert state(ledger)[0] in (before[0], after[0])
        assert not ledger.lost_parts()
        litter = [path for path in place[1].iterdir() if not path.name.startswith("built-")]
        assert litter == []


def test_a_full_disk_while_a_table_is_written(place, monkeypatch):
    ledger = Ledger(*place)
    commit(ledger, "p1.zarr", range(2))
    before = {path: path.read_bytes() for path in place[0].rglob("*") if path.is_file()}

    def full(writer: pq.ParquetWriter, table: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.commit([row(5, "p1.zarr")], rejects=[REJECT])
    assert {path: path.read_bytes() for path in place[0].rglob("*") if path.is_file()} == before
    assert list(place[1].iterdir()) == []
    ledger.commit([row(5, "p1.zarr")], rejects=[REJECT])
    assert len(state(Ledger(*place))[0]) == 3


def test_kill_9_of_a_real_process(place, tmp_path: Path):
    program = f"""
import itertools
from pathlib import Path
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
ledger = Ledger(Path({str(place[0])!r}), Path({str(place[1])!r}))
for number in itertools.count(len(list(ledger.rows()))):
    built = ledger.tmp / "built"
    built.mkdir(parents=True, exist_ok=True)
    (built / "data").write_text(str(number) * 1000)
    ledger.commit([Row(f"s{{number}}", "trace", "k", {{}}, f"p{{number}}.zarr")], built={{f"p{{number}}.zarr": built}})
    print(number, flush=True)
"""
    done = 0
    for delay in (0.0, 0.004, 0.011):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        ledger = Ledger(*place)
        rows = state(ledger)[0]
        assert len(rows) >= told[-1] + 1 > done, "what was reported as committed is there"
        assert ledger.lost_parts() == set()
        for one in rows.values():
            number = one.id[1:]
            assert (ledger.parts / one.part / "data").read_text() == number * 1000
        done = len(rows)


def test_flipped_bits_in_a_manifest_are_found_and_rejections_are_never_read_wrong(place):
    ledger = Ledger(*place)
    ledger.commit([row(1, "p1.zarr")], rejects=[REJECT])
    expected = state(ledger)
    for name in (f"manifests/{ledger.digest}.parquet", "HEAD", "rejects.parquet"):
        path = place[0] / name
        whole = path.read_bytes()
        for position in range(0, len(whole), 1 if name == "HEAD" else 11):
            torn = bytearray(whole)
            torn[position] ^= 1 << (position % 8)
            path.write_bytes(torn)
            try:
                found = state(Ledger(*place))
            except StoreError as error:
                assert str(place[0]) in str(error) and "Remove" in str(error)
            else:
                assert found == expected, f"{name}: byte {position}"
                assert name != f"manifests/{ledger.digest}.parquet", f"byte {position} went unnoticed"
        path.write_bytes(whole)
    assert state(Ledger(*place)) == expected


@pytest.mark.parametrize("name", ["manifests", "HEAD", "rejects.parquet"])
def test_torn_files_are_named(place, name: str):
    ledger = Ledger(*place)
    ledger.commit([row(1, "p1.zarr")], rejects=[REJECT])
    path = place[0] / name if name != "manifests" else place[0] / "manifests" / f"{ledger.digest}.parquet"
    whole = path.read_bytes()
    for content in (b"", whole[:-1] if name != "HEAD" else whole[:20], whole[: len(whole) // 2], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=path.name):
            Ledger(*place)


def test_a_manifest_that_is_gone_is_named(place):
    ledger = Ledger(*place)
    commit(ledger, "p1.zarr", range(1))
    (place[0] / "manifests" / f"{ledger.digest}.parquet").unlink()
    with pytest.raises(StoreError, match=f"{ledger.digest}.parquet: cannot be read .*HEAD points to it"):
        Ledger(*place)


def test_single_files_serve_as_parts_too(place):
    ledger = Ledger(*place)
    ledger.commit([row(0, "a.parquet")], built={"a.parquet": build(place[1], "a.parquet", folder=False)})
    assert (ledger.parts / "a.parquet").read_text() == "a.parquet"


def test_texts_of_any_kind_survive(place):
    ledger = Ledger(*place)
    odd = Row('s/"ü\n 猫', "trace", "k", {"prompt ü": "näh"}, "p", cover={"temperatures": [1.0, 2.5]})
    ledger.commit([odd], rejects=[Reject("ö", "trace", "k", "r", "zwei\nZeilen")])
    rows, rejects = state(Ledger(*place))
    assert list(rows.values()) == [odd] and rejects["ö", "trace"].detail == "zwei\nZeilen"


def test_a_manifest_that_may_wait_is_written_when_it_is_worth_it_and_by_flush(tmp_path: Path, monkeypatch):
    ledger = Ledger(tmp_path / "stage", tmp_path / "tmp")
    now = [100.0]
    monkeypatch.setattr("kdpipe.data.ledger.time.monotonic", lambda: now[0])
    ledger.commit([row(1, "p")], soon=True)
    assert stored(tmp_path) == {"s1"}, "the first is written at once"
    ledger._cost = 1.0
    (tmp_path / "tmp").mkdir(exist_ok=True)
    (tmp_path / "tmp" / "built").write_text("x")
    ledger.commit([row(2, "p")], built={"part-b": tmp_path / "tmp" / "built"}, soon=True)
    assert stored(tmp_path) == {"s1"} and ledger.get("s2", "trace") is not None
    assert (ledger.parts / "part-b").exists(), "parts are in place at once"
    now[0] += 21
    ledger.commit([row(3, "p")], soon=True)
    assert stored(tmp_path) == {"s1", "s2", "s3"}
    ledger._cost = 1.0
    ledger.commit(rejects=[Reject("d", "trace", "k", "bad", "no")], soon=True)
    assert Ledger(tmp_path / "stage", tmp_path / "tmp").rejected("d", "trace") is None
    ledger.flush()
    assert Ledger(tmp_path / "stage", tmp_path / "tmp").rejected("d", "trace") is not None
    ledger._cost = 1.0
    ledger.commit([row(4, "p")], soon=True)
    ledger.commit([row(5, "p")])
    assert stored(tmp_path) == {"s1", "s2", "s3", "s4", "s5"}, "a commit that may not wait writes what waited too"


def test_rows_that_wait_survive_a_write_that_fails(tmp_path: Path, monkeypatch):
    ledger = Ledger(tmp_path / "stage", tmp_path / "tmp")
    ledger.commit([row(1, "p")], soon=True)
    ledger._cost = 1.0
    ledger.commit([row(2, "p")], soon=True)
    for number, soon in ((3, False), (4, True)):
        ledger._cost = 0.0  # so that it is written now
        with monkeypatch.context() as patch:
            interrupt(patch, 1, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space left"):
                ledger.commit([row(number, "p")], soon=soon)
        assert stored(tmp_path) == {"s1"}
    ledger.flush()
    assert stored(tmp_path) == {"s1", "s2", "s4"}


def stored(tmp_path: Path) -> set[str]:
    return {found.id for found in Ledger(tmp_path / "stage", tmp_path / "tmp").rows()}
