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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kdpipe.data.errors import KdpipeError, SaidElsewhere, StoreError, of_all
from kdpipe.data.stream import Stream, StreamState, prefetch
from kdpipe.stages.config import TrainConfig, identity_of
from kdpipe.stages.interrupts import Handler, handle
from kdpipe.stages.progress import progress
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.checkpoint import Checkpoints
from kdpipe.stages.train.data import GlobalBatch, Reader
from kdpipe.stages.train.guards import DoesNotFit, NotFinite, Skips, StepFailed, check_losses, within_memory
from kdpipe.stages.train.metrics import read_metrics
from kdpipe.stages.train.objective import Objective
from kdpipe.stages.train.optimizer import Optimizer
from kdpipe.stages.train.validation import Validation
from kdpipe.stages.train.watchers import Watchers, bar_text, peak_memory, watch
from kdpipe.stages.train.weights import OVER_AUDIO, Weighting
from kdpipe.stages.train.world import World

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
    """What one optimizer step did; means over the tokens of its global batch, of all ranks. `sources` as in
    `objective.Sums`; `tokens` are those of whole sequences."""

    loss: float
    terms: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float]]
    grad_norm: float
    learning_rate: float
    tokens: int


def train(
    config: TrainConfig,
    place: Place,
    objective: Objective,
    weights: Weighting,
    optimizer: Optimizer,
    stream: Stream,
    reader: Reader,
    total_steps: int,
    world: World,
    validation: Validation | None = None,
) -> None:
    """Trains from the last checkpoint, or from the start, to the last step, where it leaves a checkpoint.

    Args:
        config: the `train` section.
        place: where files go.
        objective: gives each term of a micro-batch.
        weights: weight of each term, by task and step.
        optimizer: of the student and of the objective's projections.
        stream: order of the samples.
        reader: loads them.
        total_steps: optimizer steps of the whole run.
        world: the processes that train together; each is given its own share of the stream.
        validation: measures the held-out loss; None for none. Where the loss is the lowest so far, a checkpoint
            follows, and is kept.

    Raises:
        StepFailed: loss or gradient is not finite, or a micro-batch does not fit; names the samples. A checkpoint of
            the steps before it was written, unless the model is sharded and the micro-batch does not fit.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    done = saved = _resume(place, optimizer, stream, world)
    passed = [line for line in read_metrics(place.metrics) if line["step"] <= done]
    before: StreamState | None = None

    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                place.checkpoints, place.tmp, identity=place.identity, keep=config.keep_checkpoints, world=world
            )
        )

        def save(step: int, after: StreamState) -> None:
            world.first_does(place.recheck)
            checkpoints.save(optimizer, step, after.as_dict(), None if validation is None else validation.best_step)

        metrics = stack.enter_context(
            watch(config.log_to, place.folder, place.tmp, done, place.identity, identity_of(config))
            if world.is_first
            else nullcontext(Watchers([]))
        )
        stopped = stack.enter_context(_stop_signals())
        bar = stack.enter_context(progress(total_steps, "train", "step", done, shown=world.is_first))
        items = islice(stream, total_steps - done)
        batches = stack.enter_context(closing(prefetch(items, reader.load, depth=_AHEAD, threads=_THREADS)))
        if validation is not None:
            validation.recall(passed)
            if config.export == "best" and validation.best_step is not None:
                best_one = checkpoint.named(place.checkpoints, validation.best_step)
                world.first_does(lambda: checkpoint.check(best_one))
        best = None if validation is None else validation.best_step
        world.first_does(partial(checkpoints.tidy, {best}))
        skips = Skips(config.skip_nonfinite, passed, place.say)
        meter = _Meter()
        problem = ""

        def append(line: dict[str, Any]) -> None:
            # Rank 0 alone has anything to write. The others learn of it at the end of the step.
            nonlocal problem
            try:
                metrics.append(line)
            except OSError as error:
                problem = (
                    f"train: {place.metrics} cannot be written ({error.strerror or error}). Make room on that disk, or "
                    "move the run folder, and run the same command again to go on from the last checkpoint."
                )

        for number in range(done, total_steps):
            with meter.waiting():
                batch = next(batches)
            # Dropout is a function of seed, step and rank, so that a resumed run needs no state of it.
            torch.manual_seed(int.from_bytes(sha256(f"{config.seed}/{number}/{world.rank}".encode()).digest()[:8]))
            step, line = None, None
            try:
                step = train_step(objective, weights, optimizer, batch, number, world)
            except StepFailed as failure:
                optimizer.discard()
                line = skips.take(failure, _epoch(batch.after))
                if line is None:
                    if before is not None and number > saved:
                        save(number, before)
                    if world.is_first:
                        raise of_all(failure) from None
                    raise of_all(SaidElsewhere(str(failure))) from None
            batch.release()
            meter.tokens += 0 if step is None else step.tokens
            bar.update()
            last = number + 1 == total_steps
            if line is not None:
                append(line)
            if step is not None:
                memory = peak_memory(objective.device)
                bar.set_postfix_str(_bar_text(step, meter, memory), refresh=False)
                if (number + 1) % config.log_steps == 0 or last:
                    append(_line(number + 1, batch.after, step, meter, memory))
                    meter = _Meter()
            if validation is not None and (validation.due(number + 1) or last):
                with meter.aside():
                    append(validation.line(number + 1))
            before = batch.after
            best = validation is not None and validation.best_step == number + 1
            said = list(zip(*world.exchange((stopped.is_set(), best, problem)), strict=True))
            world.refuse(said[2])
            stop, best = any(said[0]), any(said[1])
            if (number + 1) % config.checkpoint_steps == 0 or last or stop or best:
                save(number + 1, batch.after)
                saved = number + 1
            if stop and not last:
                checkpoints.wait()
                raise of_all(
                    KeyboardInterrupt(
                        f"train: stopped after step {number + 1} of {total_steps}; a checkpoint is written. "
                        "Run the same command again to go on from there."
                    )
                )


def train_step(
    objective: Objective,
    weights: Weighting,
    optimizer: Optimizer,
    batch: GlobalBatch,
    number: int,
    world: World,
) -> Step:
    """One optimizer step over the micro-batches of a global batch.

    Each rank sums over its own samples; the sums, and those of the gradients, are then added up over the ranks.

    Args:
        objective: gives each term of a micro-batch.
        weights: weight of each term, by task and step.
        optimizer: takes the step.
        batch: the samples of this rank; there may be none.
        number: steps done before.
        world: the ranks.

    Raises:
        StepFailed: on some rank loss or gradient is not finite, or a micro-batch does not fit; the same on every rank.
            No weight was changed, but gradients are left behind.
        KdpipeError: another rank is gone, or a micro-batch of a sharded model does not fit.
    """
    counts = world.exchange((batch.response_tokens, batch.audio_tokens, batch.tokens, len(batch.micros)))
    columns = list(zip(*counts, strict=True))
    response, audio, tokens = (sum(column) for column in columns[:3])

    def normalizer(name: str) -> int:
        return max(1, audio if name == OVER_AUDIO else response)

    losses: list[torch.Tensor] = []
    sums: list[dict[str, torch.Tensor]] = []
    failure: StepFailed | None = None
    try:
        for micro in batch.micros:
            with world.others_there(), within_memory(micro.batch, number, objective.device):
                micro = micro.to(objective.device)
                made = objective(micro, weights.factors(micro.batch, number, normalizer))
                made.loss.backward()
            losses.append(made.loss.detach())
            flat = dict(made.terms)
            flat |= {f"{source} {name}": value for source, seen in made.sources.items() for name, value in seen.items()}
            sums.append(flat)
        if objective.is_sharded:
            with world.others_there():
                objective.idle(max(columns[3]) - len(batch.micros))
        values = torch.stack(losses).tolist() if losses else []
        check_losses(values, [micro.batch for micro in batch.micros], number)
    except StepFailed as failed:
        if objective.is_sharded and isinstance(failed, DoesNotFit):
            # The others wait inside the model for this rank's share, and cannot be told.
            raise KdpipeError(str(failed)) from None
        failure = failed
    _fail_together(world, failure, number)
    world.sum_gradients(optimizer.replicated)
    with world.others_there():
        norm, rate = optimizer.step(number)
    if not abs(norm) < float("inf"):
        ids = world.exchange([name for micro in batch.micros for name in micro.batch.ids])
        raise NotFinite(f"the gradient norm is {norm}", number, [name for own in ids for name in own])
    own = {"": sum(values)}
    if sums:
        totals = torch.stack([torch.stack(list(flat.values())) for flat in sums]).sum(0).tolist()
        own |= dict(zip(sums[0], totals, strict=True))
    terms: dict[str, float] = {}
    sources: dict[str, dict[str, float]] = {}
    for name, total in _added(world.exchange(own)).items():
        source, _, kind = name.partition(" ")
        if kind:
            sources.setdefault(source, {})[kind] = total / normalizer(source.split("/")[0])
        else:
            terms[name] = total / normalizer(name) if name else total
    return Step(terms.pop(""), terms, sources, norm, rate, tokens)


def _added(given: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name, in the order of the ranks."""
    total: dict[str, float] = {}
    for one in given:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _fail_together(world: World, failure: StepFailed | None, number: int) -> None:
    """Raises on every rank what failed on the first of those where anything did, with the samples of all."""
    if world.size == 1 and failure is not None:
        raise failure
    own: Any = None
    if failure is not None:
        own = [failure.what, failure.ids] if isinstance(failure, NotFinite) else [str(failure), None]
    found = [one for one in world.exchange(own) if one is not None]
    if found:
        what, ids = found[0]
        if ids is None:
            raise DoesNotFit(what)
        raise NotFinite(what, number, [sample for _, those in found for sample in those or ()])


