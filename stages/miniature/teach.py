"""Teaches the miniatures: a textual teacher that reasons well, and a base student that hears well but reasons little.

Both learn from freshly sampled scenes whose tone sequences never occur in the test split. The student first learns to
name the tone in each 40 ms frame through encoder and projection, without which next-token training stays on a plateau
for minutes.

Shapes: B samples, T tokens, F mel frames, M mel bins, N audio tokens of all samples in a row, H width, C frame classes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.miniature import models, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[str], None]
IGNORED = -100
FRAME_SECONDS = 0.04
"""Seconds that an audio token covers."""


@dataclass(frozen=True)
class _Lesson:
    """Token ids of a prompt and of the response to it, and which clip is heard with them."""

    prompt: list[int]
    response: list[int]
    clip: int = -1


def teach_textual_teacher(
    folder: Path, *, seed: int, report: Report, steps: int = 250, batch: int = 32, rate: float = 2e-3
) -> dict[str, float]:
    """Trains the Qwen3 miniature in `folder` on description and question to trace and answer.

    Args:
        folder: A model of `make_qwen3`; its weights are replaced.
        seed: Seed of scenes and order.
        report: Receives lines on the progress.
        steps: Optimizer steps.
        batch: Samples a step, all of them new.
        rate: Peak learning rate.

    Returns:
        `accuracy` of the answers to 200 held-out questions under greedy decoding.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng([seed, 0])

    def prompt(scene: world.Scene, question: world.Question) -> str:
        return _chat(tokenizer, _teacher_text(scene, question))

    def lessons() -> Iterator[list[_Lesson]]:
        while True:
            pairs = [world.sample_question(rng, held_out=False) for _ in range(batch)]
            yield [_lesson(tokenizer, prompt(*pair), world.trace(*pair)) for pair in pairs]

    stream = lessons()
    _train(model, lambda: _loss(model, _collate(next(stream), tokenizer)), steps, rate, report, "teacher")
    _save(model, folder)
    exam = [world.sample_question(np.random.default_rng([seed, 1, index]), held_out=True) for index in range(200)]
    texts = _generate(model, tokenizer, [{"text": prompt(*pair)} for pair in exam])
    return {"accuracy": _accuracy(texts, [question.answer for _, question in exam])}
