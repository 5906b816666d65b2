"""The processes that train together, and the few numbers that they tell each other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from kdpipe.data.errors import KdpipeError, SaidElsewhere, of_all
from kdpipe.stages.models.loaded import pick_device
from kdpipe.stages.train.launch import Launch

BUCKET_BYTES = 64 << 20
"""Gradients are summed over the ranks in pieces of about this size."""

_TIMEOUT = timedelta(minutes=30)
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "Broken pipe")
"""What torch says in a plain RuntimeError when another process is gone."""


def is_lost(error: BaseException) -> bool:
    """Whether torch says that another process is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


@dataclass(frozen=True)
class World:
    """Where this process stands among those that train together.

    Attributes:
        rank: of this process, from 0; rank 0 alone writes and speaks.
        size: processes.
        device: of this process.
    """

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def alone(device: str) -> World:
        """A process that trains by itself."""
        return World(0, 1, pick_device(device))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What each rank says, by rank: JSON values, floats to the last bit."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self.others_there():
            dist.all_gather(lengths, torch.tensor([len(own)]))
            padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
            padded[: len(own)] = own
            taken = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(taken, padded)
        return [json.loads(bytes(one[: int(length)].numpy())) for one, length in zip(taken, lengths, strict=True)]

    def refuse_together(self, problem: str) -> None:
        """Raises on every rank where any has a problem.

        Raises:
            KdpipeError: the problem of the first rank that has one.
        """
        self.refuse(self.exchange(problem))

    def refuse(self, problems: Sequence[str]) -> None:
        """Raises on every rank what any of all ranks has said; empty texts are no problems.

        Raises:
            KdpipeError: the problem of the first rank that has one.
        """
        found = [text for text in problems if text]
        if found:
            raise of_all((KdpipeError if self.is_first else SaidElsewhere)(found[0]))

    def first_does(self, work: Callable[[], object]) -> None:
        """Has rank 0 do something that the others wait for.

        Raises:
            KdpipeError: it failed, on every rank; alone, what `work` raises.
        """
        if self.size == 1:
            work()
            return
        problem = ""
        if self.is_first:
            try:
                work()
            except (KdpipeError, OSError) as error:
                problem = str(error)
        self.refuse_together(problem)

    def part(self) -> None:
        """Waits until every rank is here. A launcher ends the others once one has left, whatever they are about; and
        torch's threads may abort who leaves while others still talk."""
        with suppress(KdpipeError, RuntimeError):
            self.exchange(None)

    @torch.no_grad()
    def sum_gradients(self, weights: Sequence[torch.Tensor]) -> None:
        """Replaces each weight's gradient by its sum over all ranks; without one it counts as zero.

        Args:
            weights: the same ones in the same order on every rank, of float32 gradients.
        """
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            bucket.append(weight.grad)
            size += weight.grad.nbytes
            if size >= BUCKET_BYTES:
                self._sum(bucket)
                bucket, size = [], 0
        if bucket:
            self._sum(bucket)

    def _sum(self, gradients: Sequence[torch.Tensor]) -> None:
        flat, at = torch.cat([gradient.reshape(-1) for gradient in gradients]), 0
        with self.others_there():
            dist.all_reduce(flat)
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()

    @contextmanager
    def others_there(self) -> Iterator[None]:
        """Around work with the other ranks.

        Raises:
            KdpipeError: one of them is gone.
        """
        try:
            yield
        except (RuntimeError, CheckpointException) as error:
            if not is_lost(error):
                raise
            raise KdpipeError(
                f"rank {self.rank} of {self.size}: another process ended or does not answer ({_plainly(error)}). What "
                "it said tells why, or the launcher's report if it was killed; start all of them again, and training "
                "goes on from the last checkpoint."
            ) from None


@contextmanager
def joined(launch: Launch, device: str) -> Iterator[World]:
    """Meets the other processes, and leaves them at the end.

    Args:
        launch: how they were started.
        device: `auto`, `cpu` or `cuda`; a GPU is that of the local rank.

    Raises:
        KdpipeError: there are fewer GPUs than processes on this machine, or the others do not come.
    """
    place = pick_device(device)
    if place.type == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise KdpipeError(
                f"rank {launch.rank}: process {launch.local_rank + 1} on this machine, which has "
                f"{torch.cuda.device_count()} GPUs. Start one process a GPU."
            )
        place = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.size))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            init_method=f"tcp://{launch.address}:{launch.port}"
            if "TORCHELASTIC_RUN_ID" not in os.environ
            else "env://",
            rank=launch.rank,
            world_size=launch.size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise KdpipeError(
            f"rank {launch.rank} of {launch.size}: the processes did not meet at {launch.address}:{launch.port} "
            f"({error})"
        ) from None
    world = World(launch.rank, launch.size, place)
    try:
        yield world
        world.part()
    except BaseException as error:
        if getattr(error, "of_all", False):
            world.part()
        raise
    finally:
        dist.destroy_process_group()


def _plainly(error: BaseException) -> str:
    """What torch says, without its source files, advice and emoji."""
    first = re.sub(r"^\[[^\]]*\]\s*", "", (str(error).splitlines() or [""])[0])
    return re.split(r"\. |: +\.|\s+Check the logs", first)[0][:200]
