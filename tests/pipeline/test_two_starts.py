"""Two processes start on one run folder at once: one works, the other says who holds it, and the run is whole.

`KDPIPE_STARTS=50 pytest tests/pipeline/test_two_starts.py` does it so often.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.pipeline.plan import make_plans, status_of
from kdpipe.pipeline.runner import Request

from .test_cache import IDS, begin

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

KDPIPE = Path(sys.executable).with_name("kdpipe")


def contents(request: Request) -> dict[str, bytes]:
    parts = request.context().ledger("cache-teachers").parts
    return {str(path.relative_to(parts)): path.read_bytes() for path in parts.rglob("*") if path.is_file()}


def start(request: Request) -> subprocess.Popen[str]:
    command = [str(KDPIPE), "cache-teachers", "-c", str(request.config_file), "--set", "data.eval_split=train"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def alone(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts that one process makes."""
    request = begin(tmp_path_factory.mktemp("alone") / "run", family, IDS)
    process = start(request)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return contents(request)


@pytest.mark.parametrize("turn", range(int(os.environ.get("KDPIPE_STARTS", "2"))))
def test_one_works_and_the_other_says_who(
    family: Miniatures, alone: dict[str, bytes], tmp_path: Path, turn: int
) -> None:
    request = begin(tmp_path / "run", family, IDS)
    processes = [start(request)]
    time.sleep(0.02 * turn % 0.5)
    processes.append(start(request))
    outs = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) in ([0, 2], [0, 0]), outs
    if 2 in codes:
        refused = codes.index(2)
        assert f"another kdpipe works here (process {processes[1 - refused].pid} on " in outs[refused], outs
    else:
        assert any("Everything is fresh" in out for out in outs), outs
    assert "Traceback" not in "".join(outs)
    assert status_of(make_plans(request.context(), "cache-teachers")["cache-teachers"]).state == "fresh"
    assert contents(request) == alone
    assert not request.context().ledger("cache-teachers").unreferenced_parts()
