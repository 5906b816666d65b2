"""The main job over real recordings: 8 kHz WAV and 44.1 kHz OGG, real vLLM, transformers and Zarr, by the command line.

One run is shared by the tests of this file; each later test works on a copy of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.vllm

GOOD = -1
"""Stands for all samples that were not rejected."""

KDPIPE = str(Path(sys.executable).parent / "kdpipe")
SOUNDS = {"dog_bark": "a dog", "rain": "rain", "rooster": "a rooster", "clock_tick": "a clock"}
TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>I hear {answer}.</CAPTION><REASONING>It sounds like {answer}."
    "</REASONING><SUMMARY>So {answer}.</SUMMARY></THINK><RESPONSE>{answer}</RESPONSE>"
)

CONFIG = """\
data: {manifest: data/manifest.jsonl, max_seconds: 6, max_reject_fraction: 0.3}
student:
  model: {path: models/student, dtype: float32}
textualize:
  describe: {prompt: Describe the audio., max_tokens: 8}
  trace: {require_match: false, candidates: 2, max_tokens: 200, max_section_chars: 12}
  engine: {max_model_len: 1280, enforce_eager: true, cpu_kv_cache_gib: 1}
  part_samples: 4
teachers:
  textual: {model: {path: models/teacher, dtype: float32}}
  k: 16
  temperatures: [1.0, 2.0]
  part_samples: 5
layers: {mode: skip, every: 2, match: lens}
train:
  epochs: 2
  learning_rate: 1e-3
  global_batch_tokens: 8192
  micro_batch_tokens: 4096
evaluate:
  max_tokens: 24
  engine: {max_model_len: 1280, enforce_eager: true, cpu_kv_cache_gib: 1}
