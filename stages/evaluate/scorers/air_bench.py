"""AIR-Bench, foundation part: the letter in the response.

Source: `score_foundation.py` of the benchmark's repository (OFA-Sys/AIR-Bench). It prints one accuracy a task and
the sum of the items counted; the score here is that of all counted items together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers.counting import Item, accuracy
from kdpipe.stages.evaluate.scorers.letters import LETTERS, letter_of


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether the response is right by AIR-Bench's script.

    Its letter (see `letters.letter_of`) must be that of the first choice that equals the answer. The script ends where
    the answer is none of the choices.

    Args:
        answer: the text of the right choice (`answer_gt`). One that is a letter, and none of the choices, stands for
            itself; the published file has none such.
        prediction: the response.
        choices: `choice_a` to `choice_d`; the empty text for one that the item lacks.
    """
    letter = letter_of(prediction)
    if letter is None:
        return False
    known = choices[: len(LETTERS)]
    return letter == (LETTERS[known.index(answer)] if answer in known else answer)


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy; officially of the items whose response holds a letter, strictly of all."""
    return accuracy(items, is_correct, lambda item: letter_of(item.prediction or "") is not None)
