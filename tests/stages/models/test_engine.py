"""Driving items through an engine, the reaper of its processes, and vLLM itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.stages.config import EngineConfig, ModelConfig
from kdpipe.stages.models import reaper
from kdpipe.stages.models.drive import drive
from kdpipe.stages.models.engine import Completion, Engine, Output, Request, Sampling, open_engine, seed_of
from kdpipe.stages.models.folder import ModelFolder, resolve

REQUEST = Request("prompt", Sampling(4))


class FakeEngine:
    """Finishes the newest half of its requests at each step; refuses prompts that say so."""

    capacity = 4

    def __init__(self):
        self.waiting: dict[str, Request] = {}
        self.most = 0
        self.count = 0

    def submit(self, request: Request) -> str:
        if request.prompt == "refuse":
            raise Rejected("too_long", "no")
        self.count += 1
        self.waiting[str(self.count)] = request
        self.most = max(self.most, len(self.waiting))
        return str(self.count)

    def step(self) -> list[tuple[str, Completion | Rejected]]:
        done = list(self.waiting)[len(self.waiting) // 2 :]
        results: list[tuple[str, Completion | Rejected]] = []
        for name in done:
            request = self.waiting.pop(name)
            broken = request.prompt == "break"
            output = Output(request.prompt, "stop", 1)
            results.append((name, Rejected("engine_refused", "no") if broken else Completion(1, (output,))))
        return results


def as_engine(fake: FakeEngine) -> Engine:
    engine: Any = fake
    return engine


def test_drive_takes_each_item_through_its_requests_and_keeps_the_engine_full():
    fake = FakeEngine()
    steps: dict[int, list[str | None]] = {n: [] for n in range(20)}
    threads = set()

    def advance(item: int, completion: Completion | None) -> Request | None:
        steps[item].append(None if completion is None else completion.outputs[0].text)
        asked = len(steps[item])
        return Request(f"{item}-{asked}", Sampling(4)) if asked <= item % 3 else None

    def prepare(item: int) -> None:
        threads.add(threading.current_thread().name)

    drive(as_engine(fake), range(20), prepare=prepare, advance=advance, reject=pytest.fail)
    assert steps == {n: [None, *(f"{n}-{asked}" for asked in range(1, n % 3 + 1))] for n in range(20)}
    assert fake.most == fake.capacity
    assert all(name.startswith("kdpipe-decode") for name in threads)


def test_drive_rejects_one_by_one():
    rejected = {}
    done = []

    def prepare(item: str) -> None:
        if item == "bad clip":
            raise Rejected("audio_silent", "silent")

    def advance(item: str, completion: Completion | None) -> Request | None:
        if completion is None:
            return Request(item, Sampling(4))
        if item == "bad answer":
            raise Rejected("trace_malformed", "no")
        done.append(item)
        return None

    items = ["bad clip", "refuse", "fine", "break", "bad answer", "fine too"]
    drive(
        as_engine(FakeEngine()),
        items,
        prepare=prepare,
        advance=advance,
        reject=lambda item, reason: rejected.update({item: reason.reason}),
    )
    assert sorted(done) == ["fine", "fine too"]
    assert rejected == {
        "bad clip": "audio_silent",
        "refuse": "too_long",
        "break": "engine_refused",
        "bad answer": "trace_malformed",
    }


def test_drive_needs_no_engine_for_items_that_ask_for_nothing():
    seen = []
    drive(None, range(50), prepare=lambda item: None, advance=lambda item, _: seen.append(item), reject=pytest.fail)
    assert seen == list(range(50))


def test_drive_prepares_a_bounded_distance_ahead_and_passes_errors_on():
    prepared, most = [], []
    engine = FakeEngine()

    def advance(item: int, completion: Completion | None) -> Request | None:
        most.append(len(prepared) - item)
        if item == 60:
            raise ZeroDivisionError
        return REQUEST if completion is None else None

    with pytest.raises(ZeroDivisionError):
        drive(as_engine(engine), range(100), prepare=prepared.append, advance=advance, reject=pytest.fail)
    assert max(most) <= 2 * 16
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdpipe-decode")]


def test_seeds_differ_by_sample_and_purpose_and_stay():
    seeds = {seed_of(seed, name, what) for seed in (0, 1) for name in ("a", "b") for what in ("describe", "trace")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a") == seed_of(0, "a")


def test_the_reaper_ends_what_a_killed_process_leaves(tmp_path):
    code = f"""
