"""Training in several processes, as torchrun starts them: the same losses as in one, the same run after a stop."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import LoraConfig
from kdpipe.stages.train.launch import Launch, find_launch

from .conftest import Run, story

ALL = "all + acoustic + SFT"
KDPIPE = Path(sys.executable).with_name("kdpipe")


def plain(value: Any) -> Any:
    """A configuration as YAML takes it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def start(run: Run, ranks: int, *words: str, first: str = "") -> subprocess.Popen[str]:
    """torchrun with `kdpipe train` on the run's configuration; `first` is what each process executes before."""
    file = run.base / f"{Path(run.config.run.folder).name}.yaml"
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, eval_split="train"))
    file.write_text(yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False))
    program = KDPIPE
    if first:
        program = run.base / "patched.py"
        program.write_text(f"import os, time\n{first}\nfrom kdpipe.pipeline.cli import main\nmain()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*torchrun, str(program), *(words or ("train",)), "-c", str(file)],
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
    lines = [line.get("validation") or line for line in run.metrics]
    return [[line["loss"], line.get("grad_norm", 0), line.get("tokens", 0), *line["terms"].values()] for line in lines]


def stop_after(run: Run, process: subprocess.Popen[str], steps: int) -> str:
    """Sends SIGTERM to the last rank once so many steps are in the metrics; what all of them said."""
    deadline = time.monotonic() + 120
    while len(run.metrics) < steps and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "Run the same command again to go on from there." in out, out
    return out


SHARDED = {"fsdp": True}
LORA = {"lora": LoraConfig(rank=4)}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (ALL, {}),
    "sharded": (ALL, SHARDED),
    "sharded, checkpointing": (ALL, {**SHARDED, "gradient_checkpointing": True, "micro_batch_tokens": 500}),
    "sharded, projections": ("hidden + acoustic top + SFT", SHARDED),
    "sharded, LoRA": (ALL, SHARDED | LORA),
}


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in SETTINGS] + [(4, "plain"), (4, "sharded")])
def test_several_ranks_train_as_one(cached: Any, ranks: int, name: str) -> None:
    """Batches of 900 tokens hold few samples, so that some ranks have none of some."""
    setting, changes = SETTINGS[name]
    shared = {"global_batch_tokens": 900, "epochs": 9, "max_steps": 6, "validation_fraction": 0.2, "validate_steps": 3}
    one, several = (
        cached(setting).elsewhere(f"ranks-{ranks}-{name.replace(', ', '-')}-{which}", **(shared | changes))
        for which in ("one", "several")
    )
    one.train()
    out = finish(start(several, ranks))
    assert out.count("Done.") == 1 and ("(FSDP2)" in out) == ("sharded" in name)
    assert len(one.metrics) == len(several.metrics) == 6 + 2
    for a, b in zip(curve(one), curve(several), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    folder = several.ctx.folder("train")
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in one.ctx.folder("train").iterdir())
    whole, exported = (load_file(run.student / "model.safetensors") for run in (one, several))
    assert whole.keys() == exported.keys()
    for key, weight in whole.items():
        torch.testing.assert_close(exported[key], weight, rtol=1e-3, atol=2e-4)
    # What one process finds, several have made: the same student under the same key.
    assert not several.plans()["train"].todo
    assert "nothing to do" in finish(start(several, ranks))


