"""Gradient checkpointing and compilation: the same loss as without."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from kdpipe.stages.train import run as module
from kdpipe.stages.train.speed import set_speed

ALL = "all + acoustic + SFT"


def _curves(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics]


def test_one_layer_of_so_many_is_recomputed_and_nothing_changes(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cached(ALL).elsewhere("kept", max_steps=2).train()
    chosen: list[list[bool]] = []

    def watched(student: Any, config: Any) -> None:
        set_speed(student, config)
        chosen.append([layer.gradient_checkpointing for layer in student.layers])

    monkeypatch.setattr(module, "set_speed", watched)
    for every in (1, 2, 3):
        run = cached(ALL).elsewhere(f"every-{every}", max_steps=2)
        metrics = run.train(gradient_checkpointing=True, checkpoint_every=every)
        for (loss, norm), (ours, own) in zip(_curves(plain), _curves(metrics), strict=True):
            assert ours == pytest.approx(loss, rel=1e-6) and own == pytest.approx(norm, rel=1e-5)
    assert chosen == [[True] * 4, [True, False, True, False], [True, False, False, True]]


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for inductor"
)
def test_compiled_layers_give_the_same_loss(cached: Any) -> None:
    """Batches of several shapes, captured layers and recomputation included."""
    plain = cached(ALL).elsewhere("eager", max_steps=2).train()
    torch._dynamo.reset()
    run = cached(ALL).elsewhere("compiled", max_steps=2)
    metrics = run.train(compile=True, gradient_checkpointing=True)
    for (loss, norm), (ours, own) in zip(_curves(plain), _curves(metrics), strict=True):
        assert ours == pytest.approx(loss, rel=1e-5) and own == pytest.approx(norm, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert (run.student / "model.safetensors").exists()