"""


def kdpipe(*arguments: str, folder: Path, code: int = 0) -> str:
    """Runs the command line in `folder` and returns what it printed."""
    done = subprocess.run([KDPIPE, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def status(folder: Path, code: int) -> dict[str, dict]:
    stages = json.loads(kdpipe("status", "--json", folder=folder, code=code))["stages"]
    assert [stage["name"] for stage in stages] == ["textualize", "cache-teachers", "train", "evaluate"]
    return {stage["name"]: stage for stage in stages}


def build(folder: Path, recordings: Path, family) -> None:
    """Copies a mix of recordings into `folder/data` with a manifest, and the miniatures into `folder/models`."""
    clips = folder / "data" / "clips"
    clips.mkdir(parents=True)
    rows = []
    for number, name in enumerate(SOUNDS):
        files = sorted((recordings / "esc10" / name).glob("*.ogg"))[:3]
        for take, file in enumerate(files):
            shutil.copy(file, clips)
            rows.append({
                "id": f"{name}-{take}", "audio": f"clips/{file.name}", "question": "What makes the sound?",
                "choices": list(SOUNDS.values()), "answer": SOUNDS[name], "task": "sound",
                "split": "test" if take == 2 else "train",
            })  # fmt: skip
            if take == 0:
                rows[-1]["trace"] = TRACE.format(answer=SOUNDS[name])
        digit = recordings / "fsdd" / f"{number}_theo_0.wav"
        shutil.copy(digit, clips)
        rows.append({
            "id": f"digit-{number}", "audio": f"clips/{digit.name}", "question": "Which digit is spoken?",
            "answer": str(number), "task": "digit", "split": "test" if number == 3 else "train",
        })  # fmt: skip
    (clips / "broken.wav").write_bytes(b"this is not audio")
    rows.append({"id": "broken", "audio": "clips/broken.wav", "question": "What is it?", "answer": "rain"})
    (folder / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(family.qwen2_audio, folder / "models" / "student")
    shutil.copytree(family.teacher, folder / "models" / "teacher")
    (folder / "kdpipe.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recordings, family) -> Path:
    """A run that has been brought up to date once."""
    folder = tmp_path_factory.mktemp("run") / "first"
    folder.mkdir()
    build(folder, recordings, family)
    kdpipe("check", folder=folder)
    assert status(folder, 1)["textualize"]["state"] == "missing"
    kdpipe("run", folder=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, in another place."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def test_everything_is_made_and_fresh(finished):
    stages = status(finished, 0)
    assert {stage["state"] for stage in stages.values()} == {"fresh"}
    rejects = {
        row["id"]: row["reason"] for row in pq.read_table(finished / "textualize" / "rejects.parquet").to_pylist()
    }
    assert rejects.pop("broken") == "audio_unreadable"
    # An untaught model may end a description before its first word.
    assert set(rejects.values()) <= {"description_empty"} and len(rejects) < 3
    good = 11 - len(rejects)
    assert stages["textualize"]["samples"] == {"total": 12, "fresh": good, "stale": 0, "rejected": 12 - good}
    assert stages["train"]["samples"] == {"total": good, "fresh": good, "stale": 0, "rejected": 0}
    steps = [json.loads(line) for line in (finished / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"]
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    assert set(scores["base"]["by_task"]) == {"sound", "digit"} == set(scores["student"]["by_task"])
    assert scores["student"]["n"] == 5
    predictions = pq.read_table(finished / "evaluate" / "predictions.parquet").to_pylist()
    assert len(predictions) == 10 and all(row["output"] for row in predictions)


def test_zarr_alone_opens_every_part(finished):
    code = (
        "import sys, zarr\n"
        "for path in sys.argv[1:]:\n"
        "    part = zarr.open_group(path, mode='r')\n"
        "    units = part.attrs['kdpipe']['units']\n"
        "    arrays = dict(part.members(max_depth=None))\n"
        "    print(len(units), sum(array[:].size for array in arrays.values() if hasattr(array, 'shape')))\n"
        "assert 'kdpipe' not in sys.modules and 'torch' not in sys.modules\n"
    )
    parts = sorted((finished / "cache-teachers" / "parts").glob("*.zarr"))
    assert len(parts) >= 6
    output = subprocess.run([sys.executable, "-c", code, *map(str, parts)], capture_output=True, text=True, check=True)
    assert len(output.stdout.splitlines()) == len(parts)


def test_a_moved_run_is_fresh_and_a_second_run_does_nothing(run):
    status(run, 0)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "locks" not in path.parts}
    assert "nothing to do" in kdpipe("run", folder=run)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "locks" not in path.parts}
    remembered = {run / "tmp" / name for name in ("fingerprints.sqlite", "look.npz")}
    assert {path for path in after if before.get(path) != after[path]} <= remembered


def test_execution_settings_make_nothing_stale(run):
    text = (run / "kdpipe.yaml").read_text()
    text = text.replace("part_samples: 4", "part_samples: 2").replace(
        "micro_batch_tokens: 4096", "micro_batch_tokens: 2048"
    )
    text = text.replace("cpu_kv_cache_gib: 1", "cpu_kv_cache_gib: 3").replace("  k: 16", "  batch_tokens: 999\n  k: 16")
    (run / "kdpipe.yaml").write_text(text)
    status(run, 0)


def test_one_changed_clip_is_one_stale_sample_in_each_stage_that_hears_it(run, recordings):
    shutil.copy(recordings / "fsdd" / "0_jackson_1.wav", run / "data" / "clips" / "0_theo_0.wav")
    stages = status(run, 1)
    for name in ("textualize", "cache-teachers", "train"):
        assert stages[name]["state"] == "stale" and stages[name]["samples"]["stale"] == 1, stages[name]
    assert any("audio" in reason for reason in stages["textualize"]["reasons"])
    assert stages["evaluate"]["state"] == "stale"


def test_one_changed_test_clip_touches_only_evaluate(run, recordings):
    shutil.copy(recordings / "fsdd" / "3_jackson_1.wav", run / "data" / "clips" / "3_theo_0.wav")
    stages = status(run, 1)
    assert {name for name, stage in stages.items() if stage["state"] != "fresh"} == {"evaluate"}
    assert stages["evaluate"]["samples"]["stale"] == 1


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("textualize.describe.prompt=What is it?", {"textualize": 12, "cache-teachers": 12, "train": 12}),
        ("textualize.trace.prompt='{question}'", {"textualize": 8, "cache-teachers": 8, "train": 8}),
        ("teachers.textual.prompt='{description}'", {"textualize": 0, "cache-teachers": GOOD, "train": GOOD}),
        ("teachers.k=8", {"textualize": 0, "cache-teachers": 0, "train": GOOD}),
        ("teachers.k=32", {"textualize": 0, "cache-teachers": GOOD, "train": GOOD}),
        ("train.learning_rate=2e-3", {"textualize": 0, "cache-teachers": 0, "train": GOOD}),
        ("evaluate.temperature=0", {"textualize": 0, "cache-teachers": 0, "train": 0, "evaluate": 5}),
    ],
)
def test_a_changed_setting_stales_what_depends_on_it(finished, override, stale):
    good = status(finished, 0)["train"]["samples"]["total"]
    output = subprocess.run(
        [KDPIPE, "status", "--json", "--set", override], cwd=finished, capture_output=True, text=True
    )
    assert output.returncode == 1, output.stderr
    stages = {stage["name"]: stage["samples"]["stale"] for stage in json.loads(output.stdout)["stages"]}
    assert {name: stages[name] for name in stale} == {name: good if n is GOOD else n for name, n in stale.items()}


def test_only_refuses_when_upstream_is_stale(run):
    output = kdpipe("train", "--only", "--set", "teachers.k=32", folder=run, code=2)
    assert "cache-teachers is stale, and --only was given" in output and "k 16 -> 32" in output


def test_dry_run_says_what_and_why_and_changes_nothing(run):
    output = kdpipe("run", "--dry-run", "--set", "train.epochs=3", folder=run)
    assert "train" in output and "stale" in output and "textualize" not in output
    status(run, 0)


def test_recaching_changed_teachers_runs_only_what_is_stale(run):
    """A larger k recomputes the textual teacher; targets and acoustic states stay as they are."""
    parts = {path.name: path.stat().st_mtime_ns for path in (run / "cache-teachers" / "parts").iterdir()}
    output = kdpipe("cache-teachers", "--set", "teachers.k=24", folder=run)
    assert "k 16 -> 24" in output
    left = {path.name: path.stat().st_mtime_ns for path in (run / "cache-teachers" / "parts").iterdir()}
    same = {name for name, time in parts.items() if left.get(name) == time}
    sources = {
        json.loads((run / "cache-teachers" / "parts" / name / "zarr.json").read_text())["attributes"]["kdpipe"][
            "source"
        ]
        for name in same
    }
    assert {"targets", "acoustic"} <= sources


def test_rows_and_another_model_are_scored_from_one_cache(run):
    """Base, SFT and the seventh row, then a model that is nobody's student; again, and nothing is done."""
    parts = {path.name: path.stat().st_mtime_ns for path in (run / "cache-teachers" / "parts").iterdir()}
    weights = ("--set", "train.task_weights={digit: {sft: 0.25}}")
    command = ("rows", "--rows", "base,sft,ours", "--seeds", "3", "--group", "hearing=digit,sound", *weights)
    assert kdpipe(*command, "--dry-run", folder=run).count("to do") == 3
    output = kdpipe(*command, folder=run)
    assert "All layers + acoustic + weights by task" in output and "over SFT: hearing" in output
    rows = {row["name"]: row for row in json.loads((run / "rows" / "results.json").read_text())["rows"]}
    assert {name: row["seeds"] for name, row in rows.items()} == {"base": [], "sft": [3], "ours": [3]}
    assert all(row["n"] == 5 and row["groups"]["hearing"]["n"] == 5 for row in rows.values())
    left = {path.name: path.stat().st_mtime_ns for path in (run / "cache-teachers" / "parts").iterdir()}
    assert parts.items() <= left.items(), "what the run had cached served the rows"
    again = kdpipe(*command, folder=run)
    assert again.count("fresh") == 4 and "samples to do" not in again

    told = kdpipe("evaluate", "--model", str(run / "rows" / "sft" / "seed-3" / "train" / "student"), folder=run)
    assert "train:" not in told
    (place,) = (run / "evaluations").iterdir()
    assert f"kdpipe report -c {place / 'kdpipe.yaml'}" in told
    for made in ("rows/ours/seed-3", str(place.relative_to(run))):
        stages = json.loads(
            kdpipe("status", "--json", "-c", f"{made}/kdpipe.yaml", folder=run, code=0 if "rows" in made else 1)
        )
        assert {stage["name"]: stage["state"] for stage in stages["stages"]}["evaluate"] == "fresh"
    answers = pq.read_table(place / "evaluate" / "predictions.parquet").to_pylist()
    assert sorted(row["source"] for row in answers) == ["base"] * 5 + ["student"] * 5
    status(run, 0)
