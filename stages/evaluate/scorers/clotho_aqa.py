"""ClothoAQA: exact accuracy over all answers of all people.

Source: `eval_audio/evaluate_aqa.py` of QwenLM/Qwen-Audio. Each row of the benchmark is one answer of one person, and
the script compares the response with each row's answer as it stands: a question whose three answers are yes, yes, no
gives a model that says yes two of three. No majority is taken, and unanimity is not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.stages.evaluate.scorers.counting import ACCURACY, Item, share


def is_correct(answer: str | Sequence[str], prediction: str, choices: list[str]) -> bool:
    """Whether the prediction, its outer white space removed, is one of the answers; case and punctuation count.

    This is the verdict on a question as a whole. The official score counts answers instead (see `score`).

    Args:
        answer: the answer, or all answers that were given to the question.
        prediction: what the model said.
        choices: not looked at.
    """
    return prediction.strip() in _answers(answer)


def score(items: Sequence[Item]) -> dict[str, Any]:
    """The share of rows (one answer of one person) that the predictions equal; `n` counts rows.

    Officially of the questions that have a prediction, strictly of all.
    """
    right, counted, rows = 0, 0, 0
    for item in items:
        answers = _answers(item.answer)
        rows += len(answers)
        if item.prediction is not None:
            counted += len(answers)
            right += answers.count(item.prediction.strip())
    return {"measure": ACCURACY, "official": share(right, counted), "strict": share(right, rows)}


def _answers(answer: str | Sequence[str]) -> list[str]:
    return [answer] if isinstance(answer, str) else list(answer)
