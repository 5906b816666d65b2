"""Training on a GPU: the losses of a CPU, the same bits each time, and FSDP2 over NCCL."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import LoraConfig
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train import loop
from kdpipe.stages.train.metrics import MetricsFile
from kdpipe.stages.train.objective import Objective
from kdpipe.stages.train.optimizer import Optimizer
from kdpipe.stages.train.sharding import shard
from kdpipe.stages.train.terms import resolve_terms
from kdpipe.stages.train.world import World

from .conftest import SETTINGS, Run, ready, story

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ALL = "all + acoustic + SFT"


def assert_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float) -> None:
    assert len(ours) == len(theirs) >= 3
    for a, b in zip(ours, theirs, strict=True):
        assert a["terms"] == pytest.approx(b["terms"], rel=rel, abs=1e-5)
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=rel)


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_are_those_of_a_cpu(cached: Any, setting: str) -> None:
    """From one cache, made on a CPU; all terms also from what the teachers say on the GPU."""
    expected = cached(setting).elsewhere("cpu").train()
    on_gpu = cached(setting).elsewhere("gpu", device="cuda")
    assert_alike(on_gpu.train(), expected, 5e-4)
    assert "form triton" in "\n".join(on_gpu.said)
    if setting == ALL:
        assert_alike(cached(setting, device="cuda").elsewhere("all-gpu", device="cuda").train(), expected, 5e-4)


@pytest.mark.parametrize("form", ["chunked", "in_forward", "reference"])
def test_every_form(cached: Any, form: str) -> None:
    expected = cached(ALL).elsewhere("triton", device="cuda").train()
    assert_alike(cached(ALL).elsewhere(form, device="cuda", head_form=form).train(), expected, 5e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True},
        {"gradient_checkpointing": True},
        {"compile": True},
        {"micro_batch_tokens": 100},
    ],
    ids=str,
)
def test_choices_that_change_nothing(cached: Any, changes: dict[str, Any]) -> None:
    expected = cached(ALL).elsewhere("usual", device="cuda").train()
    name = "-".join(changes)
    assert_alike(cached(ALL).elsewhere(f"changed-{name}", device="cuda", **changes).train(), expected, 5e-4)


def test_lora(cached: Any) -> None:
    changes = {"lora": LoraConfig(rank=4)}
    expected = cached(ALL).elsewhere("lora-cpu", **changes).train()
    assert_alike(cached(ALL).elsewhere("lora-gpu", device="cuda", **changes).train(), expected, 5e-4)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_broke_off_goes_on_bit_for_bit(
    cached: Any, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With teachers on the GPU too, in the student's precision."""
    shared = cached(ALL)
    shutil.copytree(shared.base, tmp_path / "run")
    config = shared.config
    student = replace(config.student, model=replace(config.student.model, dtype=dtype))
    cache = Run(replace(config, student=student, teachers=replace(config.teachers, device="cuda")), tmp_path / "run")
    cache.bring_up_to_date(TEXTUALIZE, CACHE_TEACHERS)
    whole, broken = (cache.elsewhere(name, device="cuda", checkpoint_steps=2) for name in ("whole", "broken"))
    expected = whole.train()
    append = MetricsFile.append

    def breaking(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 3:
            raise _Stopped

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", breaking)
        with pytest.raises(_Stopped):
            broken.train()
    assert story(broken.train()) == story(expected)
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert getattr(torch, dtype) in {weight.dtype for weight in theirs.values()}


def test_sharded_by_fsdp2_over_nccl(cached: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One rank, as there is one GPU: hooks, mixed precision and the collectives of CUDA."""
    run = cached(ALL).elsewhere("nccl", device="cuda")
    needs = requirements(run.ctx)
    given = ready(run, monkeypatch)
    items = list(given["stream"])
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        curves = []
        for sharded in (False, True):
            student = load_model(needs.student, device="cpu" if sharded else "cuda", train=True)
            student.model.requires_grad_(True)
            for name, parameter in student.model.named_parameters():
                if name.startswith("visual."):
                    parameter.requires_grad_(False)
            world = World(0, 1, torch.device("cuda"))
            if sharded:
                shard(student, world)
            trained = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
            assert all(p.is_cuda for p in trained.values())
            objective = Objective(
                student, resolve_terms(run.ctx.config, needs), teacher=needs.textual, alignment=needs.alignment, seed=0
            )
            optimizer = Optimizer(trained, {}, run.config.train, len(items))
            steps = []
            for number, item in enumerate(items):
                batch = given["reader"].load(item)
                step = loop.train_step(objective, given["weights"], optimizer, batch, number, world)
                batch.release()
                steps.append((step.loss, step.grad_norm))
            curves.append(steps)
        for a, b in zip(*curves, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    finally:
        dist.destroy_process_group()
