"""Processes of the stages: no code from the working folder, and errors that nobody foresaw."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from kdpipe.pipeline import cli, demo, runner
from kdpipe.pipeline.unforeseen import unforeseen

KDPIPE = Path(sys.executable).parent / "kdpipe"
TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A tone.</CAPTION><REASONING>One tone.</REASONING>"
    "<SUMMARY>One.</SUMMARY></THINK><RESPONSE>one</RESPONSE>"
)
HOSTILE = "import sys, pathlib\npathlib.Path({mark!r}).touch()\nraise SystemExit('code of the working folder ran')\n"
LIBRARIES = ("soundfile", "pyarrow", "transformers", "torch", "psutil", "kdpipe", "yaml")


def build(folder: Path, family) -> Path:
    """A run of two samples, one of whose clips is a named pipe that nobody writes to."""
    (folder / "data").mkdir(parents=True)
    soundfile.write(folder / "data" / "a.wav", 0.3 * np.sin(np.arange(16_000) * 0.1), 16_000)
    os.mkfifo(folder / "data" / "pipe.wav")
    common = {"question": "How many?", "answer": "one", "description": "a tone", "trace": TRACE}
    rows = [{"id": name, "audio": f"{name}.wav", **common} for name in ("a", "pipe")]
    rows.append({**rows[0], "id": "held-out", "split": "test"})
    (folder / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "kdpipe.yaml"
    config.write_text(
        "data: {manifest: data/manifest.jsonl, max_reject_fraction: 0.5}\n"
        f"student: {{model: {{path: {family.qwen2_5_omni}, dtype: float32}}}}\n"
        f"teachers: {{textual: {{model: {{path: {family.teacher}, dtype: float32}}}}}}\n"
    )
    return config


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def test_a_stage_neither_runs_code_of_the_working_folder_nor_waits_for_a_pipe(tmp_path, family):
    """As on the command line, in a folder with files that bear the names of libraries."""
    config = build(tmp_path / "run", family)
    work = tmp_path / "work"
    work.mkdir()
    for name in LIBRARIES:
        (work / f"{name}.py").write_text(HOSTILE.format(mark=str(tmp_path / f"ran-{name}")))
    command = [KDPIPE, "textualize", "-c", config]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True, timeout=120)
    assert [path.name for path in tmp_path.glob("ran-*")] == []
    assert done.returncode == 0, done.stderr
    command = [KDPIPE, "status", "-c", config, "--json"]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert told["next"] == f"kdpipe cache-teachers -c {config}"
    (textualize, *_) = told["stages"]
    assert textualize["samples"] == {"total": 2, "fresh": 1, "stale": 0, "rejected": 1}
    assert textualize["reasons"] == ["rejected: audio_unreadable: 1"]
    assert [path.name for path in tmp_path.glob("ran-*")] == []


def test_models_of_the_demo_are_made_without_the_working_folder_in_the_path(tmp_path, monkeypatch):
    """What `-P` does there is Python's; that it is asked for is ours."""
    (tmp_path / "data").mkdir()
    commands = []

    class Stopped(Exception):
        pass

    def note(command, **options):
        commands.append(command)
        raise Stopped

    monkeypatch.setattr(demo.subprocess, "run", note)
    with pytest.raises(Stopped):
        demo.run_demo(tmp_path)
    assert commands[0][:4] == [sys.executable, "-P", "-m", "kdpipe.pipeline.demo"]


WORKER = """
import sys
from kdpipe.pipeline import worker

def fail(*arguments):
    raise {error}

worker.make_plans = fail
sys.exit(worker.main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "RuntimeError('header too large\\nsecond line')",
            1,
            r"Error: train: RuntimeError: header too large\. What was committed is kept\. The traceback is in (.*)\.\n",
        ),
        (
            "OSError(28, 'No space left')",
            2,
            r"Error: train: \[Errno 28\] No space left\. What was committed is kept.*\n",
        ),
        ("ValueError()", 1, r"Error: train: ValueError: \. What was committed is kept\. The traceback is in (.*)\.\n"),
    ],
)
def test_a_stage_ends_with_one_sentence_and_leaves_the_traceback_in_a_file(tmp_path, error, code, said):
    (tmp_path / "kdpipe.yaml").write_text(
        "data: {manifest: m.jsonl}\nstudent: {model: student}\nteachers: {textual: {model: teacher}}\n"
    )
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", WORKER.format(error=error.replace("\n", "\\n")), tmp_path / "kdpipe.yaml"]
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    found = re.fullmatch(said, done.stderr)
    assert found, done.stderr
    left = list((tmp_path / "tmp").iterdir())
    assert [str(path) for path in left] == list(found.groups())
    for path in left:
        text = path.read_text()
        assert text.startswith("Traceback (most recent call last)") and "in fail" in text


def test_the_command_line_does_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*arguments, **options):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(runner, "bring_up_to_date", fail)
    result = CliRunner().invoke(cli.main, ["run", "-c", str(tmp_path / "kdpipe.yaml")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (file,) = tmp_path.iterdir()
    assert result.output == (
        f"Error: KeyError: 'a mistake of ours'. What was committed is kept. The traceback is in {file}.\n"
    )
    assert "in fail" in file.read_text()


@pytest.mark.parametrize("error", [click.UsageError("bad option"), click.Abort(), click.exceptions.Exit(3)])
def test_what_click_raises_is_left_to_click(monkeypatch, tmp_path, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(runner, "bring_up_to_date", fail)
    result = CliRunner().invoke(cli.main, ["run"])
    assert result.exit_code in (1, 2, 3) and "committed" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_for_the_file_the_traceback_is_in_the_sentence(monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    try:
        raise ValueError("long " * 1000 + "\nsecond line")
    except ValueError as error:
        text = unforeseen(error)
    first, _, rest = text.partition(" What was committed is kept. ")
    assert first.startswith("ValueError: long long") and len(first) < 330 and "second" not in first
    assert rest.startswith("Traceback (most recent call last)")


def test_the_traceback_of_any_text_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = unforeseen(ValueError(os.fsdecode(b"clip-\xff.wav")))
    (file,) = tmp_path.iterdir()
    assert text.endswith(f"The traceback is in {file}.") and "\\udcff" in file.read_text()


def test_making_models_fails_in_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-P", "-m", "kdpipe.pipeline.demo", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("Error: demo: ") and done.stderr.count("\n") == 1


def test_an_interruption_before_the_stage_has_begun_is_one_sentence(tmp_path, family):
    """The runner starts a stage with SIGINT blocked; it waits until the stage can take it."""
    config = build(tmp_path, family)
    command = [sys.executable, "-P", "-m", "kdpipe.pipeline.worker", "textualize", str(config)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        process.send_signal(signal.SIGINT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.strip() == "textualize: interrupted. What was committed is kept."
