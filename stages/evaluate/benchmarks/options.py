"""Choices: their bare texts, and from a bare text back to what the official script compares."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdpipe.data.answers import equal
from kdpipe.stages.evaluate.scorers.letters import LETTERS

_PREFIX = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[).:])\s+(?=\S)")


def bare(choices: Sequence[str]) -> tuple[str, ...]:
    """The texts of choices without the prefixes `(A) `, `A) `, `A. ` or `A: `.

    Prefixes are taken off only where every choice has one, and their letters run from A in order. An empty text stands
    for a choice that is missing.
    """
    found = [_PREFIX.match(choice) for choice in choices]
    for place, (choice, one) in enumerate(zip(choices, found, strict=True)):
        if choice and (one is None or (one[1] or one[2]) != chr(ord("A") + place)):
            return tuple(choices)
    return tuple(choice[one.end() :] if one else "" for choice, one in zip(choices, found, strict=True))


def bare_answer(answer: str, choices: Sequence[str]) -> str:
    """The answer as one of the bare choices where it is one of the published ones."""
    return bare(choices)[choices.index(answer)] if answer in choices else answer


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Place of the one choice that the prediction is.

    It is so literally (outer white space apart), or else by `kdpipe.data.answers.equal`; as the text that the
    benchmark has, or the bare one.

    Returns:
        The place from 0; None where no choice is the prediction, or more than one.
    """
    for texts in (tuple(choices), bare(choices)):
        for same in (_literally, equal):
            places = [place for place, choice in enumerate(texts) if choice.strip() and same(prediction, choice)]
            if len(places) == 1:
                return places[0]
            if places:
                return None
    return None


def as_published(prediction: str, choices: Sequence[str]) -> str:
    """The prediction; where the choices have prefixes and it is the bare text of one, that choice with its prefix."""
    if bare(choices) == tuple(choices):
        return prediction
    place = chosen(prediction, choices)
    return prediction if place is None else choices[place]


def as_letter(prediction: str, choices: Sequence[str]) -> str:
    """The letter of the one choice that the prediction is; otherwise the prediction as it stands.

    The text of a choice wins over a letter: where the choices are the notes C, D, A and B, a prediction `A` is the
    third, and so the letter C.
    """
    place = chosen(prediction, choices)
    return prediction if place is None or place >= len(LETTERS) else LETTERS[place]


def _literally(left: str, right: str) -> bool:
    return left.strip() == right.strip()
