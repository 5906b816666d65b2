"""Training on a real store: losses fall, and neither a cut nor an interruption changes them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from kdpipe.data.errors import KdpipeError
from kdpipe.stages import interrupts
from kdpipe.stages.config import AcousticTeacherConfig, ModelConfig
from kdpipe.stages.interrupts import Interrupts
from kdpipe.stages.train import loop
from kdpipe.stages.train.data import split_by_padded_size
from kdpipe.stages.train.metrics import MetricsFile
from kdpipe.stages.train.objective import MicroBatch, Objective, Sums

from .conftest import last_checkpoint, story

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

Metrics = list[dict[str, Any]]
SETTINGS = ("SFT only", "top + SFT", "skip + SFT", "all + SFT", "all + acoustic + SFT", "hidden + acoustic top + SFT")
ALL = "all + acoustic + SFT"
TERMS = {
    "SFT only": {"sft"},
    "top + SFT": {"sft", "top"},
    "skip + SFT": {"sft", "top", "layer"},
    "all + SFT": {"sft", "top", "layer"},
    ALL: {"sft", "top", "layer", "acoustic"},
    "hidden + acoustic top + SFT": {"sft", "top", "layer", "acoustic", "acoustic_top"},
}


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.set_num_threads(2)


def _curve(metrics: Metrics) -> list[float]:
    return [line["loss"] for line in metrics]


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_ablation_learns_and_logs_its_terms(cached: Any, setting: str) -> None:
    run = cached(setting).elsewhere("learns")
    metrics = run.train(epochs=3)
    weights = dataclasses.asdict(run.config.train.weights)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1)) and len(metrics) >= 6
    assert metrics[0]["epoch"] == 1 and metrics[-1]["epoch"] == 3
    for line in metrics:
        assert set(line["terms"]) == TERMS[setting]
        assert line["loss"] == pytest.approx(sum(weights[name] * value for name, value in line["terms"].items()), 1e-5)
        assert line["tokens"] > 0 and line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1
        assert ("top" in line["sources"]) == ("top" in line["terms"])
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    if "layer" in TERMS[setting] and setting.startswith("hidden"):
        assert metrics[-1]["terms"]["layer"] < 0.8 * metrics[0]["terms"]["layer"]
    if "acoustic" in TERMS[setting]:
        assert metrics[0]["terms"]["acoustic"] < 1e-4, "the student starts as its own acoustic teacher"
    assert (run.student / "model.safetensors").exists()


def test_the_teacher_is_imitated(cached: Any) -> None:
    run = cached("top + SFT", k=10_000, logprob_dtype="float32").elsewhere("imitates")
    weights = dataclasses.replace(run.config.train.weights, top=1.0, sft=0.0)
    metrics = run.train(weights=weights, epochs=8, learning_rate=5e-4, schedule="constant")
    assert metrics[-1]["terms"]["top"] < 0.5 * metrics[0]["terms"]["top"]
    assert metrics[0]["sources"]["top"]["teacher_kept"] == pytest.approx(1.0, abs=1e-4)


def test_the_loss_does_not_depend_on_micro_batches(cached: Any) -> None:
    curves, counts = [], []
    for budget in (100_000, 150):
        run = cached(ALL).elsewhere(f"micro-{budget}", global_batch_tokens=900)
        with pytest.MonkeyPatch.context() as patch:
            sizes: list[int] = []
            true = loop.train_step

            def spy(
                objective: Any,
                weights: Any,
                optimizer: Any,
                batch: Any,
                number: int,
                world: Any,
                true=true,
                sizes=sizes,
            ):
                sizes.append(len(batch.micros))
                return true(objective, weights, optimizer, batch, number, world)

            patch.setattr(loop, "train_step", spy)
            metrics = run.train(micro_batch_tokens=budget)
        counts.append(sizes)
        curves.append([(line["loss"], line["grad_norm"], *line["terms"].values()) for line in metrics])
    assert set(counts[0]) == {1} and max(counts[1]) >= 4
    for one, many in zip(*curves, strict=True):
        assert one == pytest.approx(many, rel=1e-5, abs=1e-5)


def test_the_same_run_twice_gives_the_same_bits(cached: Any) -> None:
    first, second = (cached(ALL).elsewhere(f"twice-{name}") for name in "ab")
    assert story(first.train()) == story(second.train())
    assert (first.student / "model.safetensors").read_bytes() == (second.student / "model.safetensors").read_bytes()


def _stop_at(step: int, number: int, times: int = 1) -> pytest.MonkeyPatch:
    """Sends this process a signal when it logs a step, before the checkpoint that may follow."""
    patch = pytest.MonkeyPatch()
    append = MetricsFile.append

    def stopping(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(MetricsFile, "append", stopping)
    return patch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_run_goes_on_bit_for_bit(cached: Any, number: int) -> None:
    setting = "hidden + acoustic top + SFT"
    whole, broken = (cached(setting).elsewhere(f"{name}-{number}", checkpoint_steps=100) for name in ("whole", "cut"))
    whole.train()
    before = signal.getsignal(number)
    patch = _stop_at(2, number)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of \d+; .* Run the same command again"):
        broken.train()
    patch.undo()
    assert signal.getsignal(number) is before
    assert len(broken.metrics) == 2 and not broken.student.exists()
    assert [path.name for path in (broken.ctx.folder("train") / "checkpoints").iterdir()] == ["step-000002"]
    broken.train()
    assert "train: goes on after step 2" in broken.said
    assert story(broken.metrics) == story(whole.metrics)
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def test_a_ctrl_c_that_comes_twice_finishes_the_step(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a terminal and from the runner, which passes on what it gets."""
    run = cached("SFT only").elsewhere("ctrl-c", checkpoint_steps=100)
    monkeypatch.setattr(interrupts, "monotonic", lambda: 1.0)
    before = signal.signal(signal.SIGINT, Interrupts())
    patch = _stop_at(2, signal.SIGINT, times=2)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
            run.train()
    finally:
        patch.undo()
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (run.ctx.folder("train") / "checkpoints").iterdir()] == ["step-000002"]


