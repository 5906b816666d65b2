"""Training in several processes, as torchrun starts them: the same losses as in one, the same run after a stop."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.launch import Launch, find_launch

from .conftest import Run

ALL = "all + acoustic + SFT"
KDPIPE = Path(sys.executable).with_name("kdpipe")


def plain(value: Any) -> Any:
    """A configuration as YAML takes it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def start(run: Run, ranks: int, *words: str) -> subprocess.Popen[str]:
    """torchrun with `kdpipe train` on the run's configuration."""
    file = run.base / f"{Path(run.config.run.folder).name}.yaml"
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, eval_split="train"))
    file.write_text(yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*torchrun, str(KDPIPE), *(words or ("train",)), "-c", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def curve(run: Run) -> list[list[float]]:
    return [[line["loss"], line["grad_norm"], line["tokens"], *line["terms"].values()] for line in run.metrics]


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_train_as_one(cached: Any, ranks: int) -> None:
    """Batches of 900 tokens hold few samples, so that some ranks have none of some."""
    settings = {"global_batch_tokens": 900, "epochs": 4, "max_steps": 6}
    one, several = (cached(ALL).elsewhere(f"ranks-{ranks}-{name}", **settings) for name in ("one", "several"))
    one.train()
    out = finish(start(several, ranks))
    assert out.count("Done.") == 1
    assert len(one.metrics) == len(several.metrics) == 6
    for a, b in zip(curve(one), curve(several), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    # What one process finds, several have made: the same student under the same key.
    assert not several.plans()["train"].todo
    assert "nothing to do" in finish(start(several, ranks))


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(cached: Any) -> None:
    settings = {"epochs": 6, "checkpoint_steps": 1000}
    whole, cut = (cached(ALL).elsewhere(f"signal-{name}", **settings) for name in ("whole", "cut"))
    finish(start(whole, 2))
    process = start(cut, 2)
    file = cut.ctx.folder("train") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(cut.metrics if file.exists() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "Run the same command again to go on from there." in out, out
    assert 0 < len(cut.metrics) < len(whole.metrics) and not cut.student.exists()
    assert "goes on after step" in finish(start(cut, 2))
    assert [json.dumps(row) for row in curve(cut)] == [json.dumps(row) for row in curve(whole)]
    assert (cut.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def test_what_is_upstream_is_refused_once_and_in_words(cached: Any) -> None:
    made = cached(ALL)
    run = Run(dataclasses.replace(made.config, run=dataclasses.replace(made.config.run, folder="nothing")), made.base)
    out = finish(start(run, 2), 1)
    assert out.count("it does not run in several processes") == 1 and "Run `kdpipe textualize` first, by itself" in out
    out = finish(start(run, 2, "cache-teachers"), 1)
    assert out.count("Error: kdpipe cache-teachers: started as one of 2 processes") == 1


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
}


def test_torchrun_says_where_a_process_stands() -> None:
    assert find_launch({}) is None
    assert find_launch(TORCHRUN) == Launch(3, 8, 1, "gpu7", 29500)
    for gone in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(KdpipeError, match=f"{gone}: not set as torchrun sets it"):
            find_launch({name: value for name, value in TORCHRUN.items() if name != gone})
    assert find_launch(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None, "the only one is alone"
    assert find_launch({"WORLD_SIZE": "1", "RANK": "0"}) is None, "as some clusters say of every job"
    with pytest.raises(KdpipeError, match="rank 8 of 8 processes"):
        find_launch(TORCHRUN | {"RANK": "8"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("gpu[07-09,12],big1", "gpu07"), ("r1-n[3,5]-ib", "r1-n3-ib")],
)
def test_slurm_says_where_a_process_stands(nodes: str, host: str) -> None:
    found = find_launch(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == Launch(5, 16, 1, host, 20_863)
    assert find_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": nodes}) is None
