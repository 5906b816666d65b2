"""Training on a real store: losses fall, and no cut or interruption changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
SETTINGS = ["SFT only", "top + SFT", "skip + SFT", "all + SFT", "all + acoustic + SFT", "hidden + acoustic top + SFT"]

@pytest.mark.parametrize("setting", SETTINGS)
def test_each_ablation_learns(cached, setting: str) -> None:
    torch.set_num_threads(2)
    run = cached(setting).elsewhere("learns")
    metrics = run.train(epochs=3)
    print([ (m["loss"], m["terms"], m["seconds"], m["data_wait"], m["tokens"]) for m in metrics])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
