"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

`checkpoints/step-000123/` is written by torch.distributed.checkpoint, in its safetensors form, which holds no pickle:
each rank writes what it holds of the trained weights (float32), of the losses' projections and of AdamW's moments,
and each of another number of ranks reads what it needs. `state.json` has identity, step, place in the stream and the
sizes of the files. What is random in a step is a function of the seed, the step and the rank, and so needs no state.

Tensors are copied when a checkpoint is asked for, and written while training goes on. The folder is built aside and
renamed, so one of that name is always complete.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from kdpipe.data.errors import KdpipeError, StoreError
from kdpipe.data.files import make_folder, move_into_place, remove, retire, write_json
from kdpipe.stages.train.cost import FILE_BYTES
from kdpipe.stages.train.optimizer import Optimizer
from kdpipe.stages.train.world import World

# It is said of every process that works alone, from several threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_FORMAT = 2
_STATE = "state.json"
_NAME = re.compile("step-[0-9]{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        identity: digest of everything that decides the student.
        stream: state of the stream after that step.
        files: size in bytes of each of its other files.
    """

    folder: Path
    step: int
    identity: str
    stream: Mapping[str, Any]
    files: Mapping[str, int]


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, beside what the caller does; a context manager.

    Where several ranks train, each calls the same methods in the same order.

    Args:
        folder: `train/checkpoints`.
        tmp: where they are built, on the same file system; the same for all ranks.
        identity: the run's identity.
        keep: how many of the last ones stay, beside the best.
        world: the ranks.
    """

    def __init__(self, folder: Path, tmp: Path, *, identity: str, keep: int, world: World):
        self._folder = folder
        self._tmp = tmp
        self._identity = identity
        self._keep = keep
        self._world = world
        # Its threads talk to each other while training does: they need a group of their own.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._finishing = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Any] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._pending is not None:
            # What ends the run is said already; a checkpoint that was begun is still finished.
            with suppress(Exception, CheckpointException):
                self._pending.result()
        self._finishing.shutdown()

    def save(self, optimizer: Optimizer, step: int, stream: Mapping[str, Any], best: int | None = None) -> None:
        """Copies everything, and begins to write `step-<step>`; on completion the older ones are removed.

        Args:
            optimizer: weights and moments.
            step: optimizer steps done.
            stream: state of the stream after them.
            best: step whose checkpoint is to stay, whatever its age.

        Raises:
            KdpipeError: the one before could not be written; it names the reason.
        """
        self.wait()
        built = named(self._tmp, step)

        def make_room() -> None:
            try:
                make_folder(self._tmp)
                remove(built)
            except OSError as error:
                raise KdpipeError(self._not_written(error)) from None

        self._world.first_does(make_room)
        tensors = optimizer.tensors()
        written = dcp.async_save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(
                str(built), fqn_to_index_mapping=_files(tensors, self._world.size), save_distributed=True
            ),
            process_group=self._group,
        )
        assert isinstance(written, Future)
        state = {"format": _FORMAT, "identity": self._identity, "step": step, "stream": dict(stream)}
        finish = partial(self._finish, built, state, {step, best}) if self._world.is_first else lambda: None
        self._pending = self._finishing.submit(_after, written, finish)

    def wait(self) -> None:
        """Returns once the checkpoint that was begun last is complete on disk.

        Raises:
            KdpipeError: it could not be written, on whatever rank; earlier ones are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        problem = ""
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            problem = self._not_written(error)
        self._world.refuse_together(problem)

    def tidy(self, kept: Collection[int | None]) -> None:
        """Removes older checkpoints than are to stay, as a run leaves them that is killed before it comes to it.

        Args:
            kept: steps whose checkpoints stay, whatever their age.
        """
        for old in _all_in(self._folder)[: -self._keep]:
            if _step(old) not in kept:
                retire(old, self._tmp)

    def _not_written(self, error: BaseException) -> str:
        return (
            f"train: a checkpoint could not be written to {self._folder} ({_reason(error)}). Those before are whole: "
            "make room, or mend what is said here, and run the same command again to go on from the last."
        )

    def _finish(self, built: Path, state: Mapping[str, Any], kept: set[int | None]) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(built.iterdir())}
        write_json(built / _STATE, {**state, "files": sizes}, self._tmp)
        move_into_place(built, self._folder / built.name)
        self.tidy(kept)


def find(folder: Path, tmp: Path, identity: str, stream: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint of this run; removes those of other runs, and says so.

    Args:
        folder: `train/checkpoints`.
        tmp: for what is being removed, on the same file system.
        identity: the run's identity.
        stream: digest of the stream; with other parts the same samples come in another order.
        say: prints a line.

    Raises:
        StoreError: a checkpoint cannot be read.
    """
    last = None
    for path in _all_in(folder):
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            why = "another release" if state["format"] != _FORMAT else ""
            if not why and state["identity"] != identity:
                why = "another configuration or other data"
            if not why and state["stream"].get("digest") != stream:
                why = "another order of the data"
            found = None if why else read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from None
        if found is None:
            say(f"train: {path.name} is of {why}: removed")
            retire(path, tmp)
        last = found or last
    return last


