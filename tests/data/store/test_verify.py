"""Verifying a store: every flipped bit is found, named and mended, and sound stores are left alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.mend import DAMAGED, examine, mend, size_of
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.shard import METADATA
from kdpipe.data.store.verify import PartCheck

from .conftest import flip
from .small import LENGTHS, SOURCES, Small, make_small

STEPS = {".json": 61, ".parquet": 3}
"""Of a `zarr.json` each 61st byte is changed, and other ones in the next file, which is much like it; `test_ledger`
changes every byte of a `rejects.parquet`."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def store(original: Small, tmp_path: Path) -> Small:
    shutil.copytree(original.folder.parent, tmp_path / "run")
    return Small(tmp_path / "run" / "cache-teachers", original.logits)


def check_part(part: Path) -> list:
    check = PartCheck(part)
    return check.damages + [found for job in check.jobs() for found in job(lambda count: None)]


def flips(file: Path, number: int) -> Iterator[tuple[int, int]]:
    """Positions and bits: one bit of every byte of array data, and all bits of a short file."""
    size = file.stat().st_size
    step = STEPS.get(file.suffix, 1)
    for position in range(number % step, size, step):
        yield from ((position, bit) for bit in (range(8) if size < 80 else [(position + number) % 8]))


def state(ledger: Ledger) -> dict[tuple[str, str], Row]:
    return {(row.id, row.source): row for row in ledger.rows()}


def test_a_sound_store_is_sound(store: Small):
    told: list[int] = []
    findings = examine(store.folder, told.append)
    assert findings.damages == () and not findings.is_lost
    assert findings.parts == len(SOURCES) and findings.bytes == size_of(store.folder)
    assert 0 < sum(told) < findings.bytes
    assert mend(store.folder, store.tmp, findings) == [] and not (store.folder / DAMAGED).exists()


def test_an_empty_store_is_sound(tmp_path: Path):
    assert examine(tmp_path / "cache-teachers").damages == ()


@pytest.mark.parametrize("source", SOURCES)
def test_every_flip_in_a_part_is_found_and_names_the_file(store: Small, source: str):
    part = store.folder / "parts" / f"{source}.zarr"
    assert check_part(part) == []
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        whole = file.read_bytes()
        for position, bit in flips(file, number):
            flip(file, position, bit)
            found = check_part(part)
            assert found, f"{file}: bit {bit} of byte {position}"
            assert all(damage.aside == part for damage in found)
            assert file in {damage.file for damage in found}, (position, bit, found)
            file.write_bytes(whole)
    assert len(files) > 3 and check_part(part) == []


@pytest.mark.parametrize("name", ["HEAD", "rejects.parquet", "manifest"])
def test_every_flip_beside_the_parts_is_found_and_mended(original: Small, tmp_path: Path, name: str):
    """With one small part, for speed; the part has no say in it."""
    store = make_small(tmp_path / "run", sources=["targets"])
    expected = state(store.ledger), set(store.ledger.rejects())
    file = next((store.folder / "manifests").iterdir()) if name == "manifest" else store.folder / name
    whole = file.read_bytes()
    for position, bit in flips(file, 0):
        flip(file, position, bit)
        findings = examine(store.folder)
        assert file in {damage.file for damage in findings.damages}, f"bit {bit} of byte {position}"
        assert not any(damage.part for damage in findings.damages)
        if position % 90 == 0:
            moved = mend(store.folder, store.tmp, findings)
            assert moved[0][0] == file and moved[0][1].read_bytes() != whole
            assert state(store.ledger) == expected[0]
            assert set(store.ledger.rejects()) == (set() if name == "rejects.parquet" else expected[1])
            assert examine(store.folder).damages == ()
            if name != "rejects.parquet":
                assert file.read_bytes() == whole, "the same rows give the same bytes"
        file.write_bytes(whole)
    assert examine(store.folder).damages == ()


def damaged_shard(store: Small) -> Path:
    file = store.folder / "parts" / "textual.zarr" / "top" / "logprob" / "c" / "0" / "0"
    flip(file, 3)
    return file


