"""The tables of a ledger: what is found of damage that no checksum in a Parquet file covers."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data import ledger_files
from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest
from kdpipe.data.ledger_files import (
    Reject,
    is_as_written,
    read_rejects,
    write_rejects,
    write_rows,
)
from kdpipe.data.ledger_rows import Row, Rows

REJECT = Reject("bad", "trace", "kb", "audio_silent", "bad.wav is silent")
ROWS = [Row(f"s{n}", "trace", f"k{n}", {"audio": f"a{n}"}, "p.zarr", n, 10 + n, cover={"k": 64}) for n in range(2)]


@pytest.fixture
def rejects(tmp_path: Path) -> Path:
    path = tmp_path / "rejects.parquet"
    write_rejects(path, [REJECT], tmp_path)
    return path


def test_rows_are_read_back_in_one_order(tmp_path: Path):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    write_rows(one, Rows.of(ROWS), tmp_path)
    write_rows(other, Rows.of(reversed(ROWS)), tmp_path)
    assert one.read_bytes() == other.read_bytes() and is_as_written(one)
    assert list(Rows.read(one)) == ROWS and Rows.of(reversed(ROWS)).digest() == Rows.read(one).digest()


def test_memory_of_a_manifest_is_that_of_its_rows(tmp_path: Path):
    shared, count = {f"name{n}": digest(n) for n in range(10)}, 12_000  # three batches
    names = Names(shared, {"question": 0, "content": 1})
    rows = [
        Row(f"s{n}", "textual", digest(n), Fields(names, (digest([n]), digest([n, n]))), "p", n, 10, n)
        for n in range(count)
    ]
    path = tmp_path / "manifest.parquet"
    write_rows(tmp_path / "first.parquet", Rows.of(rows[:1]), tmp_path)  # which imports what it needs
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        made = Rows.of(rows)
        named = made.digest()
        write_rows(path, made, tmp_path)
        written = tracemalloc.get_traced_memory()[1] / count
        del made
        tracemalloc.reset_peak()
        found = Rows.read(path)
        columns = (pa.total_allocated_bytes() - before) / count
        assert found.digest() == named
        peak = tracemalloc.get_traced_memory()[1] / count
    finally:
        tracemalloc.stop()
    assert list(found) == rows and is_as_written(path)
    assert written < 450, f"{written:.0f} bytes a row to write, as Python's objects"
    assert columns < 160, f"{columns:.0f} bytes a row held in columns; as objects it was 650"
    assert peak < 300, f"{peak:.0f} bytes a row to read and prove, as objects; it was 1,100"


def test_manifests_of_earlier_releases_are_read(tmp_path: Path):
    """All named digests of a row were one JSON text."""
    rows = [*ROWS, dataclasses.replace(ROWS[0], id="other", fields={"question": "q", "audio": "a"})]
    made = next(Rows.of(rows).tables(10))
    made = made.drop_columns([name for name in made.column_names if name.startswith(("fields.", "held_", "made_"))])
    path = tmp_path / "old.parquet"
    texts = [json.dumps(row.fields) for row in sorted(rows, key=lambda row: (row.row, row.id))]
    pq.write_table(made.append_column("fields", pa.array(texts)), path, write_page_checksum=True)
    found = Rows.read(path)
    assert sorted(found, key=lambda row: row.id) == sorted(rows, key=lambda row: row.id)
    assert found.digest() == Rows.of(rows).digest() and is_as_written(path)
    marked = [dataclasses.replace(row, made_with="torch 2") for row in rows]
    assert Rows.of(marked).digest() != found.digest()
    named = digest(
        [
            (r.id, r.source, r.key, r.part, r.row, r.tokens, r.length, r.cover, r.content)
            for r in sorted(rows, key=lambda row: row.id)
        ]
    )
    assert found.digest() == named, "they keep the names of their files"


@pytest.mark.parametrize("count", [0, 1, 8192, 8193, 20_000])
def test_manifests_of_this_and_earlier_releases_are_as_written(tmp_path: Path, count: int):
    """Earlier ones wrote all rows in one group."""
    rows = [dataclasses.replace(ROWS[0], id=f"s{n}", row=n, key=digest(n)) for n in range(count)]
    path, older = tmp_path / "new.parquet", tmp_path / "old.parquet"
    write_rows(path, Rows.of(rows), tmp_path)
    assert list(Rows.read(path)) == rows and is_as_written(path)
    assert pq.read_metadata(path).num_row_groups == max(1, -(-count // 8192))
    pq.write_table(pq.read_table(path).combine_chunks(), older, write_page_checksum=True)
    assert list(Rows.read(older)) == rows and is_as_written(older)
    assert (older.read_bytes() == path.read_bytes()) == (count <= 8192)
    pq.write_table(pq.read_table(path), older, write_page_checksum=True, row_group_size=5000)
    assert is_as_written(older) == (count <= 5000), "nobody writes so"


def test_every_flip_in_rejections_is_found(rejects: Path):
    assert is_as_written(rejects) and read_rejects(rejects) == [REJECT]
    whole = rejects.read_bytes()
    for position in range(len(whole)):
        rejects.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            sound = is_as_written(rejects) and read_rejects(rejects) == [REJECT]
        except ValueError:
            sound = False
        assert not sound, f"byte {position}"


def test_a_table_of_another_pyarrow_counts_as_written_unless_it_contradicts_itself(rejects: Path, monkeypatch):
    monkeypatch.setattr(ledger_files, "_this_writer", lambda: "parquet-cpp-arrow version 1.0.0")
    assert is_as_written(rejects)
    monkeypatch.setattr(pq, "read_metadata", lambda path: SimpleNamespace(created_by="parquet-cpp-arrow version 2.0.0"))
    assert not is_as_written(rejects)


@pytest.mark.parametrize("read", [Rows.read, read_rejects, is_as_written])
def test_a_folder_is_no_table(tmp_path: Path, read):
    (tmp_path / "table.parquet").mkdir()
    with pytest.raises(ValueError, match="a folder, not a file"):
        read(tmp_path / "table.parquet")