def _resume(place: Place, optimizer: Optimizer, stream: Stream, world: World) -> int:
    """Puts the last checkpoint of this run in place; returns the steps it has done, 0 without one."""
    find = partial(checkpoint.find, place.checkpoints, place.tmp, place.identity, stream.digest, place.say)
    # Rank 0 removes those of other runs before the others look.
    world.first_does(find)
    found = find()
    if found is None:
        return 0
    problem = ""
    try:
        checkpoint.load(found, optimizer, world)
    except StoreError as error:
        problem = str(error)
    world.refuse_together(problem)
    stream.resume(StreamState(**found.stream))
    place.say(f"train: goes on after step {found.step}")
    return found.step


def _bar_text(step: Step, meter: _Meter, memory: int) -> str:
    return bar_text(step.loss, step.terms, step.grad_norm, step.learning_rate, meter.rate, meter.waited, memory)


def _line(step: int, after: StreamState, values: Step, meter: _Meter, memory: int) -> dict[str, Any]:
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
        "data_wait": round(meter.waited, 4),
        "peak_memory_gib": round(memory / 2**30, 3),
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

    @property
    def waited(self) -> float:
        return self.wait / max(self.seconds, 1e-9)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

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
    before: dict[int, Handler] = {}

    def restore() -> None:
        for number, handler in before.items():
            handle(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        restore()

    before.update({number: handle(number, stop) for number in numbers})
    try:
        yield stopped
    finally:
        restore()
