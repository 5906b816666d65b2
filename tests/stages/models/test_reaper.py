"""The watcher that ends engine processes whose parent is gone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kdpipe.stages.models import reaper


def test_the_watcher_runs_no_code_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('code of the working folder ran')\n")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    watcher = reaper.watch("a-mark-of-this-test")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(3)
    finally:
        watcher.kill()
        watcher.wait()
