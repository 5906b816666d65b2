"""What happens to a step that cannot be done: a loss or gradient that is no number, a micro-batch without memory.

Either is said with the samples it came from, and leaves weights, moments and random states as they were before it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.models.inputs import Batch
from kdpipe.stages.oom import out_of_memory
from kdpipe.stages.train.watchers import peak_memory

_NAMED = 16
"""Samples of a micro-batch that a message describes one by one."""


class StepFailed(KdpipeError):
    """A step that could not be done; the weights are those of the step before."""


class NotFinite(StepFailed):
    """Loss or gradient is NaN or infinite.

    Args:
        what: such as `the loss is nan`.
        number: steps done before.
        ids: samples it came from.
    """

    def __init__(self, what: str, number: int, ids: Iterable[str]):
        self.what, self.number, self.ids = what, number, tuple(ids)
        super().__init__(
            f"train: {what} in step {number + 1}, from samples {', '.join(self.ids)}. Training stopped before it "
            "touched the weights. Look at these samples; a lower train.learning_rate or student.model.dtype: float32 "
            "may help. train.skip_nonfinite lets so many steps pass."
        )


class DoesNotFit(StepFailed):
    """A forward or backward pass got no memory."""


class Skips:
    """Counts the steps that are passed over because loss or gradient is not finite.

    Args:
        limit: most of them in a run.
        lines: of metrics.jsonl up to where the run goes on: they hold what was skipped before.
        say: prints a line.
    """

    def __init__(self, limit: int, lines: Iterable[Mapping[str, Any]], say: Callable[[str], None]):
        self._limit = limit
        self._say = say
        self.count = len(skipped(lines))

    def take(self, failure: StepFailed, epoch: int) -> dict[str, Any] | None:
        """Passes a step over, and says so.

        Args:
            failure: what happened in the step.
            epoch: the one it belongs to, counted from 1.

        Returns:
            The line for metrics.jsonl, or None where the step may not be passed over.
        """
        if not isinstance(failure, NotFinite) or self.count >= self._limit:
            return None
        self.count += 1
        self._say(
            f"train: step {failure.number + 1} skipped: {failure.what}, from samples {', '.join(failure.ids)} "
            f"({self.count} of train.skip_nonfinite = {self._limit})"
        )
        return {
            "step": failure.number + 1,
            "epoch": epoch,
            "loss": None,
            "skipped": failure.what,
            "samples": list(failure.ids),
        }


def skipped(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl that tell of skipped steps."""
    return [line for line in lines if "skipped" in line]


def check_losses(values: Sequence[float], micros: Sequence[Batch], number: int) -> None:
    """Refuses losses of micro-batches that are not finite.

    Raises:
        NotFinite: with all samples of the micro-batches concerned.
    """
    bad = [(value, batch) for value, batch in zip(values, micros, strict=True) if not abs(value) < float("inf")]
    if bad:
        raise NotFinite(f"the loss is {bad[0][0]}", number, [name for _, batch in bad for name in batch.ids])


@contextmanager
def within_memory(batch: Batch, number: int, device: torch.device) -> Iterator[None]:
    """Around forward and backward pass of a micro-batch: says which one got no memory, and what helps.

    Args:
        batch: of the micro-batch.
        number: steps done before.
        device: of the student.

    Raises:
        DoesNotFit: memory could not be allocated.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        # The frames of the pass hold its tensors, and the error holds the frames: they would stay while a checkpoint
        # is written.
        traceback.clear_frames(error.__traceback__)
        raise DoesNotFit(_describe(batch, number, device, error)) from None


def _describe(batch: Batch, number: int, device: torch.device, error: BaseException) -> str:
    lengths = batch.lengths
    audio = [stop - start for start, stop in zip(batch.audio_offsets, batch.audio_offsets[1:], strict=False)]
    each = [
        f"{name} ({length:,} tokens, {heard:,} of them audio)"
        for name, length, heard in zip(batch.ids, lengths, audio, strict=True)
    ]
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    rows, padded = len(batch.ids), batch.input_ids.numel()
    shape = f"padded to {max(lengths):,} tokens" if batch.position_ids is None else "packed"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    alone = (
        "It is one sample alone, so a lower train.micro_batch_tokens does not help; set"
        if rows == 1
        else f"Lower train.micro_batch_tokens below {padded} (the loss does not depend on it), or set"
    )
    return (
        f"train: a micro-batch does not fit into memory in step {number + 1}: {rows} sequences {shape}, "
        f"{padded:,} tokens in all, {sum(audio):,} of them audio: {', '.join(each[:_NAMED])}{more}. "
        f"{_peak(device)}. What torch says: {reason.rstrip('.')}. {alone} train.gradient_checkpointing: true, or "
        "train fewer weights (train.freeze, LoRA). Run the same command again: it goes on from the last checkpoint."
    )


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"Peak {_gb(peak)}, {_gb(held)} with what the allocator holds back, of {_gb(total)} on {device}"
    peak = peak_memory(device)
    return f"Peak {_gb(peak)} of {_gb(psutil.virtual_memory().total)} in process {os.getpid()}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
