"""What the last look at a run found, kept so that the next need not look at every sample where nothing has moved.

A look is a function of what it reads: kdpipe's own files, the configuration, the manifest, the model folders, the
clips, and of each stage `HEAD`, the rejections and whether the parts are there. All of that is noted down with the
result, files as in `kdpipe.data.hashing.Fingerprints` (size, times, inode), and the result holds as long as every note
does. Anything doubtful, like a file that was written a moment ago or a part that is gone, is not noted down, and then
the next look is a whole one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kdpipe.data
import kdpipe.pipeline
import kdpipe.stages
from kdpipe.data.errors import KdpipeError
from kdpipe.data.files import write_atomically
from kdpipe.data.hashing import RACY_NS, Stat, digest, digest_file, stat_of
from kdpipe.pipeline.plan import STAGES, StageStatus, make_plans
from kdpipe.pipeline.standing import standing
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.environment import environment
from kdpipe.stages.models.folder import resolve

if TYPE_CHECKING:
    import numpy as np

_NAME = "look.npz"
_GONE = (-1, -1, -1, -1)
_LEDGER = ("HEAD", "rejects.parquet")


@dataclass(frozen=True)
class Recalled:
    """A result that still holds.

    Attributes:
        statuses: of all stages.
        done: stages that `kdpipe run` had nothing left to do for, kdpipe.lock written.
    """

    statuses: tuple[StageStatus, ...]
    done: frozenset[str]


@dataclass(frozen=True)
class Look:
    """One look at a run.

    Attributes:
        ctx: the run.
        notes: of what it read apart from the clips, taken before it read.
        plans: what it found.
    """

    ctx: Context
    notes: Mapping[str, Any]
    plans: Mapping[str, StagePlan]

    def completed(self) -> Look:
        """With the stages that it left out; nothing may have run since."""
        return replace(self, plans=make_plans(self.ctx, made=self.plans))

    def keep(self, done: Iterable[str] = ()) -> tuple[StageStatus, ...]:
        """Notes down a look at all stages for `recall`, unless anything is doubtful; gives its statuses.

        Args:
            done: see `Recalled`.
        """
        results = _results(self.ctx)
        statuses = tuple(standing(self.ctx, self.plans))
        ledgers = [plan.ledger for plan in self.plans.values()]
        clips = self.ctx.prints.seen()
        if clips is None or self.plans.keys() != STAGES.keys() or any(ledger.lost_parts() for ledger in ledgers):
            return statuses
        if max(_times(self.notes["files"])) > self.notes["at"] - RACY_NS:
            return statuses
        about = {
            "notes": self.notes,
            "statuses": [asdict(status) for status in statuses],
            "results": results,
            "done": list(done),
            "lock_file": _content(self.ctx.run_folder / "kdpipe.lock"),
            "parts": [pair for ledger in ledgers for pair in ledger.expected()],
        }
        _write(self.ctx, about, clips)
        return statuses


def look(ctx: Context, target: str | None = None) -> Look:
    """Looks at all stages, or at those that `target` needs.

    Raises:
        KdpipeError: the manifest, a model folder or a ledger cannot be read.
    """
    notes = _notes(ctx)
    return Look(ctx, notes, make_plans(ctx, target))


def recall(ctx: Context) -> Recalled | None:
    """What was last noted down, if all of it still holds."""
    try:
        about, paths, stats = _read(ctx)
        now, then = _notes(ctx), about["notes"]
        if {**now, "at": 0} != {**then, "at": 0} or not all(_is_there(*pair) for pair in about["parts"]):
            return None
        if about["results"] != _results(ctx) or not _are_as_noted(paths, stats):
            return None
        statuses = tuple(StageStatus(**{**status, "reasons": tuple(status["reasons"])}) for status in about["statuses"])
        as_left = about["lock_file"] == _content(ctx.run_folder / "kdpipe.lock")
        return Recalled(statuses, frozenset(about["done"] if as_left else ()))
    except Exception:  # nothing is noted down, or it is damaged in whatever way: a whole look is always right
        return None


def _notes(ctx: Context) -> dict[str, Any]:
    """Of all that a look reads but the clips; in the form of JSON, so that it can be compared."""
    manifest = ctx.base / ctx.config.data.manifest
    listed = [file for module in (kdpipe.data, kdpipe.stages, kdpipe.pipeline) for file in _files_in(*module.__path__)]
    models, found = [], []
    config = ctx.config
    for model in (
        config.student.model,
        config.describer,
        config.tracer,
        config.teachers.textual.model,
        config.acoustic,
        *filter(None, [config.evaluate.model]),
    ):
        try:
            folder = resolve(model, ctx.base)
        except KdpipeError as error:
            models.append(str(error))
        else:
            models.append([str(folder.path), folder.commit])
            found += _files_in(folder.path)
    files = [*listed, *found, *(_files_in(manifest) if manifest.is_dir() else [str(manifest)])]
    return {
        "at": time.time_ns(),
        "config": digest(repr(ctx.config)),
        "libraries": [environment(ctx, name).text for name in STAGES],
        "base": str(ctx.base),
        "models": models,
        "files": [[path, *_stat_or_gone(path)] for path in files],
        "ledgers": {name: [_content(ctx.folder(name) / file) for file in _LEDGER] for name in STAGES},
    }


def _files_in(folder: str | Path) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if not place.endswith("__pycache__")
    )


def _stat_or_gone(path: str | Path) -> Stat:
    try:
        return stat_of(path)
    except OSError:
        return _GONE


def _times(files: Sequence[Sequence[Any]]) -> Iterator[int]:
    """When files were last written or renamed, in nanoseconds."""
    return (max(modified, changed) for _, _, modified, changed, _ in files)


def _content(path: Path) -> str | None:
    try:
        return digest_file(path)
    except OSError:
        return None


def _results(ctx: Context) -> list[str | None]:
    """The result files of evaluate, which are made of its parts."""
    return [_content(ctx.folder("evaluate") / name) for name in ("scores.json", "predictions.parquet")]


def _is_there(path: str, size: int | None) -> bool:
    return os.path.exists(path) if size is None else os.path.getsize(path) == size


def _are_as_noted(paths: Sequence[str], stats: np.ndarray) -> bool:
    for path, noted in zip(paths, stats.tolist(), strict=True):
        try:
            if stat_of(path) != tuple(noted):
                return False
        except OSError:
            if noted[0] >= 0:
                return False
    return True


def _write(ctx: Context, about: Mapping[str, Any], clips: Mapping[str, Stat | None]) -> None:
    import numpy as np

    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "paths": np.frombuffer("\0".join(clips).encode(errors="surrogateescape"), np.uint8),
        "stats": np.array([stat or _GONE for stat in clips.values()], np.int64).reshape(-1, len(_GONE)),
    }

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    tmp = ctx.run_folder / "tmp"
    with contextlib.suppress(OSError):  # in a folder that cannot be written, each look is a whole one
        write_atomically(tmp / _NAME, write, tmp)


def _read(ctx: Context) -> tuple[dict[str, Any], list[str], np.ndarray]:
    file = ctx.run_folder / "tmp" / _NAME
    if not file.is_file():
        raise FileNotFoundError(file)
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        paths = arrays["paths"].tobytes().decode(errors="surrogateescape")
        return about, paths.split("\0") if paths else [], arrays["stats"]