def read(path: Path) -> Checkpoint:
    """What a checkpoint says of itself.

    Raises:
        StoreError: it is gone or damaged.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in state["files"].items()}
        return Checkpoint(path, int(state["step"]), state["identity"], dict(state["stream"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from None


def check(path: Path) -> Checkpoint:
    """What a checkpoint says of itself, once its files are there in full.

    Raises:
        StoreError: it is gone or damaged.
    """
    found = read(path)
    with _reading(found):
        return found


def named(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"step-{step:06d}"


def load(checkpoint: Checkpoint, optimizer: Optimizer, world: World) -> None:
    """Puts weights and moments in place, whatever the number of ranks that wrote them.

    Args:
        checkpoint: the same for all ranks.
        optimizer: of this rank; sharded or not.
        world: the ranks, all of which call this.

    Raises:
        StoreError: a file is damaged or does not fit the model.
        KdpipeError: another rank is gone.
    """
    with _reading(checkpoint), world.others_there():
        reader = HuggingFaceStorageReader(str(checkpoint.folder))
        wanted = optimizer.prepare(reader.read_metadata().state_dict_metadata)
        dcp.load(wanted, storage_reader=reader, no_dist=world.size == 1)
        optimizer.publish()


@torch.no_grad()
def restore(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Rounds a checkpoint's weights into a whole model, in this process alone.

    Args:
        model: with gradients switched on where something was trained.
        checkpoint: written by any number of ranks.

    Raises:
        StoreError: a file is damaged or does not fit the model.
    """
    trained = {f"weights/{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    with _reading(checkpoint):
        wide = {name: torch.empty_like(weight, dtype=torch.float32) for name, weight in trained.items()}
        dcp.load(wide, storage_reader=HuggingFaceStorageReader(str(checkpoint.folder)), no_dist=True)
        for name, weight in trained.items():
            weight.copy_(wide[name])


@contextmanager
def _reading(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        for name, size in checkpoint.files.items():
            if (checkpoint.folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not its {size:,} bytes")
        yield
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, AssertionError, CheckpointException) as error:
        if isinstance(error, KdpipeError):
            raise
        raise _damaged(checkpoint.folder, error) from None


def _files(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Which of the files of a rank each tensor goes to, counted from 1: a file is put together in memory."""
    files: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        files[name] = 1 + size // (FILE_BYTES * ranks)
    return files


def _after(written: Future[Any], finish: Callable[[], None]) -> None:
    written.result()
    finish()


def _all_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the last one last."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _reason(error: BaseException) -> str:
    """The first failure of all ranks, without the tracebacks that are put around it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {first}"
    return str(error)


def _damaged(path: Path, error: BaseException) -> StoreError:
    later = [one.name for one in _all_in(path.parent) if _step(one) > _step(path)]
    those = f"this folder and the later ones ({', '.join(later)})" if later else "this folder"
    return StoreError(
        f"{path}: the checkpoint cannot be read ({_reason(error)}). Remove {those}: training goes on from the one "
        "before, or from the start."
    )
