"""`kill -9` of real `kdpipe` processes at random times: of the command, of its stage's process, or of both at once.

Nothing stands in for anything here, so a try takes half a minute and more. KDPIPE_REAL_KILLS says how many there are
without an engine; KDPIPE_ENGINE_KILLS how many with vLLM, which are left out unless asked for.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .commands import Commands, contents
from .test_kills import left_behind, look
from .world import BY_NAME, Scenario, World, trace_records

KILLS = int(os.environ.get("KDPIPE_REAL_KILLS", "1"))
ENGINE_KILLS = int(os.environ.get("KDPIPE_ENGINE_KILLS", "0"))
KDPIPE = str(Path(sys.executable).with_name("kdpipe"))
VICTIMS = ("stage", "group", "command")
ENGINE = """\
  describe: {prompt: Describe the audio., max_tokens: 8}
  engine: {max_model_len: 1280, enforce_eager: true, cpu_kv_cache_gib: 1}
"""


def start(run: Path, scenario: Scenario) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [KDPIPE, *scenario.words],
        cwd=run,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen[str], victim: str) -> bool:
    """Kills, and waits until the stage is gone as well; whether there was anything to kill."""
    stages = [child for child in psutil.Process(process.pid).children() if "worker" in " ".join(child.cmdline())]
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "command":
        process.kill()
    elif stages:
        stages[0].kill()
    else:
        return False
    process.communicate(timeout=120)
    psutil.wait_procs(stages, timeout=60)
    return True


def begun(run: Path, scenario: Scenario, process: subprocess.Popen[str]) -> None:
    """Waits until the stage writes its first file."""
    while process.poll() is None and not any(path.suffix not in (".sqlite", ".sqlite-journal", ".lock", ".npz")
                                             for path in (run / "tmp").glob("*")):  # fmt: skip
        time.sleep(0.01)


@pytest.mark.parametrize("number", range(KILLS))
def test_processes_killed_at_random_times(commands: Commands, world: World, number: int) -> None:
    scenario = BY_NAME[("cache-teachers", "train", "recache")[number % 3]]
    world.after(scenario)
    chance = random.Random(number)
    victim = VICTIMS[(number + number // 3) % 3]
    run = world.fresh(scenario)
    process = start(run, scenario)
    begun(run, scenario, process)
    time.sleep(chance.random() * 2.5)
    killed = process.poll() is None and kill(process, victim)
    print(f"{scenario.name}: {victim} {'killed' if killed else 'was done'}; {len(contents(run))} files")
    process.communicate()
    look(commands, world, scenario, run)
    again = start(run, scenario)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "Traceback" not in out, out
    assert left_behind(scenario, run, world.after(scenario)) == []


@pytest.mark.vllm
@pytest.mark.skipif(not ENGINE_KILLS, reason="KDPIPE_ENGINE_KILLS says how many")
def test_textualize_with_its_engine_killed_at_random_times(world: World) -> None:
    scenario = BY_NAME["textualize"]

    def fresh() -> Path:
        run = world.fresh(scenario, "engine")
        config = run / "kdpipe.yaml"
        config.write_text(config.read_text().replace("textualize:\n", "textualize:\n" + ENGINE))
        return run

    run, began = fresh(), time.monotonic()
    process = start(run, scenario)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    span = time.monotonic() - began
    expected = trace_records(run)
    for number in range(ENGINE_KILLS):
        run = fresh()
        process = start(run, scenario)
        chance = random.Random(number)
        time.sleep(span * (0.3 + 0.7 * chance.random()))
        victim = VICTIMS[number % 3]
        killed = process.poll() is None and kill(process, victim)
        process.communicate()
        time.sleep(3)
        left = [one for one in psutil.process_iter() if "VLLM::EngineCore" in one.name() and one.cwd() == str(run)]
        assert left == [], "the engine outlived its command"
        done = start(run, scenario)
        out, _ = done.communicate(timeout=600)
        assert done.returncode == 0 and "Traceback" not in out, out
        assert trace_records(run) == expected
        print(f"textualize with vLLM: {victim} {'killed' if killed else 'was done'}")
