"""Packed sequences give what padded ones give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.models.packing import pack, split_by_size

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

ALL = "all + acoustic + SFT"


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen2_audio"])
def test_states_and_gradients_are_those_of_padded_sequences(family: Miniatures, name: str) -> None:
    folder = resolve(ModelConfig(str(getattr(family, name)), dtype="float32"), family.teacher.parent)
    encoder, rng = Encoder(folder), np.random.default_rng(0)
    examples = []
    for place, (seconds, response) in enumerate(((0.7, 20), (2.5, 90), (1.5, 55))):
        clip = rng.normal(size=int(seconds * encoder.rate)).astype(np.float32) * 0.1
        prompt = encoder.prompt_ids(encoder.prompt_text("How many?", clips=1), [len(clip)])
        examples.append(Example(str(place), prompt, list(range(5, 5 + response)), encoder.features([clip])))
    padded = encoder.collate(examples)
    packed = pack(padded, folder.family)
    assert packed.lengths == padded.lengths == [example.length for example in examples]
    assert packed.input_ids.shape == (1, sum(packed.lengths))
    model = load_model(folder, device="cpu", train=True)
    made = []
    for batch in (padded, packed):
        model.model.zero_grad(set_to_none=True)
        with model.capture([2], batch.audio_rows) as heard:
            last = model.hidden(batch).flatten(0, 1)[batch.response_rows]
        # Not squares: those of normalized states are nearly constant, and their gradient is a rounding error.
        generator = torch.Generator().manual_seed(0)
        sums = [(states * torch.randn(states.shape, generator=generator)).sum() for states in (last, heard[2])]
        torch.stack(sums).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
        made.append((last.detach(), heard[2].detach(), gradients))
    for ours, theirs in zip(made[0][:2], made[1][:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for key, value in made[0][2].items():
        assert float((value - made[1][2][key]).norm()) <= 1e-5 * float(value.norm()) + 1e-9, key


@pytest.mark.parametrize("student", ["qwen2_5_omni", "qwen2_audio"])
def test_the_loss_is_that_of_padded_micro_batches(cached: Any, student: str) -> None:
    setting = ALL if student == "qwen2_5_omni" else "SFT only"
    padded, packed = (cached(setting, student=student).elsewhere(f"packing-{flag}", max_steps=2) for flag in (0, 1))
    ours, theirs = padded.train(), packed.train(packing=True, gradient_checkpointing=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["tokens"] == other["tokens"]


def test_groups_fill_the_budget() -> None:
    assert split_by_size([5, 9, 3, 4, 20], 13) == [[4], [1, 3], [0, 2]]
    assert split_by_size([], 10) == []
