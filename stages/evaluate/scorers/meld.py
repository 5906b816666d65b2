"""MELD in the form of Qwen-Audio: exact accuracy.

Source: `eval_audio/evaluate_emotion.py` of QwenLM/Qwen-Audio, which compares the stripped output with `gt` as they
stand; case and punctuation count. Every item has a response there, an empty one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers.counting import Item, accuracy


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether the prediction, its outer white space removed, is the label.

    Args:
        answer: the label (`gt`).
        prediction: what the model said.
        choices: not looked at.
    """
    return prediction.strip() == answer


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy; officially of the items that have a prediction, strictly of all."""
    return accuracy(items, is_correct)