def test_a_finished_run_only_exports_again(cached: Any) -> None:
    run = cached("SFT only").elsewhere("again")
    metrics = run.train()
    weights = (run.student / "model.safetensors").read_bytes()
    shutil.rmtree(run.student)
    assert len(run.plans()["train"].todo) == 8
    run.bring_up_to_date()
    assert run.metrics == metrics
    assert (run.student / "model.safetensors").read_bytes() == weights
    assert not run.plans()["train"].todo


def test_another_configuration_starts_anew_and_says_so(cached: Any) -> None:
    run = cached("SFT only").elsewhere("anew")
    run.train(max_steps=2, keep_checkpoints=1)
    run.train(learning_rate=1e-4)
    assert "train: step-000002 is of another configuration or other data: removed" in run.said
    assert run.metrics[0]["step"] == 1 and run.metrics[0]["learning_rate"] < 1e-4 + 1e-12


def test_max_steps_and_log_steps(cached: Any) -> None:
    run = cached("SFT only").elsewhere("few")
    assert [line["step"] for line in run.train(max_steps=3, log_steps=2)] == [2, 3]


def test_what_is_frozen_stays(cached: Any, family: Miniatures) -> None:
    run = cached("SFT only").elsewhere("frozen")
    run.train(freeze=("audio_tower", "embeddings", "thinker.model.layers.0."), max_steps=2)
    before, after = load_file(family.qwen2_5_omni / "model.safetensors"), load_file(run.student / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    moved = set(before) - same
    assert "thinker.audio_tower.conv1.weight" in same and "thinker.audio_tower.proj.weight" in moved
    assert "thinker.model.embed_tokens.weight" in same and "thinker.lm_head.weight" in moved
    assert all(name in same for name in before if ".visual." in name or "model.layers.0." in name)
    assert any(f"{sum(before[name].numel() for name in same):,} frozen" in line for line in run.said)


def test_gradient_checkpointing_changes_nothing(cached: Any) -> None:
    plain, thrifty = (cached(ALL).elsewhere(f"gc-{flag}", max_steps=2) for flag in (False, True))
    ours, theirs = plain.train(), thrifty.train(gradient_checkpointing=True)
    assert _curve(ours) == pytest.approx(_curve(theirs), rel=1e-6)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-5)


