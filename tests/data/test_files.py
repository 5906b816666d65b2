"""Writing that a crash cannot tear."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kdpipe.data import files
from kdpipe.data.files import build_aside, fsync_tree, move_into_place, remove, retire, write_atomically, write_json


def test_a_file_replaces_a_file(tmp_path: Path):
    target = tmp_path / "run" / "deep" / "HEAD"
    write_atomically(target, lambda path: path.write_text("one"), tmp_path / "tmp")
    write_atomically(target, lambda path: path.write_text("two"), tmp_path / "tmp")
    assert target.read_text() == "two"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_built_path_keeps_the_suffix(tmp_path: Path):
    seen = []
    write_atomically(tmp_path / "a.parquet", lambda path: (seen.append(path.suffix), path.touch()), tmp_path / "tmp")
    assert seen == [".parquet"]


def test_a_folder_replaces_a_folder_and_nothing_is_left_aside(tmp_path: Path):
    target = tmp_path / "student"
    for text in ("old", "new"):
        with build_aside(tmp_path / "tmp") as built:
            (built / "sub").mkdir(parents=True)
            (built / "sub" / "weights").write_text(text)
            (built / text).touch()
            move_into_place(built, target)
    assert sorted(path.name for path in target.iterdir()) == ["new", "sub"]
    assert (target / "sub" / "weights").read_text() == "new"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_write_that_fails_leaves_the_target_and_no_litter(tmp_path: Path):
    target = tmp_path / "scores.json"
    write_json(target, {"accuracy": 1}, tmp_path / "tmp")
    before = target.read_bytes()

    def half(path: Path) -> None:
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, half, tmp_path / "tmp")
    assert target.read_bytes() == before
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_at_the_flush_leaves_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Delayed allocation lets a full disk show itself only in fsync."""
    target = tmp_path / "HEAD"
    write_atomically(target, lambda path: path.write_text("old"), tmp_path / "tmp")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(target, lambda path: path.write_text("new"), tmp_path / "tmp")
    assert target.read_text() == "old"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_folder_that_cannot_be_swapped_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, built = tmp_path / "student", tmp_path / "tmp" / "built"
    for folder, text in ((target, "old"), (built, "new")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)

    def full(source: object, destination: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            move_into_place(built, target)
    assert (target / "weights").read_text() == "old"


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, str]] = []
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        flush(handle)

    def replace(source: Path, destination: Path) -> None:
        events.append(("rename", str(destination)))
        rename(source, destination)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    built = tmp_path / "tmp" / "part.zarr"
    (built / "top" / "ids").mkdir(parents=True)
    (built / "zarr.json").write_text("{}")
    (built / "top" / "ids" / "0").write_bytes(b"1")
    target = tmp_path / "stage" / "parts" / "part.zarr"
    move_into_place(built, target)

    at = events.index(("rename", str(target)))
    flushed = {path for kind, path in events[:at] if kind == "fsync"}
    below = {str(built / name) for name in ("", "zarr.json", "top", "top/ids", "top/ids/0")}
    assert below <= flushed
    # the entries of the two new folders above the target, and after the rename the target's own
    assert {str(tmp_path), str(tmp_path / "stage")} <= flushed
    assert ("fsync", str(target.parent)) in events[at:]


def test_build_aside_cleans_up_files_and_folders_after_an_error(tmp_path: Path):
    for make in (Path.mkdir, Path.touch):
        with pytest.raises(RuntimeError), build_aside(tmp_path / "tmp", ".zarr") as path:
            make(path)
            assert path.suffix == ".zarr"
            raise RuntimeError
    assert list((tmp_path / "tmp").iterdir()) == []


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("link", "file", "folder", "absent"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_what_is_retired_is_whole_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / "weights").touch()

    def broken(path: Path) -> None:
        assert not folder.exists() and path.parent == tmp_path / "tmp"
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", broken)
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/tmp/old-"):
            retire(folder, tmp_path / "tmp")
    assert not folder.exists()
    retire(folder, tmp_path / "tmp")
    retire(tmp_path / "tmp", tmp_path / "other")
    assert not (tmp_path / "tmp").exists() and list((tmp_path / "other").iterdir()) == []


def test_json_is_indented_and_not_escaped(tmp_path: Path):
    write_json(tmp_path / "a.json", {"größe": [1]}, tmp_path / "tmp")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "größe": [\n    1\n  ]\n}\n'


def test_fsync_tree_takes_a_single_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    fsync_tree(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "absent")
