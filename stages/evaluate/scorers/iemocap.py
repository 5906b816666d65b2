"""IEMOCAP, session 5: unweighted accuracy.

No script is official; papers report the mean over the classes of each class's recall (`balanced_accuracy_score` of
scikit-learn). Labels are compared as MELD's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers import meld
from kdpipe.stages.evaluate.scorers.counting import UNWEIGHTED, Item, mean_recall


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether the prediction, its outer white space removed, is the label; see `meld.is_correct`."""
    return meld.is_correct(answer, prediction, choices)


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Mean recall over the classes; officially of the items that have a prediction, strictly of all."""
    entries = {}
    for name, chosen in (("official", [one for one in items if one.prediction is not None]), ("strict", items)):
        verdicts = [(str(one.answer), is_correct(str(one.answer), one.prediction or "", [])) for one in chosen]
        entries[name] = {"score": mean_recall(verdicts), "n": len(verdicts)}
    return {"measure": UNWEIGHTED, **entries}
