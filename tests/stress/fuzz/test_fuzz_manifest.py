"""Damaged and hostile manifests in every format: a manifest comes out, or `ManifestError` with the place."""

from __future__ import annotations

import csv
import io
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from kdpipe.data.errors import ManifestError, Rejected
from kdpipe.data.manifest import check_sample, load_manifest

from .fuzzing import ODD_TEXTS, apply, edits, fuzz, odd_values, refusing

ROWS: list[dict[str, Any]] = [
    {"id": "a", "audio": "clips/a.wav", "question": "How many?", "choices": ["one", "two"], "answer": "two"},
    {"id": "b", "audio": ["clips/b.ogg", "in/a.wav"], "question": "Wer? é", "split": "test", "start": 0.5, "end": 2},
    {"id": "c", "audio": "link/a.wav", "question": "now?", "trace": "<THINK>", "description": "tones", "extra": [1]},
]
COLUMNS = sorted({name for row in ROWS for name in row} | {"task", "response"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("manifest") / "data"
    (base / "in").mkdir(parents=True)
    (base / "link").symlink_to(base.parent)
    (base / "out.wav").symlink_to("/etc/passwd")
    (base / "self").symlink_to(base / "self")
    return base


def load(path: Path) -> None:
    """Loads what lies there and looks at all of it."""
    with refusing(path.name, ManifestError):
        manifest = load_manifest(path)
        root = os.path.realpath(path.parent)
        assert manifest.samples and len(manifest.by_id) == len(manifest.samples)
        for sample in manifest.samples:
            assert sample.id and "\0" not in sample.id
            sample.id.encode()
            for ref in sample.audio:
                if ref.path is not None:
                    assert os.path.commonpath((root, os.path.realpath(ref.path))) == root, ref
            with refusing("", Rejected):
                check_sample(sample)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows of which some cells are odd, some columns are gone, and some rows stand twice or are none."""
    found: list[Any] = [dict(row) for row in draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=4))]
    for place, row in enumerate(found):
        row["id"] = f"{row['id']}{place}" if draw(st.booleans()) else row["id"]
        for column in draw(st.lists(st.sampled_from(COLUMNS), max_size=3)):
            row[column] = draw(odd_values)
        for column in draw(st.lists(st.sampled_from(COLUMNS), max_size=1)):
            row.pop(column, None)
        row |= draw(st.dictionaries(st.sampled_from(ODD_TEXTS), odd_values, max_size=1))
    if draw(st.integers(0, 9)) == 0:
        found.append(draw(odd_values))
    return found


@fuzz(0.09, found=rows(), ends=st.sampled_from(("\n", "\r\n", "\n\n", "")), name=st.sampled_from(("m.jsonl", "m.json")))
def test_json_rows(folder: Path, found: list[Any], ends: str, name: str) -> None:
    load(put(folder, name, "".join(json.dumps(row) + ends for row in found).encode()))


@fuzz(0.08, changes=edits())
def test_json_bytes(folder: Path, changes: Any) -> None:
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    load(put(folder, "m.jsonl", apply(whole, changes)))


@fuzz(0.02, depth=st.integers(1, 200_000), opening=st.sampled_from(("[", '{"a":')), digits=st.integers(1, 10_000))
def test_json_without_bounds(folder: Path, depth: int, opening: str, digits: int) -> None:
    load(put(folder, "m.jsonl", f'{{"id": {"9" * digits}}}\n{{"id": "x", "extra": {opening * depth}\n'.encode()))


def _csv(found: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    names = sorted({str(name) for row in found for name in row})
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    for row in found:
        writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})
    return text.getvalue().encode("utf-8", "surrogatepass")


@fuzz(0.06, found=rows(), bom=st.booleans())
def test_csv_rows(folder: Path, found: list[Any], bom: bool) -> None:
    whole = _csv([row for row in found if isinstance(row, dict)])
    load(put(folder, "m.csv", (b"\xef\xbb\xbf" if bom else b"") + whole))


@fuzz(0.06, changes=edits())
def test_csv_bytes(folder: Path, changes: Any) -> None:
    load(put(folder, "m.csv", apply(_csv(ROWS), changes)))


_ARROW = (
    *(pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_()),
    *(pa.null(), pa.date32(), pa.time64("ns"), pa.timestamp("ns"), pa.timestamp("us", tz="nowhere/at-all")),
    *(pa.duration("s"), pa.decimal128(38, 3), pa.list_(pa.string()), pa.list_(pa.binary())),
    *(pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.map_(pa.string(), pa.int64())),
    *(pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.list_(pa.float32()))),
)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Tables with the manifest's columns, or others, of types that fit and types that do not."""
    columns: dict[str, pa.Array] = {}
    for name in draw(st.lists(st.sampled_from((*COLUMNS, *ODD_TEXTS[4:12])), max_size=6)):
        kind = draw(st.sampled_from(_ARROW))
        raw = draw(st.lists(st.binary(min_size=80, max_size=80), min_size=3, max_size=3))
        columns[name.encode(errors="replace").decode()] = _array(kind, raw)
    columns |= {} if draw(st.integers(0, 9)) == 0 else {"id": columns.get("id", pa.array(["a", "b", "c"]))}
    return pa.table(columns)


def _array(kind: pa.DataType, raw: list[bytes]) -> pa.Array:
    """Three values of a type, made of raw bytes where it holds numbers or texts (not always valid ones)."""
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), pa.array(["x", "\x1b[2J"]))
    if pa.types.is_binary(kind):
        return pa.array(raw, kind)
    if pa.types.is_string(kind):
        offsets = pa.py_buffer(bytes(pa.array([0, 8, 20, 40], pa.int32()).buffers()[1] or b""))
        return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"".join(raw)))
    if pa.types.is_primitive(kind) and kind != pa.bool_():
        return pa.Array.from_buffers(kind, 3, [None, pa.py_buffer(b"".join(raw))])
    values: dict[str, Any] = {"list<item: string>": ["x", "\x1b"], "list<item: binary>": [raw[0]], "bool": True}
    if pa.types.is_struct(kind):
        return pa.array([{"bytes": raw[0], "path": "a.wav"}, {"bytes": None, "path": "../../x"}, None], kind)
    return pa.array([values.get(str(kind)), None, None], kind)


