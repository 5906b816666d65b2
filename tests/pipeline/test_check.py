"""`kdpipe check` over real miniature model folders: what it finds, all at once, without loading weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures


def _run_folder(tmp_path: Path, family: Miniatures, **more: Any) -> Path:
    import soundfile

    rows = [
        {"id": f"s{i}", "audio": "a.wav", "question": "how many?", "answer": "1", "split": split}
        for i, split in enumerate(("train", "train", "test"))
    ]
    rows[1]["audio"] = "missing.wav"
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000) / 9) * 0.3, 16_000)
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "data": {"manifest": "manifest.jsonl", "max_reject_fraction": 0.5, **more.pop("data", {})},
        "student": {"model": {"path": str(family.qwen2_5_omni), "dtype": "float32", **more.pop("student", {})}},
        "teachers": {"textual": {"model": {"path": str(family.teacher)}}, **more.pop("teachers", {})},
        **more,
    }
    (tmp_path / "kdpipe.yaml").write_text(json.dumps(config))
    return tmp_path


def _check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-c", "from kdpipe.pipeline.cli import main; main()", "check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_what_is_right_is_summed_up_without_loading_weights(tmp_path: Path, family: Miniatures) -> None:
    done = _check(_run_folder(tmp_path, family, train={"lora": {"rank": 4}}))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "manifest: 3 samples" in done.stdout and "1 of 3 samples will be rejected: audio_missing" in done.stdout
    assert "layers (student->teacher): 1->2" in done.stdout
    assert "train.lora: rank 4, alpha 32 (scaling 8), dropout 0, 24,064 weights on 28 linear layers" in done.stdout
    assert not any(line.rstrip().endswith("| torch") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teachers": {"tail_blocks": 10**9}}, "teachers.tail_blocks: 1000000000 is too many for"),
        ({"student": {"dtype": "float16"}}, "student.model.dtype: gradients underflow in float16"),
        ({"train": {"lora": {"rank": 4, "targets": ["qproj"]}}}, "did you mean q_proj?"),
        ({"train": {"lora": {"rank": 64}}}, "train.lora.rank: 64 is more than the smaller side of"),
        ({"train": {"lora": {"rank": 0}}}, "train.lora.rank: 0 is out of range"),
        ({"train": {"lora": {"targets": []}}}, "train.lora.targets: is empty"),
        ({"train": {"lora": {"rank": 4}, "freeze": ["audio_tower"]}}, "train.freeze: with train.lora"),
        ({"data": {"eval_split": "tets"}}, "did you mean test?"),
        ({"teachers": {"textual": {"model": {"path": "nowhere"}}}}, "nowhere"),
    ],
    ids=[
        "tail_blocks",
        "float16",
        "lora_target",
        "lora_rank",
        "lora_no_rank",
        "lora_no_target",
        "lora_and_freeze",
        "split",
        "folder",
    ],
)
def test_mistakes_are_named(tmp_path: Path, family: Miniatures, settings: dict[str, Any], words: str) -> None:
    done = _check(_run_folder(tmp_path, family, **settings))
    assert done.returncode != 0 and words in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_of_a_benchmark_are_looked_at(tmp_path: Path, family: Miniatures) -> None:
    folder = _run_folder(tmp_path, family)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]

    def check(**columns: str) -> subprocess.CompletedProcess[str]:
        rows[2] |= columns
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return _check(folder)

    assert "benchmark 'mine': 1 samples, not known, scored as any others" in check(benchmark="mine").stdout
    done = check(benchmark="mmau")
    assert done.returncode == 2 and "its column `item` does not hold the benchmark's item" in done.stderr
    item = json.dumps({"question": "how many?", "choices": ["1", "2"], "answer": "1"})
    assert "benchmark 'mmau': 1 samples, scored as MMAU" in check(item=item).stdout


def test_without_training_no_training_split_is_needed(tmp_path: Path, family: Miniatures) -> None:
    model = {"path": str(family.qwen2_audio), "dtype": "float32"}
    folder = _run_folder(tmp_path, family, data={"train_split": "none"}, evaluate={"model": model})
    done = _check(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "evaluate.model: " in done.stdout
