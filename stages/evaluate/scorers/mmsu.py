"""MMSU: the letter in the response.

Source: `mmsu_evaluation.py` of the benchmark's repository (dingdongwang/MMSU_Bench). Two things in it are not followed:
an empty response, and one that says `None`, is there judged by the letter of the record before it (or ends the script
where it is the first). Here it is one without a letter; the official file holds `null` for it, which the script passes
over, so that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers.counting import Item, accuracy
from kdpipe.stages.evaluate.scorers.letters import LETTERS, letter_of


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether the response is right by MMSU's script.

    Its letter (see `letters.letter_of`) must be that of a choice that equals the answer. Where two choices are the
    same text, either letter is right.

    Args:
        answer: the text of the right choice (`answer_gt`). One that is a letter, and none of the choices, stands for
            itself; the published file has none such.
        prediction: the response.
        choices: `choice_a` to `choice_d`; the empty text for one that the item lacks.
    """
    letter = letter_of(prediction)
    if letter is None:
        return False
    if answer not in choices:
        return answer == letter
    place = LETTERS.index(letter)
    return place < len(choices) and choices[place] == answer


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy; officially of the items whose response holds a letter, strictly of all."""
    return accuracy(items, is_correct, lambda item: letter_of(item.prediction or "") is not None)
