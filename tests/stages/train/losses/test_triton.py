"""Runs triton_cases.py: natively where there is a CUDA device, and always under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def _run(**environment: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--override-ini=addopts=--import-mode=importlib",
        str(CASES),
    ]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no kernels on this platform")
    said = _run(TRITON_INTERPRET="1")
    found = re.search(r"(\d+) passed", said)
    assert found and int(found[1]) >= 60 and "skipped" not in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_device() -> None:
    assert re.search(r"\d+ passed", _run())