def test_a_damaged_part_is_set_aside_and_only_its_samples_are_stale(store: Small):
    file, before = damaged_shard(store), state(store.ledger)
    (damage,) = (findings := examine(store.folder)).damages
    assert (damage.file, damage.part, damage.samples) == (file, "textual.zarr", tuple(LENGTHS))
    assert "checksum does not match, chunk 0" in damage.what
    moved = mend(store.folder, store.tmp, findings)
    assert moved == [(store.folder / "parts" / "textual.zarr", store.folder / DAMAGED / "textual.zarr")]
    assert state(store.ledger) == before and store.ledger.lost_parts() == {"textual.zarr"}
    (damage,) = examine(store.folder).damages
    assert damage.what == "missing (set aside before, and not made anew yet)" and damage.aside is None
    shutil.copytree(moved[0][1], moved[0][0])
    mend(store.folder, store.tmp, examine(store.folder))
    assert sorted(path.name for path in (store.folder / DAMAGED).iterdir()) == ["textual.zarr", "textual.zarr.2"]


def test_only_the_samples_of_a_damaged_chunk_are_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 8)
    store = make_small(tmp_path / "run", sources=["targets"])
    flip(store.folder / "parts" / "targets.zarr" / "target_ids" / "c" / "0", 2 * 12 + 1)  # rows 4 and 5
    (damage,) = examine(store.folder).damages
    assert damage.samples == ("cat-2", "ox") and "chunk 2" in damage.what


def test_a_clip_names_all_samples_that_share_it(store: Small):
    ledger = store.ledger
    linked = state(ledger)["dog-1", "acoustic"]
    values = {name: getattr(linked, name) for name in Row.__slots__}
    ledger.commit([Row(**{**values, "id": "later"})])
    assert examine(store.folder).damages == (), "a sample that was linked later is not named in the part"
    flip(store.folder / "parts" / "acoustic.zarr" / "hidden" / "28" / "scale" / "c" / "0", 0)
    (damage,) = examine(store.folder).damages
    assert set(damage.samples) == {"dog-1", "cat-2", "ox", "later"}


def edit_lost_head(store: Small) -> None:
    (store.folder / "HEAD").unlink()


def edit_lost_manifest(store: Small) -> None:
    next((store.folder / "manifests").iterdir()).unlink()


def edit_lost_both(store: Small) -> None:
    edit_lost_head(store)
    shutil.rmtree(store.folder / "manifests")


def edit_head_and_manifest(store: Small) -> None:
    flip(store.folder / "HEAD", 3)
    flip(next((store.folder / "manifests").iterdir()), 100)


def edit_head_and_part(store: Small) -> None:
    edit_head_and_manifest(store)
    damaged_shard(store)


@pytest.mark.parametrize(
    "edit", [edit_lost_head, edit_lost_manifest, edit_lost_both, edit_head_and_manifest, edit_head_and_part]
)
def test_a_lost_ledger_is_made_anew(store: Small, edit: Callable[[Small], None]):
    before = state(store.ledger)
    edit(store)
    findings = examine(store.folder)
    assert findings.is_lost and findings.damages
    mend(store.folder, store.tmp, findings)
    if edit is edit_head_and_part:
        before = {pair: row for pair, row in before.items() if pair[1] != "textual"}
    assert state(store.ledger) == before
    assert [reject.id for reject in store.ledger.rejects()] == ["bad"]
    assert examine(store.folder).damages == ()


def test_what_was_rejected_after_it_was_made_stays_rejected(store: Small):
    from kdpipe.data.ledger_files import Reject

    store.ledger.commit(rejects=[Reject("ox", "targets", "k2", "too_long", "now")])
    edit_lost_both(store)
    mend(store.folder, store.tmp, examine(store.folder))
    assert store.ledger.get("ox", "targets") is None and store.ledger.rejected("ox", "targets") is not None


