"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

`checkpoints/step-000123/` holds `weights.safetensors` (the trained weights in float32, and the losses' projections),
`optimizer.safetensors` (AdamW's moments) and `state.json` (identity, step, place in the stream). What is random in a
step is a function of the seed, the step and the rank, and so needs no state. A checkpoint is built aside and renamed,
so a folder of that name is always complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdpipe.data.errors import StoreError
from kdpipe.data.files import build_aside, move_into_place, remove, write_json
from kdpipe.stages.train.optimizer import Optimizer

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        identity: digest of everything that decides the student.
        stream: state of the stream after that step.
    """

    folder: Path
    step: int
    identity: str
    stream: Mapping[str, Any]


def save(
    folder: Path, tmp: Path, optimizer: Optimizer, *, identity: str, step: int, stream: Mapping[str, Any], keep: int
) -> Checkpoint:
    """Writes `folder/step-<step>` and removes all but the last `keep`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are then as they were.
    """
    target = folder / f"step-{step:06d}"
    state = {"format": _FORMAT, "identity": identity, "step": step, "stream": dict(stream)}
    with build_aside(tmp) as path:
        path.mkdir()
        _write(path / "weights.safetensors", optimizer.weights)
        _write(path / "optimizer.safetensors", optimizer.state())
        write_json(path / "state.json", state, tmp)
        move_into_place(path, target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        remove(old)
    return Checkpoint(target, step, identity, dict(stream))


def find(folder: Path, identity: str, stream: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint of this run; removes those of other runs, and says so.

    Args:
        folder: `train/checkpoints`.
        identity: the run's identity.
        stream: digest of the stream; with other parts the same samples come in another order.
        say: prints a line.

    Raises:
        StoreError: a checkpoint cannot be read.
    """
    found = []
    for path in sorted(folder.glob("step-*")):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            checkpoint = Checkpoint(path, state["step"], state["identity"], state["stream"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
        if checkpoint.identity == identity and checkpoint.stream.get("digest") == stream:
            found.append(checkpoint)
            continue
        why = "another configuration or other data" if checkpoint.identity != identity else "another order of the data"
        say(f"train: {path.name} is of {why}: removed")
        remove(path)
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def load(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Puts weights and moments in place.

    Raises:
        StoreError: a file is damaged or does not fit the model.
    """
    try:
        optimizer.load(
            load_file(checkpoint.folder / "weights.safetensors"), load_file(checkpoint.folder / "optimizer.safetensors")
        )
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise _damaged(checkpoint.folder, error) from None


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{path}: the checkpoint cannot be read ({error}). Remove this folder: training goes on from the one before, "
        "or from the start."
    )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
