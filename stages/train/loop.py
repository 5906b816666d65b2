"""The training loop: global batches in, a trained student out, one line of metrics a step.

A global batch is a budget of sequence tokens; its micro-batches are what fits into one forward pass. Every term is
summed over the tokens of the whole global batch and divided once by their number, so the loss and its gradient are
the same however the batch is cut.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kdpipe.data.stream import Stream, StreamState, prefetch
from kdpipe.stages.config import TrainConfig
from kdpipe.stages.progress import progress
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.data import GlobalBatch, Reader
from kdpipe.stages.train.guards import NotFinite, Skips, StepFailed, check_losses, undone_on_failure, within_memory
from kdpipe.stages.train.metrics import MetricsFile, read_metrics
from kdpipe.stages.train.objective import OVER_AUDIO, Objective
from kdpipe.stages.train.optimizer import Optimizer

_AHEAD = 4  # global batches loaded ahead of the step
_THREADS = min(_AHEAD, os.cpu_count() or 1)


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files.

    Attributes:
        folder: the stage's folder, with `checkpoints/` and `metrics.jsonl`.
        tmp: unfinished files.
        identity: digest of everything that decides the student.
        say: prints a line.
        recheck: raises if an input changed since it was hashed; called before anything is saved.
    """

    folder: Path
    tmp: Path
    identity: str
    say: Callable[[str], None]
    recheck: Callable[[], None] = lambda: None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """File of the metrics."""
        return self.folder / "metrics.jsonl"


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; means over the tokens of its global batch. `sources` as in `objective.Sums`."""

    loss: float
    terms: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float]]
    grad_norm: float
    learning_rate: float


def train(
    config: TrainConfig,
    place: Place,
    objective: Objective,
    weights: Mapping[str, float],
    optimizer: Optimizer,
    stream: Stream,
    reader: Reader,
    total_steps: int,
) -> None:
    """Trains from the last checkpoint, or from the start, to the last step, where it leaves a checkpoint.

    Args:
        config: the `train` section.
        place: where files go.
        objective: gives each term of a micro-batch.
        weights: weight of each term.
        optimizer: of the student and of the objective's projections.
        stream: order of the samples.
        reader: loads them.
        total_steps: optimizer steps of the whole run.

    Raises:
        StepFailed: loss or gradient is not finite, or a micro-batch does not fit; names the samples. A checkpoint of
            the steps before it was written.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    done = saved = _resume(place, optimizer, stream)
    before: StreamState | None = None

    def save(step: int, after: StreamState) -> None:
        place.recheck()
        checkpoint.save(
            place.checkpoints,
            place.tmp,
            optimizer,
            identity=place.identity,
            step=step,
            stream=after.as_dict(),
            keep=config.keep_checkpoints,
        )

    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsFile(place.metrics, done, place.tmp))
        stopped = stack.enter_context(_stop_signals())
        bar = stack.enter_context(progress(total_steps, "train", "step", done))
        items = islice(stream, total_steps - done)
        batches = stack.enter_context(closing(prefetch(items, reader.load, depth=_AHEAD, threads=_THREADS)))
        skips = Skips(config.skip_nonfinite, read_metrics(place.metrics), place.say)
        meter = _Meter()
        for number in range(done, total_steps):
            with meter.waiting():
                batch = next(batches)
            step, line = None, None
            try:
                with undone_on_failure():
                    step = train_step(objective, weights, optimizer, batch, number)
            except StepFailed as failure:
                optimizer.discard()
                line = skips.take(failure, _epoch(batch.after))
                if line is None:
                    if before is not None and number > saved:
                        save(number, before)
                    raise
            batch.release()
            meter.count(batch)
            bar.update()
            last = number + 1 == total_steps
            if line is not None:
                metrics.append(line, durable=True)
            if step is not None:
                bar.set_postfix_str(f"loss {step.loss:.4f}, {meter.rate:.0f} tok/s", refresh=False)
                if (number + 1) % config.log_steps == 0 or last:
                    metrics.append(_line(number + 1, batch.after, step, meter))
                    meter = _Meter()
            before = batch.after
            if (number + 1) % config.checkpoint_steps == 0 or last or stopped.is_set():
                save(number + 1, batch.after)
                saved = number + 1
            if stopped.is_set() and not last:
                raise KeyboardInterrupt(
                    f"train: stopped after step {number + 1} of {total_steps}; a checkpoint is written. "
                    "Run the same command again to go on from there."
                )


