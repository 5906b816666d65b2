"""MMAU (v05.15.25): sets of words.

Source: `evaluation.py` of the benchmark's repository (Sakshi113/MMAU). Items without the key that holds the prediction
are passed over; an empty prediction is counted, and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.data.answers import words_match
from kdpipe.stages.evaluate.scorers.counting import Item, accuracy


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    r"""Whether the prediction is right by MMAU's script.

    Words are the matches of `\b\w+\b` in the lower-cased text, as a set. Right iff the prediction holds a word at
    all, holds all words of the answer, and none that another choice has and the answer lacks. The text of the choice
    is expected: a letter is right only where the answer is that letter.

    Args:
        answer: the right choice.
        prediction: what the model said.
        choices: all choices, as the file has them.
    """
    return words_match(answer, prediction, choices)


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy; officially of the items that have a prediction, strictly of all."""
    return accuracy(items, is_correct)
