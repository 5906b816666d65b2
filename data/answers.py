"""When an answer counts as right: one rule for filtering candidates and for evaluation.

With choices it is the rule of MMAU (v05.15.25), over the sets of words of the lower-cased texts; free-form answers
have no wrong choices to rule out, so there the word sequences must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\b\w+\b")


def normalize(text: str) -> str:
    """The words of `text`, lower-cased and joined by single spaces: case, punctuation and spacing drop out.

    Args:
        text: any text.

    Returns:
        The normalized text; empty when `text` holds no word character.
    """
    return " ".join(_words(text))


def equal(left: str, right: str) -> bool:
    """Whether two texts are the same answer: equal after `normalize`.

    Texts without a single word character (`+`, `♯`) normalize to nothing; those are compared as they stand.

    Args:
        left: one answer.
        right: the other.

    Returns:
        True when both say the same; never for empty texts.
    """
    words = normalize(left)
    if words or normalize(right):
        return words == normalize(right)
    return bool(left.strip()) and left.strip() == right.strip()


def is_choice(answer: str, choices: Sequence[str]) -> bool:
    """Whether `answer` is one of `choices`, compared by `equal`."""
    return any(equal(answer, choice) for choice in choices)


def words_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """MMAU's rule as its script applies it, whatever it is given.

    With W(x) the set of words of x: right iff W(prediction) is not empty, W(answer) is a subset of W(prediction), and
    W(prediction) shares no word with W(choice) - W(answer) for any choice. So an answer without a single word (`+`)
    takes any words that no choice claims, and without choices any text that holds the answer's words is right;
    `matches` mends both.

    Args:
        answer: the right answer.
        prediction: what a model said.
        choices: the choices of the question.

    Returns:
        True when the prediction is right.
    """
    answer_words, predicted = set(_words(answer)), set(_words(prediction))
    wrong = {word for choice in choices for word in _words(choice)} - answer_words
    return bool(predicted) and answer_words <= predicted and predicted.isdisjoint(wrong)


def matches(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether `prediction` gives `answer`.

    With choices, MMAU's rule (`words_match`). Without choices, and for an answer that holds no word at all, the two
    must be `equal`.

    Args:
        answer: the right answer.
        prediction: what a model said; the bare answer, its trace removed.
        choices: the choices of the question, the right one among them; empty for a free-form question.

    Returns:
        True when the prediction is right.
    """
    if not choices or not _words(answer):
        return equal(answer, prediction)
    return words_match(answer, prediction, choices)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
