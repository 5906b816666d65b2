"""Damaged files that a run reads back, function by function: traces, descriptions, ledgers, models, checkpoints."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from kdpipe.data.cota import DEFAULT_SECTIONS, Trace, TraceSchema
from kdpipe.data.errors import ConfigError, KdpipeError, ModelError, Rejected, StoreError
from kdpipe.data.hashing import Fingerprints
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.ledger_rows import Row
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.miniature.models import Miniatures
from kdpipe.stages.models.folder import resolve, shards, weight_shapes
from kdpipe.stages.models.vocabulary import align, load_vocabulary
from kdpipe.stages.textualize.descriptions import Description, Descriptions
from kdpipe.stages.textualize.table import read_traces, to_table
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.metrics import MetricsFile, read_metrics

from .fuzzing import ODD_TEXTS, apply, edits, forget, fuzz, odd_values, refusing
from .test_fuzz_manifest import documents

SCHEMA = TraceSchema()
WHOLE = SCHEMA.render(Trace({name: f"{name.lower()} é 2 < 3" for name in DEFAULT_SECTIONS}, "two"))
_PIECES = ("<", "</", ">", "THINK", "think>", *DEFAULT_SECTIONS, "RESPONSE", "<RESPONSE>", "</THINK>", " ", "a", "ſ")


@fuzz(0.03, changes=edits(), text=st.lists(st.sampled_from((*_PIECES, *ODD_TEXTS[:20])), max_size=30).map("".join))
def test_traces(changes: Any, text: str) -> None:
    for given in (apply(WHOLE.encode(), changes).decode(errors="replace"), text):
        with refusing("", Rejected):
            found = SCHEMA.parse(given)
            assert SCHEMA.parse(SCHEMA.render(found)) == found
        answer = SCHEMA.extract_response(given)
        assert answer is None or answer == answer.strip()


@fuzz(
    0.01,
    names=st.lists(st.sampled_from((*ODD_TEXTS, "A", "B_C", "THINK", "a")), max_size=4),
    choices=st.one_of(st.none(), st.lists(st.sampled_from((*ODD_TEXTS, "x|y", "(a", "</THINK>")), max_size=3)),
    most=st.sampled_from((None, 0, -1, 1, 2000)),
)
def test_trace_schemas(names: list[str], choices: list[str] | None, most: int | None) -> None:
    with refusing("", ConfigError):
        TraceSchema(tuple(names))
    with refusing("", ConfigError):
        SCHEMA.regex(max_chars_per_section=most, response=choices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@fuzz(0.02, changes=edits(), rows=st.lists(odd_values, max_size=3))
def test_descriptions_and_metrics_of_a_killed_run(folder: Path, changes: Any, rows: list[Any]) -> None:
    path = folder / "descriptions.jsonl"
    path.unlink(missing_ok=True)
    file = Descriptions(path).__enter__()
    for number in range(3):
        file.add(f"k{number}", Description(f"tones: {number} é", 5, 3, "stop"))
    file.__exit__(KeyboardInterrupt, None, None)
    more = "".join(json.dumps({"key": "k9", "text": row}) + "\n" + json.dumps(row) + "\n" for row in rows)
    path.write_bytes(apply(path.read_bytes(), changes) + more.encode())
    found = Descriptions(path)
    for number in range(10):
        one = found.get(f"k{number}")
        assert one is None or (isinstance(one.text, str) and one.text)

    path = folder / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0, "terms": {"top": 2.0}} for step in range(1, 4)]
    path.write_bytes(apply("".join(json.dumps(line) + "\n" for line in lines).encode(), changes) + more.encode())
    assert all(isinstance(line, dict) and type(line["step"]) is int for line in read_metrics(path))
    with MetricsFile(path, 2, folder) as metrics:
        metrics.append({"step": 3})
    assert read_metrics(path)[-1] == {"step": 3}


RECORDS = [
    {
        "id": f"s{number}",
        "key": f"key{number}",
        "description": "tones",
        "trace": WHOLE,
        **{f"section_{name.lower()}": "x" for name in DEFAULT_SECTIONS},
        "response": "two",
        "audio_samples": [8000],
        "audio_rate": 16000,
    }
    for number in range(3)
]


@pytest.fixture(scope="module")
def ledger(folder: Path) -> Callable[[], Ledger]:
    stage, tmp = folder / "textualize", folder / "tmp"
    tmp.mkdir()
    pq.write_table(to_table(RECORDS, DEFAULT_SECTIONS), tmp / "part")
    rows = [Row(one["id"], "trace", one["key"], {"audio": "d"}, "p.parquet", n) for n, one in enumerate(RECORDS)]
    rejects = [Reject("bad", "trace", "key", "audio_missing", "clip is not there")]
    Ledger(stage, tmp).commit(rows, rejects=rejects, built={"p.parquet": tmp / "part"})
    return lambda: Ledger(stage, tmp)


def damage(path: Path, content: bytes, look: Callable[[], Any]) -> None:
    """Looks at what a file is a part of while it holds something else."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        look()
    finally:
        path.write_bytes(whole)


