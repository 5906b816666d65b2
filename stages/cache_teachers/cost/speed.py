"""How long teachers take: by the speed they had on this machine before, or else by arithmetic.

`tmp/speed.json` in the cache folder remembers, by source, teacher and device, how much a teacher did in how many
seconds. It is about execution alone: no part, key or ledger depends on it, and it may be removed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdpipe.data.files import write_json
from kdpipe.stages.base import Context
from kdpipe.stages.models.folder import ModelFolder, weight_shapes

_FILE = "speed.json"
_FORMAT = 1
_FORGET = 0.95
"""What is remembered loses a twentieth of its weight with each record, so that a speed follows its settings."""
_PROBE_SECONDS = 0.5
_NOT_READ = ("embed_tokens", "talker.", "token2wav.", "visual.", "lm_head")
"""Parts of a checkpoint that no token goes through here; the output head is counted by its rows."""


@dataclass(frozen=True)
class Work:
    """What a teacher has to do.

    Attributes:
        tokens: of whole sequences, prompts and audio included, padding not.
        head_rows: rows that go through the output head: response positions times distributions of each.
        tower: positions of the audio tower.
    """

    tokens: float
    head_rows: float = 0
    tower: float = 0

    def flop(self, teacher: ModelFolder) -> float:
        """Floating-point operations of the forward passes: 2 a weight that a token goes through; without attention."""
        body, tower = parameters(teacher.path)
        body *= _active_share(teacher)
        return 2.0 * (body * self.tokens + tower * self.tower + head_weights(teacher) * self.head_rows)


@dataclass(frozen=True)
class Duration:
    """Time that some work takes.

    Attributes:
        seconds: how long, without loading the model.
        device: what it runs on.
        rough: whether it is arithmetic, and so a lower bound, or from parts that were made before.
    """

    seconds: float
    device: str
    rough: bool


def record_speed(
    ctx: Context,
    source: str,
    teacher: ModelFolder,
    tokens: int,
    seconds: float,
    *,
    head_rows: int = 0,
    tower: int = 0,
) -> None:
    """Remembers how long a teacher took for some samples; called after their commit, by one process of a run.

    A file that cannot be read or written is no error.

    Args:
        ctx: the run.
        source: `textual`, `acoustic` or `acoustic_top`.
        teacher: its folder.
        tokens: of their whole sequences, prompts and audio included, padding not.
        seconds: from the first batch to the last commit, without loading the model.
        head_rows: response positions times the distributions of each, top and lens layers together.
        tower: positions of the audio tower.
    """
    work = Work(tokens, head_rows, tower)
    if tokens <= 0 or seconds <= 0:
        return
    try:
        known = _read(ctx)
        place = known.setdefault(source, {}).setdefault(teacher.digest(ctx.prints), {})
        old = place.get(device_name(ctx, source), {})
        place[device_name(ctx, source)] = {
            name: _FORGET * float(old.get(name, 0.0)) + value
            for name, value in (("seconds", seconds), ("tokens", tokens), ("flop", work.flop(teacher)))
        }
        write_json(_file(ctx), {"format": _FORMAT, "speeds": known}, ctx.tmp("cache-teachers"))
    except (OSError, ValueError, TypeError, AttributeError):
        return


def duration(ctx: Context, source: str, teacher: ModelFolder, work: Work) -> Duration:
    """How long a teacher will take for some work.

    Without history, for as long as `_PROBE_SECONDS`, the device multiplies matrices: PyTorch is then imported.
    """
    device, flop = device_name(ctx, source), work.flop(teacher)
    try:
        known = _read(ctx)[source][teacher.digest(ctx.prints)][device]
        return Duration(flop * float(known["seconds"]) / float(known["flop"]), device, rough=False)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        speed = _multiply_speed(_device(ctx), teacher.settings.dtype) * _devices(ctx, source)
        return Duration(flop / speed, device, rough=True)


def head_weights(teacher: ModelFolder) -> int:
    """Weights of the output head."""
    return teacher.head_rows * teacher.width


@lru_cache(maxsize=16)
def parameters(folder: Path) -> tuple[int, int]:
    """Weights of decoder layers and audio tower of a checkpoint, from the headers of its safetensors files alone."""
    body = tower = 0
    for name, shape in weight_shapes(folder).items():
        if any(part in name for part in _NOT_READ):
            continue
        if "audio_tower." in name:
            tower += math.prod(shape)
        else:
            body += math.prod(shape)
    return body, tower


def _active_share(teacher: ModelFolder) -> float:
    """Share of the weights that one token goes through, in a mixture of experts: nearly all are experts."""
    experts = teacher.text.get("num_experts") or teacher.text.get("num_local_experts")
    used = teacher.text.get("num_experts_per_tok")
    return used / experts if experts and used else 1.0


def device_name(ctx: Context, source: str) -> str:
    """What a teacher runs on: GPUs or processor, how many, and under which engine. Found without PyTorch."""
    name = _gpu() if _device(ctx) == "cuda" else _processor()
    count = _devices(ctx, source)
    served = source == "textual" and ctx.config.teachers.textual.engine != "transformers"
    return f"{name}{f' x {count}' if count > 1 else ''}{' (vLLM)' if served else ''}"


def _devices(ctx: Context, source: str) -> int:
    """Devices that work at the same time."""
    teachers = ctx.config.teachers
    served = source == "textual" and teachers.textual.engine != "transformers"
    return teachers.serve.tensor_parallel_size if served else teachers.tensor_parallel_size


def _device(ctx: Context) -> str:
    wanted = ctx.config.teachers.device
    if wanted != "auto":
        return wanted
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if not hidden and (any(_gpu_files()) or Path("/dev/kfd").exists()) else "cpu"


def _gpu_files() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


def _gpu() -> str:
    for file in _gpu_files():
        name = _field(file, "Model")
        if name:
            return name
    return "GPU"


def _processor() -> str:
    name = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine() or "processor"
    return f"{name}, {os.cpu_count() or 1} threads"


@lru_cache(maxsize=8)
def _field(file: Path, name: str) -> str:
    """The first value of `name: value` in a text file."""
    try:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return " ".join(value.split())
    except OSError:
        pass
    return ""


@lru_cache(maxsize=4)
def _multiply_speed(device: str, dtype: str) -> float:
    """Floating-point operations a second of a matrix product, measured for about half a second."""
    import torch

    place = torch.device("cuda" if device == "cuda" and torch.cuda.is_available() else "cpu")
    size = 4096 if place.type == "cuda" else 512
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=place)

    def run(times: int) -> float:
        if place.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        if place.type == "cuda":
            torch.cuda.synchronize()
        return max(time.perf_counter() - start, 1e-6)

    run(1)
    once = run(1)
    times = max(1, min(10_000, int(_PROBE_SECONDS / once)))
    return 2.0 * size**3 * times / run(times)


def _file(ctx: Context) -> Path:
    return ctx.tmp("cache-teachers") / _FILE


def _read(ctx: Context) -> dict[str, Any]:
    """What is remembered; nothing, where the file is missing, damaged, or of another format."""
    try:
        document = json.loads(_file(ctx).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = document.get("speeds") if isinstance(document, dict) and document.get("format") == _FORMAT else None
    return known if isinstance(known, dict) else {}
