"""Digests of values and files, and the memory of file digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data import hashing
from kdpipe.data.errors import KdpipeError
from kdpipe.data.hashing import Fingerprints, digest, digest_bytes, digest_file, digest_texts

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Sampling:
    temperature: float
    stops: tuple[str, ...]


def old(path: Path, seconds: int = 100) -> Path:
    """Makes a file look untouched for a while; its change time cannot be set, so the caller patches the clock."""
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns - seconds * 10**9))
    return path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch):
    """A clock an hour ahead, so that files just written do not count as racy."""
    now = hashing.time.time_ns
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was hashed."""
    names: list[str] = []
    real = hashing.digest_file

    def counted(path: Path) -> str:
        names.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(hashing, "digest_file", counted)
    return names


def test_a_digest_is_half_a_sha256_and_stays_what_it_is():
    assert digest_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb924"
    assert digest({"b": [1, None], "a": "ü"}) == digest_bytes(b'{"a":"\\u00fc","b":[1,null]}')


@given(plain, plain)
def test_digests_differ_exactly_where_values_differ(left, right):
    assert (digest(left) == digest(right)) == (repr_of(left) == repr_of(right))


def repr_of(value: object) -> object:
    """Equality that tells 1 from 1.0 and from True, which == does not; mappings without their order."""
    if isinstance(value, dict):
        return ("dict", frozenset((key, repr_of(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(repr_of(item) for item in value))
    return (type(value).__name__, repr(value))


def test_order_of_mappings_and_kind_of_sequence_do_not_count():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, 2)) == digest([1, 2]) != digest([2, 1])
    assert digest({3, 1, 2}) == digest([1, 2, 3])
    assert digest(Sampling(0.7, ("<",))) == digest({"temperature": 0.7, "stops": ["<"]})


@pytest.mark.parametrize("value", [b"bytes", Path("x"), object()])
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises(TypeError):
        digest({"value": value})


@pytest.mark.parametrize("items", [[], [1], [("a", {"k": [1, 2]}, None, 1.0), ("b", "ü", {})], list(range(3000))])
def test_items_one_by_one_have_the_digest_of_their_list(items):
    assert digest_texts(json.dumps(item, sort_keys=True, separators=(",", ":")) for item in items) == digest(items)


def test_digest_file_reads_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 7)
    data = bytes(range(256)) * 3
    (tmp_path / "clip").write_bytes(data)
    assert digest_file(tmp_path / "clip") == digest_bytes(data)


@pytest.mark.usefixtures("later")
def test_a_file_is_read_once_over_many_runs(tmp_path: Path, reads: list[str]):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    memory = tmp_path / "tmp" / "prints.sqlite"
    prints = Fingerprints(memory)
    assert prints.file(clip) == prints.file(clip) == digest_bytes(b"sound")
    prints.save()
    assert Fingerprints(memory).file(clip) == digest_bytes(b"sound")
    assert reads == ["clip.wav"]


