"""`kdpipe train` as one of several processes that torchrun or Slurm has started.

Every process runs this. Rank 0 holds the lock, looks at what is on disk and writes; the stage runs in these processes
themselves, since nothing else runs after it. Upstream stages are refused: they bring their own processes, and which of
several GPUs each may have is for `kdpipe cache-teachers` to say, in a run of its own.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType

from kdpipe.data.errors import KdpipeError, SaidElsewhere
from kdpipe.pipeline.check import check
from kdpipe.pipeline.lock import hold
from kdpipe.pipeline.lock_file import write_lock_file
from kdpipe.pipeline.memory import refuse_training_that_does_not_fit
from kdpipe.pipeline.plan import has_work, make_plans, status_of, upstream
from kdpipe.pipeline.runner import Request, clean_tmp, refuse_stale
from kdpipe.pipeline.worker import DEFAULTS
from kdpipe.stages.train.launch import Launch

NAME = "train"


def train_launched(request: Request, launch: Launch) -> bool:
    """Brings the student up to date together with the other processes.

    Args:
        request: the same for all.
        launch: which of them this is.

    Returns:
        Whether anything ran.

    Raises:
        KdpipeError: something upstream is not fresh, or training cannot start or go on; the same on every rank.
        KeyboardInterrupt: SIGINT or SIGTERM came to one of them; a checkpoint was written.
    """
    ctx = request.context()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from kdpipe.stages.train.run import run
    from kdpipe.stages.train.stage import current_plans
    from kdpipe.stages.train.world import joined

    signal.signal(signal.SIGTERM, _interrupt)  # until training itself takes notice of it
    with joined(launch, ctx.config.train.device) as world, ExitStack() as stack:
        if not world.is_first:
            ctx = replace(ctx, say=lambda line: None)
        todo = [False]

        def begin() -> None:
            check(ctx, download=True)
            stack.enter_context(hold([ctx.run_folder, ctx.cache_folder]))
            clean_tmp(ctx)
            plans = make_plans(ctx, NAME)
            for name in upstream(NAME, ctx.config)[:-1]:
                if has_work(plans[name]):
                    refuse_stale(status_of(plans[name]), "it does not run in several processes", ", by itself")
            refuse_training_that_does_not_fit(ctx, plans[NAME], launch)
            todo[0] = has_work(plans[NAME])

        world.first_does(begin)
        if not any(world.exchange(todo[0])):
            return False
        run(ctx, current_plans(ctx), world)

        def end() -> None:
            ctx.prints.save()
            after = request.context()
            write_lock_file(after, make_plans(after))

        world.first_does(end)
        return True


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def refuse_launched(command: str, launch: Launch) -> None:
    """Refuses what several processes cannot do together.

    Raises:
        KdpipeError: there are several, and the command is not `train`; on rank 0 with its words.
    """
    if command != NAME:
        raise (KdpipeError if launch.rank == 0 else SaidElsewhere)(
            f"kdpipe {command}: started as one of {launch.size} processes, and only `kdpipe train` runs in several. "
            f"Run `kdpipe {command}` by itself, and then `kdpipe train` under torchrun or Slurm."
        )