def test_a_student_in_bfloat16_keeps_float32_weights_while_it_trains(cached: Any) -> None:
    run = cached("SFT only").elsewhere("low")
    model = dataclasses.replace(run.config.student.model, dtype="bfloat16")
    run.config = dataclasses.replace(run.config, student=dataclasses.replace(run.config.student, model=model))
    metrics = run.train(learning_rate=1e-3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    stored = load_file(run.student / "model.safetensors")
    assert stored["thinker.lm_head.weight"].dtype == torch.bfloat16
    assert last_checkpoint(run)["weights/lm_head.weight"].dtype == torch.float32


def test_a_loss_that_is_not_finite_names_its_samples(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cached("SFT only").elsewhere("nan", checkpoint_steps=1)
    true = Objective.__call__
    seen: list[tuple[str, ...]] = []

    def poisoned(self: Objective, micro: MicroBatch, factors: dict[str, float]) -> Sums:
        sums = true(self, micro, factors)
        seen.append(micro.batch.ids)
        return dataclasses.replace(sums, loss=sums.loss * float("nan")) if len(seen) == 4 else sums

    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(KdpipeError, match=r"the loss is nan in step \d") as caught:
        run.train()
    assert f"samples {', '.join(seen[3])}." in str(caught.value)
    assert not run.student.exists() and run.metrics[-1]["step"] == 1


def test_a_damaged_store_stops_the_run_and_names_the_sample(cached: Any) -> None:
    run = cached("top + SFT", samples=3)
    row = run.ctx.ledger("cache-teachers").get("s01", "textual")
    part = run.ctx.folder("cache-teachers") / "parts" / row.part
    file = next(path for path in (part / "top" / "logprob").rglob("*") if path.is_file() and path.name != "zarr.json")
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(KdpipeError, match=r"damaged.*read for sample 's0"):
        run.elsewhere("damaged").train()


def test_micro_batches_are_packed_from_long_to_short() -> None:
    assert split_by_padded_size([5, 9, 3, 4, 20], 18) == [[4], [1, 0], [3, 2]]
    assert split_by_padded_size([], 10) == []


class _Opened:
    """Names of files that anyone opens in a folder, told by the kernel (inotify)."""

    def __init__(self, folder: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        watch = libc.inotify_add_watch(self._handle, str(folder).encode(), 0x20)
        assert self._handle >= 0 and watch >= 0

    def names(self) -> set[str]:
        found: set[str] = set()
        while True:
            try:
                data = os.read(self._handle, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                length = struct.unpack_from("iIII", data)[3]
                found.add(data[16 : 16 + length].rstrip(b"\0").decode())
                data = data[16 + length :]


def _train_in_a_process(run: Any, code: str) -> subprocess.CompletedProcess[str]:
    lines = [
        "import os, signal, torch",
        "from pathlib import Path",
        "from kdpipe.stages.config import *",
        "from kdpipe.stages.base import Context",
        "from kdpipe.stages.train.stage import STAGE",
        "from kdpipe.stages.train.metrics import MetricsFile",
        "torch.set_num_threads(2)",
        code,
        f"STAGE.run(Context({run.config!r}, Path({str(run.base)!r})), [])",
    ]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)


_KILLED = """
append = MetricsFile.append
def dying(self, line):
    append(self, line)
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.append = dying
"""


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux")
def test_killed_and_resumed_is_the_same_run_and_no_teacher_weights_are_opened(
    cached: Any, family: Miniatures, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    shutil.copytree(family.qwen2_5_omni, snapshot)
    acoustic = AcousticTeacherConfig(ModelConfig(str(snapshot), dtype="float32"))
    cache = cached(ALL, acoustic=acoustic)
    whole, broken = (cache.elsewhere(name, checkpoint_steps=2) for name in ("unkilled", "killed"))
    expected = whole.train()
    context = broken.ctx
    for folder in (snapshot, family.teacher, family.qwen2_5_omni):
        context.prints.file(folder / "model.safetensors")
    context.prints.save()

    teachers = [_Opened(snapshot), _Opened(family.teacher)]
    student = _Opened(family.qwen2_5_omni)
    process = _train_in_a_process(broken, _KILLED)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(broken.metrics) == 3 and not broken.student.exists()
    process = _train_in_a_process(broken, "")
    assert process.returncode == 0, process.stderr
    assert "train: goes on after step 2" in process.stdout
    assert story(broken.metrics) == story(expected)
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()
    assert "model.safetensors" in student.names(), "the watch works"
    for opened in teachers:
        assert not [name for name in opened.names() if name.endswith(".safetensors")]