@fuzz(0.04, which=st.sampled_from(("HEAD", "manifests", "rejects.parquet", "parts")), changes=edits(4))
def test_ledgers(ledger: Callable[[], Ledger], which: str, changes: Any) -> None:
    path = ledger().folder / which
    path = next(path.iterdir()) if path.is_dir() else path

    def look() -> None:
        with refusing("textualize", StoreError):
            found = ledger()
            found.lost_parts(), found.unreferenced_parts()
            read_traces(found)

    damage(path, apply(path.read_bytes(), changes), look)


@fuzz(0.02, number=st.integers(0, 2), column=st.sampled_from((*RECORDS[0], "extra")), value=odd_values)
def test_trace_tables_of_other_types(ledger: Callable[[], Ledger], number: int, column: str, value: Any) -> None:
    records = [dict(record) for record in RECORDS]
    records[number][column] = value
    try:
        columns = {name: pa.array([record.get(name) for record in records]) for name in records[number]}
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        return
    target = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), target)
    except pa.ArrowException:
        return

    def look() -> None:
        with refusing("p.parquet", StoreError):
            for row in read_traces(ledger()).values():
                assert isinstance(row.trace, str) and isinstance(row.description, str)
                assert row.audio_seconds >= 0

    damage(ledger().parts / "p.parquet", target.getvalue(), look)


@fuzz(0.01, changes=edits(4))
def test_fingerprints(folder: Path, changes: Any) -> None:
    memory = folder / "prints" / "fingerprints.sqlite"
    clip = folder / "clip"
    if not memory.exists():
        clip.write_bytes(b"abc")
        os.utime(clip, (0, 0))
        prints = Fingerprints(memory)
        prints._fresh["x"] = (1, 2, 3, 4, "d" * 32)
        prints.file(clip)
        prints.save()
    expected = Fingerprints().file(clip)

    def look() -> None:
        prints = Fingerprints(memory)
        assert prints.file(clip) == expected
        prints._fresh["y"] = (1, 2, 3, 4, "d" * 32)
        prints.save()
        if not memory.exists():
            memory.touch()

    damage(memory, apply(memory.read_bytes(), changes), look)


_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def models(family: Miniatures, folder: Path) -> Path:
    """A student, with a small index and small weights: their headers are what is read."""
    import numpy as np
    from safetensors.numpy import save_file

    to = folder / "models" / "student"
    to.mkdir(parents=True)
    for name in _JSON:
        source = family.qwen2_5_omni / name
        if source.exists():
            (to / name).write_bytes(source.read_bytes())
    save_file({"thinker.a": np.zeros((2, 3), np.float32)}, to / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"thinker.a": "model.safetensors"}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


@fuzz(0.07, name=st.sampled_from((*_JSON, "model.safetensors", "model.safetensors.index.json")), data=st.data())
def test_model_folders(models: Path, name: str, data: st.DataObject) -> None:
    path = models / name
    whole = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        content = json.dumps(data.draw(documents(_few(json.loads(whole))))).encode()
    else:
        content = apply(whole, data.draw(edits(3)))

    def look() -> None:
        forget()
        with refusing("", ModelError):
            found = resolve(ModelConfig("student"), models.parent)
            assert min(found.layers, found.width, found.head_rows) > 0 and isinstance(found.family, str)
        with refusing("student", ModelError):
            words = load_vocabulary(models, "student")
            assert all(type(i) is int and isinstance(token, str) for i, token in words.tokens.items())
            with refusing("", KdpipeError):
                align(words, words, 100, 90)
        with refusing("model.safetensors", ModelError):
            assert all(one.parent == models for one in shards(models))
            weight_shapes(models)

    damage(path, content, look)


def _few(document: Any) -> Any:
    """The document with at most twenty entries of each list or mapping: a vocabulary has thousands."""
    if isinstance(document, dict):
        return {key: _few(document[key]) for key in list(document)[:20]}
    return [_few(item) for item in document[:20]] if isinstance(document, list) else document


STATE = {"format": 2, "identity": "i", "step": 3, "stream": {"digest": "s", "epoch": 0}, "files": {"a.safetensors": 3}}


@fuzz(0.02, state=documents(STATE), changes=st.one_of(st.none(), edits(3)))
def test_checkpoints(folder: Path, state: Any, changes: Any) -> None:
    place = folder / "checkpoints" / "step-000003"
    place.mkdir(parents=True, exist_ok=True)
    (place / "a.safetensors").write_bytes(b"abc")
    (place / "state.json").write_bytes(apply(json.dumps(STATE if changes else state).encode(), changes or []))
    with refusing("step-000003", StoreError):
        found = checkpoint.find(place.parent, place.parent / "tmp", "i", "s", lambda line: None)
        if found is not None:
            assert type(found.step) is int
            checkpoint.check(place)


def test_the_whole_files_are_read(ledger: Callable[[], Ledger], models: Path) -> None:
    assert set(read_traces(ledger())) == {"s0", "s1", "s2"}
    assert resolve(ModelConfig("student"), models.parent).hears and weight_shapes(models) == {"thinker.a": (2, 3)}
    assert SCHEMA.parse(WHOLE).response == "two"
