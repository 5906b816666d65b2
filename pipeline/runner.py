"""Brings stages up to date, each in a process of its own, so that its memory is gone before the next starts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kdpipe.data.errors import ConfigError, KdpipeError, RejectBudgetError, StaleError
from kdpipe.data.files import remove
from kdpipe.data.hashing import digest
from kdpipe.pipeline.check import check
from kdpipe.pipeline.config import load_config
from kdpipe.pipeline.cost import refuse_what_does_not_fit
from kdpipe.pipeline.lock import hold
from kdpipe.pipeline.lock_file import write_lock_file
from kdpipe.pipeline.memory import refuse_training_that_does_not_fit
from kdpipe.pipeline.plan import STAGES, StageStatus, has_work, status_of, upstream
from kdpipe.pipeline.recall import look, recall
from kdpipe.pipeline.terminal import printable
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.evaluate.results import assemble, assembled

_UNFINISHED = re.compile(r"(old-)?[0-9a-f]{32}")
"""Names that `kdpipe.data.files.build_aside` gives; other files in `tmp/` are kept between runs."""


class StageFailed(Exception):
    """A stage process ended with an error that it has printed itself.

    Attributes:
        code: its exit status (128 + signal number for a signal).
    """

    def __init__(self, stage: str, code: int):
        self.code = code
        super().__init__(f"{stage} ended with exit status {code}")


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        config_file: the configuration file.
        overrides: texts of `--set`.
    """

    config_file: Path
    overrides: tuple[str, ...] = ()

    def context(self, earlier: Context | None = None) -> Context:
        """Loads the configuration anew.

        Args:
            earlier: a context whose manifest is taken over while its file stands.

        Raises:
            ConfigError: all its mistakes.
        """
        ctx = Context(load_config(self.config_file, self.overrides), self.config_file.resolve().parent)
        if earlier is not None:
            ctx.take_manifest(earlier)
        return ctx


def of_model(request: Request, model: str) -> Request:
    """The same request, for scoring another model: in a folder of that model's below the run folder, over its cache.

    Args:
        request: configuration file and overrides.
        model: a folder, relative to the working directory or else to the configuration's, or a hub name.

    Raises:
        ConfigError: all mistakes of the configuration, or no model is named.
    """
    if not model.strip():
        raise ConfigError(["--model: names no model; give a folder or a hub name"])
    others = tuple(text for text in request.overrides if text.startswith("evaluate.model."))  # of this model
    overrides = tuple(text for text in request.overrides if text not in others)
    ctx = Request(request.config_file, overrides).context()
    folder = Path(model) if Path(model).is_dir() else ctx.base / model
    name = str(folder.resolve()) if folder.is_dir() else model
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip(".-")[:60] or "model"
    place = ctx.run_folder / "evaluations" / f"{slug}-{digest(name)[:8]}"
    values = {
        "evaluate.model": {"path": name, "dtype": ctx.config.student.model.dtype},  # nothing of another model's
        "run.folder": str(place),
        "run.cache": str(ctx.cache_folder),
    }
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return Request(request.config_file, (*overrides, *settings, *others))


def bring_up_to_date(request: Request, target: str, *, only: bool = False) -> bool:
    """Runs `target` and, before it, every stage it needs that is not fresh.

    Args:
        request: configuration file and overrides.
        target: stage name.
        only: refuse instead of running an upstream stage.

    Returns:
        Whether anything ran.

    Raises:
        StaleError: `only`, and something upstream is not fresh.
        RejectBudgetError: too many samples of a stage were rejected.
        KdpipeError: the teachers' files have no room on the disk, or training has none in memory.
        StageFailed: a stage process failed.
    """
    ctx = request.context()
    needed = upstream(target, ctx.config)
    recalled = recall(ctx)
    if recalled is not None and target in recalled.done:
        return False
    del recalled
    check(ctx, download=True)
    ran = False
    with hold([ctx.run_folder, ctx.cache_folder]) as locks:
        clean_tmp(ctx)
        last = look(request.context(ctx), target)
        for name in needed:
            plan = last.plans[name]
            if STAGES[name].whole:
                _check_budget(ctx, plan)
            if has_work(plan):
                if only and name != target:
                    refuse_stale(status_of(plan))
                refuse_what_does_not_fit(request.context(), plan)
                refuse_training_that_does_not_fit(request.context(), plan)
                print(_headline(status_of(plan)), flush=True)
                del last, plan  # a stage may run for days, and nobody needs them meanwhile
                _run_stage(request, name, locks)
                ran = True
                last = look(request.context(), target)
                plan = last.plans[name]
            _check_budget(ctx, plan)
            if has_work(plan):
                raise KdpipeError(
                    f"{name} ran, but is not fresh: {'; '.join(status_of(plan).reasons)}. "
                    "An input changed meanwhile; run the command again."
                )
        if target == "evaluate" and not assembled(ctx):
            assemble(ctx)
            ran = True
        last = last.completed()
        write_lock_file(last.ctx, last.plans)
        last.keep(done=needed)
    return ran


def refuse_stale(status: StageStatus, why: str = "--only was given", else_: str = ", or leave --only out") -> None:
    """Refuses to go on from an upstream stage that is not fresh.

    Args:
        status: of the stage.
        why: it is not run.
        else_: what else can be done but run it first, if anything.

    Raises:
        StaleError: it is not fresh.
    """
    if status.state != "fresh":
        raise StaleError(
            f"{status.name} is {status.state}, and {why}: {'; '.join(status.reasons)}. "
            f"Run `kdpipe {status.name}` first{else_}."
        )


def _headline(status: StageStatus) -> str:
    reasons = printable("; ".join(status.reasons))
    return f"{status.name}: {status.stale} of {status.total} samples to do ({reasons})"


def _check_budget(ctx: Context, plan: StagePlan) -> None:
    status, budget = status_of(plan), ctx.config.data.max_reject_fraction
    if STAGES[plan.stage].whole and not plan.wanted:
        raise RejectBudgetError(
            f"{status.name}: no sample is left, all were rejected upstream. Which, and why: rejects.parquet in "
            f"{ctx.folder('textualize')} and {ctx.folder('cache-teachers')}."
        )
    if status.rejected > budget * status.total + 1e-9:
        raise RejectBudgetError(
            f"{status.name}: {status.rejected} of {status.total} samples were rejected, more than "
            f"data.max_reject_fraction = {budget:g} allows. The good ones are done and kept. Which, and why: "
            f"{ctx.folder(status.name) / 'rejects.parquet'}. Mend the samples and run again, or raise the budget."
        )


def _run_stage(request: Request, name: str, locks: Sequence[int]) -> None:
    command = [sys.executable, "-P", "-m", "kdpipe.pipeline.worker", name, str(request.config_file), *request.overrides]
    process: subprocess.Popen[bytes] | None = None
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        # The stage takes a SIGINT that a terminal has sent to it as well for the same one.
        came.append(number)
        if process is not None:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Until the stage can take it (it imports first), SIGINT waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(command, pass_fds=locks, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not code and came:  # it came when the stage was done, but the next one is not to begin
        code = 128 + came[0]
    if code:
        raise StageFailed(name, code if code > 0 else 128 - code)


def clean_tmp(ctx: Context) -> None:
    """Removes what killed runs left unfinished in the temporary folders; called under the lock."""
    for folder in {ctx.run_folder / "tmp", ctx.cache_folder / "tmp"}:
        for path in folder.glob("*"):
            if _UNFINISHED.match(path.name):
                remove(path)
