"""Manifests: every format gives the same samples, and everything that is wrong is told at once, with its place."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kdpipe.data.errors import ManifestError, Rejected
from kdpipe.data.manifest import AudioRef, check_sample, load_manifest

ROWS = [
    {
        "id": "a",
        "audio": "clips/a.wav",
        "question": "How many tones?",
        "choices": ["one", "two"],
        "answer": "two",
        "task": "count",
        "split": "train",
        "start": 0.5,
        "end": 2.0,
        "trace": "<THINK>..",
        "response": "two",
        "description": "two tones",
        "source": "synth",
    },
    {"id": "b", "audio": "clips/b.ogg", "question": "Wer spricht? é", "split": "test"},
    {"id": "7", "audio": "clips/a.wav", "question": "And now?", "split": None},
]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def problems(path: Path, **options) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def one_problem(path: Path, **options) -> str:
    found = problems(path, **options)
    assert len(found) == 1, found
    return found[0]


def row_problem(folder: Path, **row) -> str:
    """The one problem of a manifest whose second row is `row`."""
    good = {"id": "good", "audio": "a.wav", "question": "?"}
    text = one_problem(write_jsonl(folder / "m.jsonl", [good, {"id": "x", "audio": "b.wav", "question": "?", **row}]))
    assert text.startswith("m.jsonl:2: ")
    return text


def save_as(form: str, folder: Path) -> Path:
    columns = list(ROWS[0])
    if form == "jsonl":
        rows = [dict(row) for row in ROWS]
        rows[2]["id"] = 7
        return write_jsonl(folder / "m.jsonl", rows)
    if form == "json with BOM":
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        (folder / "m.json").write_text("\n" + text, encoding="utf-8-sig")
        return folder / "m.json"
    if form.startswith("csv"):
        as_text = json.dumps if form == "csv, JSON choices" else " | ".join
        with open(folder / "m.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in ROWS:
                writer.writerow({**row, "choices": as_text(row["choices"]) if "choices" in row else ""})
        return folder / "m.csv"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "m.parquet")
        return folder / "m.parquet"
    import datasets

    if form == "dataset":
        rows = [{name: row.get(name) for name in columns} for row in ROWS]
        datasets.Dataset.from_list(rows).save_to_disk(folder / "m")
    else:
        rows = [{name: row.get(name) for name in columns if name != "split"} for row in ROWS]
        parts = {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])}
        datasets.DatasetDict(parts).save_to_disk(folder / "m")
    return folder / "m"


@pytest.mark.parametrize(
    "form", ["jsonl", "json with BOM", "csv", "csv, JSON choices", "parquet", "dataset", "dataset dict"]
)
def test_every_format_gives_the_same_samples(form, tmp_path):
    manifest = load_manifest(save_as(form, tmp_path))
    assert [sample.id for sample in manifest.samples] == ["a", "b", "7"]
    first, second, third = manifest.samples
    assert first.audio == (AudioRef(tmp_path / "clips/a.wav", None, "clips/a.wav"),)
    assert (first.question, first.choices, first.answer) == ("How many tones?", ("one", "two"), "two")
    assert (first.task, first.start, first.end) == ("count", 0.5, 2.0)
    assert (first.trace, first.response, first.description) == ("<THINK>..", "two", "two tones")
    assert first.extra == {"source": "synth"}
    assert second.question == "Wer spricht? é"
    assert second.choices == () and second.answer is second.task is second.trace is second.start is None
    ids = {split: [sample.id for sample in manifest.select(split)] for split in ("train", "test", "dev")}
    expected = ["a"] if form == "dataset dict" else ["a", "7"]
    assert ids == {"train": expected, "test": ["b", "7"] if form == "dataset dict" else ["b"], "dev": []}
    assert manifest.by_id["7"] is third


def test_audio_as_list_bytes_or_struct(tmp_path):
    rows = [
        {"id": 1, "audio": ["a.wav", "sub/b.wav"]},
        {"id": 2, "audio": None},
        {"id": 3, "audio": []},
        {"id": 4},
        {"id": 5, "audio": {"path": "a.wav", "bytes": None}},
        {"id": 6, "audio": ""},
    ]
    samples = load_manifest(write_jsonl(tmp_path / "m.jsonl", rows)).samples
    assert [ref.name for ref in samples[0].audio] == ["a.wav", "sub/b.wav"]
    for sample in (samples[1], samples[2], samples[3], samples[5]):
        assert [(ref.path, ref.data) for ref in sample.audio] == [(None, None)]
    assert samples[4].audio == (AudioRef(tmp_path / "a.wav", None, "a.wav"),)

    structs = [{"bytes": b"RIFF", "path": "/elsewhere/a.wav"}, {"bytes": b"", "path": None}]
    for name, column in {"raw": [b"RIFF", b""], "struct": structs, "list": [[b"RIFF"], [b""]]}.items():
        table = pyarrow.table({"id": ["x", "y"], "audio": column})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        refs = [sample.audio[0] for sample in load_manifest(tmp_path / f"{name}.parquet").samples]
        assert [(ref.path, ref.data) for ref in refs] == [(None, b"RIFF"), (None, b"")]
        assert "'y'" in refs[1].name


def test_audio_lists_in_csv(tmp_path):
    write_lines(tmp_path / "m.csv", b"id,audio", b'1,"[""a.wav"", ""b.wav""]"', b"2,[a].wav")
    first, second = load_manifest(tmp_path / "m.csv").samples
    assert [ref.name for ref in first.audio] == ["a.wav", "b.wav"]
    assert [ref.name for ref in second.audio] == ["[a].wav"]


def test_dataset_with_audio_and_class_label_is_not_decoded(tmp_path):
    import datasets

    clips = [{"bytes": b"no audio", "path": "x.wav"}] * 2
    dataset = datasets.Dataset.from_dict({"id": [1, 2], "audio": clips, "answer": [1, None]})
    dataset = dataset.cast_column("audio", datasets.Audio())
    dataset.cast_column("answer", datasets.ClassLabel(names=["sad", "happy"])).save_to_disk(tmp_path / "ds")
    first, second = load_manifest(tmp_path / "ds").samples
    assert first.audio == (AudioRef(None, b"no audio", "x.wav"),)
    assert (first.answer, second.answer) == ("happy", None)


def test_relative_to_the_manifest_and_not_to_the_working_folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "m.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert load_manifest(Path("m.jsonl")).samples[0].audio[0].path == tmp_path / "clips/a.wav"


@pytest.mark.parametrize("name", ["../a.wav", "sub/../../a.wav", "/etc/passwd", "..", "link/a.wav", "sub/link.wav"])
def test_paths_that_leave_the_folder(name, tmp_path):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "link").symlink_to(tmp_path)
    (home / "sub" / "link.wav").symlink_to(tmp_path / "a.wav")
    path = write_jsonl(home / "m.jsonl", [{"id": 1, "audio": name, "question": "?"}])
    text = one_problem(path)
    assert "m.jsonl:1: " in text and repr(name) in text and "`data.allow_outside: true`" in text
    assert load_manifest(path, allow_outside=True).samples[0].audio[0].path == home / name


@pytest.mark.parametrize("name", ["sub/../a.wav", "inner/a.wav", "sub/inner.wav", "..a/b..wav", "./a.wav"])
def test_paths_that_stay_in_the_folder(name, tmp_path):
    real = tmp_path / "real"
    (real / "sub").mkdir(parents=True)
    (real / "inner").symlink_to("sub")
    (real / "sub" / "inner.wav").symlink_to(real / "a.wav")
    (tmp_path / "alias").symlink_to("real")
    for home in (real, tmp_path / "alias"):
        path = write_jsonl(home / "m.jsonl", [{"id": 1, "audio": name, "question": "?"}])
        assert load_manifest(path).samples[0].audio[0].path == home / name
    absolute = write_jsonl(real / "abs.jsonl", [{"id": 1, "audio": str(real / "a.wav")}, {"id": 2, "audio": "a.wav"}])
    assert {sample.audio[0].path for sample in load_manifest(absolute).samples} == {real / "a.wav"}


def test_folders_are_listed_once_and_no_clip_is_touched(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": i, "audio": f"clips/{i}.wav"} for i in range(50)])
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(os.path, "realpath", lambda name: name if name == str(tmp_path) else pytest.fail(name))
    assert len(load_manifest(path).samples) == 50
    assert listed == [str(tmp_path), str(tmp_path / "clips")]


def test_missing_and_unreadable_manifests(tmp_path):
    assert "no such manifest" in one_problem(tmp_path / "none.jsonl")
    (tmp_path / "m.xlsx").write_bytes(b"x")
    assert "unknown format" in one_problem(tmp_path / "m.xlsx")
    for name in ("m.jsonl", "m.csv"):
        (tmp_path / name).write_bytes(b"\n" if name == "m.jsonl" else b"")
        assert "holds no samples" in one_problem(tmp_path / name)
    (tmp_path / "m.csv").write_bytes(b"id,audio\n")
    assert "holds no samples" in one_problem(tmp_path / "m.csv")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 but no more")
    assert "is not Parquet" in one_problem(tmp_path / "m.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "m.parquet")
    data = (tmp_path / "m.parquet").read_bytes()
    (tmp_path / "m.parquet").write_bytes(data[:8] + bytes(64) + data[72:])
    assert "m.parquet" in problems(tmp_path / "m.parquet")[0]
    (tmp_path / "folder").mkdir()
    assert "save_to_disk" in one_problem(tmp_path / "folder")
    path = save_as("dataset", tmp_path / "folder")
    (arrow,) = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "m: is not a dataset that can be read" in one_problem(path)
    (path / "state.json").write_text("{")
    assert "m: is not a dataset that can be read" in one_problem(path)


def test_bad_lines_of_json(tmp_path):
    path = write_lines(
        tmp_path / "m.jsonl",
        b'{"id": "a", "audio": "a.wav"',
        b'["a"',
        b"3",
        b'{"id": "\xff"}',
        b"",
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5000 + b"}",
        b'{"id": "good"}',
        b'{"id": "a\\u0000"}',
        b'{"id": "a\\ud800"}',
    )
    found = problems(path)
    assert [text.split(": ")[0] for text in found] == [f"m.jsonl:{line}" for line in (1, 2, 3, 4, 6, 7, 9, 10)]
    assert "not JSON" in found[0] and "one JSON object" in found[2] and "UTF-8" in found[3]
    assert "NUL" in found[6] and "Unicode" in found[7]
    array = write_lines(tmp_path / "m.json", b"", b'[{"id": 1},', b'{"id": 2}]')
    assert any("is not JSON" in text for text in problems(array))
    array = write_lines(tmp_path / "m.json", b'[{"id": 1},', b'{"id": 2}]')
    assert "one object a line" in one_problem(array)


def test_bad_lines_of_csv(tmp_path):
    path = write_lines(
        tmp_path / "m.csv",
        b"id,audio,question,start,answer",
        b"a,a.wav,?,1,x",
        b'b,b.wav,"two',
        b'lines",soon,x',
        b"c,c.wav,?",
        b"d,d.wav,\xff,1,x",
        b"e,e\x00.wav,?,1,x",
        b'f,f.wav,"?',
    )
    found = problems(path)
    places = [text.split(": ")[0] for text in found]
    assert places == [f"m.csv:{line}" for line in (3, 5, 6, 7, 8)]
    assert "start is text" in found[0] and "3 fields" in found[1] and "UTF-8" in found[2] and "NUL" in found[3]
    assert "is not CSV" in found[4]


def test_columns_missing_or_twice(tmp_path):
    assert "no column 'id'" in one_problem(write_lines(tmp_path / "m.csv", b"name,audio", b"a,a.wav", b"b,b.wav"))
    assert "'audio' stands there twice" in one_problem(write_lines(tmp_path / "m.csv", b"id,audio,audio", b"a,b,c"))
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a", "b"]}), tmp_path / "m.parquet")
    assert "no column 'id'" in one_problem(tmp_path / "m.parquet")


def test_duplicate_and_missing_ids(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": "1"}, {}, {"id": 1}, {"id": ""}, {"id": True}, {"id": 1.5}])
    found = problems(path)
    assert found[1].startswith("m.jsonl:3: id '1' stands already at m.jsonl:1")
    assert "m.jsonl:2: there is no id" in found and "m.jsonl:4: there is no id" in found
    assert "m.jsonl:5: id is true or false" in found[3] and "m.jsonl:6: id is a number" in found[4]
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 1]}), tmp_path / "m.parquet")
    assert one_problem(tmp_path / "m.parquet").startswith("m.parquet row 3: id '1' stands already at m.parquet row 1")


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"answer": ["two", "2"]}, "answer is a list: it must be one text"),
        ({"answer": 2}, "answer is a number"),
        ({"question": {"text": "?"}}, "question is an object"),
        ({"split": False}, "split is true or false"),
        ({"choices": "one|two"}, "choices is text"),
        ({"choices": ["one", 2]}, "choices is a list with a number, text"),
        ({"choices": ["one", " "]}, "one of the choices is blank"),
        ({"choices": ["one", "t\0"]}, "one of the choices holds a NUL byte"),
        ({"audio": 3}, "audio is a number"),
        ({"audio": ["a.wav", 3]}, "audio is a number"),
        ({"audio": {"url": "a.wav"}}, "audio is an object"),
        ({"audio": {"bytes": "UklGRg=="}}, "audio is an object"),
        ({"audio": "a\0.wav"}, "audio holds a NUL byte"),
        ({"question": "a\0b"}, "question holds a NUL byte"),
        ({"start": "1.0"}, "start is text"),
        ({"start": True}, "start is true or false"),
        ({"start": -0.5}, "start is -0.5"),
        ({"start": math.nan}, "start is nan"),
        ({"end": math.inf}, "end is inf"),
        ({"end": 10**400}, "end is 1000"),
        ({"start": 2.0, "end": 1.0}, "must lie behind start (2 s)"),
        ({"start": 2, "end": 2}, "must lie behind"),
    ],
)
def test_values_of_the_wrong_kind(row, detail, tmp_path):
    assert detail in row_problem(tmp_path, **row)


def test_all_problems_at_once_but_not_all_in_words(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": i, "audio": "../x.wav", "start": "no"} for i in range(30)])
    found = problems(path)
    assert len(found) == 21
    assert found[0].startswith("m.jsonl:1: ") and found[1].startswith("m.jsonl:1: ")
    assert found[-1] == "... and 40 more"


def test_samples_that_are_rejected_and_not_errors(tmp_path):
    rows = [{"id": 1, "question": " "}, {"id": 2}, ROWS[0], {**ROWS[0], "id": 3, "answer": "three"}]
    blank, none, good, wrong = load_manifest(write_jsonl(tmp_path / "m.jsonl", rows)).samples
    for sample in (blank, none):
        with pytest.raises(Rejected) as caught:
            check_sample(sample)
        assert caught.value.reason == "question_missing"
    with pytest.raises(Rejected) as caught:
        check_sample(wrong)
    assert caught.value.reason == "answer_not_in_choices"
    assert "'three'" in caught.value.detail and "'one', 'two'" in caught.value.detail
    for sample in (good, replace(good, answer="Two."), replace(good, answer=None), replace(wrong, choices=())):
        check_sample(sample)


def test_light():
    code = "import sys, kdpipe.data.manifest, kdpipe.data.cota; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "datasets", "pyarrow", "soundfile", "numpy"} & set(loaded)


def test_text_that_is_not_utf_8_in_parquet_is_a_problem_of_the_file(tmp_path):
    offsets = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    bad = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(pyarrow.table({"id": bad}), tmp_path / "m.parquet")
    assert "m.parquet: is not Parquet that can be read (behind row 0)" in one_problem(tmp_path / "m.parquet")


@pytest.mark.parametrize(("name", "text"), [("state.json", '{"_split": []}'), ("dataset_info.json", "null")])
def test_a_damaged_dataset_folder_is_a_problem_whatever_datasets_raises(tmp_path, name, text):
    import datasets

    datasets.Dataset.from_list([{"id": "a"}]).save_to_disk(str(tmp_path / "set"))
    file = tmp_path / "set" / name
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, **json.loads(text)}) if text != "null" else text)
    assert "is not a dataset that can be read" in one_problem(tmp_path / "set")


def test_a_path_that_is_too_long_is_a_problem(tmp_path):
    assert "cannot be read" in one_problem(tmp_path / ("x" * 300 + ".jsonl"))