def test_missing_files_cut_files_and_files_too_many(store: Small):
    part = store.folder / "parts" / "textual.zarr"
    for file in sorted(path for path in part.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for content in (None, b"", whole[:-1], whole + b"\0", whole[: len(whole) // 2]):
            file.unlink() if content is None else file.write_bytes(content)
            assert file in {damage.file for damage in check_part(part)}, (file, content)
            file.write_bytes(whole)
    stray = part / "top" / "ids" / "c" / "1" / "0"
    stray.parent.mkdir()
    stray.write_bytes(b"x")
    (damage,) = (findings := examine(store.folder)).damages
    assert (damage.file, damage.what, damage.part) == (stray, "not of this part", None)
    moved = mend(store.folder, store.tmp, findings)
    assert moved == [(stray, store.folder / DAMAGED / "textual.zarr-top-ids-c-1-0")]
    assert examine(store.folder).damages == () and not store.ledger.lost_parts()


@pytest.mark.parametrize("name", ["HEAD", "rejects.parquet", "manifest", "zarr.json", "top/ids/zarr.json"])
def test_a_folder_in_place_of_a_file_is_set_aside(store: Small, name: str):
    part = store.folder / "parts" / "textual.zarr"
    (manifest,) = (store.folder / "manifests").glob("*.parquet")
    file = manifest if name == "manifest" else part / name if "zarr.json" in name else store.folder / name
    before = state(store.ledger)
    file.unlink(missing_ok=True)
    file.mkdir()
    findings = examine(store.folder)
    assert file in {damage.file for damage in findings.damages}
    mend(store.folder, store.tmp, findings)
    lost = {key for key, row in before.items() if "zarr.json" in name and row.part == part.name}
    assert state(store.ledger) == before and store.ledger.lost_parts() == ({part.name} if lost else set())
    left = examine(store.folder).damages
    assert {damage.file for damage in left} == ({part} if lost else set())


def test_damage_beside_a_stray_file_is_found_too(store: Small):
    (store.folder / "parts" / "textual.zarr" / "notes.txt").write_text("mine")
    file = damaged_shard(store)
    assert {damage.file.name for damage in examine(store.folder).damages} == {"notes.txt", file.name}


def test_units_that_are_not_what_the_manifest_says(store: Small):
    ledger = store.ledger
    for change in ({"key": "x"}, {"row": 9}, {"row": 1}, {"tokens": 7}, {"source": "acoustic_top"}):
        row = state(ledger)["dog-1", "textual"]
        wrong = Row(**{**{name: getattr(row, name) for name in Row.__slots__}, **change})
        ledger.commit([wrong], drop=[("dog-1", "textual")])
        found = examine(store.folder).damages
        assert any("of sample 'dog-1' as the manifest says" in damage.what for damage in found), change
        ledger.commit([row], drop=[(wrong.id, wrong.source)])
        back = [state(Small(store.folder).ledger).get(("dog-1", "acoustic_top"))]
        if back == [None]:
            mended = next(r for r in _rows(store) if (r.id, r.source) == ("dog-1", "acoustic_top"))
            ledger.commit([mended])
    assert examine(store.folder).damages == ()


def _rows(store: Small) -> list[Row]:
    from kdpipe.data.store.metadata import rows_from_parts

    return list(rows_from_parts(store.folder / "parts"))


def rebuilt(store: Small, name: str, change: Callable[[np.ndarray], np.ndarray], *, prefix: str = "top") -> list[str]:
    """Words of what is found after an array of the textual part was written with other values and right checksums."""
    from kdpipe.data.store.reader import PartReader
    from kdpipe.data.store.writer import PartWriter

    from .small import _declared, layout_of

    part = PartReader(store.folder / "parts" / "textual.zarr")
    path = store.tmp / "again.zarr"
    shutil.rmtree(path, ignore_errors=True)
    layouts = {"textual": layout_of(6, logprob="float16", draws={"count": 2, "k": 6})}
    specs, attributes, constants = _declared("textual", layouts, np.zeros((2, 6), np.float16))
    writer = PartWriter(path, source="textual", arrays=specs, attributes=attributes, constants=constants)
    for row, unit in enumerate(part.units):
        arrays = part.read(row)
        if row == 1:
            arrays[f"{prefix}/{name}"] = change(arrays[f"{prefix}/{name}"].copy())
        writer.append(unit["id"], unit["key"], arrays)
    writer.close()
    found = check_part(path)
    assert all(damage.samples == ("cat-2",) for damage in found), found
    return [damage.what for damage in found]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logprob", lambda a: a * np.float16(np.nan), "NaN or above 0"),
        ("logprob", lambda a: a * np.float16(-1), "NaN or above 0"),
        ("logprob", lambda a: a[:, ::-1].copy(), "do not fall"),
        ("logprob", lambda a: a - np.float16(0.5), "sums to"),
        ("log_tail", lambda a: a + np.float16(0.2), "sums to|above 0"),
        ("log_tail", lambda a: a * np.float16(np.nan), "a tail that is NaN"),
        ("log_z", lambda a: a * np.float32(np.inf), "not finite"),
        ("log_z", lambda a: a + np.arange(a.shape[1], dtype=np.float32), "sums to"),
        ("ids", lambda a: a | 255, "beyond the vocabulary"),
        ("draws", lambda a: a + np.uint32(64), "drawn id"),
        ("draws", lambda a: a[..., ::-1].copy(), "do not rise"),
    ],
)
def test_values_that_no_teacher_says_are_found(store: Small, name: str, change, words: str):
    import re

    assert rebuilt(store, name, lambda a: a) == []
    (what,) = rebuilt(store, name, change, prefix="lens/09")
    assert re.search(words, what), what


def test_lengths_that_differ_from_the_response(tmp_path: Path, monkeypatch):
    store = make_small(tmp_path / "run", sources=["targets"])
    monkeypatch.setitem(LENGTHS, "ox", 5)
    make_small(tmp_path / "other", sources=["textual"])
    shutil.move(tmp_path / "other" / "cache-teachers" / "parts" / "textual.zarr", store.folder / "parts")
    from kdpipe.data.store.metadata import part_rows

    store.ledger.commit(part_rows(store.folder / "parts" / "textual.zarr"))
    (damage,) = examine(store.folder).damages
    assert damage.what == "has 5 rows for the 4 tokens of sample 'ox'" and damage.part == "textual.zarr"
    row = state(store.ledger)["ox", "textual"]
    values = {name: getattr(row, name) for name in Row.__slots__} | {"fields": {"content": "another"}, "length": 9}
    store.ledger.commit([Row(**values)])
    assert examine(store.folder).damages == (), "a row that is stale may be of another length"


def test_a_part_of_another_format_is_told_and_left(store: Small):
    import json

    from kdpipe.data.store.metadata import metadata_digest
    from kdpipe.data.store.shard import as_json

    root = store.folder / "parts" / "textual.zarr" / METADATA
    document = json.loads(root.read_bytes())
    document["attributes"]["kdpipe"]["format"] = 1
    root.write_bytes(as_json(document))
    document["attributes"]["kdpipe"]["metadata"] = metadata_digest(root.parent)
    root.write_bytes(as_json(document))
    (damage,) = (findings := examine(store.folder)).damages
    assert "written in format 1" in damage.what and damage.aside is None
    assert mend(store.folder, store.tmp, findings) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_no_damage(store: Small):
    from kdpipe.data.errors import StoreError

    (store.folder / "parts" / "textual.zarr" / METADATA).chmod(0)
    with pytest.raises(StoreError, match="may not be read"):
        examine(store.folder)


def test_whole_files_of_one_shape_that_change_places_are_found(store: Small):
    """Each is sound by itself: what the part says of its chunks binds them to their places."""
    part = store.folder / "parts" / "textual.zarr"
    one, two = (next((part / prefix).rglob("logprob")) / "c" / "0" for prefix in ("top", "lens"))
    one, two = (next(path for path in folder.rglob("*") if path.is_file()) for folder in (one, two))
    kept = one.read_bytes()
    assert len(kept) == two.stat().st_size and kept != two.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    findings = examine(store.folder)
    assert {damage.file for damage in findings.damages} == {one, two}
    assert all("not the chunk that the part was written with" in damage.what for damage in findings.damages)
    with pytest.raises(StoreError, match="not the chunk that the part was written with"):
        PartReader(part).read(0)


@pytest.mark.parametrize("kind", ["file", "dangling link", "looping link"])
def test_a_part_that_is_no_folder_is_set_aside(store: Small, kind: str):
    part = sorted((store.folder / "parts").iterdir())[0]
    shutil.rmtree(part)
    if kind == "file":
        part.write_text("not a part")
    else:
        part.symlink_to(part.name if kind == "looping link" else "nowhere")
    findings = examine(store.folder)
    assert any(damage.aside == part for damage in findings.damages)
    mend(store.folder, store.folder.parent / "tmp", findings)
    assert not os.path.lexists(part) and part.name in store.ledger.lost_parts()