def _parquet(table: pa.Table) -> bytes:
    target = io.BytesIO()
    pq.write_table(table, target)
    return target.getvalue()


@fuzz(0.04, table=tables())
def test_parquet_types(folder: Path, table: pa.Table) -> None:
    try:
        whole = _parquet(table)
    except pa.ArrowException:  # Parquet has no such type
        return
    load(put(folder, "m.parquet", whole))


@lru_cache
def whole_parquet() -> bytes:
    columns = ("id", "question", "choices", "answer", "split", "start", "end")
    flat = [{name: row.get(name) for name in columns} for row in ROWS]
    audio = pa.array([{"bytes": b"RIFF", "path": "x.wav"}, {"bytes": None, "path": "clips/a.wav"}, None])
    return _parquet(pa.Table.from_pylist(flat).append_column("audio", audio))


@fuzz(0.05, changes=edits(3))
def test_parquet_bytes(folder: Path, changes: Any) -> None:
    load(put(folder, "m.parquet", apply(whole_parquet(), changes)))


class Files(dict[Path, bytes]):
    """Content of files; said shortly where a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Files:
    """The files of a dataset dictionary as `save_to_disk` writes it."""
    import datasets

    columns = ("id", "question", "answer", "split")
    flat = [{name: row.get(name) for name in columns} for row in ROWS]
    made = datasets.Dataset.from_list(flat).add_column("task", [0, 1, 0])  # type: ignore[call-arg]
    made = made.cast_column("task", datasets.ClassLabel(names=["count", "name"]))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(folder / "set"))
    return Files({path: path.read_bytes() for path in sorted((folder / "set").rglob("*")) if path.is_file()})


@st.composite
def documents(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON document of which some values, deep in it, are odd or gone."""
    found = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        at, above, key = found, None, None
        while isinstance(at, dict | list) and at and draw(st.integers(0, 4)):
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            above, key = at, keys[draw(st.integers(0, len(keys) - 1))]
            at = above[key]  # type: ignore[index]
        if above is None:
            found = draw(odd_values) if draw(st.integers(0, 3)) == 0 else found
        elif isinstance(above, dict) and draw(st.integers(0, 3)) == 0:
            del above[key]
        else:
            above[key] = draw(odd_values)  # type: ignore[index]
    return found


@fuzz(0.03, data=st.data())
def test_dataset_folder(folder: Path, dataset: Files, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(dataset)))
    if path.suffix == ".json" and data.draw(st.booleans()):
        damaged = json.dumps(data.draw(documents(json.loads(dataset[path])))).encode()
    else:
        damaged = apply(dataset[path], data.draw(edits(3)))
    path.write_bytes(damaged)
    try:
        load(folder / "set")
    finally:
        path.write_bytes(dataset[path])
