"""What people watch while a student trains: metrics.jsonl always, TensorBoard and Weights & Biases where asked for.

All get the same lines. The two libraries are imported only where `train.log_to` names them. A run that goes on after a
crash continues its series: lines that are done anew replace those of metrics.jsonl, hide those of TensorBoard
(`purge_step`), and are left out for Weights & Biases, which keeps what it was given; they hold the same numbers, since
a resumed run repeats its steps bit for bit.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from kdpipe.data.errors import ConfigError
from kdpipe.data.files import remove, write_json
from kdpipe.stages.train.metrics import MetricsFile, missing_watchers

_GIB = 2**30


class Watcher(Protocol):
    """Takes lines of metrics."""

    def append(self, line: Mapping[str, Any]) -> None:
        """Shows or keeps one line."""
        ...


class Watchers:
    """Hands each line to metrics.jsonl and then to the others."""

    def __init__(self, watchers: Sequence[Watcher]):
        self._watchers = watchers

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line everywhere."""
        for watcher in self._watchers:
            watcher.append(line)


@contextmanager
def watch(
    log_to: Sequence[str], folder: Path, tmp: Path, done: int, identity: str, settings: Mapping[str, Any]
) -> Iterator[Watchers]:
    """Opens what the configuration asks for.

    Args:
        log_to: `train.log_to`.
        folder: the stage's folder: metrics.jsonl, `tensorboard/`, `wandb/`.
        tmp: unfinished files.
        done: steps that are done; later lines belong to work that is done anew.
        identity: of the student; another one begins a new series.
        settings: what the run is made with, for people.

    Raises:
        ConfigError: a library is not installed.
    """
    if problems := missing_watchers(log_to):
        raise ConfigError(problems)
    with ExitStack() as stack:
        watchers: list[Watcher] = [stack.enter_context(MetricsFile(folder / "metrics.jsonl", done, tmp))]
        if "tensorboard" in log_to:
            watchers.append(stack.enter_context(_tensorboard(folder / "tensorboard", done)))
        if "wandb" in log_to:
            watchers.append(stack.enter_context(_wandb(folder, tmp, identity, settings)))
        yield Watchers(watchers)


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, nested names joined by `/`, without the step."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and f"{prefix}{name}" != "step":
            found[f"{prefix}{name}"] = value
    return found


def named(line: Mapping[str, Any]) -> dict[str, float]:
    """Scalars under the names of their charts: `train/loss`, `train/terms/top`, `validation/loss`."""
    if "validation" in line:
        return scalars({"validation": line["validation"]})
    return scalars({"train": {name: value for name, value in line.items() if name != "step"}})


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, or by this process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux tells kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bar_text(
    loss: float, terms: Mapping[str, float], norm: float, rate: float, tokens: float, wait: float, memory: int
) -> str:
    """What stands behind the progress bar.

    Args:
        loss: of the step.
        terms: its terms, unweighted, a token.
        norm: of the gradient.
        rate: learning rate.
        tokens: sequence tokens a second.
        wait: share of the time spent waiting for data.
        memory: most bytes held so far.
    """
    by_term = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    return (
        f"loss {loss:.4f} ({by_term}), grad {norm:.3g}, lr {rate:.2e}, {tokens:.0f} tok/s, "
        f"data {100 * wait:.0f} %, {memory / _GIB:.2f} GiB"
    )


class _Series:
    """Scalars by step for a TensorBoard writer."""

    def __init__(self, writer: Any):
        self._writer = writer

    def append(self, line: Mapping[str, Any]) -> None:
        for name, value in named(line).items():
            self._writer.add_scalar(name, value, line["step"])
        # What is not flushed is lost with a killed process, and the steps before the checkpoint are not done again.
        self._writer.flush()


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[_Series]:
    from torch.utils.tensorboard import SummaryWriter

    if not done and folder.exists():
        remove(folder)
    writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
    try:
        yield _Series(writer)
    finally:
        writer.close()


class _Run:
    """A run of Weights & Biases, and the last step that it was given."""

    def __init__(self, run: Any, state: dict[str, Any], path: Path, tmp: Path):
        self._run = run
        self._state = state
        self._path = path
        self._tmp = tmp

    def append(self, line: Mapping[str, Any]) -> None:
        kind = "validation" if "validation" in line else "train"
        if line["step"] <= self._state[kind]:
            return
        self._run.log({**named(line), "step": line["step"]})
        self._state[kind] = line["step"]
        write_json(self._path, self._state, self._tmp)


@contextmanager
def _wandb(folder: Path, tmp: Path, identity: str, settings: Mapping[str, Any]) -> Iterator[_Run]:
    import wandb

    path = folder / "wandb.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        goes_on = state["identity"] == identity and isinstance(state["id"], str)
        goes_on = goes_on and all(type(state[kind]) is int for kind in ("train", "validation"))
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        goes_on = False
    if not goes_on:
        state = {"identity": identity, "id": secrets.token_hex(8), "train": 0, "validation": 0}
        write_json(path, state, tmp)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "kdpipe"),
        id=state["id"],
        resume="allow",
        dir=str(folder),
        config=json.loads(json.dumps(settings, default=str)),
        settings=wandb.Settings(console="off", silent=True, save_code=False),
    )
    run.define_metric("*", step_metric="step")
    code = 1
    try:
        yield _Run(run, state, path, tmp)
        code = 0
    finally:
        run.finish(exit_code=code)
