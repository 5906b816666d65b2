"""The command line over a real run of which one file is damaged or hostile: the right status, and words, no traceback.

In this process by click's runner, and for some as a process of its own, as a user starts it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import strategies as st

import kdpipe.pipeline.unforeseen
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.plan import STAGES, make_plans
from kdpipe.pipeline.runner import Request
from kdpipe.stages.miniature.models import Miniatures

from .fuzzing import apply, edits, forget, fuzz, odd_values
from .test_fuzz_files import _few
from .test_fuzz_manifest import documents

IDS = ["dog-1", "cat-2", "hen"]
TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>tones</CAPTION><REASONING>two</REASONING><SUMMARY>2</SUMMARY></THINK>"
    "<RESPONSE>2</RESPONSE>"
)
CONFIG = """\
data: {manifest: manifest.jsonl}
student: {model: {path: student, dtype: float32}}
teachers:
  textual: {model: {path: teacher, dtype: float32}}
  k: 8
  states: int8
  part_samples: 2
  device: cpu
train: {weights: {top: 1, layer: 1, acoustic: 1, acoustic_top: 0.1, sft: 1}, device: cpu}
"""
COMMANDS: list[tuple[tuple[str, ...], tuple[int, ...]]] = [
    (("status",), (0, 1, 2)),
    (("status", "--json"), (0, 1, 2)),
    (("status", "--why", "dog-1"), (0, 1, 2)),
    (("check",), (0, 2)),
    (("cache", "inspect"), (0, 2)),
    (("cache", "inspect", "dog-1"), (0, 2)),
    (("cache", "verify", "--report-only"), (0, 1, 2)),
    (("cache", "gc", "--dry-run"), (0, 2)),
    (("train", "--dry-run"), (0, 2)),
    (("run", "--dry-run", "--set", "evaluate.base=false"), (0, 2)),
]
"""Commands that change nothing, and their exit statuses."""


class Run:
    """A run, its models in its folder, and the files that may be damaged."""

    def __init__(self, base: Path):
        self.base = base
        kept = ("locks",)
        files = (path for path in base.rglob("*") if path.is_file() and path.parent.name not in kept)
        # Weights are large, and none of these commands reads them beyond the header.
        self.files = sorted(path for path in files if path.stat().st_size < 3_000_000)
        self.whole = {path: path.read_bytes() for path in self.files}

    def __repr__(self) -> str:
        return f"<a run of {len(self.files)} files>"

    def restore(self) -> None:
        """Puts back what was damaged, and removes what a command has left."""
        for path, content in self.whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        for path in self.base.glob("*.lock"):
            path.unlink()


@pytest.fixture(scope="module")
def run(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Run:
    base = tmp_path_factory.mktemp("commands") / "run"
    for name, source in (("student", family.qwen2_5_omni), ("teacher", family.teacher)):
        shutil.copytree(source, base / name)
    tone = 0.3 * np.sin(np.arange(12_000) / 9)
    soundfile.write(base / "0.wav", tone, 16_000)
    given = {"audio": "0.wav", "description": "tones", "trace": TRACE, "choices": ["2", "3"]}
    rows = [{"id": sample, "question": f"How many, {sample}?", **given} for sample in IDS]
    rows.append({"id": "test", "audio": "0.wav", "question": "?", "answer": "2", "split": "test"})
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "kdpipe.yaml").write_text(CONFIG)
    for stage in ("textualize", "cache-teachers"):
        ctx = Request(base / "kdpipe.yaml").context()
        STAGES[stage].run(ctx, make_plans(ctx, stage)[stage].todo)
    assert CliRunner().invoke(main, ["check", "-c", str(base / "kdpipe.yaml")]).exit_code == 0
    (base / "train").mkdir()
    (base / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "terms": {}}\n')
    (base / "evaluate").mkdir()
    (base / "evaluate" / "scores.json").write_text("{}")
    return Run(base)


def look(run: Run, words: tuple[str, ...], statuses: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command says, in this process; an error that nobody foresaw is raised here."""

    def unforeseen(error: Exception) -> str:
        raise AssertionError(f"kdpipe {' '.join(words)}: unforeseen: {error!r}") from error

    monkeypatch.setattr(kdpipe.pipeline.unforeseen, "unforeseen", unforeseen)
    forget()
    result = CliRunner().invoke(main, [*words, "-c", str(run.base / "kdpipe.yaml")])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in statuses, (result.exit_code, result.output[-2000:])
    assert_said(result.exit_code, result.output)
    return result.output