def train_step(
    objective: Objective, weights: Mapping[str, float], optimizer: Optimizer, batch: GlobalBatch, number: int
) -> Step:
    """One optimizer step over the micro-batches of a global batch.

    Args:
        objective: gives each term of a micro-batch.
        weights: weight of each term.
        optimizer: takes the step.
        batch: the samples.
        number: steps done before.

    Raises:
        StepFailed: loss or gradient is not finite, or a micro-batch does not fit; no weight was changed, but gradients
            are left behind.
    """

    def normalizer(name: str) -> int:
        return max(1, batch.audio_tokens if name == OVER_AUDIO else batch.response_tokens)

    factors = {name: weight / normalizer(name) for name, weight in weights.items()}
    losses, sums = [], []
    for micro in batch.micros:
        with within_memory(micro.batch, number, objective.device):
            made = objective(micro.to(objective.device), factors)
            made.loss.backward()
        losses.append(made.loss.detach())
        flat = {(name,): value for name, value in made.terms.items()}
        flat |= {(source, name): value for source, seen in made.sources.items() for name, value in seen.items()}
        sums.append(flat)
    values = torch.stack(losses).tolist()
    check_losses(values, [micro.batch for micro in batch.micros], number)
    norm, rate = optimizer.step(number)
    if not abs(norm) < float("inf"):
        raise NotFinite(f"the gradient norm is {norm}", number, [i for m in batch.micros for i in m.batch.ids])
    terms: dict[str, float] = {}
    sources: dict[str, dict[str, float]] = {}
    totals = torch.stack([torch.stack([flat[place] for flat in sums]).sum() for place in sums[0]]).tolist()
    for place, total in zip(sums[0], totals, strict=True):
        mean = total / normalizer(place[0].split("/")[0])
        if len(place) == 1:
            terms[place[0]] = mean
        else:
            sources.setdefault(place[0], {})[place[1]] = mean
    return Step(sum(values), terms, sources, norm, rate)


def _resume(place: Place, optimizer: Optimizer, stream: Stream) -> int:
    """Puts the last checkpoint of this run in place; returns the steps it has done, 0 without one."""
    found = checkpoint.find(place.checkpoints, place.identity, stream.digest, place.say)
    if found is None:
        return 0
    checkpoint.load(found, optimizer)
    stream.resume(StreamState(**found.stream))
    place.say(f"train: goes on after step {found.step}")
    return found.step


def _line(step: int, after: StreamState, values: Step, meter: _Meter) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": _epoch(after),
        "loss": values.loss,
        "terms": dict(values.terms),
        "sources": {name: dict(seen) for name, seen in values.sources.items()},
        "learning_rate": values.learning_rate,
        "grad_norm": values.grad_norm,
        "tokens": meter.tokens,
        "tokens_per_second": round(meter.rate, 1),
        "data_wait": round(meter.wait / max(meter.seconds, 1e-9), 4),
        "seconds": round(meter.seconds, 4),
    }


def _epoch(after: StreamState) -> int:
    """The epoch of the step that a state comes after, counted from 1."""
    return after.epoch + 1 if after.batch else after.epoch


class _Meter:
    """Tokens, seconds, and seconds spent waiting for data, since the last line."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.tokens = 0
        self.wait = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def count(self, batch: GlobalBatch) -> None:
        self.tokens += batch.tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal acts as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        restore()

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