def test_bfloat16_is_sharded_as_it_is_replicated(cached: Any, tmp_path: Path) -> None:
    """The ranks' gradients are summed in float32 in both, so that only rounding and the order of additions differ."""
    made = cached(ALL)
    shutil.copytree(made.base, tmp_path / "low")
    model = dataclasses.replace(made.config.student.model, dtype="bfloat16")
    student = dataclasses.replace(made.config.student, model=model)
    low = Run(dataclasses.replace(made.config, student=student), tmp_path / "low")
    low.bring_up_to_date(CACHE_TEACHERS)
    for lora in (None, LoraConfig(rank=4)):
        runs = [
            low.elsewhere(f"low-{lora is None}-{fsdp}", fsdp=fsdp, epochs=4, max_steps=4, lora=lora)
            for fsdp in (False, True)
        ]
        for run in runs:
            finish(start(run, 2))
        for a, b in zip(*(curve(run) for run in runs), strict=True):
            assert a == pytest.approx(b, rel=2e-3, abs=2e-3)


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(cached: Any) -> None:
    settings = {"epochs": 6, "checkpoint_steps": 1000, "fsdp": True}
    whole, cut = (cached(ALL).elsewhere(f"signal-{name}", **settings) for name in ("whole", "cut"))
    finish(start(whole, 2))
    stop_after(cut, start(cut, 2), 2)
    assert 0 < len(cut.metrics) < len(whole.metrics) and not cut.student.exists()
    assert "goes on after step" in finish(start(cut, 2))
    assert [json.dumps(row) for row in curve(cut)] == [json.dumps(row) for row in curve(whole)]
    assert (cut.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def test_a_run_goes_on_with_another_number_of_ranks(cached: Any) -> None:
    """One process, four sharded ones, two that are not, two that are, one: each goes on from the one before."""
    whole = cached(ALL).elsewhere("reshard-whole", epochs=10)
    whole.train()
    cut = cached(ALL).elsewhere("reshard-cut", epochs=10, checkpoint_steps=1000)
    for ranks, fsdp in ((1, False), (4, True), (2, False), (2, True)):
        before = len(cut.metrics)
        cut.config = dataclasses.replace(cut.config, train=dataclasses.replace(cut.config.train, fsdp=fsdp))
        out = stop_after(cut, start(cut, ranks), before + 1)
        assert (f"goes on after step {before}" in out) == (before > 0)
        assert before < len(cut.metrics) < len(whole.metrics)
    assert "goes on after step" in finish(start(cut, 1))
    assert len(cut.metrics) == len(whole.metrics)
    for a, b in zip(curve(cut), curve(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


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
    assert find_launch(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}) == Launch(3, 8, 1, "gpu7", 29500, 4)
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
    for tasks, node, here in (("8(x2)", "1", 8), ("4,12", "1", 12), ("4(x3),2(x2)", "3", 2), ("16", "", 16)):
        more = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
        found = find_launch(SLURM | more)
        assert found is not None and found.local_size == here
    assert find_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": nodes}) is None


OVERFLOW = {"learning_rate": 1e30, "epochs": 5, "checkpoint_steps": 100}


def test_a_loss_that_is_not_finite_names_the_samples_of_all_ranks_once_rank_0_is_done(cached: Any) -> None:
    """Its checkpoint takes long to finish; nobody leaves before, or the launcher would end rank 0."""
    one, several = (cached(ALL).elsewhere(f"overflow-{which}", **OVERFLOW) for which in ("one", "several"))
    with pytest.raises(KdpipeError, match="from samples") as caught:
        one.train()
    slow = """
from kdpipe.stages.train import checkpoint
move = checkpoint.move_into_place
checkpoint.move_into_place = lambda *args: (time.sleep(3), move(*args))
"""
    several.config = dataclasses.replace(several.config, train=dataclasses.replace(several.config.train, fsdp=True))
    out = finish(start(several, 2, first=slow), 1)
    (said,) = re.findall("from samples ([^.]*)", out)
    assert sorted(said.split(", ")) == sorted(re.findall("from samples ([^.]*)", str(caught.value))[0].split(", "))
    ours, theirs = (sorted(p.name for p in (r.ctx.folder("train") / "checkpoints").iterdir()) for r in (several, one))
    assert ours == theirs


def test_a_damaged_checkpoint_and_a_full_disk_are_said_once(cached: Any) -> None:
    run = cached(ALL).elsewhere("said-once", checkpoint_steps=1, epochs=9, max_steps=4, validation_fraction=0.2)
    full = """
from kdpipe.stages.train.metrics import MetricsFile
append, count = MetricsFile.append, []
def failing(self, line):
    count.append(line)
    if len(count) == 3:
        raise OSError(28, "No space left on device")
    append(self, line)
MetricsFile.append = failing
"""
    out = finish(start(run, 2, first=full), 1)
    assert out.count("metrics.jsonl cannot be written (No space left on device)") == 1 and "another process" not in out
    checkpoints = run.ctx.folder("train") / "checkpoints"
    shutil.copytree(max(checkpoints.iterdir()), checkpoints / "step-000003.bak")
    file = next(max(p for p in checkpoints.iterdir() if p.suffix != ".bak").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    out = finish(start(run, 2), 1)
    assert out.count("the checkpoint cannot be read") == 1 and "another process" not in out
    file.write_bytes(whole)
    finish(start(run, 2))
    other = cached(ALL).elsewhere("said-once-one", epochs=9, max_steps=4, validation_fraction=0.2)
    for a, b in zip(curve(run), (other.train(), curve(other))[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("kdpipe.stages.train.optimizer._norm", {}),
        ("kdpipe.stages.train.objective.Objective.idle", {"validation_fraction": 0.2, "validate_steps": 2}),
        ("kdpipe.stages.train.checkpoint.dcp.load", {}),
    ],
)
def test_a_rank_that_is_killed_is_told_of_and_the_run_goes_on(cached: Any, where: str, changes: dict[str, Any]) -> None:
    """Started by hand, as under Slurm: nobody ends the other one."""
    name = where.rsplit(".", 1)[1]
    settings = {"fsdp": True, "epochs": 9, "max_steps": 4, "checkpoint_steps": 1, **changes}
    run, whole = (cached(ALL).elsewhere(f"killed-{name}-{which}", **settings) for which in ("run", "whole"))
    if name == "load":
        stop_after(run, start(run, 2), 2)
    owner, _, function = where.rpartition(".")
    kill = f"""
import importlib, signal
place, names = {owner!r}, []
while True:
    try:
        owner = importlib.import_module(place)
        break
    except ImportError:
        place, _, last = place.rpartition(".")
        names.insert(0, last)
for last in names:
    owner = getattr(owner, last)
real, calls = getattr(owner, {function!r}), []
def killing(*args, **kwargs):
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) == {1 if name == "load" else 2}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, {function!r}, killing)
"""
    file, port = run.base / f"{Path(run.config.run.folder).name}.yaml", _free_port()
    finish(start(run, 1, "status", first=kill), 1)  # writes the files
    processes = [
        subprocess.Popen(
            [sys.executable, str(run.base / "patched.py"), "train", "-c", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL, outs
    assert processes[0].returncode == 2 and "another process ended or does not answer" in outs[0], outs[0]
    assert "Traceback" not in outs[0] and "Remove" not in outs[0]
    for one in (run, whole):
        finish(start(one, 2))
    assert story(run.metrics) == story(whole.metrics)
    assert (run.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])
