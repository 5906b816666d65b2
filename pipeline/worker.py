"""The process of one stage: `python -m kdpipe.pipeline.worker STAGE CONFIG [SET ...]`; started by the runner."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
from pathlib import Path

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.plan import STAGES, make_plans
from kdpipe.pipeline.runner import Request
from kdpipe.pipeline.terminal import printable
from kdpipe.pipeline.unforeseen import of_the_system, unforeseen
from kdpipe.stages.interrupts import Interrupts

_PR_SET_PDEATHSIG = 1
DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""Defaults of environment variables: libraries do not write over the progress bar, and Arrow gives its memory back.

(Its own allocator keeps some 70 MiB after it has written a manifest of 40,000 rows.)
"""


def _end_with_parent() -> None:
    """Asks Linux to send SIGTERM when the runner dies; elsewhere the inherited lock must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Runs one stage and returns the exit status: 0, 2 for an error of the user's, 130 for an interruption."""
    stage, config_file, *overrides = arguments
    _end_with_parent()
    signal.signal(signal.SIGINT, Interrupts())
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the runner until here
        ctx = Request(Path(config_file), tuple(overrides)).context()
        todo = make_plans(ctx, stage)[stage].todo  # the rest of the plans is let go
        STAGES[stage].run(ctx, todo)
        ctx.prints.save()
    except KdpipeError as error:
        print("Error: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Error: {stage}: {of_the_system(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"Error: {stage}: {unforeseen(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or f"{stage}: interrupted. What was committed is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what is said in a run of days is read meanwhile, in a log too
    sys.exit(main(sys.argv[1:]))
