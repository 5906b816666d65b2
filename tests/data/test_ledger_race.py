"""A reader beside a committer: manifests are swapped and pruned under it, and it never sees a broken state."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdpipe.data import ledger as module
from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "textualize", tmp_path / "tmp"
    commit(folders, 0)
    return folders


def commit(place: tuple[Path, Path], *numbers: int) -> None:
    """One commit a number, by another object on the same folder; each prunes the older manifests."""
    ledger = Ledger(*place)
    for number in numbers:
        ledger.commit([Row(f"s{number}", "trace", "k", {}, "p.parquet", number)])


def ids(ledger: Ledger) -> set[str]:
    return {row.id for row in ledger.rows()}


def meddle(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, place: tuple[Path, Path]) -> list[int]:
    """Three commits before the first call of a function that the reader uses; gives the calls made."""
    real, calls = getattr(owner, name), []

    def meddled(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, real)
                commit(place, 1, 2, 3)
        return real(*args)

    monkeypatch.setattr(owner, name, meddled)
    return calls


@pytest.mark.parametrize(("owner", "name"), [(module, "digest_file"), (module.Rows, "read")])
def test_a_manifest_pruned_after_head_was_read_is_followed_to_the_new_one(place, monkeypatch, owner: Any, name: str):
    """Whether the reader has checked the manifest's digest by then or not."""
    (old,) = (place[0] / "manifests").iterdir()
    calls = meddle(monkeypatch, owner, name, place)
    found = Ledger(*place)
    assert not old.exists() and len(calls) > 1
    assert ids(found) == {"s0", "s1", "s2", "s3"}
    assert found.digest == (place[0] / "HEAD").read_text().split()[0]


def test_what_is_broken_for_good_is_still_an_error(place, monkeypatch):
    """Though `HEAD` moves once while it is read: the new one points to nothing either."""
    real, tried = module.digest_file, []

    def gone(path: Path) -> str:
        tried.append(path)
        if len(tried) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(module, "digest_file", real)
                commit(place, 1, 2, 3)
        raise FileNotFoundError(2, "No such file", str(path))

    monkeypatch.setattr(module, "digest_file", gone)
    with pytest.raises(StoreError, match="HEAD points to it"):
        Ledger(*place)
    assert len(set(tried)) == len(tried) == 2


COMMITTER = """
import sys
from pathlib import Path
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    ledger.commit([Row("s0", "trace", f"k{number}", {}, "p.parquet", number)])
"""


def test_a_reader_beside_a_busy_process_sees_one_state_after_another(place):
    command = [sys.executable, "-c", COMMITTER, *map(str, place)]
    committer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert committer.stdout is not None and committer.stdout.readline() == "ready\n"
        seen, end = [], time.monotonic() + 30
        while len(set(seen)) < 20 and time.monotonic() < end:
            (row,) = Ledger(*place).rows()
            seen.append(row.row)
        assert committer.poll() is None
    finally:
        committer.kill()
        committer.wait()
        assert committer.stdout is not None
        committer.stdout.close()
    assert seen == sorted(seen) and len(set(seen)) > 5, "commits went on while the ledger was read"
