"""Runs triton_cases.py in a process of its own: the interpreter has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.parametrize("interpreted", [True, False])
def test_the_kernel(interpreted: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no kernels on this platform")
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    options = ["-p", "no:cacheprovider", "--override-ini=addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, str(CASES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "11 passed" in done.stdout
