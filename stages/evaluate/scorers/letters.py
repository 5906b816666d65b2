"""How the scripts of AIR-Bench and MMSU read a letter out of a response; both do it in the same way."""

from __future__ import annotations

LETTERS = "ABCD"
"""The letters that the scripts know; a fifth choice cannot be chosen."""


def letter_of(response: str) -> str | None:
    """The letter that a response chooses.

    Outer white space and all line ends are removed. Then the first character if it is one of A to D, or else the last
    but one, as in `The answer is A.` Only capitals count. So `Car` chooses C, `(A)` chooses A, and `B` with two marks
    behind it chooses nothing.

    Returns:
        The letter; None for a response that chooses nothing, the empty one and `None` among them.
    """
    text = response.strip().replace("\n", "")
    if not text or text == "None":
        return None
    if text[0] in LETTERS:
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in LETTERS else None
