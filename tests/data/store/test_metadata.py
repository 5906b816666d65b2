"""The ledger rebuilt from parts, and parts that must not be believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.format import ArraySpec
from kdpipe.data.store.metadata import load_attributes, metadata_digest, part_rows, rows_from_parts
from kdpipe.data.store.writer import PartWriter

from .conftest import World, make_world


def clips(path: Path, key: str = "key", tokens: int = 3) -> Path:
    writer = PartWriter(path, source="acoustic", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={})
    shared = {"fields": {"audio": "x"}, "cover": {"hidden": [1]}, "content": "c"}
    writer.append(
        "clip", key, {"target_ids": np.zeros(tokens, np.uint32)}, {**shared, "samples": [{"id": "a"}, {"id": "b"}]}
    )
    writer.append("alone", "k2", {"target_ids": np.zeros(1, np.uint32)}, {**shared, "samples": []})
    writer.close()
    return path


def test_rows_say_all_that_the_ledger_knows(world: World):
    rows = part_rows(world.path)
    assert len(rows) == 5
    assert rows[2] == Row(
        id="s2",
        source="textual",
        key="key-s2",
        fields={"prompt": "p", "audio": "s2"},
        part="a.zarr",
        row=2,
        tokens=17,
        length=24,
        content="s2",
        cover={"k": 12},
    )
    assert {row.part for row in part_rows(world.path, "other.zarr")} == {"other.zarr"}


def test_a_clip_gives_a_row_to_each_sample_it_serves(tmp_path: Path):
    expected = [
        Row(sample, "acoustic", "key", {"audio": "x"}, "a.zarr", 0, 3, 0, "c", {"hidden": [1]}) for sample in "ab"
    ]
    assert part_rows(clips(tmp_path / "a.zarr")) == expected


def test_a_lost_ledger_is_rebuilt_from_its_parts(tmp_path: Path):
    ledger = Ledger(tmp_path / "stage", tmp_path / "tmp")
    for number in range(3):
        built = make_world(tmp_path / "tmp" / "b", seed=number, name=f"p{number}s").path
        ledger.commit(part_rows(built, f"p{number}.zarr"), built={f"p{number}.zarr": built})
    ledger.commit(part_rows(clips(tmp_path / "tmp" / "c"), "c.zarr"), built={"c.zarr": tmp_path / "tmp" / "c"})
    (ledger.folder / "HEAD").unlink()
    rebuilt = Ledger(ledger.folder, ledger.tmp)
    assert not list(rebuilt.rows())
    rebuilt.commit(rows_from_parts(rebuilt.parts))
    assert rebuilt.digest == ledger.digest
    assert {(row.id, row.source): row for row in rebuilt.rows()} == {(row.id, row.source): row for row in ledger.rows()}


def test_of_two_parts_with_one_sample_the_newest_comes_last(tmp_path: Path):
    for age, name in enumerate(("a", "c", "b")):
        clips(tmp_path / f"{name}.zarr", key=f"key-{name}")
        os.utime(tmp_path / f"{name}.zarr" / "zarr.json", (1e9 - age, 1e9 - age))
    (tmp_path / "notes.txt").touch()
    assert [row.key for row in rows_from_parts(tmp_path) if row.id == "a"] == ["key-b", "key-c", "key-a"]
    assert list(rows_from_parts(tmp_path / "absent")) == []


def test_another_format_version_is_refused_before_anything_else(world: World):
    file = world.path / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["kdpipe"] = {"format": 1}
    file.write_text(json.dumps(root))
    with pytest.raises(
        StoreError, match=r"written in format 1, and this kdpipe reads format 2\. Remove the part folder"
    ):
        load_attributes(world.path)


def test_metadata_that_was_edited_is_refused(world: World):
    file = world.path / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["kdpipe"]["units"][0]["id"] = "s1"
    file.write_text(json.dumps(root))
    with pytest.raises(StoreError, match="digest of the metadata does not match"):
        load_attributes(world.path)


def test_layout_of_the_json_does_not_count(world: World):
    before = metadata_digest(world.path)
    for file in world.path.rglob("zarr.json"):
        file.write_text(json.dumps(json.loads(file.read_text()), separators=(",", ":"), sort_keys=True))
    assert metadata_digest(world.path) == before == load_attributes(world.path)["metadata"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"attributes": {}}', '{"attributes": {"kdpipe": 3}}', "\xff"])
def test_other_files_are_no_parts(tmp_path: Path, content: str):
    part = tmp_path / "a.zarr"
    part.mkdir()
    (part / "zarr.json").write_text(content, encoding="latin-1")
    clips(tmp_path / "b.zarr")
    for read in (load_attributes, part_rows):
        with pytest.raises(StoreError, match=r"a\.zarr/zarr\.json: not the metadata of a part"):
            read(part)
    assert {row.part for row in rows_from_parts(tmp_path)} == {"b.zarr"}, "a lost ledger is made of what can be read"
    (part / "zarr.json").unlink()
    for read in (load_attributes, part_rows):
        with pytest.raises(StoreError, match=r"zarr\.json: missing"):
            read(part)
    assert {row.part for row in rows_from_parts(tmp_path)} == {"b.zarr"}
