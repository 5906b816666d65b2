"""A teacher on one device, its layers over several GPUs, or a share of every layer in each of several processes.

With tensor parallelism rank 0 is the calling process; the others run `python -m kdpipe.stages.models.parallel`. All
load the model by transformers' tensor-parallel plan, each its share. Before a forward pass rank 0 writes names, shapes
and dtypes of the inputs to the others' standard input and broadcasts the tensors; then all run the same pass, whose
layer outputs are whole on every rank after each layer's all-reduce. Only rank 0 keeps them. The output head is whole
on rank 0, as it is for one device, and not used by the others.

No rank outlives rank 0 (its end closes their standard input, and on Linux the kernel kills them), and rank 0 never
waits for ever: a rank that ends makes the forward pass an error, and where the pass hangs all the same, as NCCL's do,
a watcher ends the process with a message, as after `kill -9`. Ranks on the CPU talk by gloo, on GPUs by NCCL; only the
former has been run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config import ModelConfig, TeachersConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.loaded import LoadedModel, load_model, pick_device
from kdpipe.stages.models.ranks import REFUSED, Ranks

TIMEOUT = 1800.0
"""Seconds that a rank may take to load its share, or for one forward pass."""
GRACE = 10.0
"""Seconds that rank 0 is given to notice by itself that another rank is gone, before the watcher ends it."""
_PR_SET_PDEATHSIG = 1


@contextmanager
def open_teacher(folder: ModelFolder, config: TeachersConfig) -> Iterator[LoadedModel]:
    """Loads a teacher where the configuration says; frozen, for forward passes without gradients.

    Args:
        folder: the model.
        config: its `device`, `device_map` and `tensor_parallel_size` count.

    Raises:
        ModelError: it cannot be loaded or shared out, or a process that holds a share ended.
        KdpipeError: there are fewer GPUs than processes.
    """
    if config.tensor_parallel_size > 1:
        with shared(folder, config.tensor_parallel_size, device=config.device) as loaded:
            yield loaded
    else:
        yield load_model(folder, device=config.device, device_map=config.device_map)


@contextmanager
def shared(
    folder: ModelFolder, size: int, *, device: str = "auto", timeout: float = TIMEOUT, grace: float = GRACE
) -> Iterator[LoadedModel]:
    """Loads a model into this process and `size - 1` others, which end with the block.

    Call it in the main thread: on Linux the other ranks die with the thread that started them.

    Args:
        folder: the model.
        size: ranks, at least 2; on GPUs rank r takes the r-th that torch sees.
        device: `auto`, `cpu` or `cuda`.
        timeout: seconds that all may take to load, and for one forward pass.
        grace: seconds between the end of a rank and the end of a process that hangs for it.

    Raises:
        ModelError: the model cannot be loaded or shared out, or a rank ended or did not answer.
        KdpipeError: there are fewer GPUs than ranks, or this process is part of another process group.
    """
    kind = _check_devices(pick_device(device).type, size)
    with tempfile.TemporaryDirectory(prefix="kdpipe-ranks-") as meeting, _environment(0, size):
        ranks = Ranks(folder, size, kind, Path(meeting), timeout, grace)
        try:
            ranks.await_start()
            with ranks.together():
                _join(kind, 0, size, Path(meeting), timeout)
                loaded = load_model(folder, device=kind, tensor_parallel=size)
            yield replace(loaded, around=ranks.around)
        finally:
            ranks.close()


def _check_devices(kind: str, size: int) -> str:
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise KdpipeError(
            f"teachers.tensor_parallel_size is {size}, but torch sees {torch.cuda.device_count()} GPUs. Lower it."
        )
    if kind == "cpu" and torch.cuda.is_available():
        raise KdpipeError(
            "teachers.tensor_parallel_size: transformers shares a model over the GPUs wherever torch sees any. "
            "Say teachers.device: auto, or set CUDA_VISIBLE_DEVICES= (nothing) for the CPU."
        )
    if dist.is_initialized():
        raise KdpipeError(
            "teachers.tensor_parallel_size: this process is part of a torch process group already, and kdpipe starts "
            "one of its own. Run kdpipe without torchrun."
        )
    return kind


@contextmanager
def _environment(rank: int, size: int) -> Iterator[None]:
    """What transformers and gloo read from the environment; all ranks are on this machine, so gloo stays within it."""
    ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if sys.platform == "linux":
        ours["GLOO_SOCKET_IFNAME"] = "lo"
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _join(kind: str, rank: int, size: int, meeting: Path, timeout: float) -> None:
    """Makes the process group; NCCL's own time limit ends the process, so that ours must come first."""
    cuda = kind == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(str(meeting / "store"), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=2 * timeout if cuda else timeout),
        device_id=torch.device("cuda", rank) if cuda else None,
    )


def _serve(rank: int, size: int, kind: str, meeting: Path, timeout: float, model: dict[str, Any], name: str) -> None:
    folder = replace(resolve(ModelConfig(**model), Path("/")), name=name)
    (meeting / f"up{rank}").touch()
    _join(kind, rank, size, meeting, timeout)
    loaded = load_model(folder, device=kind, tensor_parallel=size)
    loaded.model.set_output_embeddings(nn.Identity())
    with torch.inference_mode():
        for line in sys.stdin.buffer:
            inputs = {
                name: torch.empty(shape, dtype=getattr(torch, dtype), device=loaded.entrance)
                for name, (shape, dtype) in json.loads(line).items()
            }
            for value in inputs.values():
                dist.broadcast(value, src=0)
            loaded.model(**inputs, use_cache=False, return_dict=True)
    dist.destroy_process_group()


def main() -> int:
    """Another rank than 0: loads its share, and runs the forward passes that rank 0 announces until its input ends."""
    task = json.loads(sys.stdin.buffer.readline())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task.pop("parent"):
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threads, rank, size, meeting = task.pop("threads"), task["rank"], task["size"], Path(task.pop("meeting"))
    if task["kind"] == "cpu":
        torch.set_num_threads(threads)
    try:
        with _environment(rank, size):
            _serve(**task, meeting=meeting)
    except Exception as error:
        refused = isinstance(error, KdpipeError)
        with suppress(OSError):
            (meeting / f"why{rank}").write_text(str(error) if refused else f"{type(error).__name__}: {error}")
        if refused:
            return REFUSED
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
