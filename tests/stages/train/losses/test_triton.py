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


POINTERS = {
    "*fp32": ("u_ptr", "largest_ptr", "picked_ptr", "relative_ptr", "factors_ptr", "values_ptr"),
    "*fp64": ("lse_ptr", "temperature_ptr"),
    "*bf16": ("bias_ptr", "out_ptr"),
    "*i64": ("ids_ptr",),
    "*i8": ("masked_ptr",),
    "i32": ("columns", "first", "S", "lse_row", "lse_t"),
    "fp32": ("logit_scale", "softcap"),
}


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("kernel", ["_reduce_kernel", "_gradient_kernel", "_pick_gradient_kernel"])
def test_kernels_compile_for_hopper(kernel: str, everything: bool) -> None:
    """Down to machine code, which needs no device: what the interpreter lets pass, the compiler might not."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernels on this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from kdpipe.stages.train.losses import triton_head

    function = getattr(triton_head, kernel)
    types = {name: kind for kind, names in POINTERS.items() for name in names}
    constants = {"T": 2, "BIAS": everything, "CAP": everything, "MASK": everything, "WIDTH": 1024, "PICKS": 128}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(function, signature, constexprs=places), target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
