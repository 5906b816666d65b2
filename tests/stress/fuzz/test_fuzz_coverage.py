"""The parsers under atheris, which looks for inputs that reach code no input before has reached."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .fuzzing import COUNTS, FULL, TOTAL
from .test_fuzz_audio import seeds
from .test_fuzz_config import SEEDS
from .test_fuzz_files import WHOLE
from .test_fuzz_manifest import ROWS, _csv

pytestmark = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed here")

CORPUS: dict[str, list[bytes]] = {
    "jsonl": ["".join(json.dumps(row) + "\n" for row in ROWS).encode()],
    "csv": [_csv(ROWS)],
    "config": [seed.encode() for seed in SEEDS],
    "trace": [WHOLE.encode()],
    "clip": [seeds()[name][:4000] for name in ("wav PCM_16", "flac", "ogg VORBIS", "mp3", "aiff PCM_16")],
    "lines": [b'{"step": 1, "loss": 2.0}\n', b'{"key": "k", "text": "tones", "finish_reason": "stop"}\n'],
}


@pytest.mark.parametrize("target", sorted(CORPUS))
def test_parsers(target: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number, seed in enumerate(CORPUS[target]):
        (tmp_path / "corpus" / str(number)).write_bytes(seed)
    runs = max(10, round(TOTAL * 0.02))
    options = [f"-runs={runs}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"]
    options += [f"-artifact_prefix={tmp_path}/", *([] if TOTAL >= FULL else ["-seed=1"]), str(tmp_path / "corpus")]
    child = Path(__file__).with_name("atheris_child.py")
    done = subprocess.run(
        [sys.executable, str(child), target, str(tmp_path), *options], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    COUNTS[f"test_fuzz_coverage.{target}"] += runs