@pytest.mark.usefixtures("later")
def test_a_run_that_moves_with_its_data_keeps_its_memory(tmp_path: Path, reads: list[str]):
    home = tmp_path / "a"
    (home / "clips").mkdir(parents=True)
    (home / "clips" / "x.wav").write_bytes(b"sound")
    prints = Fingerprints(home / "tmp" / "prints.sqlite")
    prints.file(home / "clips" / "x.wav")
    prints.save()
    home.rename(tmp_path / "b")
    assert Fingerprints(tmp_path / "b" / "tmp" / "prints.sqlite").file(tmp_path / "b" / "clips" / "x.wav")
    assert reads == ["x.wav"]
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    moved = Fingerprints(tmp_path / "c" / "tmp" / "prints.sqlite").file(tmp_path / "c" / "clips" / "x.wav")
    assert moved == digest_bytes(b"sound")
    assert reads == ["x.wav", "x.wav"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("replace", [False, True])
def test_new_bytes_are_seen_though_size_and_modification_time_are_the_old_ones(tmp_path: Path, replace: bool):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    memory = tmp_path / "tmp" / "prints.sqlite"
    prints = Fingerprints(memory)
    prints.file(clip)
    prints.save()
    before = clip.stat()
    if replace:
        (tmp_path / "new").write_bytes(b"SOUND")
        os.replace(tmp_path / "new", clip)
    else:
        clip.write_bytes(b"SOUND")
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Fingerprints(memory).file(clip) == digest_bytes(b"SOUND")
    assert prints.file(clip) == digest_bytes(b"SOUND")


def test_a_file_just_written_is_hashed_again(tmp_path: Path, reads: list[str]):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    prints = Fingerprints(tmp_path / "tmp" / "prints.sqlite")
    prints.file(clip)
    prints.save()
    prints.file(clip)
    assert reads == ["clip.wav"] * 2
    assert not (tmp_path / "tmp" / "prints.sqlite").exists()
    prints.file(old(clip))
    prints.file(clip)
    assert reads == ["clip.wav"] * 4, "an old modification time alone does not make a fresh file trustworthy"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    real = hashing.digest_file

    def slow(path: Path) -> str:
        value = real(path)
        with open(path, "ab") as file:
            file.write(b"more")
        return value

    monkeypatch.setattr(hashing, "digest_file", slow)
    with pytest.raises(KdpipeError, match=r"clip\.wav: changed while it was being read"):
        Fingerprints().file(clip)


def test_changed_names_what_has_other_bytes_or_is_gone(tmp_path: Path):
    names = ["same", "touched", "rewritten", "gone", "unseen"]
    paths = {name: tmp_path / name for name in names}
    prints = Fingerprints()
    for name, path in paths.items():
        path.write_bytes(b"sound")
        if name != "unseen":
            prints.file(path)
    os.utime(paths["touched"], ns=(1, 1))
    paths["rewritten"].write_bytes(b"noise")
    paths["gone"].unlink()
    paths["unseen"].write_bytes(b"noise")
    assert prints.changed(paths.values()) == [paths["rewritten"], paths["gone"]]
    assert prints.changed([tmp_path / "never was"]) == [], (
        "a clip that was missing from the start is rejected, not changed"
    )


@pytest.mark.usefixtures("later")
def test_a_file_that_was_not_touched_is_not_read_again_by_changed(tmp_path: Path, reads: list[str]):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    prints = Fingerprints()
    prints.file(clip)
    assert prints.changed([clip]) == []
    assert reads == ["clip.wav"]


def test_folder_digest_holds_names_and_content_of_the_chosen_files(tmp_path: Path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "deep.json").write_text("{}")
    prints = Fingerprints()
    first = prints.folder(model, [".json"])
    (model / "readme.md").write_text("words")
    (model / "sub" / "deep.json").write_text("[]")
    assert prints.folder(model, [".json"]) == first
    assert prints.folder(model, [".json", ".md"]) != first
    (model / "config.json").rename(model / "settings.json")
    assert prints.folder(model, [".json"]) != first
    with pytest.raises(FileNotFoundError):
        prints.folder(tmp_path / "absent", [".json"])


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("name", ["a b", "a%41b", "a?b=c", "a#b", "größe"])
def test_folders_of_any_name_keep_a_memory(tmp_path: Path, name: str, reads: list[str]):
    clip = tmp_path / name / "clip.wav"
    clip.parent.mkdir()
    clip.write_bytes(b"sound")
    memory = tmp_path / name / "tmp" / "prints.sqlite"
    prints = Fingerprints(memory)
    prints.file(clip)
    prints.save()
    Fingerprints(memory).file(clip)
    assert reads == ["clip.wav"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "content", [b"", b"not a database, but long enough to look like one" * 40, b"SQLite format 3\0"]
)
def test_a_damaged_memory_is_forgotten_and_made_anew(tmp_path: Path, content: bytes, reads: list[str]):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    memory = tmp_path / "tmp" / "prints.sqlite"
    memory.parent.mkdir()
    memory.write_bytes(content)
    for _ in range(3):
        prints = Fingerprints(memory)
        assert prints.file(clip) == digest_bytes(b"sound")
        prints.save()
    assert len(reads) <= 2


@pytest.mark.usefixtures("later")
def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    (tmp_path / "tmp").write_text("a file where the folder should be")
    prints = Fingerprints(tmp_path / "tmp" / "prints.sqlite")
    prints.file(clip)
    prints.save()
    assert prints.file(clip) == digest_bytes(b"sound")


@pytest.mark.usefixtures("later")
def test_two_runs_may_save_to_one_memory(tmp_path: Path):
    memory = tmp_path / "tmp" / "prints.sqlite"
    both = [Fingerprints(memory), Fingerprints(memory)]
    for number, prints in enumerate(both):
        (tmp_path / f"{number}.wav").write_bytes(b"sound")
        prints.file(tmp_path / f"{number}.wav")
    for prints in both:
        prints.save()
    with sqlite3.connect(memory) as connection:
        assert connection.execute("SELECT path FROM prints ORDER BY path").fetchall() == [("0.wav",), ("1.wav",)]
    connection.close()


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path):
    """Reading a named pipe would wait for a writer, for ever."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    prints = Fingerprints(tmp_path / "tmp" / "prints.sqlite")
    for name in ("pipe.wav", "folder.wav", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            prints.file(tmp_path / name)
    assert prints.changed([tmp_path / "pipe.wav"]) == []


@pytest.mark.timeout(20)
def test_a_clip_that_became_a_pipe_has_changed(tmp_path: Path):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"sound")
    prints = Fingerprints()
    prints.file(clip)
    clip.unlink()
    os.mkfifo(clip)
    assert prints.changed([clip]) == [clip]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a",
        'q"\\\n',
        "😀\u2028",
        None,
        3,
        -7,
        True,
        1.5,
        [],
        ["a", None, 2],
        ("a", "b"),
        [1.0, None],
        [True, "a"],
        [["a"]],
    ],
    ids=repr,
)
def test_short_cuts_give_the_general_text(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert digest(value) == hashlib.sha256(text.encode()).hexdigest()[:32]