def assert_said(status: int, output: str) -> None:
    """No traceback, nothing that a terminal would obey, and a reason where something is refused."""
    assert "Traceback" not in output and "raceback is in" not in output, output[-3000:]
    bad = [char for char in output if not char.isprintable() and char not in "\n\r"]
    assert not bad, (bad, output[-2000:])
    assert status != 2 or len(output.split("Error:", 1)[-1].strip()) > 20, output


@fuzz(0.035, command=st.sampled_from(COMMANDS), data=st.data())
def test_one_file_is_damaged(run: Run, command: Any, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data.draw(st.sampled_from(run.files))
    whole = run.whole[path]
    try:
        if path.suffix == ".json" and data.draw(st.booleans()):
            document = json.loads(whole)
            document = document if len(whole) < 20_000 else _few(document)
            path.write_bytes(json.dumps(data.draw(documents(document))).encode())
        elif data.draw(st.integers(0, 9)) == 0:
            path.unlink()
        else:
            path.write_bytes(apply(whole, data.draw(edits(3))))
        look(run, *command, monkeypatch)
    finally:
        run.restore()


@fuzz(
    0.025,
    command=st.sampled_from(COMMANDS),
    texts=st.dictionaries(
        st.sampled_from(("id", "audio", "question", "answer", "choices", "split", "task", "description", "trace", "x")),
        st.one_of(
            odd_values, st.sampled_from(("\x1b[2J", "a\x9b31m", "\u202eb", "two\nlines", "\u2028", "'; rm -rf /"))
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_hostile_rows(run: Run, command: Any, texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": "odd", "audio": "0.wav", "question": "?", "answer": "2", "split": "train", **texts}
    manifest = run.base / "manifest.jsonl"
    try:
        manifest.write_bytes(run.whole[manifest] + json.dumps(row).encode() + b"\n")
        look(run, *command, monkeypatch)
    finally:
        run.restore()


@fuzz(
    0.025,
    command=st.sampled_from(COMMANDS[:6]),
    key=st.sampled_from(
        (
            *("data.manifest", "run.folder", "run.cache", "student.model.path", "student.system", "student.prompt"),
            *("teachers.textual.model.path", "teachers.k", "teachers.mass", "teachers.temperatures", "layers.map"),
            *("data.train_split", "textualize.trace.sections", "teachers.textual.chat_template_kwargs", "train.freeze"),
            *("data.max_seconds", "train.task_weights", "student.model.revision", "train.lora.rank", "layers.every"),
        )
    ),
    value=odd_values,
)
def test_hostile_settings(run: Run, command: Any, key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words, statuses = command
    setting = f"{key}={json.dumps(value)}".replace("\0", "")
    try:
        look(run, (*words, "--set", setting), statuses, monkeypatch)
    finally:
        run.restore()


@fuzz(0.003, command=st.sampled_from(COMMANDS[:6]), data=st.data())
def test_as_a_user_starts_it(run: Run, command: Any, data: st.DataObject) -> None:
    words, statuses = command
    light = [path for path in run.files if path.suffix not in (".safetensors",)]
    path = data.draw(st.sampled_from(light))
    try:
        path.write_bytes(apply(run.whole[path], data.draw(edits(3))))
        done = subprocess.run(
            [sys.executable, "-c", "from kdpipe.pipeline.cli import main; main()", *words, "-c", "kdpipe.yaml"],
            cwd=run.base,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    finally:
        run.restore()
    assert done.returncode in statuses, done.stderr[-2000:]
    assert_said(done.returncode, done.stdout + done.stderr)
    assert done.returncode != 2 or done.stderr
