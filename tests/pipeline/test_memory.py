"""What memory training will take, as a line and a table; and the refusal of what has none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.memory import refuse_training_that_does_not_fit, training_memory
from kdpipe.pipeline.plan import make_plans
from kdpipe.pipeline.runner import Request
from kdpipe.stages.train import cost

CONFIG = """\
data: {{manifest: data/manifest.jsonl}}
student: {{model: {{path: {student}, dtype: {dtype}}}}}
teachers: {{textual: {{model: {{path: {teacher}, dtype: float32}}}}, k: 8, device: cpu}}
train: {{device: cpu}}
"""


def build(folder: Path, family: Any, dtype: str = "float32") -> Request:
    (folder / "data").mkdir(parents=True)
    soundfile.write(folder / "data" / "a.wav", 0.3 * np.sin(np.arange(16_000) / 12), 16_000)
    rows = [
        {"id": f"s{n}", "audio": "a.wav", "question": "How many?", "split": "test" if n else "train"} for n in (0, 1)
    ]
    (folder / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.format(student=family.qwen2_5_omni, teacher=family.teacher, dtype=dtype)
    (folder / "kdpipe.yaml").write_text(text)
    return Request(folder / "kdpipe.yaml")


def test_dry_run_prints_a_line_and_a_table(tmp_path: Path, family: Any) -> None:
    request = build(tmp_path, family, dtype="bfloat16")
    done = CliRunner().invoke(main, ["train", "-c", str(request.config_file), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("train: about "))
    assert "of" in lines[head] and "on cpu (most of it: " in lines[head]
    names = [line[:38].strip() for line in lines[head + 1 :]]
    assert names == [
        "train will take on cpu",
        "weights",
        "float32 copies",
        "gradients (float32)",
        "AdamW moments",
        "activations",
        "output head, losses",
        "teachers' data",
        "checkpoint",
        "process",
        "in all",
        "the device has",
    ]
    assert all(len(line) <= 80 for line in lines[head + 1 :])


def test_what_does_not_fit_is_refused_with_remedies_that_help(tmp_path: Path, family: Any, monkeypatch: Any) -> None:
    request = build(tmp_path, family)
    ctx = request.context()
    plan = make_plans(ctx, "train")["train"]
    said: list[str] = []
    object.__setattr__(ctx, "say", said.append)
    refuse_training_that_does_not_fit(ctx, plan)
    assert len(said) == 1 and said[0].startswith("train: about ")
    need = training_memory(ctx)

    monkeypatch.setattr(cost, "device_memory", lambda device: (need.firm_bytes + need.bytes) // 2)
    refuse_training_that_does_not_fit(ctx, plan)
    assert "more than cpu has, if the estimate is right. Set train.gradient_checkpointing: true, or lower" in said[-1]

    monkeypatch.setattr(cost, "device_memory", lambda device: need.firm_bytes - 1)
    with pytest.raises(KdpipeError, match="Nothing was loaded") as caught:
        refuse_training_that_does_not_fit(ctx, plan)
    for remedy in ("train.gradient_checkpointing: true", "train.micro_batch_tokens (4096)", "train.freeze", "bfloat16"):
        assert remedy in str(caught.value)

    monkeypatch.setattr(cost, "device_memory", lambda device: 1000)
    with pytest.raises(KdpipeError) as caught:
        refuse_training_that_does_not_fit(ctx, plan)
    assert "micro_batch_tokens" not in str(caught.value) and "train.freeze" in str(caught.value)

    monkeypatch.setattr(cost, "device_memory", lambda device: None)
    refuse_training_that_does_not_fit(ctx, plan)


def test_the_estimate_imports_no_torch(tmp_path: Path, family: Any) -> None:
    request = build(tmp_path, family)
    code = (
        "import sys\nfrom pathlib import Path\nfrom kdpipe.pipeline.runner import Request\n"
        "from kdpipe.pipeline.memory import memory_lines\n"
        f"print(len(memory_lines(Request(Path({str(request.config_file)!r})).context())))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