import os, subprocess, sys, time
from importlib.metadata import entry_points
from pathlib import Path
from kdpipe.stages.models import reaper
reaper.watch("mark-of-this-test")
os.environ[reaper.MARK] = "mark-of-this-test"
orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({str(tmp_path / "pid")!r}).write_text(str(orphan.pid))
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    file = tmp_path / "pid"
    assert until(lambda: file.exists() and file.read_text() != "")
    orphan = psutil.Process(int(file.read_text()))
    watchers = [child for child in psutil.Process(parent.pid).children() if child != orphan]
    assert len(watchers) == 1
    assert until(lambda: reaper.MARK in orphan.environ())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs([orphan, *watchers], timeout=30)
    assert not alive


def test_the_reaper_spares_other_marks():
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, reaper.MARK: "x"}
    )
    try:
        reaper.end("y", seconds=1)
        assert other.poll() is None
        reaper.end("x")
        assert not psutil.pid_exists(other.pid)
    finally:
        other.kill()


def until(condition: Any, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def folder_of(path: Path) -> ModelFolder:
    return resolve(ModelConfig(str(path), dtype="float32"), Path("/"))


def test_an_engine_that_cannot_start_says_so(family):
    # Longer than the model's positions: vLLM refuses before it starts a process.
    config = EngineConfig(max_model_len=1 << 20, enforce_eager=True, cpu_kv_cache_gib=1)
    with (
        pytest.raises(KdpipeError, match="vLLM could not start the model"),
        open_engine(folder_of(family.teacher), config, clips=0, seed=0),
    ):
        pass
    assert reaper.MARK not in os.environ


@pytest.mark.vllm
def test_vllm_serves_refuses_and_ends(family):
    config = EngineConfig(max_model_len=1000, max_num_seqs=8, enforce_eager=True, cpu_kv_cache_gib=1)
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, frames).astype(np.float32) for frames in (16_000, 24_000, 480_001)]
    pattern = TraceSchema(("PLANNING",)).regex(max_chars_per_section=12, response=["odd", "even"])
    sampled = Sampling(200, 0.9, n=3, seed=5, regex=pattern)
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(ZeroDivisionError),
        open_engine(folder_of(family.qwen2_audio), config, clips=2, seed=0) as engine,
    ):
        encoder = engine.encoder
        one, two = (encoder.prompt_text("How many tones?", clips=clips) for clips in (1, 2))

        def finish(count: int) -> dict[str, Any]:
            done: dict[str, Any] = {}
            while len(done) < count:
                done |= dict(engine.step())
            return done

        refused = [
            (Request(one, Sampling(4), clips[2:]), "audio_too_long"),
            (Request(encoder.prompt_text("tone " * 2000, clips=1), Sampling(4), clips[:1]), "too_long"),
        ]
        for request, reason in refused:
            with pytest.raises(Rejected) as caught:
                engine.submit(request)
            assert caught.value.reason == reason
        malformed = engine.submit(Request(one, Sampling(4, regex="("), clips[:1]))
        assert finish(1)[malformed].reason == "engine_refused"

        # The first clip was part of a refused request, so the sender must not take the engine to know it.
        greedy = engine.submit(Request(one, Sampling(8), clips[:1]))
        both = engine.submit(Request(two, Sampling(8), clips[:2]))
        drawn = engine.submit(Request(one, sampled, clips[:1]))
        done = finish(3)
        assert done[greedy].prompt_tokens == len(encoder.prompt_ids(one, [16_000]))
        assert done[both].prompt_tokens == len(encoder.prompt_ids(two, [16_000, 24_000]))
        assert len(done[drawn].outputs) == 3
        assert len({output.text for output in done[drawn].outputs}) > 1
        for output in done[drawn].outputs:
            assert output.finish_reason == "stop"
            assert TraceSchema(("PLANNING",)).parse(output.text).response in ("odd", "even")

        again = [engine.submit(Request(one, sampled, clips[:1])), engine.submit(Request(one, Sampling(8), clips[:1]))]
        repeated = finish(2)
        assert repeated[again[0]] == done[drawn]
        assert repeated[again[1]].outputs[0].text == done[greedy].outputs[0].text
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) >= 2
        raise ZeroDivisionError
    left = [child for child in started if is_alive(child)]
    assert not left


def is_alive(process: psutil.Process) -> bool:
    """Whether a process of the engine still runs; Python's resource tracker is none of it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("supported", [True, False])
def test_vllms_processes_ask_for_amx_where_there_is_any(supported: bool, monkeypatch: pytest.MonkeyPatch):
    """Without it a worker in bfloat16 died of an illegal instruction in two of three starts, on a Xeon that has AMX."""
    import torch

    (entry,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "kdpipe")
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    entry.load()()
    assert asked == [True] * supported
