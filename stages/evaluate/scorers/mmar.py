"""MMAR: MMAU's rule.

Source: `code/evaluation.py` of the benchmark's repository (ddlBoJack/MMAR), which took its matcher from MMAU as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers import mmau
from kdpipe.stages.evaluate.scorers.counting import Item


def is_correct(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether the prediction is right by MMAR's script; see `mmau.is_correct`."""
    return mmau.is_correct(answer, prediction, choices)


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy; officially of the items that have a prediction, strictly of all."""
    return mmau.score(items)
